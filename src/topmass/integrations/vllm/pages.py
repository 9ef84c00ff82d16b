"""Pages of the KV cache with index keys in them: all rows `[key | value]` of a page first, head by head, then its index keys.

vLLM knows a page as so many columns per KV head and token, and gives it more of them than keys and values need. How a page's memory
is used is ours alone: rows of keys and values lie as in a page without index keys, aligned as dense kernels like them, and the index
keys of its tokens, one each, are one piece. Whatever moves, shares, evicts or restores a page moves its index keys with it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topmass.ops import page_rows

__all__ = ["PageLayout"]

# 16 bytes in bfloat16: what vector loads and TMA ask of a row's start
ALIGN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """Where things are in a page.

    Attributes:
        kv_heads: KV heads on this device.
        head_dim: Width of a key, and of a value.
        columns: Extra columns that a page has per KV head and token, for the index key.

    Example:
        >>> layout = PageLayout.fit(kv_heads=3, head_dim=128, index_dim=64)
        >>> layout.columns, layout.width
        (24, 280)
    """

    kv_heads: int
    head_dim: int
    columns: int

    @classmethod
    def fit(cls, *, kv_heads: int, head_dim: int, index_dim: int) -> "PageLayout":
        """The narrowest layout that holds index keys of `index_dim` values."""
        share = -(-index_dim // kv_heads)
        return cls(kv_heads=kv_heads, head_dim=head_dim, columns=-(-share // ALIGN) * ALIGN)

    @property
    def width(self) -> int:
        """Columns of a page, per KV head and token."""
        return 2 * self.head_dim + self.columns

    def rows(
        self, cache: Float[Tensor, "pages kv_heads page_size width"]
    ) -> Float[Tensor, "pages kv_heads page_size key_and_value"]:
        """Keys and values of every page, side by side, as a view: what a cache without index keys would be."""
        heads, size = cache.shape[1:3]
        return self._flat(cache)[:, : heads * size * 2 * self.head_dim].unflatten(1, (heads, size, 2 * self.head_dim))

    def index(
        self, cache: Float[Tensor, "pages kv_heads page_size width"]
    ) -> Float[Tensor, "pages page_size index_width"]:
        """What every page has for the index keys of its tokens, as a view."""
        heads, size = cache.shape[1:3]
        return self._flat(cache)[:, heads * size * 2 * self.head_dim :].unflatten(1, (size, heads * self.columns))

    def _flat(self, cache: Tensor) -> Tensor:
        """Every page's memory, which is one piece whatever order vLLM gives its dimensions."""
        values = cache[0].numel()
        assert sum((n - 1) * s for n, s in zip(cache.shape[1:], cache.stride()[1:], strict=True)) == values - 1
        return cache.as_strided((cache.shape[0], values), (cache.stride(0), 1))

    def keys(
        self, cache: Float[Tensor, "pages kv_heads page_size width"]
    ) -> Float[Tensor, "pages page_size kv_heads head_dim"]:
        """Keys of every page, as a view."""
        return self.rows(cache).transpose(1, 2)[..., : self.head_dim]

    def values(
        self, cache: Float[Tensor, "pages kv_heads page_size width"]
    ) -> Float[Tensor, "pages page_size kv_heads head_dim"]:
        """Values of every page, as a view."""
        return self.rows(cache).transpose(1, 2)[..., self.head_dim :]

    def write_index(
        self,
        cache: Float[Tensor, "pages kv_heads page_size width"],
        index: Float[Tensor, "tokens index_dim"],
        slots: Int[Tensor, " tokens"],
    ) -> None:
        """Write index keys; token `i` of the sequence that owns page `p` has slot `p * page_size + i % page_size`.

        Slots below 0 are padding, which goes to slot 0: vLLM gives its page to no request.
        """
        page_rows(self.index(cache)[:, None], index, slots)

    def write_tokens(
        self,
        cache: Float[Tensor, "pages kv_heads page_size width"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        slots: Int[Tensor, " tokens"],
    ) -> None:
        """Write keys and values, as `write_index` does with index keys."""
        page_rows(self.rows(cache), torch.cat([key, value], -1).flatten(1), slots)

    def read_index(
        self, cache: Float[Tensor, "pages kv_heads page_size width"], pages: Int[Tensor, " n"], length: int, dim: int
    ) -> Float[Tensor, "length dim"]:
        """Index keys of the first `length` tokens of the sequence that owns `pages`."""
        return self.index(cache)[pages].flatten(0, 1)[:length, :dim]

    def pages_of(self, cache: Tensor, length: int) -> int:
        """Pages that hold `length` tokens."""
        return -(-length // cache.shape[2])
