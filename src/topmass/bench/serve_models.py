"""Models for `topmass bench serve`: a directory as it is, or a shape with random weights, and an indexer for it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from topmass.bench.models import MODELS, POSITIONS, is_shape
from topmass.bench.serve import ServeSetting, sparse_table
from topmass.bench.serve_engines import Launch
from topmass.bench.stress import stress_indexer
from topmass.errors import ConfigError, DataError
from topmass.integrations.transformers.load import load_tokenizer
from topmass.integrations.transformers.reference import REFERENCE
from topmass.integrations.vllm.service import open_service
from topmass.selection.indexer import Indexer, IndexerConfig, ModelFingerprint, rotary_width

__all__ = ["prepare", "read_tokens", "untrained_indexer", "vocabulary_of", "write_shape"]

# what vLLM calls the classes of transformers' model types
_ARCHITECTURES = {"qwen3_5_text": "Qwen3_5ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def prepare(
    model: str,
    setting: ServeSetting,
    folder: Path,
    *,
    indexer: str | None = None,
    text: Path | None = None,
    dim: int = 64,
    kv_block: int = 1,
    say: Callable[[str], Any] = print,
) -> tuple[Launch, dict[str, Any]]:
    """How engines of a model are started, and what a manifest says of it.

    Args:
        model: A shape with random weights, `reference`, or a directory.
        folder: Where a shape and an untrained indexer are written.
        indexer: Directory, or `reference`. `None` takes what the setting's `config` names, else an untrained one.
        text: File that prompts are windows of. `None` takes text of the needle task, and random tokens for a shape or a model
            without a tokenizer.
        dim: Width of an untrained indexer's queries and keys.
        kv_block: Keys that it takes together.
        say: Called with what people should know.

    Raises:
        ConfigError: There is no such model or text, a sparse engine's settings are wrong, or the indexer does not fit the model.
        DataError: The model has no tokenizer for the text, the text is empty, or the indexer is missing or damaged.
    """
    options: dict[str, Any] = {}
    if shape := is_shape(model):
        say(f"random weights in the shape of {model}: these rows say nothing of quality")
        where, options = write_shape(model, folder / "model"), {"load_format": "dummy"}
    else:
        where = REFERENCE if model == "reference" else Path(model)
        if not (where / "config.json").is_file():
            raise ConfigError(f"There is no config.json in {where}; give a directory, `reference`, or a shape.")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        say("warning: on a CPU plain PyTorch is timed, which says nothing of any kernel")
    elif setting.interleave:
        options["gpu_memory_utilization"] = round(0.9 / len(setting.engines), 3)
    untrained = indexer is None and "config" not in setting.sparse and "sparse" in setting.modes
    if untrained:
        alike = (
            "whose 32 neighbouring queries select 3 to 4 times what one does"
            if shape
            else "which shows no trained one's time"
        )
        say(f"no indexer was given: an untrained one is served, {alike}")
        indexer = str(untrained_indexer(where, folder / "indexer", dim=dim, kv_block=kv_block, stress=shape))
    for mode, table in setting.engines.values():
        if mode == "sparse":
            # as its engine will, which starts after others
            given = {"topmass": sparse_table(indexer or "", table)}
            service = open_service(given, device=device, keep=False)
            assert service is not None
            service.check(ModelFingerprint.from_config(_text(where)))
    if shape and text is not None:
        raise ConfigError(f"The shape {model} has no words to read {text} with; name a model, or leave the text out.")
    ids = [] if shape else _needles(where, max(setting.lengths), say) if text is None else read_tokens(where, text)
    launch = Launch(
        model=str(where),
        vocabulary=vocabulary_of(where),
        text=ids,
        source=str(text or "the needle task's text") if ids else "",
        indexer=indexer or "",
        stand_in=untrained and shape,
        options=options,
    )
    return launch, {"model": model, "weights_hash": None if shape else _digest(where), "device": device}


def _digest(folder: Path) -> str:
    """Hash of the files of weights."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def write_shape(name: str, folder: Path) -> Path:
    """The configuration of a named shape, and a tokenizer of nothing but its ids, as a directory.

    Raises:
        ConfigError: There is no such shape.
    """
    from transformers import AutoConfig

    if name not in MODELS:
        raise ConfigError(f"Unknown shape {name!r}; known: {', '.join(MODELS)}.")
    kind, settings = MODELS[name]
    # vLLM sizes nothing by the positions that a model was made for but its RoPE tables
    config = AutoConfig.for_model(kind, max_position_embeddings=POSITIONS // 4, **settings)
    config.architectures = [_ARCHITECTURES[kind]]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    _write_tokenizer(folder, int(settings["vocab_size"]))
    return folder


def _write_tokenizer(folder: Path, size: int) -> None:
    """One word a token: a server cannot do without."""
    words = {"[UNK]": 0, **{f"t{i}": i for i in range(1, size)}}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    split = {"pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [], "version": "1.0"}
    (folder / "tokenizer.json").write_text(json.dumps({**split, **parts, "model": model}), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _text(folder: str | Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder)).get_text_config()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is no model that transformers knows: {' '.join(str(error).split())[:200]}"
        ) from error


def vocabulary_of(model: str | Path) -> int:
    """Tokens of a model's vocabulary.

    Raises:
        ConfigError: There is no such model.
    """
    return int(_text(model).vocab_size)


def read_tokens(model: str | Path, text: Path) -> list[int]:
    """Token ids of a UTF-8 file.

    Raises:
        ConfigError: The file cannot be read.
        DataError: The model has no tokenizer, or the text no token.
    """
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text} cannot be read as UTF-8 text: {error}.") from error
    if not (found := load_tokenizer(str(model))(words, add_special_tokens=False)["input_ids"]):
        raise DataError(f"{text} is empty; give a text of at least one token.")
    return found


def _needles(model: Path, length: int, say: Callable[[str], Any]) -> list[int]:
    """Text of the evaluation's needle task, somewhat longer than a prompt, as `topmass bench ttft` reads it."""
    from topmass.eval.tasks import make_samples

    try:
        tokenizer = load_tokenizer(str(model))
    except DataError:
        say("warning: the model has no tokenizer, so prompts are random tokens")
        return []
    (sample,) = make_samples("niah_single", tokenizer, length=2 * max(length, 1024), n=1)
    return tokenizer(sample.context, add_special_tokens=False)["input_ids"]


def untrained_indexer(
    model: str | Path, folder: Path, *, dim: int = 64, kv_block: int = 1, stress: bool = False
) -> Path:
    """Save an untrained indexer for a model, a `stress_indexer` for one with random weights."""
    text = _text(model)
    fingerprint = ModelFingerprint.from_config(text)
    width = min(rotary_width(fingerprint), dim // 2 * 2)
    config = IndexerConfig(hidden_size=text.hidden_size, dim=dim, rotary_dim=width, kv_block=kv_block)
    make = stress_indexer if stress else Indexer.create
    make(dict.fromkeys(fingerprint.full_layers, config), fingerprint).save(folder)
    return folder
