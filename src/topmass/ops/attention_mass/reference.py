"""Definition of attention mass in plain PyTorch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topmass.core.granularity import Granularity, Share, split_queries
from topmass.core.rule import SupportRule
from topmass.ops._logits import causal_logits, rows_that_fit, softmax_and_normaliser
from topmass.ops.topk_support.reference import pool_scores_reference

__all__ = ["attention_mass_reference", "average_heads", "pool_mass"]


def attention_mass_reference(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    lse: Float[Tensor, "batch q_len q_heads"] | None,
    *,
    scale: float,
    q_start: int,
    positions: Int[Tensor, " q_len"] | None,
    softcap: float | None,
    sinks: Float[Tensor, " q_heads"] | None,
    granularity: Granularity,
    pool: str,
) -> tuple[Float[Tensor, "batch share_heads q_blocks groups"], Float[Tensor, "batch share_heads q_len"]]:
    """Pooled mass and what each row sums to; a few whole query blocks at a time, beside the result."""
    settings = {"scale": scale, "softcap": softcap, "sinks": sinks, "share": granularity.share}
    scores, totals = [], []
    step = rows_that_fit(q, k.shape[1], multiple=granularity.q_block)
    for lo, hi in split_queries(0 if positions is not None else q_start, q.shape[1], step):
        rows = slice(lo, hi)
        start, where = q_start + rows.start, None if positions is None else positions[rows]
        mass = _mass(q[:, rows], k, None if lse is None else lse[:, rows], q_start=start, positions=where, **settings)
        totals.append(mass.sum(-1))
        scores.append(pool_mass(mass, granularity=granularity, q_start=start, pool=pool))
    if len(scores) == 1:
        return scores[0], totals[0]
    return torch.cat(scores, 2), torch.cat(totals, 2)


def pool_mass(
    mass: Float[Tensor, "batch share_heads q_len kv_len"], *, granularity: Granularity, q_start: int, pool: str
) -> Float[Tensor, "batch share_heads q_blocks groups"]:
    """Mass at the granularity of a selection, without regard to its sink, window or budget."""
    rule = SupportRule(budget=None, granularity=granularity)
    return pool_scores_reference(mass, rule=rule, q_start=q_start, pool=pool)


def average_heads(
    p: Float[Tensor, "batch q_heads q_len kv_len"], *, share: Share, kv_heads: int
) -> Float[Tensor, "batch share_heads q_len kv_len"]:
    """Average probabilities over the heads that share a selection."""
    if share == "q_head":
        return p
    if share == "layer":
        return p.mean(1, keepdim=True)
    b, h, q_len, kv_len = p.shape
    return torch.mean(p.view(b, kv_heads, h // kv_heads, q_len, kv_len), 2)


def _mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    q_start: int,
    positions: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    share: Share,
) -> Float[Tensor, "batch share_heads q_len kv_len"]:
    logits = causal_logits(
        q, k, scale=scale, q_start=q_start if positions is None else k.shape[1], softcap=softcap
    )  # fmt: skip
    if positions is not None:
        logits.masked_fill_(torch.arange(k.shape[1], device=q.device) > positions[:, None], float("-inf"))
    if lse is None:
        p, _ = softmax_and_normaliser(logits, sinks)
    else:
        p = logits.sub_(lse.transpose(1, 2).to(logits.dtype)[..., None]).exp_()
    return average_heads(p, share=share, kv_heads=k.shape[2])
