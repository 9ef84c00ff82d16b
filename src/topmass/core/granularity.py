"""The unit in which keys are selected."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from topmass.errors import ConfigError

__all__ = ["Granularity", "Share", "split_queries"]

Share = Literal["layer", "kv_head", "q_head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Granularity:
    """The unit of selection; not a kernel's tile.

    Attributes:
        q_block: Consecutive queries that share one selection, in tokens; a power of two. 1 selects per query.
        kv_block: Consecutive keys taken or left together, in tokens; a power of two. 1 is token granularity.
        share: Heads that share one selection: all of the layer, one KV group, or each query head alone.

    Raises:
        ConfigError: A block is not a power of two, or `share` is unknown.

    Example:
        >>> Granularity(q_block=32, kv_block=4)
        Granularity(q_block=32, kv_block=4, share='layer')
    """

    q_block: int = 1
    kv_block: int = 1
    share: Share = "layer"

    def __post_init__(self) -> None:
        for name in ("q_block", "kv_block"):
            size = getattr(self, name)
            if type(size) is not int or size < 1 or size & (size - 1):
                raise ConfigError(f"{name} must be a power of two (1, 2, 4, ...), got {size!r}.")
        if self.share not in get_args(Share):
            raise ConfigError(f"share must be one of {', '.join(get_args(Share))}, got {self.share!r}.")

    def __str__(self) -> str:
        return f"q{self.q_block} k{self.kv_block} {self.share}"

    def share_heads(self, q_heads: int, kv_heads: int) -> int:
        """Number of independent selections per query for a layer of `q_heads` and `kv_heads`."""
        return {"layer": 1, "kv_head": kv_heads, "q_head": q_heads}[self.share]


def split_queries(q_start: int, q_len: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut the queries `q_start ... q_start + q_len - 1`, if they are more than `step`, at its multiples; yields offsets from `q_start`.

    The cuts are absolute positions: if `step` is a multiple of `q_block`, no query block is cut, whatever part of the
    prompt is at hand.

    Args:
        step: Queries at most in a part.

    Yields:
        First offset and the one past the last; without queries one empty part.

    Example:
        >>> list(split_queries(5, 10, 8))
        [(0, 3), (3, 10)]
        >>> list(split_queries(5, 8, 8))
        [(0, 8)]
    """
    if q_len <= step:
        yield 0, q_len
        return
    lo = 0
    while lo < q_len:
        hi = min((q_start + lo) // step * step + step - q_start, q_len)
        yield lo, hi
        lo = hi
