"""What an indexer's files say: `indexer.safetensors` holds its weights, `indexer.json` everything else."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.errors import ConfigError, DataError
from topmass.ops.index_topk.interface import Reduce

__all__ = [
    "SCHEMA_VERSION",
    "IndexerConfig",
    "IndexerInfo",
    "ModelFingerprint",
    "ScoreDtype",
    "read_artifact",
    "write_artifact",
]

SCHEMA_VERSION = 1
WEIGHTS, INFO = "indexer.safetensors", "indexer.json"

Features = Literal["hidden", "qk"]
ScoreDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerConfig:
    """Shape and arithmetic of a layer's indexer.

    Attributes:
        hidden_size: Width of what queries are projected from, and keys unless `key_size` is given.
        key_size: Width of what keys are projected from; `None` means `hidden_size`.
        dim: Width of an index query or key.
        heads: Query heads; they share one key. One head scores `q . k`, several sum `ReLU(q . k)`.
        kv_block: Keys pooled into one index key, in tokens; a power of two.
        rotary_dim: Leading dimensions that RoPE turns; 0 for a layer without RoPE.
        features: What is projected: `"hidden"`, the layer's attention input after its norm; `"qk"`, the layer's own
            queries of all heads side by side, and keys likewise, after their norm and with RoPE taken out.
        reduce: Score of a query block from the scores of its queries, see `index_topk`; a block of one query is its score.
        score_dtype: Dtype that scores are rounded to, in training metrics and in serving alike.
        norm_eps: Added to the mean square in both norms.

    Raises:
        ConfigError: A value is out of range.
    """

    hidden_size: int
    key_size: int | None = None
    dim: int = 64
    heads: int = 1
    kv_block: int = 1
    rotary_dim: int = 0
    features: Features = "hidden"
    reduce: Reduce = "max_prob"
    score_dtype: ScoreDtype = "float16"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("hidden_size", "dim", "heads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.key_size is not None and (type(self.key_size) is not int or self.key_size < 1):
            raise ConfigError(f"key_size must be a whole number of at least 1, or None, got {self.key_size!r}.")
        Granularity(kv_block=self.kv_block)
        if type(self.rotary_dim) is not int or self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.dim:
            raise ConfigError(f"rotary_dim must be even and in 0..{self.dim} (dim), got {self.rotary_dim!r}.")
        for name, known in (("features", Features), ("reduce", Reduce), ("score_dtype", ScoreDtype)):
            if (value := getattr(self, name)) not in get_args(known):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(known))}, got {value!r}.")
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be positive, got {self.norm_eps!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFingerprint:
    """Which model an indexer belongs to.

    Everything but `vocab_size` and `weights` has to agree; those two may change in a fine-tune, which is worth a warning.

    Attributes:
        model_type: Architecture, as its text configuration names it.
        hidden_size: Width of the residual stream.
        num_layers: Layers of any kind.
        full_layers: Indices of the full-attention layers.
        q_heads: Query heads of a full-attention layer.
        kv_heads: Key heads of a full-attention layer.
        head_dim: Width of a head.
        vocab_size: Rows of the embedding.
        rope: RoPE parameters, as JSON values.
        weights: Digest of a few attention weights rounded to bfloat16; `""` if they could not be read.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    full_layers: tuple[int, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rope: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""

    @classmethod
    def from_config(
        cls, config: Any, full_layers: Iterable[int] | None = None, *, weights: str = ""
    ) -> "ModelFingerprint":
        """Fingerprint of a model from its text configuration, in the names that Hugging Face's configurations use.

        Args:
            config: The text configuration, as an object with attributes.
            full_layers: Indices of the full-attention layers. `None` takes those of the configuration's `layer_types`, all without.
            weights: Digest of a few attention weights.
        """
        if full_layers is None:
            kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
            full_layers = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        rope = getattr(config, "rope_parameters", None) or {}
        # families with sliding windows keep one set of parameters per kind of layer
        rope = rope.get("full_attention", rope)
        return cls(
            model_type=config.model_type,
            # a few families attend to more than the residual stream
            hidden_size=getattr(config, "attention_hidden_size", None) or config.hidden_size,
            num_layers=config.num_hidden_layers,
            full_layers=tuple(sorted(full_layers)),
            q_heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            rope=_plain(rope),
            weights=weights,
        )

    def refusal(self, model: "ModelFingerprint") -> str | None:
        """Why an indexer with this fingerprint cannot serve `model`, or `None` if it can."""
        for f in fields(self):
            mine, other = getattr(self, f.name), getattr(model, f.name)
            if f.name not in ("vocab_size", "weights") and mine != other:
                return f"{f.name} is {other!r}, the indexer's model had {mine!r}"
        return None

    def doubt(self, model: "ModelFingerprint") -> str | None:
        """Why an indexer with this fingerprint may be less accurate on `model`, or `None`."""
        for name in ("vocab_size", "weights"):
            mine, other = getattr(self, name), getattr(model, name)
            if mine and other and mine != other:
                return f"{name} is {other!r}, the indexer's model had {mine!r}"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerInfo:
    """Everything about an indexer but its weights.

    Attributes:
        fingerprint: The model it belongs to.
        layers: Configuration by layer index.
        model: Name of that model.
        granularity: Unit of selection that it was trained for; `None` takes the layers' key block, per query.
        training_tokens: Tokens that it was trained on; 0 if untrained.
        loss: Options and final values of the training loss.
        recipe: Resolved training configuration.
        held_out: Conditions of the held-out measurements: length, budget, sequences.
        recall: Share of the oracle's keys found, by layer, on held-out data.
        retained_mass: Share of the attention mass on the chosen keys, by layer, on held-out data.
        recommended_budget: Budget to start with.
        crossover: Number of keys up to which dense attention is faster, by device and dtype.

    Raises:
        ConfigError: Layers are missing, unknown to the model, or differ in their key block or in `reduce`.
    """

    fingerprint: ModelFingerprint
    layers: Mapping[int, IndexerConfig]
    model: str = ""
    granularity: Granularity | None = None
    training_tokens: int = 0
    loss: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    held_out: Mapping[str, Any] = field(default_factory=dict)
    recall: Mapping[int, float] = field(default_factory=dict)
    retained_mass: Mapping[int, float] = field(default_factory=dict)
    recommended_budget: str | None = None
    crossover: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("An indexer needs at least one layer.")
        if strange := set(self.layers) - set(self.fingerprint.full_layers):
            raise ConfigError(
                f"Layer {min(strange)} is no full-attention layer of the model; those are "
                f"{', '.join(map(str, self.fingerprint.full_layers))}."
            )
        blocks = {c.kv_block for c in self.layers.values()}
        if len(blocks) > 1 or len({c.reduce for c in self.layers.values()}) > 1:
            raise ConfigError("All layers of an indexer need one kv_block and one reduce.")
        if self.granularity is None:
            object.__setattr__(self, "granularity", Granularity(kv_block=blocks.pop()))
        elif self.granularity.kv_block not in blocks or self.granularity.share != "layer":
            raise ConfigError(
                f"granularity ({self.granularity}) does not fit the layers: share must be 'layer' and kv_block "
                f"{blocks.pop()}."
            )
        if self.recommended_budget is not None:
            Budget.parse(self.recommended_budget)

    @property
    def kv_block(self) -> int:
        """Keys pooled into one index key."""
        return next(iter(self.layers.values())).kv_block

    def replace(self, **changes: Any) -> "IndexerInfo":
        """A copy with some fields changed."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` reads back."""
        # layer indices become strings, as JSON has it
        return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(asdict(self), sort_keys=True))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "IndexerInfo":
        """The information that `to_json` wrote.

        Raises:
            ConfigError: A field is unknown, missing, or out of range, or the schema is another one.
        """
        data = dict(data)
        version = data.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ConfigError(f"schema version {version!r}; this topmass reads version {SCHEMA_VERSION}")
        try:
            model = dict(data.pop("fingerprint"))
            model["full_layers"] = tuple(model["full_layers"])
            layers = {int(i): IndexerConfig(**config) for i, config in data.pop("layers").items()}
            measured = {
                name: {int(i): float(x) for i, x in data.pop(name, {}).items()} for name in ("recall", "retained_mass")
            }
            granularity = Granularity(**data.pop("granularity"))
            return cls(
                fingerprint=ModelFingerprint(**model), layers=layers, granularity=granularity, **measured, **data
            )
        except KeyError as error:
            raise ConfigError(f"the field {error} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(str(error).rstrip(".")) from error


def write_artifact(path: str | Path, info: IndexerInfo, tensors: Mapping[str, Tensor]) -> None:
    """Write both files; a directory that exists keeps its other files, and its indexer until both are written.

    Raises:
        DataError: A weight is NaN or infinite, or the directory cannot be written.
    """
    _check_finite(tensors, "The indexer was not saved")
    target = Path(path)
    weights = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"format": "pt"})
    text = json.dumps({**info.to_json(), "weights_sha256": hashlib.sha256(weights).hexdigest()}, indent=2) + "\n"
    parts = {WEIGHTS: weights, INFO: text.encode()}
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        for name, content in parts.items():
            _write(temporary / name, content)
        if target.exists():
            for name in parts:
                (temporary / name).replace(target / name)
        else:
            temporary.chmod(0o755)
            temporary.rename(target)
    except OSError as error:
        raise DataError(f"Cannot write the indexer to {target}: {error.strerror}; choose another directory.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def read_artifact(path: str | Path) -> tuple[IndexerInfo, dict[str, Tensor]]:
    """Read both files and check one against the other.

    Raises:
        DataError: A file is missing, damaged, of another schema, or holds NaN.
    """
    folder = Path(path)
    content = {name: _read(folder, name) for name in (INFO, WEIGHTS)}
    try:
        data = json.loads(content[INFO])
        if not isinstance(data, dict):
            raise ConfigError("it holds no object")
        digest = data.pop("weights_sha256", None)
        info = IndexerInfo.from_json(data)
    except (ConfigError, ValueError) as error:
        raise DataError(f"{folder / INFO} cannot be read ({str(error).rstrip('.')}); {_AGAIN}") from error
    try:
        tensors = load(content[WEIGHTS])
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{folder / WEIGHTS} is damaged ({error}); {_AGAIN}") from error
    if hashlib.sha256(content[WEIGHTS]).hexdigest() != digest:
        raise DataError(f"{folder / WEIGHTS} is not the file that {INFO} describes; {_AGAIN}")
    _check_finite(tensors, f"{folder / WEIGHTS} is of no use")
    return info, tensors


def _plain(rope: Mapping[str, Any]) -> dict[str, Any]:
    # whether a default is spelt out differs between versions and files
    neutral = {"rope_type": "default", "partial_rotary_factor": 1.0}
    chosen = {k: v for k, v in sorted(rope.items()) if v is not None and neutral.get(k) != v}
    return json.loads(json.dumps(chosen, default=str))


_AGAIN = "copy the indexer again, or distil it again with `topmass distill`."


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        if folder.is_dir():
            raise DataError(f"{folder} has no readable {name}, so it is no indexer; {_AGAIN}") from error
        shipped = "; the shipped one is topmass.load_reference_indexer()" if str(folder) == "reference" else ""
        raise DataError(
            f"There is no indexer at {folder}; give the directory that `topmass distill -o` or `indexer.save` wrote{shipped}."
        ) from error


def _check_finite(tensors: Mapping[str, Tensor], consequence: str) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise DataError(f"{consequence}: {name} holds NaN or infinity; distil it again with a lower learning rate.")
