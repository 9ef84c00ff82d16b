"""Keys, values and index keys of tokens, written into the pages of a KV cache. See README.md."""

from topmass.ops.write_pages.interface import write_pages

__all__ = ["write_pages"]
