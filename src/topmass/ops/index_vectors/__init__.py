"""Index keys and queries from what an indexer projects. See README.md."""

from topmass.ops.index_vectors.interface import index_vectors
from topmass.ops.index_vectors.reference import rotate_half_split

__all__ = ["index_vectors", "rotate_half_split"]
