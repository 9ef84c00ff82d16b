"""Rows of tokens written into the pages of a KV cache. See README.md."""

from topmass.ops.page_rows.interface import page_rows

__all__ = ["page_rows"]
