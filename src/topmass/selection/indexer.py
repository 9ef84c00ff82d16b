"""The indexer of one full-attention layer: small queries and keys whose product predicts the attention mass."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from topmass.core.granularity import Granularity
from topmass.errors import ConfigError

__all__ = ["IndexerConfig", "LayerIndexer", "ScoreDtype", "rotate_half_split"]

ScoreDtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexerConfig:
    """Shape and arithmetic of a layer's indexer.

    Attributes:
        hidden_size: Width of the layer's attention input.
        dim: Width of an index query or key.
        heads: Query heads; they share one key. One head scores `q . k`, several sum `ReLU(q . k)`.
        kv_block: Keys pooled into one index key, in tokens; a power of two.
        rotary_dim: Leading dimensions that RoPE turns; 0 for a layer without RoPE.
        features: What queries and keys are projected from: `"hidden"`, the layer's attention input after its norm.
        score_dtype: Dtype that scores are rounded to, in training metrics and in serving alike.
        norm_eps: Added to the mean square in both norms.

    Raises:
        ConfigError: A value is out of range.
    """

    hidden_size: int
    dim: int = 64
    heads: int = 1
    kv_block: int = 1
    rotary_dim: int = 0
    features: Literal["hidden"] = "hidden"
    score_dtype: ScoreDtype = "float16"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("hidden_size", "dim", "heads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        Granularity(kv_block=self.kv_block)
        if type(self.rotary_dim) is not int or self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.dim:
            raise ConfigError(f"rotary_dim must be even and in 0..{self.dim} (dim), got {self.rotary_dim!r}.")
        if self.features != "hidden":
            raise ConfigError(f"features must be 'hidden', got {self.features!r}.")
        if self.score_dtype not in get_args(ScoreDtype):
            raise ConfigError(
                f"score_dtype must be one of {', '.join(get_args(ScoreDtype))}, got {self.score_dtype!r}."
            )
        if not self.norm_eps > 0:
            raise ConfigError(f"norm_eps must be positive, got {self.norm_eps!r}.")


class LayerIndexer(nn.Module):
    """Projections of one layer's indexer, without bias, with RMSNorm on both sides.

    A key is pooled before norm and RoPE: mean of the raw keys of a complete group, norm, then RoPE at the group's first
    position. Raw keys are what a cache stores, so that a crop or a chunk boundary inside a group stays exact. Pooling,
    norm and RoPE run in float32 (float64 for float64 inputs) and round once, to the dtype of the projection.

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
        self.k_proj = nn.Linear(config.hidden_size, config.dim, bias=False)
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
        self._check_tables(cos, sin)
        raw = self.q_proj(hidden).unflatten(-1, (self.config.heads, self.config.dim))
        q = self._normed(self.q_norm, raw)
        if cos is not None and sin is not None:
            q = rotate_half_split(q, cos[:, :, None], sin[:, :, None])
        return q.to(raw.dtype)

    def project_keys(self, hidden: Float[Tensor, "batch len hidden"]) -> Float[Tensor, "batch len dim"]:
        """Raw keys: neither pooled, nor normed, nor rotated."""
        return self.k_proj(hidden)

    def finish_keys(
        self,
        raw: Float[Tensor, "batch len dim"],
        cos: Float[Tensor, "#batch len rotary"] | None = None,
        sin: Float[Tensor, "#batch len rotary"] | None = None,
    ) -> Float[Tensor, "batch groups dim"]:
        """Index keys of the complete groups; an incomplete one at the end has none.

        Args:
            raw: Raw keys; the first is the first of a group.
            cos: Cosines of the positions of `raw`, both halves of `rotary_dim`; `None` without RoPE.
            sin: Sines, likewise.

        Raises:
            ConfigError: RoPE tables are missing, not wanted, or of another width.
        """
        self._check_tables(cos, sin)
        r = self.config.kv_block
        whole = raw.shape[1] // r * r
        wide = torch.promote_types(raw.dtype, torch.float32)
        k = self._normed(self.k_norm, raw[:, :whole].unflatten(1, (whole // r, r)).to(wide).mean(2))
        if cos is not None and sin is not None:
            k = rotate_half_split(k, cos[:, :whole:r], sin[:, :whole:r])
        return k.to(raw.dtype)

    def _normed(self, norm: nn.RMSNorm, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(x, (self.config.dim,), norm.weight.to(x.dtype), self.config.norm_eps)

    def _check_tables(self, cos: Tensor | None, sin: Tensor | None) -> None:
        width = self.config.rotary_dim
        # a mismatch between trainer and server would be silent and ruin the selection
        if not width and not (cos is None and sin is None):
            raise ConfigError("This indexer has no RoPE (rotary_dim=0): leave cos and sin out.")
        if width and (cos is None or sin is None):
            raise ConfigError(f"This indexer has RoPE (rotary_dim={width}): pass cos and sin.")
        if cos is not None and cos.shape[-1] != width:
            raise ConfigError(f"cos and sin must have rotary_dim={width} columns, got {cos.shape[-1]}.")


def rotate_half_split(
    x: Float[Tensor, "*shape dim"], cos: Float[Tensor, "*#shape rotary"], sin: Float[Tensor, "*#shape rotary"]
) -> Float[Tensor, "*shape dim"]:
    """RoPE in half-split layout: dimension `i` is paired with `i + rotary / 2`; those past `rotary` stay.

    Args:
        cos: Cosines, the same in both halves, as transformers' rotary embeddings give them.
        sin: Sines, likewise.
    """
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, -1)
    turned = turned * cos.to(x.dtype) + torch.cat([-high, low], -1) * sin.to(x.dtype)
    return torch.cat([turned, kept], -1)
