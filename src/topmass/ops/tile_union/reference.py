"""Definition of the tile union in plain PyTorch."""

import torch

from topmass.core.support import Support
from topmass.ops.tile_union.value import TileUnion

__all__ = ["capacity", "tile_union_reference"]


def capacity(support: Support, tile: int) -> int:
    """Most ids that a tile can have, known without reading the support."""
    g, r = support.granularity.q_block, support.granularity.kv_block
    return min(tile // g * support.groups.shape[-1], -(-(support.q_start + support.q_len) // r))


def tile_union_reference(support: Support, *, tile: int) -> TileUnion:
    """Scatter every selection's bit into a word per key group, then keep the words that are not zero."""
    g, r = support.granularity.q_block, support.granularity.kv_block
    b, s, blocks, slots = support.groups.shape
    first = support.q_start // tile
    tiles = -(-(support.q_start + support.q_len) // tile) - first
    n_groups = -(-(support.q_start + support.q_len) // r)
    # position of each block in units of blocks, from the start of the first tile
    place = torch.arange(blocks, device=support.groups.device) + support.q_start // g - first * (tile // g)
    ids = support.groups.long()
    live = torch.arange(slots, device=ids.device) < support.counts[..., None]
    last = ((place + 1 + first * (tile // g)) * g).clamp_max(support.q_start + support.q_len)
    live &= (last > support.dense_len)[:, None]
    bits = torch.ones_like(ids) << (place % (tile // g))[:, None]
    # column n_groups of each tile swallows the padding
    target = (place // (tile // g))[:, None] * (n_groups + 1) + ids.masked_fill(~live, n_groups)
    words = ids.new_zeros(b, s, tiles * (n_groups + 1))
    words.scatter_add_(-1, target.flatten(2), bits.expand_as(ids).flatten(2))
    words = words.view(b, s, tiles, n_groups + 1)[..., :n_groups]
    taken = words != 0
    slot = taken.cumsum(-1) - 1
    room = capacity(support, tile)
    packed = torch.full((2, b, s, tiles, room + 1), 0, device=ids.device, dtype=torch.int64)
    slot = slot.masked_fill(~taken, room)
    packed[0].scatter_(-1, slot, torch.arange(n_groups, device=ids.device).expand_as(slot))
    packed[1].scatter_(-1, slot, words)
    return TileUnion(
        ids=packed[0, ..., :room].int(),
        # a word with bit 31 set is negative
        words=packed[1, ..., :room].to(torch.int32),
        counts=taken.sum(-1).int(),
        tile=tile,
    )
