"""The indexer: per full-attention layer, small queries and keys whose product predicts the attention mass."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from topmass.core.budget import BudgetLike
from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import ConfigError, DataError
from topmass.ops.index_topk import index_topk
from topmass.ops.index_topk.interface import Reduce
from topmass.ops.index_vectors import index_vectors, rotate_half_split
from topmass.selection.artifact import (
    IndexerConfig,
    IndexerInfo,
    ModelFingerprint,
    ScoreDtype,
    read_artifact,
    write_artifact,
)
from topmass.selection.base import AttentionInputs, RankedSelector
from topmass.selection.crossover import crossover_here

__all__ = [
    "Indexer",
    "IndexerConfig",
    "IndexerInfo",
    "IndexerSelector",
    "LayerIndexer",
    "ModelFingerprint",
    "ScoreDtype",
    "index_rope",
    "load_indexer",
    "load_reference_indexer",
    "named_indexer",
    "rotary_width",
    "rotate_half_split",
    "unrotate_half_split",
]

REFERENCE = Path(__file__).parents[1] / "assets" / "reference_indexer"


class LayerIndexer(nn.Module):
    """Projections of one layer's indexer, without bias, with RMSNorm on both sides.

    A key is pooled before norm and RoPE: mean of the raw keys of a complete group, norm, then RoPE at the group's first
    position. Raw keys are what a cache stores, so that a crop or a chunk boundary inside a group stays exact. Pooling,
    norm and RoPE run in float32 (float64 for float64 inputs) and round once, to the dtype of the projection, which is
    that of the hidden states.

    Example:
        >>> indexer = LayerIndexer(IndexerConfig(hidden_size=16, dim=8, kv_block=4))
        >>> hidden = torch.randn(1, 10, 16)
        >>> indexer.project_queries(hidden).shape, indexer.finish_keys(indexer.project_keys(hidden)).shape
        (torch.Size([1, 10, 1, 8]), torch.Size([1, 2, 8]))
    """

    def __init__(self, config: IndexerConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden_size, config.heads * config.dim, bias=False)
        self.k_proj = nn.Linear(config.key_size or config.hidden_size, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def project_queries(
        self,
        hidden: Float[Tensor, "batch len hidden"],
        cos: Float[Tensor, "#batch len rotary"] | None = None,
        sin: Float[Tensor, "#batch len rotary"] | None = None,
    ) -> Float[Tensor, "batch len heads dim"]:
        """Index queries, each rotated to its own position.

        Args:
            cos: Cosines of the positions of `hidden`, both halves of `rotary_dim`; `None` without RoPE.
            sin: Sines, likewise.

        Raises:
            ConfigError: RoPE tables are missing, not wanted, or of another width.
        """
        return self.finish_queries(self._projected(self.q_proj, hidden), cos, sin)

    def finish_queries(
        self,
        raw: Float[Tensor, "batch len width"],
        cos: Float[Tensor, "#batch len rotary"] | None = None,
        sin: Float[Tensor, "#batch len rotary"] | None = None,
        *,
        backend: str = "reference",
    ) -> Float[Tensor, "batch len heads dim"]:
        """Index queries from what `q_proj` gives: norm and RoPE.

        Args:
            backend: Of `index_vectors`.
        """
        self._check_tables(cos, sin)
        raw = raw.unflatten(-1, (1, self.config.heads, self.config.dim))
        return index_vectors(raw, self.q_norm.weight, eps=self.config.norm_eps, cos=cos, sin=sin, backend=backend)

    def project_keys(self, hidden: Float[Tensor, "batch len hidden"]) -> Float[Tensor, "batch len dim"]:
        """Raw keys: neither pooled, nor normed, nor rotated."""
        return self._projected(self.k_proj, hidden)

    def finish_keys(
        self,
        raw: Float[Tensor, "batch len dim"],
        cos: Float[Tensor, "#batch len rotary"] | None = None,
        sin: Float[Tensor, "#batch len rotary"] | None = None,
        *,
        backend: str = "reference",
    ) -> Float[Tensor, "batch groups dim"]:
        """Index keys of the complete groups; an incomplete one at the end has none.

        Args:
            raw: Raw keys; the first is the first of a group.
            cos: Cosines of the positions of `raw`, both halves of `rotary_dim`; `None` without RoPE.
            sin: Sines, likewise.
            backend: Of `index_vectors`.

        Raises:
            ConfigError: RoPE tables are missing, not wanted, or of another width.
        """
        self._check_tables(cos, sin)
        r = self.config.kv_block
        whole = raw.shape[1] // r * r
        first = [x if x is None else x[:, :whole:r] for x in (cos, sin)]
        # [batch, groups, r, 1, dim]
        raw = raw[:, :whole].unflatten(1, (whole // r, r))[:, :, :, None]
        norm, eps = self.k_norm.weight, self.config.norm_eps
        return index_vectors(raw, norm, eps=eps, cos=first[0], sin=first[1], backend=backend)[:, :, 0]

    def _projected(self, linear: nn.Linear, x: Float[Tensor, "batch len width"]) -> Float[Tensor, "batch len out"]:
        # in the backbone's dtype, whatever the weights are kept in: what autocast does in training
        return F.linear(x, linear.weight.to(x.dtype))

    def _check_tables(self, cos: Tensor | None, sin: Tensor | None) -> None:
        width = self.config.rotary_dim
        # a mismatch between trainer and server would be silent and ruin the selection
        if not width and not (cos is None and sin is None):
            raise ConfigError("This indexer has no RoPE (rotary_dim=0): leave cos and sin out.")
        if width and (cos is None or sin is None):
            raise ConfigError(f"This indexer has RoPE (rotary_dim={width}): pass cos and sin.")
        if cos is not None and cos.shape[-1] != width:
            raise ConfigError(f"cos and sin must have rotary_dim={width} columns, got {cos.shape[-1]}.")


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    """Parameters as they were: which they are, and how often each was written to."""

    tensors: tuple[Tensor, ...]
    marks: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, module: nn.Module) -> "_Weights | None":
        tensors = tuple(module.parameters())
        # such tensors do not count what is written to them
        if any(x.is_inference() for x in tensors):
            return None
        return cls(tensors, tuple((x.data_ptr(), x._version) for x in tensors))

    def same(self, other: "_Weights") -> bool:
        return self.marks == other.marks and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))


def _copy(module: LayerIndexer, device: torch.device, dtype: torch.dtype) -> LayerIndexer:
    """For inference: projections in the dtype that they compute in, norms in their own."""
    weights = {
        name: x.to(device, dtype if name.endswith("_proj.weight") else x.dtype)
        for name, x in module.state_dict().items()
    }
    with torch.device("meta"):
        placed = LayerIndexer(module.config)
    placed.load_state_dict(weights, assign=True)
    return placed.requires_grad_(False)


class Indexer(nn.Module):
    """The indexers of a model's full-attention layers, and what is known about them.

    Attributes:
        layers: `LayerIndexer` by layer index, written as a string.
        info: Everything that `indexer.json` says.

    Raises:
        ConfigError: `info` contradicts itself.

    Example:
        >>> model = ModelFingerprint(
        ...     model_type="llama",
        ...     hidden_size=16,
        ...     num_layers=2,
        ...     full_layers=(0, 1),
        ...     q_heads=4,
        ...     kv_heads=2,
        ...     head_dim=4,
        ...     vocab_size=32,
        ... )
        >>> indexer = Indexer.create({1: IndexerConfig(hidden_size=16, dim=8)}, model)
        >>> print(indexer.selector(budget=64))  # doctest: +ELLIPSIS
        indexer(budget=64, q_block=1, kv_block=1, share=layer, sink=0, window=1, dense_below=0, reduce=max_prob, indexer=...)
    """

    def __init__(self, info: IndexerInfo) -> None:
        super().__init__()
        self.info = info
        self._memo: dict[Any, tuple[_Weights, Any]] = {}
        with torch.random.fork_rng(devices=[]):
            self.layers = nn.ModuleDict({str(i): LayerIndexer(config) for i, config in sorted(info.layers.items())})

    @classmethod
    def create(
        cls, layers: Mapping[int, IndexerConfig], fingerprint: ModelFingerprint, *, seed: int = 0, **info: Any
    ) -> "Indexer":
        """An untrained indexer: where training starts, and the baseline that it has to beat.

        Args:
            layers: Configuration by layer index.
            fingerprint: The model that it will serve.
            seed: Seed of the weights; the same on every machine.
            info: Other fields of `IndexerInfo`.

        Raises:
            ConfigError: The configurations contradict each other or the fingerprint.
        """
        indexer = cls(IndexerInfo(layers=dict(layers), fingerprint=fingerprint, **info))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in indexer.layers.values():
                assert isinstance(layer, LayerIndexer)
                for linear in (layer.q_proj, layer.k_proj):
                    linear.weight.normal_(0.0, linear.in_features**-0.5, generator=generator)
        return indexer

    @classmethod
    def load(cls, path: str | Path) -> "Indexer":
        """Read what `save` wrote, onto the CPU.

        Raises:
            DataError: A file is missing, damaged, of another schema, or does not fit the other; the message says which.
        """
        info, tensors = read_artifact(path)
        indexer = cls(info)
        try:
            indexer.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip().rstrip(".")
            raise DataError(
                f"The weights in {path} do not fit its indexer.json ({reason}); distil it again."
            ) from error
        return indexer

    def save(self, path: str | Path) -> None:
        """Write `indexer.safetensors` and `indexer.json` into the directory `path`, ready to be pushed to a hub.

        The files are complete before they take their names; after a failure what was there before is still there.

        Raises:
            DataError: A weight is NaN or infinite, or the directory cannot be written.
        """
        write_artifact(path, self.info, self.state_dict())

    def selector(self, *, budget: BudgetLike | Plan, **settings: Any) -> "IndexerSelector":
        """Selects by this indexer; `settings` are those of `IndexerSelector`."""
        return IndexerSelector(self, budget=budget, **settings)

    def reducing(self, reduce: Reduce) -> "Indexer":
        """A copy with the same weights that scores a block of queries in another way; see `index_topk`.

        Raises:
            ConfigError: `reduce` is unknown.
        """
        layers = {i: replace(config, reduce=reduce) for i, config in self.info.layers.items()}
        other = Indexer(self.info.replace(layers=layers))
        other.load_state_dict(self.state_dict())
        return other.to(next(self.parameters()).device)

    def layer(self, index: int) -> LayerIndexer | None:
        """The indexer of one layer, or `None` if it has none."""
        name = str(index)
        module = self.layers[name] if name in self.layers else None  # noqa: SIM401
        assert module is None or isinstance(module, LayerIndexer)
        return module

    def served(self, index: int, device: torch.device, dtype: torch.dtype) -> LayerIndexer | None:
        """A layer's indexer on the device of a model that computes in `dtype`, or `None` if it has none.

        Not for training: the copy is kept, and made again once weights have changed.
        """
        module = self.layer(index)
        if module is None:
            return None
        return self._remembered((index, device, dtype), module, lambda: _copy(module, device, dtype))

    def _remembered(self, key: Any, of: nn.Module, make: Callable[[], Any]) -> Any:
        weights = _Weights.of(of)
        held = self._memo.get(key)
        if held is None or weights is None or not held[0].same(weights):
            value = make()
            if weights is None:
                return value
            held = self._memo[key] = weights, value
        return held[1]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that identify weights and configurations as they are now."""
        return self._remembered("digest", self, self._hash)

    def _hash(self) -> str:
        found = hashlib.sha256(json.dumps(self.info.to_json()["layers"], sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
        return found.hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerSelector(RankedSelector):
    """Top-k by an indexer's scores: no attention mass is computed.

    Runs inside `topmass.sparsify`, which captures what the indexer reads. Layers that the indexer does not cover stay
    dense. `pool` has no effect: an indexer scores whole groups.

    Attributes:
        indexer: A trained indexer, or an untrained one as a baseline.
        granularity: Unit of selection; `None` takes the one that the indexer was trained for.
        dense_below: As for every selector; `"auto"` takes the crossover that the indexer's information holds for this
            machine's device in bfloat16, and is a number from then on.

    Raises:
        ConfigError: No crossover is known for this device, the budget does not fit, `share` is not `"layer"`, or `kv_block` is not the indexer's.
    """

    name: ClassVar[str] = "indexer"
    indexer: Indexer = field(kw_only=False)
    granularity: Granularity = None  # pyright: ignore[reportAssignmentType]
    dense_below: int | Literal["auto"] = 0  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        if not isinstance(self.indexer, Indexer):
            raise ConfigError(
                f"indexer must be a topmass.Indexer, got {type(self.indexer).__name__}; see load_indexer."
            )
        if self.granularity is None:
            object.__setattr__(self, "granularity", self.indexer.info.granularity)
        if self.dense_below == "auto":
            object.__setattr__(self, "dense_below", crossover_here(self.indexer.info.crossover))
        if self.granularity.share != "layer":
            raise ConfigError(
                f"An indexer selects once for all heads: share must be 'layer', got {self.granularity.share!r}."
            )
        if self.granularity.kv_block != (own := self.indexer.info.kv_block):
            raise ConfigError(
                f"This indexer pools {own} keys into one: kv_block must be {own}, got {self.granularity.kv_block}."
            )
        if self.pool != "sum":
            raise ConfigError("pool has no effect on the indexer selector, which scores whole groups; leave it out.")
        RankedSelector.__post_init__(self)
        # a budget that does not fit is wrong also where layer 0 has no indexer
        for layer in self.indexer.info.layers:
            self.rule(layer)

    def rule(self, layer: int) -> SupportRule | None:
        return RankedSelector.rule(self, layer) if layer in self.indexer.info.layers else None

    def group_scores(self, inputs: AttentionInputs, rule: SupportRule) -> Any:
        raise NotImplementedError("The op selects by scores that it never writes down.")

    def score_heads(self, q_heads: int, kv_heads: int) -> int:
        return 0

    def select(self, inputs: AttentionInputs) -> Support:
        rule = self.rule(inputs.layer)
        assert rule is not None, "dense layers are never selected for"
        assert rule.budget is not None
        if inputs.iq is None or inputs.ik is None:
            raise ConfigError("The indexer selector needs index queries and keys; run it inside topmass.sparsify.")
        config = self.indexer.info.layers[inputs.layer]
        return index_topk(
            inputs.iq,
            inputs.ik,
            budget=rule.budget,
            granularity=rule.granularity,
            sink=rule.sink,
            window=rule.window,
            dense_below=rule.dense_below,
            q_start=inputs.start,
            reduce=config.reduce,
            # a float64 model is a test of exactness
            score_dtype=None if inputs.iq.dtype == torch.float64 else getattr(torch, config.score_dtype),
            backend=inputs.backend_of("index_topk"),
        )

    def config(self) -> dict[str, Any]:
        base = {k: v for k, v in RankedSelector.config(self).items() if k != "pool"}
        first = next(iter(self.indexer.info.layers.values()))
        return {**base, "reduce": first.reduce, "indexer": self.indexer.digest}


def load_indexer(path: str | Path) -> Indexer:
    """The indexer in the directory `path`, as `topmass distill` and `Indexer.save` write it.

    Raises:
        DataError: A file is missing, damaged, or of another schema.
    """
    return Indexer.load(path)


def load_reference_indexer() -> Indexer:
    """The indexer of the reference checkpoint, see `topmass.load_reference`.

    Raises:
        DataError: The package was installed without it.
    """
    if not REFERENCE.is_dir():
        raise DataError(
            f"The reference indexer is missing from {REFERENCE}; reinstall topmass, or make it with "
            "`topmass distill reference -o DIR` and load it with topmass.load_indexer."
        )
    return Indexer.load(REFERENCE)


def named_indexer(name: str) -> Indexer:
    """What settings and command lines name: a directory, or `reference` for the one that ships."""
    return load_reference_indexer() if name == "reference" else load_indexer(name)


def index_rope(
    cos: Float[Tensor, "batch len rotary"], sin: Float[Tensor, "batch len rotary"], rotary_dim: int
) -> tuple[Float[Tensor, "batch len index_rotary"], Float[Tensor, "batch len index_rotary"]]:
    """The model's RoPE tables at an indexer's width, both halves alike.

    An indexer narrower than the model's RoPE takes evenly spaced ones of its frequencies. Where the widths divide, these are
    the frequencies that the model's formula gives for the smaller width: from the fastest to nearly the slowest, so that
    near positions are told apart and far ones can still be compared by content.

    Args:
        cos: Cosines as the model's attention receives them.
        sin: Sines, likewise.
        rotary_dim: The indexer's `rotary_dim`, at most the model's.

    Raises:
        ConfigError: `rotary_dim` is beyond the model's.
    """
    width = cos.shape[-1]
    if rotary_dim > width:
        raise ConfigError(f"The indexer's rotary_dim={rotary_dim} is beyond the model's {width}; distil it again.")
    pairs = rotary_dim // 2
    chosen = torch.arange(pairs, device=cos.device) * (width // 2) // max(pairs, 1)
    return tuple(torch.cat([half, half], -1) for half in (cos[..., chosen], sin[..., chosen]))  # pyright: ignore[reportReturnType]


def rotary_width(model: ModelFingerprint) -> int:
    """Leading dimensions of a head that the model's RoPE turns; 0 without RoPE."""
    return int(model.head_dim * model.rope.get("partial_rotary_factor", 1.0)) if model.rope else 0


def unrotate_half_split(
    x: Float[Tensor, "*shape dim"], cos: Float[Tensor, "*#shape rotary"], sin: Float[Tensor, "*#shape rotary"]
) -> Float[Tensor, "*shape dim"]:
    """The vector that `rotate_half_split` turned into `x`.

    Exact up to rounding for any tables, also those that a model rounded to bfloat16 or multiplied by an attention factor:
    each pair was multiplied by a 2 x 2 matrix, and is multiplied by its inverse. Runs in float32 (float64 for float64
    inputs) and rounds once, to the dtype of `x`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide), sin.to(wide)
    norm = cos.square() + sin.square()
    return rotate_half_split(x.to(wide), cos / norm, -sin / norm).to(x.dtype)
