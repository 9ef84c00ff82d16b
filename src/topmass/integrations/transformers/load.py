"""Load a model by name for the command line: clear errors, checked weights, and a hash that names them."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch

from topmass.errors import ConfigError, DataError, UnsupportedModelError
from topmass.integrations.transformers.reference import load_reference

__all__ = ["check_finite", "describe_device", "load_model", "load_tokenizer", "weights_hash"]


def load_model(name: str, *, dtype: str | torch.dtype | None = None, device: str = "auto") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in eval mode.

    Args:
        name: `reference` (the checkpoint that ships with the package), a directory, or a hub id.
        dtype: A torch dtype or its name; `None` means float32 on a CPU and the checkpoint's own elsewhere.
        device: `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: The device or the dtype does not exist.
        DataError: There is no such model, or its files or weights are damaged.
        UnsupportedModelError: transformers knows no causal language model of that architecture.
    """
    where = _device(device)
    kind = _dtype(dtype, where)
    if name == "reference":
        model, tokenizer = load_reference(dtype=kind, device=where)
    else:
        _check_path(name)
        model, tokenizer = _pretrained(name, kind)
        if not getattr(model, "hf_quantizer", None):
            model = model.to(where)
    check_finite(model)
    return model.eval(), tokenizer


def check_finite(model: torch.nn.Module) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        DataError: Names the first such tensor.
    """
    for name, tensor in model.state_dict().items():
        # the sum is not finite if any element is not, and is cheap; finite values may overflow it, so look closer then
        suspect = tensor.is_floating_point() and not bool(tensor.sum(dtype=torch.float32).isfinite())
        if suspect and not bool(tensor.isfinite().all()):
            raise DataError(f"The weights hold NaN or infinity (first in {name}); get the checkpoint again.")


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all weights, whatever the files and the device they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()


def describe_device(model: torch.nn.Module) -> str:
    """Device and type of the weights, in words."""
    first = next(model.parameters())
    kind = str(first.dtype).removeprefix("torch.")
    if first.device.type == "cuda":
        return f"{torch.cuda.get_device_name(first.device)}, {kind}"
    return f"{first.device.type}, {kind}, {torch.get_num_threads()} threads"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if _has_cuda() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"The device {name!r} cannot be used ({reason}); `topmass doctor` lists those that can."
        ) from error
    return device


def _has_cuda() -> bool:
    # torch explains a GPU that it cannot use, because of an old driver for example, in a warning of many words
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if told and not found:
        reason = str(told[0].message).partition(". ")[0].partition(" (Triggered")[0].rstrip(".")
        warnings.warn(f"The GPU is not used ({reason}); update its driver or torch, or choose a device.", stacklevel=4)
    return found


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | None:
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ConfigError(f"{dtype!r} is no floating-point dtype of torch; try float32 or bfloat16.")
        return found
    return torch.float32 if dtype is None and device.type == "cpu" else dtype


def _check_path(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"{name} has no config.json, so it is not a checkpoint; give the directory that holds it.")
    elif path.exists():
        raise DataError(f"{name} is a file; give the directory of the checkpoint.")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DataError(f"There is no model at {name}; give a directory, a hub id, or `reference`.")


def _pretrained(name: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    import transformers

    kind = "auto" if dtype is None else dtype
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = load_tokenizer(name)
        auto: Any = transformers.AutoModelForCausalLM
        if type(config) not in auto._model_mapping:
            auto = transformers.AutoModelForImageTextToText
        return auto.from_pretrained(name, dtype=kind), tokenizer
    except (DataError, UnsupportedModelError):
        raise
    except ValueError as error:
        raise UnsupportedModelError(f"transformers cannot load {name}: {_first_line(error)}") from error
    except Exception as error:  # the ways in which a download or a file can fail are not one family
        if Path(name).is_dir():
            raise DataError(f"The checkpoint {name} cannot be read ({_first_line(error)}); get it again.") from error
        raise DataError(
            f"{name} is no directory, and the hub gives no such model ({_first_line(error)}); check the name and the "
            "network, or use `reference`."
        ) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model: a directory, or a hub id.

    Raises:
        DataError: There is none that tells texts apart.
    """
    import transformers

    missing = DataError(
        f"{name} has no tokenizer that transformers can read; put tokenizer.json beside its config.json."
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except ValueError as error:
        if "backend tokenizer" in str(error):
            raise missing from error
        raise
    # where its files are missing, some families get one without a vocabulary, to which all texts are alike
    one, two = tokenizer(["one", "two"], add_special_tokens=False)["input_ids"]
    if one == two:
        raise missing
    return tokenizer


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
