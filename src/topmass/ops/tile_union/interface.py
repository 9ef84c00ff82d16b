"""Public entry point of the op: checks, picks a backend, calls it."""

from topmass.core.support import Support
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import register_triton
from topmass.ops.tile_union.reference import tile_union_reference
from topmass.ops.tile_union.value import TileUnion

__all__ = ["MOST_BLOCKS", "tile_union"]

# bits of a word
MOST_BLOCKS = 32

_dispatch.register("tile_union", _dispatch.KernelBackend(name="reference", fn=tile_union_reference))
register_triton("tile_union", "topmass.ops.tile_union._triton", "tile_union_triton")


def tile_union(support: Support, *, tile: int = 32, backend: str = "auto") -> TileUnion:
    """Union of the key groups that the query blocks of each tile selected.

    The selections of queries that read every key are left out: they have no use for a list.

    Args:
        tile: Positions per tile, a power of two of one to 32 query blocks.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Returns:
        A list for every tile that holds a query of the support, in ascending order of key group.

    Raises:
        ConfigError: `tile` is not a power of two, or does not hold one to 32 query blocks.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch, topmass
        >>> rule = topmass.SupportRule(budget=topmass.Budget(tokens=3))
        >>> scores = torch.eye(8)[None, None].roll(-2, -1)
        >>> support = topmass.ops.topk_support(scores, rule=rule, q_start=0, q_len=8)
        >>> union = tile_union(support, tile=8)
        >>> union.ids[0, 0, 0, : union.counts[0, 0, 0]].tolist()
        [0, 1, 2, 3, 4, 5]
        >>> [f"{word:08b}" for word in union.words[0, 0, 0, : union.counts[0, 0, 0]].tolist()]
        ['11111000', '00001000', '00010000', '00100000', '01000000', '10000000']
    """
    g = support.granularity.q_block
    if tile < 1 or tile & (tile - 1):
        raise ConfigError(f"tile must be a power of two, got {tile}.")
    if not g <= tile <= MOST_BLOCKS * g:
        raise ConfigError(
            f"A tile holds 1 to {MOST_BLOCKS} query blocks of {g}: choose {g} to {MOST_BLOCKS * g}, got {tile}."
        )
    chosen = _dispatch.resolve("tile_union", backend, support, tile=tile)
    return chosen.fn(support, tile=tile)
