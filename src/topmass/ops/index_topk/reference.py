"""Definition of an indexer's scores and selection in plain PyTorch."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topmass.core.granularity import split_queries
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import DataError
from topmass.ops._logits import causal_logits, rows_that_fit
from topmass.ops.topk_support import pool_scores, topk_support

__all__ = ["FLOAT8", "index_logits", "index_topk_reference", "mean_queries", "sum_heads"]

FLOAT8 = torch.float8_e4m3fn


def index_logits(
    iq: Float[Tensor, "batch rows heads dim"], ik: Float[Tensor, "batch groups dim"]
) -> Float[Tensor, "batch heads rows groups"]:
    """Scaled dot products of every head with the shared keys, in float32 (float64 for float64 inputs)."""
    # past every group: what is visible is the rule's affair
    return causal_logits(iq, ik[:, :, None], scale=iq.shape[-1] ** -0.5, q_start=ik.shape[1])


def sum_heads(logits: Float[Tensor, "batch heads rows groups"]) -> Float[Tensor, "batch rows groups"]:
    """Score of every group: the logit of a single head, or the sum of the heads' rectified logits."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.relu().sum(1)


def mean_queries(
    iq: Float[Tensor, "batch q_len heads dim"], *, q_block: int, q_start: int
) -> Float[Tensor, "batch q_blocks heads dim"]:
    """Mean of the existing queries of each block, rounded once to their dtype (float8: to float16).

    Summed in float32 (float64 for float64 inputs) in one order, by halves, so that a mean has the same bits on every device
    and in every chunk and batch.
    """
    q_len = iq.shape[1]
    iq = _widened(iq)
    wide = torch.float64 if iq.dtype == torch.float64 else torch.float32
    before = q_start % q_block
    after = -(before + q_len) % q_block
    existing = q_block
    if before or after:
        iq = F.pad(iq, (0, 0, 0, 0, before, after))
        first = torch.arange(-before, q_len + after, q_block, device=iq.device)
        existing = ((first + q_block).clamp_max(q_len) - first.clamp_min(0)).clamp_min(1)[:, None, None]
    total = iq.unflatten(1, (iq.shape[1] // q_block, q_block))
    size = q_block
    while size > 1:
        size //= 2
        total = total[:, :, :size].to(wide) + total[:, :, size:]
    return (total[:, :, 0] / existing).to(iq.dtype)


def _widened(x: Tensor) -> Tensor:
    """Float8 numbers in float16, which holds all of them; others as they are."""
    return x.half() if x.dtype == FLOAT8 else x


def index_topk_reference(
    iq: Float[Tensor, "batch rows heads dim"],
    ik: Float[Tensor, "kv_batch groups dim"],
    *,
    rule: SupportRule,
    q_start: int,
    q_len: int,
    reduce: str | None,
    score_dtype: torch.dtype,
    page_table: Int[Tensor, "batch pages"] | None = None,
) -> Support:
    """Score, round, reduce and select, one chunk of whole query blocks at a time.

    Args:
        iq: A row for every query, or with `reduce=None` for every query block.
        q_len: Queries covered.
    """
    if not q_len:
        none = torch.zeros(iq.shape[0], 1, len(rule.block_starts(q_start, 0)), dtype=torch.int32, device=iq.device)
        return Support.from_groups(none[..., None][..., :0], none, rule=rule, q_start=q_start, q_len=0)
    if page_table is not None:
        ik = _unpaged(ik, page_table, rule, q_start, q_len)
    iq, ik = _widened(iq), _widened(ik)
    g, heads = rule.granularity.q_block, iq.shape[2]
    # queries that a row stands for
    each = g if reduce is None else 1
    # beside the logits of every head: scores, and what top-k and softmax need
    step = rows_that_fit(iq, ik.shape[1], heads=heads + 6, multiple=g // each) * each
    settings = {"rule": rule, "reduce": reduce, "score_dtype": score_dtype}
    parts = []
    for lo, hi in split_queries(q_start, q_len, step):
        start, end = q_start + lo, q_start + hi
        rows = slice(start // each - q_start // each, -(-end // each) - q_start // each)
        parts.append(_select(iq[:, rows], ik, q_start=start, q_len=hi - lo, **settings))
    return Support.cat(parts)


def _unpaged(
    ik: Float[Tensor, "pool page_groups dim"],
    page_table: Int[Tensor, "batch pages"],
    rule: SupportRule,
    q_start: int,
    q_len: int,
) -> Float[Tensor, "batch groups dim"]:
    """Keys of the groups that a query may read; what the table says of later ones has no say."""
    stop = rule.candidate_range(rule.block_starts(q_start, q_len)[-1:])[1]
    table = page_table[:, : -(-int(stop) // max(ik.shape[1], 1))].long()
    return ik[table].flatten(1, 2)


def _select(
    iq: Float[Tensor, "batch rows heads dim"],
    ik: Float[Tensor, "batch groups dim"],
    *,
    rule: SupportRule,
    q_start: int,
    q_len: int,
    reduce: str | None,
    score_dtype: torch.dtype,
) -> Support:
    first, stop = rule.candidate_range(rule.block_starts(q_start, q_len))
    ik = ik[:, : int(stop.max())]
    scores = sum_heads(index_logits(iq, ik))
    if bool(scores.isnan().any()):
        raise DataError("The indexer's scores hold NaN: check its weights and the hidden states it is given.")
    by_mass = rule.budget is not None and rule.budget.mass is not None
    candidate = _candidates(ik, first, stop) if by_mass or reduce == "max_prob" else None
    if reduce == "max_prob":
        assert candidate is not None
        scores = _log_probabilities(scores, candidate, rule.granularity.q_block, q_start)
    largest = min(torch.finfo(score_dtype).max, torch.finfo(scores.dtype).max)
    scores = scores.clamp(-largest, largest).to(score_dtype).to(scores.dtype)
    pooled = scores[:, None] if reduce is None else _reduce(scores[:, None], rule, q_start, reduce)
    mass = None
    if by_mass:
        assert candidate is not None
        # a block without candidates has a row of NaN
        mass = pooled.masked_fill(~candidate, float("-inf")).softmax(-1).masked_fill(~candidate, 0.0)
    return topk_support(pooled, rule=rule, q_start=q_start, q_len=q_len, mass=mass, has_rest=False)


def _candidates(
    ik: Float[Tensor, "batch groups dim"], first: int, stop: Int[Tensor, " q_blocks"]
) -> Bool[Tensor, "q_blocks groups"]:
    """Which groups each block chooses among."""
    group = torch.arange(ik.shape[1], device=ik.device)
    return (group >= first) & (group < stop.to(ik.device)[:, None])


def _log_probabilities(
    scores: Float[Tensor, "batch rows groups"], candidate: Bool[Tensor, "q_blocks groups"], q_block: int, q_start: int
) -> Float[Tensor, "batch rows groups"]:
    """Logarithm of the softmax of each query's scores over the candidates of its block; `-inf` elsewhere."""
    row = torch.arange(q_start, q_start + scores.shape[1], device=scores.device)
    own = candidate[row // q_block - q_start // q_block]
    logs = scores.masked_fill(~own, float("-inf")).log_softmax(-1)
    # without a candidate all of a row is NaN
    return logs.masked_fill(~own, float("-inf"))


def _reduce(
    scores: Float[Tensor, "batch 1 rows groups"], rule: SupportRule, q_start: int, reduce: str
) -> Float[Tensor, "batch 1 q_blocks groups"]:
    g = rule.granularity.q_block
    if reduce != "mean" and g > 1:
        before = q_start % g
        after = -(before + scores.shape[2]) % g
        return F.pad(scores, (0, 0, before, after), value=float("-inf")).unflatten(2, (-1, g)).amax(3)
    by_query = replace(rule, budget=None, granularity=replace(rule.granularity, kv_block=1))
    return pool_scores(scores, rule=by_query, q_start=q_start)
