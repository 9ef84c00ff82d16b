"""From scores to a support, by the support rule. See README.md."""

from topmass.ops.topk_support.interface import pool_scores, topk_support

__all__ = ["pool_scores", "topk_support"]
