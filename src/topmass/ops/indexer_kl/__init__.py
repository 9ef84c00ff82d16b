"""KL of score rows from mass rows, with its gradient. See README.md."""

from topmass.ops.indexer_kl.interface import kl_rows

__all__ = ["kl_rows"]
