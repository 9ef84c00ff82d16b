"""Checks of a layer's results at the shape that is timed, on a few rows: at the budget, in the middle and at the end."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from topmass.bench.inputs import Inputs
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.distill import indexer_kl
from topmass.ops import pooled_mass, sparse_prefill
from topmass.ops.index_topk.reference import index_logits, sum_heads
from topmass.testing import assert_as_accurate_as

__all__ = ["check_attention", "check_dense", "check_index", "check_kl", "check_oracle", "checked_spans"]

# queries, and blocks of them, checked at each of the places
SPAN, BLOCKS = 32, 4
# scores round once to float16; the mass comes from a normaliser computed in another order
SCORE_ULPS, MASS_TOLERANCE = 2.0, 1e-3
LOSS_TOLERANCE, SLOPE_TOLERANCE = 1e-3, 1e-2

Metrics = dict[str, float]


def checked_spans(length: int, rule: SupportRule) -> list[tuple[int, int]]:
    """First and one-past-last positions of the rows that are checked, whole query blocks each."""
    g = rule.granularity.q_block
    span = max(SPAN, min(BLOCKS * g, 256), g)
    dense = int(rule.dense_len(torch.tensor([length - 1])).item())
    starts = [min(dense, length - 1) - span // 2, length // 2, length - span]
    aligned = sorted({max(start, 0) // g * g for start in starts})
    return [(start, min(start + span, length)) for start in aligned]


def check_attention(
    inputs: Inputs, support: Support, out: Float[Tensor, "1 len q_heads dim"], rule: SupportRule
) -> Metrics:
    """Sparse attention against float64 on the same support.

    Raises:
        AssertionError: A row is more than twice as inaccurate as plain PyTorch in the same dtype.
    """
    exact = _over_spans(inputs, rule, lambda a, z: _attend64(inputs, support.rows(a, z), a, z))
    plain = _over_spans(inputs, rule, lambda a, z: _plain(inputs, support.rows(a, z).mask(z), a, z))
    return _compare("sparse attention", _rows(out, inputs, rule), exact, plain)


def check_dense(inputs: Inputs, out: Float[Tensor, "1 len q_heads dim"], rule: SupportRule, name: str) -> Metrics:
    """Dense attention against float64.

    Raises:
        AssertionError: As `check_attention`.
    """
    exact = _over_spans(inputs, rule, lambda a, z: _dense64(inputs, a, z))
    plain = _over_spans(inputs, rule, lambda a, z: _plain(inputs, _causal(inputs.q, a, z), a, z))
    return _compare(name, _rows(out, inputs, rule), exact, plain)


def check_index(inputs: Inputs, support: Support, rule: SupportRule) -> Metrics:
    """The indexer's selections against its scores in float64: as many as the rule wants, and only near ties swapped.

    Raises:
        AssertionError: A selection misses a group that scores higher by more than rounding to float16 explains.
    """

    def scores(a: int, z: int) -> Float[Tensor, "1 1 q_blocks groups"]:
        each = sum_heads(index_logits(inputs.iq[:, a:z].double(), inputs.ik.double()))
        # spans begin where a block does; the last may be cut
        g = rule.granularity.q_block
        each = F.pad(each, (0, 0, 0, -each.shape[1] % g), value=float("-inf"))
        return each.unflatten(1, (-1, g)).amax(2)[:, None]

    def tolerance(scores: Tensor, worst: Tensor) -> Tensor:
        return SCORE_ULPS * torch.finfo(torch.float16).eps * scores.abs().amax(-1)

    return _check_selection(inputs, support, rule, scores, tolerance)


def check_oracle(inputs: Inputs, support: Support, rule: SupportRule) -> Metrics:
    """The oracle's selections against the attention mass in float64.

    Raises:
        AssertionError: A selection misses a group that holds 0.1 % more mass than one it has.
    """

    def scores(a: int, z: int) -> Float[Tensor, "1 1 q_blocks groups"]:
        q, k = inputs.q[:, a:z].double(), inputs.k[:, :z].double()
        kwargs = {"scale": inputs.scale, "granularity": rule.granularity, "q_start": a, "backend": "reference"}
        return pooled_mass(q, k, **kwargs)[0]

    return _check_selection(inputs, support, rule, scores, lambda scores, worst: MASS_TOLERANCE * worst.abs())


def check_kl(
    inputs: Inputs, lse: Float[Tensor, "1 len q_heads"], granularity: Granularity, rows: Int[Tensor, " rows"]
) -> Metrics:
    """The KL loss and its gradients on some rows against float64.

    Raises:
        AssertionError: The loss is off by more than 0.1 %, or a gradient by more than 1 % in the 2-norm.
    """
    found, exact = (_kl(inputs, lse, granularity, rows, dtype) for dtype in (None, torch.float64))
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    allowed = [LOSS_TOLERANCE, SLOPE_TOLERANCE, SLOPE_TOLERANCE]
    if any(not error <= most for error, most in zip(errors, allowed, strict=True)):
        raise AssertionError(f"KL: relative errors of loss and gradients {errors}, allowed {allowed}.")
    return {"gate_error": max(errors)}


def _kl(
    inputs: Inputs,
    lse: Float[Tensor, "1 len q_heads"],
    granularity: Granularity,
    rows: Int[Tensor, " rows"],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    dtype = dtype or inputs.q.dtype
    q, k, iq, ik = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.iq, inputs.ik))
    iq, ik = iq.detach().requires_grad_(), ik.detach().requires_grad_()
    # the rows alone decide which queries are computed
    loss = indexer_kl(q, k, lse.to(torch.promote_types(dtype, lse.dtype)), iq, ik, scale=inputs.scale,
                      granularity=granularity, rows=rows)  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, (iq, ik))]


def _check_selection(
    inputs: Inputs,
    support: Support,
    rule: SupportRule,
    scores_of: Callable[[int, int], Float[Tensor, "1 1 q_blocks groups"]],
    tolerance: Callable[[Tensor, Tensor], Tensor],
) -> Metrics:
    rows = swapped = 0
    largest = 0.0
    for a, z in checked_spans(inputs.q.shape[1], rule):
        part = support.rows(a, z)
        scores = scores_of(a, z)[0, 0]
        t0 = rule.block_starts(a, z - a, scores.device)
        first, stop = rule.candidate_range(t0)
        group = torch.arange(scores.shape[-1], device=scores.device)
        candidate = (group >= first) & (group < stop[:, None])
        # blocks whose queries all read every key have no use for a selection
        sparse = (t0 + rule.granularity.q_block).clamp_max(z) > part.dense_len
        wanted = torch.minimum(rule.groups_wanted(t0), candidate.sum(-1))
        chosen = _chosen(part, scores.shape[-1])
        if bool(((chosen & candidate).sum(-1) != wanted)[sparse].any() or (chosen & ~candidate)[sparse].any()):
            raise AssertionError("A selection is not as many different candidates as the rule wants.")
        worst = scores.masked_fill(~chosen, torch.inf).amin(-1)
        best = scores.masked_fill(chosen | ~candidate, -torch.inf).amax(-1)
        gap = (best - worst).clamp_min(0.0)[sparse & (wanted > 0)]
        if bool((gap > tolerance(scores, worst)[sparse & (wanted > 0)]).any()):
            raise AssertionError(f"A selection misses a group that scores {gap.max().item():.3e} more than one it has.")
        rows, swapped = rows + gap.numel(), swapped + int((gap > 0).sum())
        largest = max([largest, *gap.tolist()])
    return {"gate_rows": float(rows), "gate_near_ties": float(swapped), "gate_largest_gap": largest}


def _chosen(part: Support, groups: int) -> Tensor:
    ids = part.groups[0, 0].long()
    live = torch.arange(ids.shape[-1], device=ids.device) < part.counts[0, 0, :, None]
    hot = torch.zeros(ids.shape[0], groups + 1, dtype=torch.bool, device=ids.device)
    return hot.scatter_(-1, ids.masked_fill(~live, groups), True)[:, :groups]


def _over_spans(inputs: Inputs, rule: SupportRule, rows_of: Callable[[int, int], Tensor]) -> Tensor:
    return torch.cat([rows_of(a, z) for a, z in checked_spans(inputs.q.shape[1], rule)], 1)


def _rows(out: Tensor, inputs: Inputs, rule: SupportRule) -> Tensor:
    return _over_spans(inputs, rule, lambda a, z: out[:, a:z])


def _attend64(inputs: Inputs, part: Support, a: int, z: int) -> Tensor:
    q, k, v = inputs.q[:, a:z].double(), inputs.k[:, :z].double(), inputs.v[:, :z].double()
    return sparse_prefill(q, k, v, part, backend="reference")[0]


def _dense64(inputs: Inputs, a: int, z: int) -> Tensor:
    return _plain(inputs, _causal(inputs.q, a, z), a, z, dtype=torch.float64)


def _causal(like: Tensor, a: int, z: int) -> Tensor:
    key = torch.arange(z, device=like.device)
    return (key <= key[a:, None])[None, None]


def _plain(inputs: Inputs, mask: Tensor, a: int, z: int, dtype: torch.dtype | None = None) -> Tensor:
    """Plain PyTorch, every intermediate in the dtype; one KV head at a time."""
    dtype = dtype or inputs.q.dtype
    outs: list[Tensor] = []
    heads = inputs.q.shape[2] // inputs.k.shape[2]
    for h in range(inputs.k.shape[2]):
        q = inputs.q[:, a:z, h * heads : (h + 1) * heads].to(dtype).transpose(1, 2)
        k, v = (x[:, :z, h : h + 1].to(dtype).transpose(1, 2) for x in (inputs.k, inputs.v))
        logits = (q @ k.mT * inputs.scale).masked_fill(~mask, -torch.inf)
        outs.append((logits.softmax(-1) @ v).transpose(1, 2))
    return torch.cat(outs, 2)


def _compare(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> Metrics:
    assert_as_accurate_as(actual, exact=exact, baseline=plain, name=name)
    error, allowed = ((x.double() - exact).abs().max().item() for x in (actual, plain))
    return {"gate_error": error, "gate_plain_error": allowed}


def worst_of(metrics: Sequence[Metrics]) -> Metrics:
    """Join the metrics of several checks: the largest of each."""
    names = {name for one in metrics for name in one}
    return {name: max(one[name] for one in metrics if name in one) for name in sorted(names)}
