"""Dense causal attention of a chunk of queries, with its normaliser on request. See README.md."""

from topmass.ops.dense_prefill.interface import dense_lse, dense_prefill

__all__ = ["dense_lse", "dense_prefill"]
