"""Triton selection: exact top-k of a row by bisection on its order-preserving bits, ids emitted in order."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.core.rule import SupportRule
from topmass.ops._triton_common import INTERPRETED

__all__ = ["topk_groups_triton", "why_not"]

MOST_GROUPS = 65536


def why_not(scores: Tensor, mass: Tensor | None, *, rule: SupportRule, **settings: object) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    if not (scores.is_cuda or INTERPRETED):
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before import."
    if scores.dtype != torch.float32:
        return f"supports float32 scores, got {scores.dtype}."
    if scores.shape[-1] > MOST_GROUPS:
        return f"supports up to {MOST_GROUPS} key groups, got {scores.shape[-1]}."
    if rule.budget is None or rule.budget.mass is not None:
        return "takes a fixed number of groups, not a mass budget or none."
    return None


@triton.jit(do_not_specialize=["N", "NB", "FIRST", "SLOTS"])
@no_type_check
def _topk_kernel(
    scores, stops, wants, groups, counts, stride, N, NB, FIRST, SLOTS, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stop = tl.load(stops + row % NB)
    want = tl.load(wants + row % NB)
    o_n = tl.arange(0, BLOCK)
    m_n = (o_n >= FIRST) & (o_n < stop)
    # [BLOCK]; signed integers in the order of the scores; -0 is 0
    bits = (tl.load(scores + row * stride + o_n, mask=m_n, other=0.0) + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    # the largest threshold that at least `want` keys reach
    lo = tl.full([], -2147483648, tl.int64)
    hi = tl.full([], 2147483647, tl.int64)
    for _ in range(32):
        mid = (lo + hi + 1) >> 1
        enough = tl.sum((m_n & (key >= mid)).to(tl.int32), 0) >= want
        lo = tl.where(enough, mid, lo)
        hi = tl.where(enough, hi, mid - 1)
    above = m_n & (key > lo)
    tied = m_n & (key == lo)
    room = want - tl.sum(above.to(tl.int32), 0)
    taken = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    slot = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(groups + row * SLOTS + slot, o_n, mask=taken)
    tl.store(counts + row, tl.sum(taken.to(tl.int32), 0))


def topk_groups_triton(
    scores: Tensor, mass: Tensor | None, *, rule: SupportRule, q_start: int, q_len: int, has_rest: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; same contract as `topk_groups_reference`."""
    B, S, NB, N = scores.shape
    # on the host: the shape of the result must not wait for the device
    t0 = rule.block_starts(q_start, q_len)
    first, stop = rule.candidate_range(t0)
    wanted = torch.minimum(rule.groups_wanted(t0), (stop - first).clamp_min(0))
    slots = int(wanted.max()) if NB else 0
    groups = torch.full((B, S, NB, slots), -1, dtype=torch.int32, device=scores.device)
    counts = torch.zeros(B, S, NB, dtype=torch.int32, device=scores.device)
    if slots == 0 or B == 0:
        return groups, counts
    scores = scores.contiguous()
    block = triton.next_power_of_2(N)
    stop, wanted = (x.int().to(scores.device, non_blocking=True) for x in (stop, wanted))
    _topk_kernel[(B * S * NB,)](
        scores, stop, wanted, groups, counts, N, N, NB, first, slots, BLOCK=block, num_warps=min(max(block // 1024, 1), 32)
    )  # fmt: skip
    return groups, counts
