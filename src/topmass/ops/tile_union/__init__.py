"""The keys that the queries of a tile read between them, with who reads which. See README.md."""

from topmass.ops.tile_union.interface import tile_union
from topmass.ops.tile_union.value import TileUnion

__all__ = ["TileUnion", "tile_union"]
