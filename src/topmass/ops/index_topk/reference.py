"""Definition of an indexer's scores and selection in plain PyTorch."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import DataError
from topmass.ops._logits import causal_logits, rows_that_fit
from topmass.ops.topk_support import pool_scores, topk_support

__all__ = ["index_logits", "index_topk_reference", "sum_heads"]


def index_logits(
    iq: Float[Tensor, "batch rows heads dim"], ik: Float[Tensor, "batch groups dim"]
) -> Float[Tensor, "batch heads rows groups"]:
    """Scaled dot products of every head with the shared keys, in float32 (float64 for float64 inputs)."""
    # past every group: what is visible is the rule's affair
    return causal_logits(iq, ik[:, :, None], scale=iq.shape[-1] ** -0.5, q_start=ik.shape[1])


def sum_heads(logits: Float[Tensor, "batch heads rows groups"]) -> Float[Tensor, "batch rows groups"]:
    """Score of every group: the logit of a single head, or the sum of the heads' rectified logits."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.relu().sum(1)


def index_topk_reference(
    iq: Float[Tensor, "batch q_len heads dim"],
    ik: Float[Tensor, "batch groups dim"],
    *,
    rule: SupportRule,
    q_start: int,
    reduce: str,
    score_dtype: torch.dtype,
) -> Support:
    """Score, round, reduce and select, one chunk of whole query blocks at a time."""
    g, q_len, heads = rule.granularity.q_block, iq.shape[1], iq.shape[2]
    # beside the logits of every head: scores, and what top-k and softmax need
    step = rows_that_fit(iq, ik.shape[1], heads=heads + 6, multiple=g)
    parts = []
    start = 0
    while start < q_len or not parts:
        # the first chunk ends where a block does
        end = min((q_start + start) // g * g + step - q_start, q_len)
        parts.append(
            _select(iq[:, start:end], ik, rule=rule, q_start=q_start + start, reduce=reduce, score_dtype=score_dtype)
        )
        start = end
    return Support.cat(parts)


def _select(
    iq: Float[Tensor, "batch rows heads dim"],
    ik: Float[Tensor, "batch groups dim"],
    *,
    rule: SupportRule,
    q_start: int,
    reduce: str,
    score_dtype: torch.dtype,
) -> Support:
    rows = iq.shape[1]
    first, stop = rule.candidate_range(rule.block_starts(q_start, rows))
    ik = ik[:, : int(stop.max()) if rows else 0]
    scores = sum_heads(index_logits(iq, ik))
    if bool(scores.isnan().any()):
        raise DataError("The indexer's scores hold NaN: check its weights and the hidden states it is given.")
    largest = min(torch.finfo(score_dtype).max, torch.finfo(scores.dtype).max)
    scores = scores.clamp(-largest, largest).to(score_dtype).to(scores.dtype)
    pooled = _reduce(scores[:, None], rule, q_start, reduce)
    mass = None
    if rule.budget is not None and rule.budget.mass is not None:
        group = torch.arange(ik.shape[1], device=ik.device)
        candidate = (group >= first) & (group < stop.to(ik.device)[:, None])
        # a block without candidates has a row of NaN
        mass = pooled.masked_fill(~candidate, float("-inf")).softmax(-1).masked_fill(~candidate, 0.0)
    return topk_support(pooled, rule=rule, q_start=q_start, q_len=rows, mass=mass, has_rest=False)


def _reduce(
    scores: Float[Tensor, "batch 1 rows groups"], rule: SupportRule, q_start: int, reduce: str
) -> Float[Tensor, "batch 1 q_blocks groups"]:
    g = rule.granularity.q_block
    if reduce == "max" and g > 1:
        before = q_start % g
        after = -(before + scores.shape[2]) % g
        return F.pad(scores, (0, 0, before, after), value=float("-inf")).unflatten(2, (-1, g)).amax(3)
    by_query = replace(rule, budget=None, granularity=replace(rule.granularity, kv_block=1))
    return pool_scores(scores, rule=by_query, q_start=q_start)
