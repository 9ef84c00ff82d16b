"""Random tensors of one layer, with index queries that drift as fast as asked: what a benchmark is run on.

An index query is a stationary AR(1) walk, `iq_t = keep iq_{t-1} + sqrt(1 - keep^2) noise_t`. Neighbours that resemble each
other select nearly the same keys, so `keep` sets the growth U/K of the union of 32 neighbours' selections (U keys) over
one selection (K keys). Index keys are independent: selections are spread over the whole context, which is the dear case
for a kernel that gathers.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from topmass.bench.shapes import Shape
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.ops import index_topk, tile_union

__all__ = ["TILE", "Inputs", "drifting", "drifting_queries", "find_keep", "make_inputs", "select", "union_growth"]

# neighbouring queries whose union is measured: what one program of the kernels gathers for
TILE = 32
# decades of 1 - keep that are searched, in how many steps, on how many tiles
DECADES, STEPS, SAMPLED = (-5.0, 0.0), 12, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Queries, keys and values of a layer, and the finished queries and keys of its indexer."""

    q: Float[Tensor, "1 len q_heads dim"]
    k: Float[Tensor, "1 len kv_heads dim"]
    v: Float[Tensor, "1 len kv_heads dim"]
    iq: Float[Tensor, "1 len 1 index_dim"]
    ik: Float[Tensor, "1 groups index_dim"]

    @property
    def scale(self) -> float:
        """What multiplies the model's logits."""
        return self.q.shape[-1] ** -0.5


def make_inputs(
    shape: Shape,
    length: int,
    *,
    kv_block: int,
    dim: int = 128,
    keep: float = 0.99,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> Inputs:
    """Draw the tensors of one layer for a prompt of `length` tokens."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    q = draw(1, length, shape.q_heads, shape.head_dim)
    k, v = (draw(1, length, shape.kv_heads, shape.head_dim) for _ in range(2))
    ik = draw(1, length // kv_block, dim)
    return Inputs(q=q, k=k, v=v, ik=ik, iq=drifting_queries(length, dim, keep=keep, seed=seed + 1, like=q))


def drifting_queries(
    length: int, dim: int, *, keep: float, seed: int, like: Float[Tensor, "..."]
) -> Float[Tensor, "1 length 1 dim"]:
    """Index queries that drift, in the dtype and on the device of `like`."""
    generator = torch.Generator(like.device).manual_seed(seed)
    noise = torch.randn(length, dim, generator=generator, device=like.device)
    return drifting(noise, keep)[None, :, None].to(like.dtype)


def drifting(noise: Float[Tensor, "len dim"], keep: float) -> Float[Tensor, "len dim"]:
    """Turn independent normal rows into a stationary AR(1) walk whose neighbours correlate by `keep`.

    Example:
        >>> walk = drifting(torch.randn(2000, 64), 0.9)
        >>> round((walk[1:] * walk[:-1]).mean().item(), 1), round(walk.var().item(), 1)
        (0.9, 1.0)
    """
    walk = noise * math.sqrt(1 - keep**2)
    walk[0] = noise[0]
    # a scan by doubling: after each step a row holds the last 2 * step rows of noise
    step, weight = 1, keep
    while step < len(walk) and weight > 1e-8:
        walk = torch.cat([walk[:step], walk[step:] + weight * walk[:-step]])
        step, weight = 2 * step, weight**2
    return walk


def select(
    iq: Float[Tensor, "1 q_len 1 dim"],
    ik: Float[Tensor, "1 groups dim"],
    rule: SupportRule,
    *,
    start: int,
    backend: str,
) -> Support:
    """`index_topk` by a support rule."""
    assert rule.budget is not None
    return index_topk(
        iq,
        ik,
        budget=rule.budget,
        granularity=rule.granularity,
        sink=rule.sink,
        window=rule.window,
        q_start=start,
        backend=backend,
    )


def union_growth(support: Support, *, backend: str = "auto") -> float | None:
    """Keys in the union of 32 neighbours' selections over the mean selection of one; `None` where nothing is selected.

    Tiles with queries that read every key are left out. Where 32 queries share a selection the growth is 1.
    """
    g = support.granularity.q_block
    if g >= TILE:
        return 1.0
    dense = int((support.dense_len.max() if support.dense_len.numel() else torch.zeros(())).item())
    first = -(-max(dense, support.q_start) // TILE) * TILE
    end = (support.q_start + support.q_len) // TILE * TILE
    union = chosen = 0
    # lists of ids and words are as long as all selections of a tile: a few tiles at a time
    step = max(2**24 // (TILE // g * max(support.groups.shape[-1], 1)), 1) * TILE
    for lo in range(first, end, step):
        part = support.rows(lo - support.q_start, min(lo + step, end) - support.q_start)
        union += int(tile_union(part, tile=TILE, backend=backend).counts.sum())
        chosen += int(part.counts.sum())
    return union / (chosen / (TILE // g)) if chosen else None


def find_keep(
    ik: Float[Tensor, "1 groups dim"], rule: SupportRule, *, length: int, growth: float, seed: int, backend: str
) -> float:
    """The `keep` of index queries whose union growth is nearest to `growth`, on sampled tiles; `seed` is theirs.

    A walk must move at all: growth below about 1.02 is not reached.
    """
    low, high = DECADES
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = _sampled_growth(ik, rule, 1 - 10**middle, length=length, seed=seed, backend=backend)
        if found is None or found > growth:
            high = middle
        else:
            low = middle
    return 1 - 10 ** ((low + high) / 2)


def _sampled_growth(
    ik: Float[Tensor, "1 groups dim"], rule: SupportRule, keep: float, *, length: int, seed: int, backend: str
) -> float | None:
    iq = drifting_queries(length, ik.shape[-1], keep=keep, seed=seed, like=ik)
    dense = int(rule.dense_len(torch.tensor([length - 1])).item())
    first, last = -(-dense // TILE), length // TILE - 1
    tiles = torch.linspace(first, last, min(SAMPLED, max(last - first + 1, 0))).long().tolist()
    union = chosen = 0.0
    for tile in tiles:
        start = tile * TILE
        part = select(iq[:, start : start + TILE], ik, rule, start=start, backend=backend)
        if (growth := union_growth(part, backend=backend)) is not None:
            mean = part.counts.float().mean().item()
            union, chosen = union + growth * mean, chosen + mean
    return union / chosen if chosen else None
