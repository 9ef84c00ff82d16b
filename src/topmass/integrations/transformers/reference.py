"""The small trained hybrid model that ships with the package."""

from pathlib import Path
from typing import Any

import torch

from topmass.errors import DataError

__all__ = ["REFERENCE", "load_reference"]

REFERENCE = Path(__file__).parents[2] / "assets" / "reference"


def load_reference(*, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """The reference checkpoint and its tokenizer, in eval mode; see its model card in `topmass/assets/reference`.

    Args:
        dtype: `None` means float32 on a CPU and bfloat16 elsewhere.
        device: Where the model goes.

    Raises:
        DataError: The package was installed without its assets.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (REFERENCE / "model.safetensors").is_file():
        raise DataError(f"The reference checkpoint is missing from {REFERENCE}; reinstall topmass.")
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=dtype).to(device).eval()  # pyright: ignore[reportArgumentType]
    # what is recorded about a run must not name a directory of this machine
    model.name_or_path = "reference"
    return model, AutoTokenizer.from_pretrained(REFERENCE)
