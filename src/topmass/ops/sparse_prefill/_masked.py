"""Triton attention under a materialised support mask: exact for any granularity, as costly as dense attention.

For diagnostics such as the oracle's tables. Memory is one byte per query and key of a chunk of queries.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.core.support import Support
from topmass.ops._logits import workspace
from topmass.ops._triton_common import cdiv, half_on_gpu, next_power_of_2, on_device
from topmass.ops.sparse_prefill._triton import support_elsewhere

__all__ = ["sparse_prefill_masked", "why_not"]


def why_not(q: Tensor, k: Tensor, v: Tensor, support: Support, **settings: object) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    if settings.get("page_table") is not None:
        return "reads keys that lie in one piece, not pages."
    return half_on_gpu(q, k, v) or support_elsewhere(q, support)


@triton.jit(do_not_specialize=["TQ", "TK", "Q_START"])
@no_type_check
def _masked_kernel(
    q, k, v, mask, out, lse, sinks, scale, softcap,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, so_b, so_t, so_h, sl_b, sl_t, sm_b, sm_s, sm_t,
    TQ, TK, Q_START,
    HQ: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    i_b, i_h = tl.program_id(1).to(tl.int64) // HQ, tl.program_id(1).to(tl.int64) % HQ
    o_m, o_n, o_d, o_v = i_m * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    m_m, m_d, m_v = o_m < TQ, o_d < D, o_v < DV
    # [BM, BD]
    b_q = tl.load(
        q + i_b * sq_b + i_h * sq_h + o_m[:, None] * sq_t + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0
    )
    if SINK:
        b_max = tl.zeros([BM], tl.float32) + tl.load(sinks + i_h).to(tl.float32)
        b_sum = tl.full([BM], 1.0, tl.float32)
    else:
        b_max = tl.full([BM], -1e30, tl.float32)
        b_sum = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BDV], tl.float32)
    stop = tl.minimum(Q_START + (i_m + 1) * BM, Q_START + TQ)
    p_k, p_v = k + i_b * sk_b + (i_h // G) * sk_h, v + i_b * sv_b + (i_h // G) * sv_h
    p_m = mask + i_b * sm_b + (i_h // S) * sm_s + o_m[:, None] * sm_t
    for n in range(0, stop, BN):
        o_k = (n + o_n).to(tl.int64)
        m_k = o_k < stop
        m_mk = tl.load(p_m + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0) != 0
        b_k = tl.load(p_k + o_k[None, :] * sk_t + o_d[:, None], mask=m_k[None, :] & m_d[:, None], other=0.0)
        b_v = tl.load(p_v + o_k[:, None] * sv_t + o_v[None, :], mask=m_k[:, None] & m_v[None, :], other=0.0)
        # [BM, BN]
        b_s = tl.dot(b_q, b_k) * scale
        if CAP:
            b_s = softcap * (2.0 * tl.sigmoid(2.0 * b_s / softcap) - 1.0)
        b_s = tl.where(m_mk, b_s, -1e30)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_a = tl.exp(b_max - b_new)
        # a row without a key yet has b_new = -1e30: keep its probabilities 0
        b_p = tl.where(m_mk, tl.exp(b_s - b_new[:, None]), 0.0)
        b_sum = b_sum * b_a + tl.sum(b_p, 1)
        b_o = b_o * b_a[:, None] + tl.dot(b_p.to(b_v.dtype), b_v)
        b_max = b_new
    empty = b_sum == 0.0
    b_lse = tl.where(empty, float("-inf"), b_max + tl.log(tl.where(empty, 1.0, b_sum)))
    b_o = b_o / tl.where(empty, 1.0, b_sum)[:, None]
    p_o = out + i_b * so_b + i_h * so_h + o_m[:, None] * so_t + o_v[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_m[:, None] & m_v[None, :])
    tl.store(lse + i_b * sl_b + o_m * sl_t + i_h, b_lse, mask=m_m)


@on_device
def sparse_prefill_masked(
    q: Tensor, k: Tensor, v: Tensor, support: Support, *, scale: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch the kernel for chunks of queries; same contract as `sparse_prefill_reference`."""
    B, TQ, HQ, D = q.shape
    HK, DV = k.shape[2], v.shape[-1]
    out = torch.empty(B, TQ, HQ, DV, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, TQ, HQ, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    shared = support.groups.shape[1]
    step = max(workspace(q) // (B * shared * (support.q_start + TQ)) // 64, 1) * 64
    bd, bdv = (max(next_power_of_2(d), 16) for d in (D, DV))
    for lo in range(0, TQ, step):
        part = support.rows(lo, min(lo + step, TQ))
        kv_len = part.q_start + part.q_len
        mask = part.mask(kv_len).view(torch.int8)
        qc, oc, lc = (x[:, lo : lo + step] for x in (q, out, lse))
        _masked_kernel[(cdiv(part.q_len, 64), B * HQ)](
            qc, k, v, mask, oc, lc, qc if sinks is None else sinks.contiguous(), scale, 1.0 if softcap is None else softcap,
            *qc.stride()[:3], *k.stride()[:3], *v.stride()[:3], *oc.stride()[:3], *lc.stride()[:2], *mask.stride()[:3],
            part.q_len, kv_len, part.q_start,
            HQ=HQ, G=HQ // HK, S=HQ // shared, D=D, DV=DV, BD=bd, BDV=bdv, BM=64, BN=64, CAP=softcap is not None,
            SINK=sinks is not None, num_warps=4 if bd <= 128 else 8,
        )  # fmt: skip
    return out, lse
