"""Random supports whose tiles have a given union: what kernels are tested and timed on."""

import torch
from jaxtyping import Int
from torch import Tensor

from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import ConfigError

__all__ = ["random_support"]

# random numbers drawn at a time
MOST_DRAWS = 2**26


def random_support(
    rule: SupportRule,
    *,
    q_len: int,
    q_start: int = 0,
    batch: int = 1,
    share_heads: int = 1,
    tile: int = 32,
    growth: float = 1.0,
    local: float = 0.5,
    span: int = 4096,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Support:
    """Draw selections that obey `rule`, such that neighbouring queries overlap as asked.

    Every tile gets a pool of `growth` times the groups that a query takes; each of its query blocks takes its groups
    from that pool at random. So the union of a tile of many blocks is `growth` times one selection. At the start of a
    sequence, where few groups compete, the pool is all of them.

    Args:
        tile: Positions per tile, aligned to absolute positions; a multiple of the rule's `q_block`.
        growth: Size of a tile's union over the size of one selection, at least 1.
        local: Share of the pool that lies within the last `span` tokens before the tile's window.
        span: Tokens that count as local.

    Raises:
        ConfigError: `growth` is below 1, `tile` does not hold whole query blocks, or the budget is one of mass.

    Example:
        >>> from topmass import Budget, SupportRule
        >>> support = random_support(SupportRule(budget=Budget(tokens=9)), q_len=64, growth=2.0)
        >>> support.groups.shape, support.counts[0, 0, -1].item()
        (torch.Size([1, 1, 64, 8]), 8)
    """
    g, r = rule.granularity.q_block, rule.granularity.kv_block
    if growth < 1 or tile % g or (rule.budget is not None and rule.budget.mass is not None):
        raise ConfigError("A random support needs growth >= 1, a tile of whole query blocks, and a budget not of mass.")
    generator = torch.Generator(device).manual_seed(seed)
    # every block of every tile
    t0 = torch.arange(q_start // tile * tile, -(-(q_start + q_len) // tile) * tile, g, device=device)
    wanted = rule.groups_wanted(t0).view(-1, tile // g)
    slots = int(wanted.max())
    rows, pool = batch * share_heads, round(growth * slots)
    step = max(MOST_DRAWS // (rows * tile // g * max(pool, 1)), 1)
    first, stop = rule.candidate_range(t0[:: tile // g])
    parts = []
    for lo in range(0, len(wanted), step):
        part = slice(lo, lo + step)
        size = torch.minimum((growth * wanted[part].amax(1)).round().long(), stop[part] - first)
        ids = _pools(first, stop[part], size, rows=rows, width=pool, local=local, span=span // r, generator=generator)
        parts.append(_picks(ids, size, wanted[part], slots=slots, generator=generator))
    before = q_start // g - q_start // tile * (tile // g)
    blocks = len(rule.block_starts(q_start, q_len))
    groups = torch.cat(parts, 1).flatten(1, 2)[:, before : before + blocks].unflatten(0, (batch, share_heads))
    return Support.from_groups(groups, (groups >= 0).sum(-1), rule=rule, q_start=q_start, q_len=q_len)


def _pools(
    first: int,
    stop: Int[Tensor, " tiles"],
    size: Int[Tensor, " tiles"],
    *,
    rows: int,
    width: int,
    local: float,
    span: int,
    generator: torch.Generator,
) -> Int[Tensor, "rows tiles width"]:
    # `size` distinct candidates of each tile, ascending: some of the far ones, then some of the near
    near = (stop - first).clamp_max(span)
    far = stop - first - near
    from_far = torch.minimum((size * (1 - local)).round().long(), far)
    from_far = torch.maximum(from_far, size - near)
    slot = torch.arange(width, device=stop.device)
    is_near = slot >= from_far[:, None]
    draw = torch.rand(rows, len(stop), width, generator=generator, device=stop.device)
    draw += is_near
    draw.masked_fill_(slot >= size[:, None], 3.0)
    draw = (draw.sort(-1).values - is_near.float()).clamp_max_(1 - 2**-24)
    # a sorted draw with repetition from n - m + 1 values, plus 0, 1, ..., m - 1, has no repetition
    room = torch.where(is_near, (near - size + from_far)[:, None], (far - from_far)[:, None]) + 1
    start = torch.where(is_near, (stop - near - from_far)[:, None], first)
    return start + slot + (draw * room).long()


def _picks(
    ids: Int[Tensor, "rows tiles width"],
    size: Int[Tensor, " tiles"],
    wanted: Int[Tensor, "tiles blocks"],
    *,
    slots: int,
    generator: torch.Generator,
) -> Int[Tensor, "rows tiles blocks slots"]:
    # each block takes the `wanted` of its tile's pool that drew lowest
    rows, tiles, width = ids.shape
    draw = torch.rand(rows, tiles, wanted.shape[1], width, generator=generator, device=ids.device)
    draw.masked_fill_((torch.arange(width, device=ids.device) >= size[:, None])[:, None], 2.0)
    chosen = draw.topk(slots, largest=False).indices
    groups = ids[:, :, None].expand_as(draw).gather(-1, chosen)
    taken = torch.arange(slots, device=ids.device) < torch.minimum(wanted, size[:, None])[..., None]
    last = torch.iinfo(torch.int64).max
    groups = groups.masked_fill(~taken, last).sort(-1).values
    return groups.masked_fill(groups == last, -1)
