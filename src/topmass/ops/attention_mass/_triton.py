"""Triton forward of attention mass: log-sum-exp of the dense attention, then probabilities averaged over heads."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.ops._triton_common import half_on_gpu

__all__ = ["attention_mass_triton", "why_not"]


def why_not(q: Tensor, k: Tensor, lse: Tensor | None, **settings: object) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    return half_on_gpu(q, k)


@triton.jit
@no_type_check
def _capped(b_s, softcap, CAP: tl.constexpr):
    if CAP:
        b_s = softcap * (2.0 * tl.sigmoid(2.0 * b_s / softcap) - 1.0)
    return b_s


@triton.jit(do_not_specialize=["TQ", "Q_START"])
@no_type_check
def _lse_kernel(
    q, k, lse, scale, softcap,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h,
    TQ, Q_START,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    i_b, i_h = tl.program_id(1).to(tl.int64) // HQ, tl.program_id(1).to(tl.int64) % HQ
    o_m, o_n, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    m_m, m_d = o_m < TQ, o_d < D
    # [BM, BD]
    b_q = tl.load(q + i_b * sq_b + i_h * sq_h + o_m[:, None] * sq_t + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    stop = tl.minimum(Q_START + (i_m + 1) * BM, Q_START + TQ)
    p_k = k + i_b * sk_b + (i_h // G) * sk_h
    for n in range(0, stop, BN):
        o_k = (n + o_n).to(tl.int64)
        # [BD, BN]
        b_k = tl.load(p_k + o_k[None, :] * sk_t + o_d[:, None], mask=(o_k[None, :] < stop) & m_d[:, None], other=0.0)
        b_s = _capped(tl.dot(b_q, b_k) * scale, softcap, CAP)
        b_s = tl.where(o_k[None, :] <= Q_START + o_m[:, None], b_s, -1e30)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_s - b_new[:, None]), 1)
        b_max = b_new
    tl.store(lse + (i_b * TQ + o_m) * HQ + i_h, b_max + tl.log(b_sum), mask=m_m)


@triton.jit(do_not_specialize=["TQ", "TK", "Q_START"])
@no_type_check
def _mass_kernel(
    q, k, lse, mass, scale, softcap,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h,
    TQ, TK, Q_START,
    HQ: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    i_n, i_m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    # S heads share one row of mass
    i_b, i_s = tl.program_id(2).to(tl.int64) // (HQ // S), tl.program_id(2).to(tl.int64) % (HQ // S)
    o_m, o_n, o_d = i_m * BM + tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BD)
    m_m, m_n, m_d = o_m < TQ, o_n < TK, o_d < D
    b_mass = tl.zeros([BM, BN], tl.float32)
    if i_n * BN <= Q_START + (i_m + 1) * BM - 1:
        for i in range(S):
            i_h = i_s * S + i
            b_q = tl.load(q + i_b * sq_b + i_h * sq_h + o_m[:, None] * sq_t + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
            b_k = tl.load(k + i_b * sk_b + (i_h // G) * sk_h + o_n[None, :] * sk_t + o_d[:, None], mask=m_n[None, :] & m_d[:, None], other=0.0)
            b_lse = tl.load(lse + (i_b * TQ + o_m) * HQ + i_h, mask=m_m, other=0.0)
            b_s = _capped(tl.dot(b_q, b_k) * scale, softcap, CAP)
            b_mass += tl.exp(b_s - b_lse[:, None])
        b_mass = tl.where(o_n[None, :] <= Q_START + o_m[:, None], b_mass / S, 0.0)
    row = (tl.program_id(2).to(tl.int64) * TQ + o_m) * TK
    tl.store(mass + row[:, None] + o_n[None, :], b_mass, mask=m_m[:, None] & m_n[None, :])


def attention_mass_triton(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    q_start: int,
    softcap: float | None,
    sinks: Tensor | None,
    share: str,
) -> Tensor:
    """Launch the kernels; same contract as `attention_mass_reference`."""
    B, TQ, HQ, D = q.shape
    TK, HK = k.shape[1], k.shape[2]
    BD = max(triton.next_power_of_2(D), 16)
    common = {"HQ": HQ, "G": HQ // HK, "D": D, "BD": BD, "BM": 64, "BN": 64, "CAP": softcap is not None, "num_warps": 4}
    cap = 1.0 if softcap is None else softcap
    strides = (*q.stride()[:3], *k.stride()[:3])
    if lse is None:
        lse = torch.empty(B, TQ, HQ, dtype=torch.float32, device=q.device)
        _lse_kernel[(triton.cdiv(TQ, 64), B * HQ)](q, k, lse, scale, cap, *strides, TQ, q_start, **common)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.float().expand_as(lse))
    S = {"layer": HQ, "kv_head": HQ // HK, "q_head": 1}[share]
    mass = torch.empty(B, HQ // S, TQ, TK, dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(TK, 64), triton.cdiv(TQ, 64), B * (HQ // S))
    _mass_kernel[grid](q, k, lse.float().contiguous(), mass, scale, cap, *strides, TQ, TK, q_start, S=S, **common)
    return mass
