"""Pages of the KV cache with index keys in them: all rows `[key | value]` of a page first, head by head, then its index keys.

vLLM knows a page as so many columns per KV head and token, and gives it more of them than keys and values need. How a page's memory
is used is ours alone: rows of keys and values lie as in a heads-first page without index keys, aligned as dense kernels like them, and
the index keys of its tokens, one each, are one piece. Whatever shares, evicts or restores whole pages takes their index keys along;
what would cut a page by heads or tokens is refused (`versions.check_engine`).
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from topmass.errors import UnsupportedModelError
from topmass.ops import write_pages

__all__ = ["PageLayout", "Pages"]

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

    def open(self, cache: Float[Tensor, "pages kv_heads page_size width"]) -> "Pages":
        """The pages of one layer.

        Raises:
            UnsupportedModelError: The memory of a page is not one piece.
        """
        return Pages(self, cache)


class Pages:
    """The pages of one layer, as views of what is in them.

    Attributes:
        rows: Keys and values side by side, `[pages, kv_heads, page_size, 2 * head_dim]`: what a cache without index keys would be.
        keys: `[pages, page_size, kv_heads, head_dim]`.
        values: Likewise.
        index: What every page has for the index keys of its tokens, `[pages, page_size, kv_heads * columns]`.

    Raises:
        UnsupportedModelError: The memory of a page is not one piece.
    """

    def __init__(self, layout: PageLayout, cache: Float[Tensor, "pages kv_heads page_size width"]) -> None:
        count, heads, size, width = cache.shape
        held, used = heads * size * width, heads * size * 2 * layout.head_dim
        inner = zip(cache.shape[1:], cache.stride()[1:], strict=True)
        # in whatever order vLLM gives its dimensions
        if sum((n - 1) * s for n, s in inner) != held - 1 or (count > 1 and cache.stride(0) < held):
            raise UnsupportedModelError(
                "topmass keeps index keys in pages whose memory is one piece, and this KV cache cuts them by heads or layers; leave "
                "VLLM_KV_CACHE_LAYOUT unset."
            )
        flat = cache.as_strided((count, held), (cache.stride(0), 1))
        self.rows = flat[:, :used].unflatten(1, (heads, size, 2 * layout.head_dim))
        self.index = flat[:, used:].unflatten(1, (size, heads * layout.columns))
        tokens = self.rows.transpose(1, 2)
        self.keys, self.values = tokens[..., : layout.head_dim], tokens[..., layout.head_dim :]

    def write(
        self,
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        index: Float[Tensor, "tokens index_dim"] | None,
        slots: Int[Tensor, " tokens"],
    ) -> None:
        """Write tokens; token `i` of the sequence that owns page `p` has slot `p * page_size + i % page_size`.

        Slots below 0 are padding, which goes to slot 0: vLLM gives its page to no request.

        Args:
            index: Raw index keys; `None` for a layer without an indexer.
        """
        write_pages(self.rows, key, value, slots, index_rows=None if index is None else self.index, index=index)

    def read_index(self, pages: Int[Tensor, " n"], length: int, dim: int) -> Float[Tensor, "length dim"]:
        """Index keys of the first `length` tokens of the sequence that owns `pages`."""
        return self.index[pages].flatten(0, 1)[:length, :dim]

    def count(self, length: int) -> int:
        """Pages that hold `length` tokens."""
        return -(-length // self.index.shape[1])
