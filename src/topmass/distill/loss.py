"""Exact KL between the dense attention mass and an indexer's softmax, with its closed-form gradient.

For a query block `i` with visible key groups `V`:

    target   P[i, j]  the model's own probabilities: averaged over heads, then over the block's existing queries, then
                      summed (or maximised) over the group's tokens, renormalised over V
    student  Q[i, :]  softmax over V of S[i, j], the indexer's score reduced over the block's existing queries
    loss_i = sum_j P (log P - log Q),   d loss_i / d S[i, j] = Q[i, j] - P[i, j]

Both follow the order in which the served selection ranks. The gradient is accumulated while the loss is computed, row
chunk by row chunk: nothing is N x N, and autograd sees two inputs and one number.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.errors import ConfigError, DataError
from topmass.ops import kl_rows, pooled_mass
from topmass.ops._logits import rows_that_fit
from topmass.ops.index_topk.interface import Reduce, check_index
from topmass.ops.index_topk.reference import index_logits, sum_heads
from topmass.ops.topk_support.interface import Pool

__all__ = ["indexer_kl"]

TOLERANCE = 1e-3


def indexer_kl(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    lse: Float[Tensor, "batch q_len q_heads"],
    iq: Float[Tensor, "batch q_len heads dim"],
    ik: Float[Tensor, "batch groups dim"],
    *,
    scale: float,
    granularity: Granularity,
    q_start: int = 0,
    pool: Pool = "sum",
    reduce: Reduce = "max",
    softcap: float | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    sink: int = 0,
    window: int = 1,
    mask_forced: bool = False,
    rows: Int[Tensor, " rows"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    """Mean KL per row, in nats, of an indexer's softmax from the dense attention mass.

    A row is a query block of a sequence (at `q_block=1` a query). What it may score, with `t0` the position at which the
    block begins:

    - `mask_forced=True`: the candidates of the support rule, complete groups past the sink that end at or before the
      window's start.
    - `mask_forced=False`: every complete group that ends at or before `t0` (inclusive): all that each query of the block
      sees entirely. `sink` and `window` have no effect.

    A row that may score nothing, or whose target holds no mass there, counts as a row with loss 0 and gradient 0, so the
    mean over uniformly drawn `rows` is an unbiased estimate of the mean over all of them.

    Gradients flow to `iq` and `ik` only; the model's attention is a constant. Scores are not rounded to a score dtype.

    Args:
        q: The model's queries, positions `q_start ...`, after norm and RoPE.
        k: The model's keys, positions `0 ...`, after norm and RoPE.
        lse: Natural-log normaliser of the dense attention, learned sinks included.
        iq: The indexer's queries, finished.
        ik: The indexer's keys, one for every complete group.
        scale: Multiplies the model's logits.
        granularity: Unit of selection that will be served.
        q_start: Position of the first query.
        pool: Mass of a key group from its tokens, as the target ranks it.
        reduce: Score of a query block from its existing queries, as it will be served.
        softcap: Logits become `softcap * tanh(logits / softcap)`. `None` leaves them.
        sinks: One learned sink logit per query head.
        sink: Keys always read at the start, in tokens.
        window: Keys always read up to and including the query's own, in tokens.
        mask_forced: Leave sink and window out of target and student.
        rows: Blocks to use, each once, in any order; 0 holds the first query. `None` uses all.
        chunk: Queries computed at a time, rounded up to whole blocks. `None` fills the workspace.

    Raises:
        ConfigError: A setting is unknown, keys are missing, or `rows` repeats or reaches past the blocks.
        DataError: A row of the model's probabilities does not sum to 1 within 1e-3, or a score is NaN.

    Source: the gradient is that of a softmax cross-entropy; the objective is that of arXiv 2606.07703 and of DSA's
    warm-up (DeepSeek-V3.2 report, Eq. 3).

    Example:
        >>> q, k, iq = torch.randn(1, 6, 2, 4), torch.randn(1, 6, 1, 4), torch.zeros(1, 6, 1, 4, requires_grad=True)
        >>> logits = torch.einsum("bthd,bsxd->bths", q, k).masked_fill(torch.ones(6, 6).triu(1).bool()[:, None], -1e9)
        >>> loss = indexer_kl(q, k, logits.logsumexp(-1), iq, torch.ones(1, 6, 4), scale=1.0, granularity=Granularity())
        >>> loss.backward()
        >>> loss.item() > 0, iq.grad.shape
        (True, torch.Size([1, 6, 1, 4]))
    """
    if pool not in get_args(Pool):
        raise ConfigError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}.")
    check_index(iq, ik, granularity=granularity, reduce=reduce)
    if reduce == "max_prob" and granularity.q_block > 1:
        raise ConfigError("reduce='max_prob' has no gradient for a block of queries; train with q_block=1.")
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk must be at least 1 query, got {chunk}.")
    g = granularity.q_block
    # rows of the mass, of every head's logits and of what is made of them
    step = rows_that_fit(q, k.shape[1], heads=2 * iq.shape[2] + 8, multiple=g) if chunk is None else -(-chunk // g) * g
    problem = _Problem(
        q=q.detach(),
        k=k.detach(),
        lse=lse.detach(),
        sinks=None if sinks is None else sinks.detach(),
        scale=scale,
        softcap=softcap,
        # sink 0 and window 1 where they have no effect: the rule may not refuse them
        rule=SupportRule(
            budget=None, granularity=granularity, sink=sink * mask_forced, window=window if mask_forced else 1
        ),
        q_start=q_start,
        pool=pool,
        reduce=reduce,
        mask_forced=mask_forced,
        rows=_rows(rows, -(-(q_start + q.shape[1]) // g) - q_start // g),
        blocks_per_chunk=step // g,
        wants_gradient=torch.is_grad_enabled() and (iq.requires_grad or ik.requires_grad),
    )
    first, stop = problem.visible(problem.rows)
    if stop.numel() and ik.shape[1] < int(stop.max()) and first < int(stop.max()):
        raise ConfigError(f"The queries may score {int(stop.max())} key groups, but ik holds {ik.shape[1]}.")
    return _IndexerKL.apply(iq, ik, problem)


def _rows(rows: Int[Tensor, " rows"] | None, blocks: int) -> Int[Tensor, " sorted_rows"]:
    if rows is None:
        return torch.arange(blocks)
    rows = rows.detach().cpu().long().sort().values
    if not rows.numel():
        raise ConfigError("rows is empty: draw at least one row.")
    if int(rows[0]) < 0 or int(rows[-1]) >= blocks or bool((rows.diff() == 0).any()):
        raise ConfigError(f"rows must be different indices in 0..{blocks - 1}, one per query block.")
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What the loss needs beside its two differentiable inputs; row indices live on the host."""

    q: Float[Tensor, "batch q_len q_heads head_dim"]
    k: Float[Tensor, "batch kv_len kv_heads head_dim"]
    lse: Float[Tensor, "batch q_len q_heads"]
    sinks: Float[Tensor, " q_heads"] | None
    scale: float
    softcap: float | None
    rule: SupportRule
    q_start: int
    pool: Pool
    reduce: str
    mask_forced: bool
    rows: Int[Tensor, " rows"]
    blocks_per_chunk: int
    wants_gradient: bool

    def block_starts(self, rows: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        g = self.rule.granularity.q_block
        return (rows + self.q_start // g) * g

    def visible(self, rows: Int[Tensor, " some"]) -> tuple[int, Int[Tensor, " some"]]:
        """First group that these rows may score, and the one past the last."""
        t0 = self.block_starts(rows)
        if self.mask_forced:
            return self.rule.candidate_range(t0)
        return 0, (t0 + 1) // self.rule.granularity.kv_block

    def chunks(self) -> Iterator["_Chunk"]:
        """The rows, some at a time; what the device has to know of them goes there once, and is cut up there."""
        device, g = self.q.device, self.rule.granularity.q_block
        t = self.block_starts(self.rows)[:, None] + torch.arange(g)
        exists = (t >= self.q_start) & (t < self.q_start + self.q.shape[1])
        t, ends = t[exists], exists.sum(1).cumsum(0)
        first, stop = self.visible(self.rows)
        t_there, exists_there, stop_there = (x.to(device, non_blocking=True) for x in (t, exists, stop))
        for lo in range(0, len(self.rows), self.blocks_per_chunk):
            rows = slice(lo, lo + self.blocks_per_chunk)
            here = slice(int(ends[lo - 1]) if lo else 0, int(ends[rows][-1]))
            whole = bool(exists[rows].all())
            last = int(stop[rows].max())
            yield _Chunk(
                positions=t_there[here],
                last=int(t[here][-1]),
                exists=exists_there[rows],
                present=None if whole else exists[rows].flatten().nonzero()[:, 0].to(device, non_blocking=True),
                first=first,
                stop=stop_there[rows],
                # without a candidate in the chunk, `stop` is the sink's end, which may lie past the keys
                groups=last if last > first else 0,
            )

    def mass(self, chunk: "_Chunk") -> tuple[Float[Tensor, "batch queries columns"], Float[Tensor, "batch queries"]]:
        """Attention mass of a chunk's queries, and what each row, with the learned sinks, sums to.

        Columns are key groups at `q_block=1`; otherwise keys, since a block's queries are averaged before they are pooled.
        """
        by_query = self.rule.granularity.q_block == 1
        query = chunk.positions - self.q_start
        lse = self.lse[:, query]
        mass, total = pooled_mass(
            self.q[:, query],
            self.k[:, : chunk.last + 1],
            lse,
            scale=self.scale,
            granularity=self.rule.granularity if by_query else Granularity(),
            pool=self.pool,
            positions=chunk.positions,
            softcap=self.softcap,
            sinks=self.sinks,
        )
        mass, total = mass[:, 0], total[:, 0]
        if self.sinks is not None:
            total = total + (self.sinks.to(total.dtype) - lse.to(total.dtype)).exp().mean(-1)
        return mass, total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Some rows and their existing queries; tensors are on the device, and nothing of them is ever read back.

    Attributes:
        positions: Positions of the existing queries, ascending.
        last: The last of them.
        exists: Which queries of each block exist.
        present: Where those are among all of these blocks' queries; `None` if all exist.
        first: First group that a row may score.
        stop: One past the last, per row.
        groups: Groups that are scored, from 0 on.
    """

    positions: Int[Tensor, " queries"]
    last: int
    exists: Bool[Tensor, "rows q_block"]
    present: Int[Tensor, " queries"] | None
    first: int
    stop: Int[Tensor, " rows"]
    groups: int


class _IndexerKL(torch.autograd.Function):
    """The loss; its gradient for a unit of loss is ready when the loss is."""

    @staticmethod
    def forward(ctx: Any, iq: Tensor, ik: Tensor, problem: _Problem) -> Tensor:
        # autocast would run float32 products in half precision
        with torch.autocast(iq.device.type, enabled=False):
            loss, grad_iq, grad_ik = _mean_kl(iq, ik, problem)
        if problem.wants_gradient:
            ctx.save_for_backward(grad_iq, grad_ik)
            ctx.dtypes = iq.dtype, ik.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]: the decorator hides the name of ctx
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        grad_iq, grad_ik = ctx.saved_tensors
        # scaled before it is narrowed: a mean over many rows would underflow in float16
        return (grad_iq * grad).to(ctx.dtypes[0]), (grad_ik * grad).to(ctx.dtypes[1]), None


def _mean_kl(iq: Tensor, ik: Tensor, problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(iq.dtype, problem.q.dtype), torch.float32)
    grad_iq = torch.zeros_like(iq, dtype=wide)
    grad_ik = torch.zeros_like(ik, dtype=wide)
    losses, totals = [], []
    count = iq.shape[0] * len(problem.rows)
    for chunk in problem.chunks():
        n = chunk.groups
        mass, total = problem.mass(chunk)
        totals.append(total)
        query = chunk.positions - problem.q_start
        x, y = iq[:, query], ik[:, :n]
        if iq.dtype != ik.dtype or wide != torch.float32:
            x, y = x.to(wide), y.to(wide)
        logits = index_logits(x, y)
        by_query = _blocks(sum_heads(logits), chunk)
        scores = _reduce(by_query, chunk.exists, problem.reduce)
        pooled = _pooled(mass.to(wide), chunk, problem)
        # [batch, rows, groups]: the closed form, 0 where a row has no target
        loss, slope = kl_rows(
            pooled, scores, first=chunk.first, stop=chunk.stop, wants_slope=problem.wants_gradient
        )  # fmt: skip
        losses.append(loss)
        if slope is not None:
            by_query = _spread(slope, by_query, scores, chunk, problem.reduce)
            d_x, d_y = _backward(by_query, logits, x.to(wide), y.to(wide))
            grad_iq[:, query] = d_x / count
            grad_ik[:, :n] += d_y / count
    if not losses:
        return torch.zeros((), dtype=wide, device=iq.device), grad_iq, grad_ik
    # the checks come last: one wait for the device, not one per chunk
    _check_rows(torch.cat(totals, 1))
    loss = torch.cat(losses, 1).sum() / max(count, 1)
    if bool(loss.isnan()):
        raise DataError("The indexer's scores hold NaN: check its weights and the hidden states it is given.")
    return loss, grad_iq, grad_ik


def _pooled(
    mass: Float[Tensor, "batch queries columns"], chunk: _Chunk, problem: _Problem
) -> Float[Tensor, "batch rows groups"]:
    """Mass of the chunk's groups, pooled as the served selection ranks it."""
    r, n = problem.rule.granularity.kv_block, chunk.groups
    if chunk.exists.shape[1] == 1:
        return mass[..., :n]
    pooled = _reduce(_blocks(mass[..., : n * r], chunk), chunk.exists, "mean")
    if r == 1:
        return pooled
    tokens = pooled.unflatten(-1, (n, r))
    return tokens.sum(-1) if problem.pool == "sum" else tokens.amax(-1)


def _blocks(x: Float[Tensor, "batch queries columns"], chunk: _Chunk) -> Float[Tensor, "batch rows q_block columns"]:
    """Lay queries out by block; queries that a block lacks hold 0."""
    if chunk.present is not None:
        x = x.new_zeros(x.shape[0], chunk.exists.numel(), x.shape[2]).index_copy_(1, chunk.present, x)
    return x.unflatten(1, chunk.exists.shape)


def _reduce(
    x: Float[Tensor, "batch rows q_block columns"], exists: Bool[Tensor, "rows q_block"], reduce: str
) -> Float[Tensor, "batch rows columns"]:
    if exists.shape[1] == 1:
        return x[:, :, 0]
    if reduce == "max":
        return x.masked_fill(~exists[..., None], float("-inf")).amax(2)
    return x.sum(2) / exists.sum(1, keepdim=True)


def _spread(
    slope: Float[Tensor, "batch rows groups"],
    by_query: Float[Tensor, "batch rows q_block groups"],
    scores: Float[Tensor, "batch rows groups"],
    chunk: _Chunk,
    reduce: str,
) -> Float[Tensor, "batch queries groups"]:
    """Gradient of each existing query's score; queries that tie for the maximum share it."""
    exists = chunk.exists
    if exists.shape[1] == 1:
        return slope
    if reduce == "max":
        share = ((by_query == scores[:, :, None]) & exists[..., None]).to(slope.dtype)
        share = share / share.sum(2, keepdim=True)
        spread = slope[:, :, None] * share
    else:
        spread = (slope / exists.sum(1, keepdim=True))[:, :, None].expand_as(by_query)
    spread = spread.flatten(1, 2)
    return spread if chunk.present is None else spread[:, chunk.present]


def _backward(
    slope: Float[Tensor, "batch queries groups"],
    logits: Float[Tensor, "batch heads queries groups"],
    x: Float[Tensor, "batch queries heads dim"],
    y: Float[Tensor, "batch groups dim"],
) -> tuple[Float[Tensor, "batch queries heads dim"], Float[Tensor, "batch groups dim"]]:
    """Gradients of the index queries and keys from those of the scores."""
    b, heads, n, groups = logits.shape
    by_head = slope[:, None] if heads == 1 else slope[:, None] * (logits > 0)
    by_head = by_head.reshape(b, heads * n, groups)
    scale = x.shape[-1] ** -0.5
    d_x = torch.bmm(by_head, y * scale).view(b, heads, n, -1).transpose(1, 2)
    d_y = torch.bmm(by_head.mT, (x * scale).transpose(1, 2).reshape(b, heads * n, -1))
    return d_x, d_y


def _check_rows(total: Float[Tensor, "batch queries"]) -> None:
    good = (total - 1).abs() < TOLERANCE
    if not bool(good.all()):
        raise DataError(
            f"The model's attention is not a distribution (a row sums to {total[~good][0].item():g}): scale, soft-cap, "
            "learned sinks and lse must be those of the dense attention, without NaN."
        )
