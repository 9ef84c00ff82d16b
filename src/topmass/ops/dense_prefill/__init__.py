"""Dense causal attention of a chunk of queries."""

from topmass.ops.dense_prefill.interface import dense_prefill

__all__ = ["dense_prefill"]
