"""Triton: some groups of one head a program."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.ops._triton_common import INTERPRETED, cdiv, next_power_of_2, on_device

__all__ = ["index_vectors_triton", "why_not"]

# values of a program
VALUES = 2048


def why_not(raw: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    given = [x for x in (raw, weight, cos, sin) if x is not None]
    if not (all(x.is_cuda for x in given) or INTERPRETED):
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before import."
    if raw.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"supports float16, bfloat16 and float32, got {raw.dtype}."
    if any(x.stride(-1) != 1 for x in given):
        return "needs the last dimension contiguous."
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "has no gradient."
    return None


# what depends on the batch may not compile a kernel again
@triton.jit(do_not_specialize=["GROUPS", "s_b", "sc_b", "ss_b"], do_not_specialize_on_alignment=["raw", "cos", "sin"])
@no_type_check
def _vectors_kernel(
    raw, weight, cos, sin, out, s_b, s_g, s_m, s_h, sc_b, sc_g, ss_b, ss_g, GROUPS, eps,
    HEADS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i_h, i_b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    o_d = tl.arange(0, BD)
    # the dimension that RoPE pairs with this one
    o_p = tl.where(o_d < ROTARY // 2, o_d + ROTARY // 2, o_d - ROTARY // 2)
    m_g, m_d = (o_g < GROUPS)[:, None], (o_d < D)[None, :]
    m_turned = m_g & (o_d < ROTARY)[None, :]
    p_group = raw + i_b * s_b + o_g * s_g + i_h * s_h
    b_x = tl.zeros([BG, BD], tl.float32)
    b_y = tl.zeros([BG, BD], tl.float32)
    for r in tl.static_range(R):
        p_row = (p_group + r * s_m)[:, None]
        b_x += tl.load(p_row + o_d[None, :], mask=m_g & m_d, other=0.0).to(tl.float32)
        if ROTARY:
            b_y += tl.load(p_row + o_p[None, :], mask=m_turned, other=0.0).to(tl.float32)
    b_x = b_x / R
    b_norm = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
    b_out = b_x * b_norm * tl.load(weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if ROTARY:
        b_y = b_y / R * b_norm * tl.load(weight + o_p, mask=o_d < ROTARY, other=0.0).to(tl.float32)[None, :]
        b_cos = tl.load(cos + i_b * sc_b + o_g[:, None] * sc_g + o_d[None, :], mask=m_turned, other=1.0).to(tl.float32)
        b_sin = tl.load(sin + i_b * ss_b + o_g[:, None] * ss_g + o_d[None, :], mask=m_turned, other=0.0).to(tl.float32)
        b_out = b_out * b_cos + tl.where((o_d < ROTARY // 2)[None, :], -b_y, b_y) * b_sin
    p_out = out + ((i_b * GROUPS + o_g) * HEADS + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_g & m_d)


@on_device
def index_vectors_triton(raw: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Launch the kernel; same contract as `index_vectors_reference`."""
    batch, groups, members, heads, dim = raw.shape
    out = torch.empty(batch, groups, heads, dim, dtype=raw.dtype, device=raw.device)
    if not out.numel():
        return out
    rotary = 0 if cos is None else cos.shape[-1]
    tables = [x.expand(batch, -1, -1) for x in (cos, sin) if x is not None] or [out[:, :, 0]] * 2
    bd = next_power_of_2(dim)
    bg = max(VALUES // bd, 1)
    _vectors_kernel[(cdiv(groups, bg), heads, batch)](
        raw, weight, *tables, out, *raw.stride()[:4], *(s for x in tables for s in x.stride()[:2]), groups, eps,
        HEADS=heads, R=members, D=dim, ROTARY=rotary, BG=bg, BD=bd, num_warps=4,
    )  # fmt: skip
    return out
