"""Public entry point of the op: checks, picks a backend, calls it."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topmass.core.budget import Budget, BudgetLike
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import register_triton
from topmass.ops.index_topk.reference import FLOAT8, index_topk_reference, mean_queries

__all__ = ["Reduce", "check_index", "index_topk"]

Reduce = Literal["mean", "max", "max_prob"]

_dispatch.register("index_topk", _dispatch.KernelBackend(name="reference", fn=index_topk_reference))
register_triton("index_topk", "topmass.ops.index_topk._triton", "index_topk_triton")


def index_topk(
    iq: Float[Tensor, "batch q_len heads dim"],
    ik: Float[Tensor, "kv_batch groups dim"],
    *,
    budget: BudgetLike,
    granularity: Granularity,
    sink: int = 0,
    window: int = 1,
    dense_below: int = 0,
    q_start: int = 0,
    reduce: Reduce = "max",
    score_dtype: torch.dtype | None = None,
    page_table: Int[Tensor, "batch pages"] | None = None,
    backend: str = "auto",
) -> Support:
    """Support of the best key groups by an indexer's score; ties break to the lower group.

    The score of a group is `q . k / sqrt(dim)`, or with several heads the sum over heads of `ReLU(q . k) / sqrt(dim)`,
    accumulated in float32 and rounded once to `score_dtype`, then reduced over the queries that share a selection. A mean
    over the queries of a single head is taken before the product instead: their mean, rounded once to the dtype of `iq`
    (float8: to float16), is the query of the block.

    Args:
        iq: The indexer's queries, positions `q_start ...`, after norm and RoPE.
        ik: The indexer's keys, one for every complete group from position 0 on: pooled, normed, rotated. Both may be
            `float8_e4m3fn`, without scales.
        budget: Keys per query. Mass is the softmax of the reduced score over the candidates, in the indexer's opinion.
        granularity: Unit of selection; an indexer selects once for the whole layer.
        sink: Keys always read at the start, in tokens, inside the budget.
        window: Keys always read up to and including the query's own, in tokens, inside the budget.
        dense_below: Queries that see at most this many keys read them all.
        q_start: Position of the first query.
        reduce: Score of a query block from its existing queries. `"max_prob"` is the greatest probability that one of them gives
            the group, by the softmax of its scores over the block's candidates: scores of different queries have no common
            zero, so that one query's keys can crowd out another's under `"max"`.
        score_dtype: Dtype that scores are rounded to. `None` is float16, or float64 for float64 inputs.
        page_table: Which page of `ik`, then a pool of pages `[pages, page_groups, dim]`, holds the groups
            `i * page_groups ...` of each sequence. `None` means that `ik` holds one sequence per row.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Raises:
        ConfigError: The budget does not fit, `reduce` or `granularity.share` is not possible, or keys are missing.
        DataError: A score is NaN. A kernel, which cannot stop to look, ranks NaN lowest instead.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> iq, ik = torch.ones(1, 1, 1, 4), torch.tensor([0.1, 0.4, 0.4, 0.3, 0.1])[None, :, None].expand(1, 5, 4)
        >>> index_topk(iq, ik, budget=3, granularity=Granularity(), q_start=4).groups.tolist()
        [[[[1, 2]]]]
    """
    rule = SupportRule(
        budget=Budget.parse(budget), granularity=granularity, sink=sink, window=window, dense_below=dense_below
    )
    check_index(iq, ik, granularity=granularity, reduce=reduce, page_table=page_table)
    if iq.shape[1]:
        # the last query block may read the most
        stop = rule.candidates_end(q_start + iq.shape[1] - 1)
        groups = ik.shape[1] * (1 if page_table is None else page_table.shape[1])
        if rule.sink_tokens // granularity.kv_block < stop and groups < stop:
            raise ConfigError(f"The queries may read {stop} key groups, but ik holds {groups}.")
    if score_dtype is None:
        score_dtype = torch.float64 if iq.dtype == torch.float64 else torch.float16
    if not score_dtype.is_floating_point:
        raise ConfigError(f"score_dtype must be a floating-point dtype, got {score_dtype}.")
    # the mean of products is the product of the mean, unless ReLU comes between
    averaged = granularity.q_block > 1 and reduce == "mean" and iq.shape[2] == 1
    kwargs = {
        "rule": rule,
        "q_start": q_start,
        "q_len": iq.shape[1],
        "reduce": None if averaged or granularity.q_block == 1 else reduce,
        "score_dtype": score_dtype,
        "page_table": page_table,
    }
    impl = _dispatch.resolve("index_topk", backend, iq, ik, **kwargs)
    # autocast would run float32 products in half precision
    with torch.autocast(iq.device.type, enabled=False):
        if averaged:
            iq = mean_queries(iq, q_block=granularity.q_block, q_start=q_start)
        return impl.fn(iq, ik, **kwargs)


def check_index(
    iq: Float[Tensor, "batch q_len heads dim"],
    ik: Float[Tensor, "kv_batch groups dim"],
    *,
    granularity: Granularity,
    reduce: str,
    page_table: Int[Tensor, "batch pages"] | None = None,
) -> None:
    """Refuse what no indexer can score.

    Raises:
        ConfigError: `reduce` is unknown, heads do not share their selection, or sequences, sizes or dtypes differ.
    """
    if reduce not in get_args(Reduce):
        raise ConfigError(f"reduce must be one of {', '.join(get_args(Reduce))}, got {reduce!r}.")
    if granularity.share != "layer":
        raise ConfigError(f"An indexer selects once for all heads: share must be 'layer', got {granularity.share!r}.")
    if iq.dtype != ik.dtype:
        raise ConfigError(f"The indexer's queries and keys need one dtype, got {iq.dtype} and {ik.dtype}.")
    if iq.dtype.itemsize == 1 and iq.dtype != FLOAT8:
        raise ConfigError(f"The indexer's queries and keys in 8 bits must be {FLOAT8}, got {iq.dtype}.")
    sequences = (ik if page_table is None else page_table).shape[0]
    if (iq.shape[0], iq.shape[-1]) != (sequences, ik.shape[-1]):
        raise ConfigError(
            f"The indexer's queries and keys{'' if page_table is None else ' (by the page table)'} must agree in "
            f"sequences and dim, got {(iq.shape[0], iq.shape[-1])} and {(sequences, ik.shape[-1])}."
        )
