"""The value that `tile_union` makes and attention kernels walk."""

from dataclasses import dataclass

from jaxtyping import Int32
from torch import Tensor

__all__ = ["TileUnion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileUnion:
    """Key groups selected by any query block of a tile, each once, and a word that says by which.

    Tiles are aligned to absolute positions: the first one holds the first query of the support.

    Attributes:
        ids: Selected key groups of each tile, ascending; what stands from `counts` on is undefined.
        words: Bit `i` of a word is set if query block `i` of the tile selected the group.
        counts: Valid ids per tile.
        tile: Positions per tile.
    """

    ids: Int32[Tensor, "batch share_heads tiles capacity"]
    words: Int32[Tensor, "batch share_heads tiles capacity"]
    counts: Int32[Tensor, "batch share_heads tiles"]
    tile: int
