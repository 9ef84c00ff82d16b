"""An indexer's scores and the support they select. See README.md."""

from topmass.ops.index_topk.interface import index_topk

__all__ = ["index_topk"]
