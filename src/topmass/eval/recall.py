"""How much of the oracle's support another support holds, and of the attention mass."""

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from topmass.core.budget import Budget
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.ops import attention_mass
from topmass.ops.topk_support import pool_scores, topk_support
from topmass.ops.topk_support.interface import Pool
from topmass.selection.base import AttentionInputs

__all__ = ["RecallMeter", "SupportQuality", "support_quality"]

# stretches of a call's queries that are measured, and their queries
TILES, TILE = 4, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportQuality:
    """One value per query that reads a support; queries that the rule makes dense are left out.

    Attributes:
        recall: Share of the oracle's keys, forced ones included, that the support holds.
        retained: Attention mass on the support, a learned sink's included.
        attainable: Attention mass on the oracle's support.
    """

    recall: Float[Tensor, "batch share_heads rows"]
    retained: Float[Tensor, "batch share_heads rows"]
    attainable: Float[Tensor, "batch share_heads rows"]


def support_quality(
    support: Support,
    mass: Float[Tensor, "batch share_heads q_len kv_len"],
    *,
    rule: SupportRule,
    pool: Pool = "sum",
) -> SupportQuality:
    """Compare a support with the oracle's under `rule`, for the same queries.

    Args:
        support: What a selector chose for queries at positions `support.q_start ...`.
        mass: Attention mass of these queries, averaged over the heads that share a selection.
        rule: The oracle's support rule: the budget and granularity at which the comparison is made.
        pool: How the oracle makes a group's score from its tokens.
    """
    start, rows, kv_len = support.q_start, support.q_len, mass.shape[-1]
    scores = pool_scores(mass, rule=rule, q_start=start, pool=pool)
    summed = None
    if rule.budget is not None and rule.budget.mass is not None:
        summed = scores if pool == "sum" else pool_scores(mass, rule=rule, q_start=start, pool="sum")
    best = topk_support(scores, rule=rule, q_start=start, q_len=rows, mass=summed)
    sparse = support.sparse_rows() & best.sparse_rows()
    chosen, ideal = (s.mask(kv_len)[:, :, sparse] for s in (support, best))
    p = mass[:, :, sparse]
    return SupportQuality(
        recall=(chosen & ideal).sum(-1) / ideal.sum(-1),
        retained=1 - p.masked_fill(chosen, 0.0).sum(-1),
        attainable=1 - p.masked_fill(ideal, 0.0).sum(-1),
    )


class RecallMeter:
    """Mean recall of the oracle's keys, over sampled prompt queries and layers; give it to `run.observe`.

    The oracle has the selector's own budget and granularity, so what is measured is the scoring alone.
    """

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    @property
    def recall(self) -> float | None:
        """The mean so far; `None` if no query read a support."""
        return self._sum / self._count if self._count else None

    def __call__(self, inputs: AttentionInputs, support: Support, rule: SupportRule) -> None:
        """Measure one selection."""
        if support.q_len == 1:  # generated
            return
        rule = _with_budget(rule)
        for lo, hi in _tiles(support):
            start = support.q_start + lo
            mass = attention_mass(
                inputs.q[:, lo:hi],
                inputs.k[:, : support.q_start + hi],
                scale=inputs.logit_scale,
                q_start=start,
                softcap=inputs.softcap,
                sinks=inputs.sinks,
                share=rule.granularity.share,
            )
            found = support_quality(support.rows(lo, hi), mass, rule=rule).recall
            self._sum += float(found.sum())
            self._count += found.numel()


def _with_budget(rule: SupportRule) -> SupportRule:
    """The oracle's rule for a selector; one with sink and window only has them as its budget."""
    if rule.budget is not None:
        return rule
    free = replace(rule, sink=0, window=1)
    return replace(free, budget=Budget(tokens=max(rule.sink_tokens + rule.window, free.smallest_budget)))


def _tiles(support: Support) -> list[tuple[int, int]]:
    """Evenly spread stretches of the queries that read a support, cut where query blocks are; the last ones always."""
    sparse = support.sparse_rows().nonzero().flatten()
    if not len(sparse):
        return []
    g = support.granularity.q_block
    tile = max(TILE, g)
    first, end = int(sparse[0]) + support.q_start, support.q_start + support.q_len
    blocks = list(range(first // tile, -(-end // tile)))
    chosen = sorted({blocks[round(i * (len(blocks) - 1) / max(TILES - 1, 1))] for i in range(TILES)})
    starts = [max(b * tile, support.q_start) - support.q_start for b in chosen]
    return [(lo, min((b + 1) * tile, end) - support.q_start) for lo, b in zip(starts, chosen, strict=True)]
