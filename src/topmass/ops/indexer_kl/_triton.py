"""Triton KL of score rows from mass rows: one program per row, two sweeps over its keys."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.ops._triton_common import INTERPRETED, on_device

__all__ = ["kl_rows_triton", "why_not"]

BLOCK = 64 if INTERPRETED else 2048


def why_not(mass: Tensor, scores: Tensor, **settings: object) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    if not ((mass.is_cuda and scores.is_cuda) or INTERPRETED):
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before import."
    if mass.dtype != torch.float32 or scores.dtype != torch.float32:
        return f"supports float32, got mass in {mass.dtype} and scores in {scores.dtype}."
    if mass.stride(-1) != 1 or scores.stride(-1) != 1:
        return "needs rows that are contiguous."
    return None


@triton.jit(do_not_specialize=["R", "N", "FIRST"])
@no_type_check
def _kl_kernel(
    mass, scores, stops, losses, sm_b, sm_r, ss_b, ss_r, R, N, FIRST, SLOPE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    # the longest rows first
    i_r = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    stop = tl.minimum(tl.load(stops + i_r), N)
    p_p, p_s = mass + i_b * sm_b + i_r * sm_r, scores + i_b * ss_b + i_r * ss_r
    begin = FIRST // BLOCK * BLOCK
    # [BLOCK]: a running softmax in every lane, merged at the end
    b_max = tl.full([BLOCK], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_p, b_plogp, b_ps = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for n in range(begin, stop, BLOCK):
        o_n = n + tl.arange(0, BLOCK)
        m_n = (o_n >= FIRST) & (o_n < stop)
        p = tl.load(p_p + o_n, mask=m_n, other=0.0)
        s = tl.load(p_s + o_n, mask=m_n, other=-1e30)
        b_new = tl.maximum(b_max, s)
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.where(m_n, tl.exp(s - b_new), 0.0)
        b_max = b_new
        b_p += p
        b_plogp += tl.where(p > 0, p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)
        b_ps += tl.where(m_n, p * s, 0.0)
    top = tl.max(b_max, 0)
    total = tl.sum(b_p, 0)
    live = total > 0
    safe = tl.where(live, total, 1.0)
    lse = top + tl.log(tl.where(live, tl.sum(b_sum * tl.exp(b_max - top), 0), 1.0))
    loss = (tl.sum(b_plogp, 0) - tl.sum(b_ps, 0)) / safe - tl.log(safe) + lse
    tl.store(losses + i_b * R + i_r, tl.where(live, loss, 0.0))
    if SLOPE:
        end = tl.where(live, stop, 0)
        for n in range(0, N, BLOCK):
            o_n = n + tl.arange(0, BLOCK)
            m_n = (o_n >= FIRST) & (o_n < end)
            p = tl.load(p_p + o_n, mask=m_n, other=0.0)
            s = tl.load(p_s + o_n, mask=m_n, other=-1e30)
            slope = tl.where(m_n, tl.exp(s - lse) - p / safe, 0.0)
            tl.store(p_p + o_n, slope, mask=o_n < N)


@on_device
def kl_rows_triton(
    mass: Tensor, scores: Tensor, *, first: int, stop: Tensor, wants_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; same contract as `kl_rows_reference`, and the slope takes the place of the mass."""
    B, R, N = scores.shape
    loss = torch.empty(B, R, dtype=torch.float32, device=scores.device)
    if loss.numel():
        stops = stop.to(scores.device, torch.int32, non_blocking=True)
        _kl_kernel[(R, B)](
            mass, scores, stops, loss, *mass.stride()[:2], *scores.stride()[:2], R, N, first,
            SLOPE=wants_slope, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return loss, mass if wants_slope else None
