"""Public entry point of the op: checks, picks a backend, calls it."""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import register_triton
from topmass.ops.topk_support.reference import pool_scores_reference, topk_groups_reference

__all__ = ["Pool", "pool_scores", "topk_support"]

Pool = Literal["sum", "max"]

_dispatch.register("topk_support", _dispatch.KernelBackend(name="reference", fn=topk_groups_reference))
register_triton("topk_support", "topmass.ops.topk_support._triton", "topk_groups_triton")


def pool_scores(
    scores: Float[Tensor, "batch share_heads q_len kv_len"], *, rule: SupportRule, q_start: int = 0, pool: Pool = "sum"
) -> Float[Tensor, "batch share_heads q_blocks groups"]:
    """Reduce token scores to the granularity of `rule`.

    Scores are averaged over each block's existing queries, then summed (or maximised) over each complete key group. An
    incomplete group at the end has no score: it always lies inside the window.

    Args:
        q_start: Position of the first query; blocks are aligned to absolute positions.
        pool: How a key group is scored from its tokens.

    Raises:
        ConfigError: `pool` is unknown.
    """
    if pool not in get_args(Pool):
        raise ConfigError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}.")
    return pool_scores_reference(scores, rule=rule, q_start=q_start, pool=pool)


def topk_support(
    scores: Float[Tensor, "batch share_heads q_blocks groups"],
    *,
    rule: SupportRule,
    q_start: int,
    q_len: int,
    mass: Float[Tensor, "batch share_heads q_blocks groups"] | None = None,
    has_rest: bool = True,
    backend: str = "auto",
) -> Support:
    """Best candidate groups of every query block by the support rule; ties break to the lower group.

    Args:
        scores: Pooled scores; only candidates are compared.
        rule: What is forced, what competes, how much is taken.
        q_start: Position of the first query.
        q_len: Queries covered.
        mass: Pooled mass (always summed), needed for a mass budget.
        has_rest: Whether mass not on candidates lies on forced keys, as it does for attention mass. False if `mass` is
            a distribution over the candidates alone.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Raises:
        ConfigError: A mass budget without `mass`, or scores that do not cover the blocks and their candidates.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch
        >>> from topmass.core.budget import Budget
        >>> rule = SupportRule(budget=Budget(tokens=3))
        >>> scores = torch.tensor([0.1, 0.4, 0.1, 0.3, 0.1]).view(1, 1, 1, 5)
        >>> topk_support(scores, rule=rule, q_start=4, q_len=1).groups.tolist()
        [[[[1, 3]]]]
    """
    if rule.budget is not None and rule.budget.mass is not None and mass is None:
        raise ConfigError("A mass budget needs the mass of every group; pass mass=.")
    g, end = rule.granularity.q_block, q_start + q_len
    if scores.shape[2] != (blocks := -(-end // g) - q_start // g):
        raise ConfigError(f"{blocks} query blocks need scores, got {scores.shape[2]}.")
    last = rule.candidates_end(end - 1) if blocks else 0
    if rule.sink_tokens // rule.granularity.kv_block < last and scores.shape[3] < last:
        raise ConfigError(f"{last} key groups are candidates, but there are scores of {scores.shape[3]}.")
    kwargs = {"rule": rule, "q_start": q_start, "q_len": q_len, "has_rest": has_rest}
    impl = _dispatch.resolve("topk_support", backend, scores, mass, **kwargs)
    groups, counts = impl.fn(scores, mass, **kwargs)
    return Support.from_groups(groups, counts, rule=rule, q_start=q_start, q_len=q_len)
