"""Definition of the support rule's selection in plain PyTorch."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topmass.core.rule import SupportRule

__all__ = ["pool_scores_reference", "topk_groups_reference"]


def pool_scores_reference(
    scores: Float[Tensor, "batch share_heads q_len kv_len"], *, rule: SupportRule, q_start: int, pool: str
) -> Float[Tensor, "batch share_heads q_blocks groups"]:
    """Average over the block's existing queries, then reduce over each complete key group."""
    g, r = rule.granularity.q_block, rule.granularity.kv_block
    q_len, kv_len = scores.shape[2:]
    if g > 1:
        before = q_start % g
        scores = F.pad(scores, (0, 0, before, -(before + q_len) % g)).unflatten(2, (-1, g)).sum(3)
        first = rule.block_starts(q_start, q_len, scores.device)
        existing = (first + g).clamp_max(q_start + q_len) - first.clamp_min(q_start)
        scores = scores / existing[:, None]
    if r > 1:
        whole = scores[..., : kv_len // r * r].unflatten(-1, (-1, r))
        scores = whole.sum(-1) if pool == "sum" else whole.amax(-1)
    return scores


def topk_groups_reference(
    scores: Float[Tensor, "batch share_heads q_blocks groups"],
    mass: Float[Tensor, "batch share_heads q_blocks groups"] | None,
    *,
    rule: SupportRule,
    q_start: int,
    q_len: int,
    has_rest: bool,
) -> tuple[Int[Tensor, "batch share_heads q_blocks slots"], Int[Tensor, "batch share_heads q_blocks"]]:
    """Ids of the best candidate groups, ascending and padded with -1, and their number."""
    t0 = rule.block_starts(q_start, q_len, scores.device)
    first, stop = rule.candidate_range(t0)
    group = torch.arange(scores.shape[-1], device=scores.device)
    candidate = (group >= first) & (group < stop[:, None])
    wanted = torch.minimum(rule.groups_wanted(t0), (stop - first).clamp_min(0))
    slots = int(wanted.max()) if wanted.numel() else 0
    if slots == 0:
        empty = scores.new_zeros(scores.shape[:3], dtype=torch.int32)
        return empty[..., None][..., :0], empty
    scores = scores.masked_fill(~candidate, float("-inf"))
    if rule.budget is not None and rule.budget.mass is not None:
        assert mass is not None
        taken = _until_mass(scores, mass, candidate, wanted, target=float(rule.budget.mass), has_rest=has_rest)
    else:
        taken = _best(scores, candidate, wanted, slots)
    return _pack(taken, slots)


def _best(
    scores: Float[Tensor, "batch share_heads q_blocks groups"],
    candidate: Bool[Tensor, "q_blocks groups"],
    wanted: Int[Tensor, " q_blocks"],
    slots: int,
) -> Bool[Tensor, "batch share_heads q_blocks groups"]:
    # everything above the threshold, then the first of the ties
    best = scores.topk(slots, -1).values
    last = (wanted - 1).clamp_min(0)[:, None].expand(*best.shape[:2], -1, 1)
    threshold = best.gather(-1, last)
    above = (scores > threshold) & candidate
    tied = (scores == threshold) & candidate
    room = wanted[:, None] - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))


def _until_mass(
    scores: Float[Tensor, "batch share_heads q_blocks groups"],
    mass: Float[Tensor, "batch share_heads q_blocks groups"],
    candidate: Bool[Tensor, "q_blocks groups"],
    wanted: Int[Tensor, " q_blocks"],
    *,
    target: float,
    has_rest: bool,
) -> Bool[Tensor, "batch share_heads q_blocks groups"]:
    # the smallest prefix, in order of score, that together with the forced keys holds the target mass
    mass = mass.double().masked_fill(~candidate, 0.0)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    reached = mass.gather(-1, order).cumsum(-1)
    forced = 1.0 - reached[..., -1:] if has_rest else torch.zeros_like(reached[..., -1:])
    short = forced + torch.cat([torch.zeros_like(forced), reached[..., :-1]], -1) < target
    rank = torch.arange(scores.shape[-1], device=scores.device)
    keep = short & (rank < wanted[:, None])
    return torch.zeros_like(keep).scatter(-1, order, keep) & candidate


def _pack(
    taken: Bool[Tensor, "batch share_heads q_blocks groups"], slots: int
) -> tuple[Int[Tensor, "batch share_heads q_blocks slots"], Int[Tensor, "batch share_heads q_blocks"]]:
    slot = taken.cumsum(-1, dtype=torch.int32)
    counts = slot[..., -1].clone()
    group = torch.arange(taken.shape[-1], device=taken.device, dtype=torch.int32).expand_as(taken)
    # column `slots` swallows what was not taken
    groups = torch.full((*taken.shape[:3], slots + 1), -1, device=taken.device, dtype=torch.int32)
    groups.scatter_(-1, (slot - 1).masked_fill_(~taken, slots).long(), group)
    return groups[..., :slots].contiguous(), counts
