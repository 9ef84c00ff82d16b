"""Attention over exactly the keys of a support. See README.md."""

from topmass.ops.sparse_prefill.interface import sparse_prefill

__all__ = ["sparse_prefill"]
