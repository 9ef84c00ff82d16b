"""Triton: a head of some tokens a program, and their index keys as if they were a head more."""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

from topmass.ops._triton_common import INTERPRETED, cdiv, next_power_of_2, on_device

__all__ = ["why_not", "write_pages_triton"]

# tokens of a program: one where launches bound the time, some where there are many
FEW, SOME = 512, 8


def why_not(
    rows: Tensor, key: Tensor, value: Tensor, slots: Tensor, index_rows: Tensor | None, index: Tensor | None
) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    given = [x for x in (rows, key, value, index_rows, index) if x is not None]
    if not (all(x.is_cuda for x in (*given, slots)) or INTERPRETED):
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before import."
    if any(x.stride(-1) != 1 for x in given):
        return "needs the columns of what is written and of where it goes contiguous."
    return None


# what depends on the batch may not compile a kernel again
@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["slots"])
@no_type_check
def _write_kernel(
    rows, key, value, slots, index_rows, index, sr_p, sr_h, sr_n, sk_t, sk_h, sv_t, sv_h, sx_p, sx_n, si_t, T,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DX: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1)
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < T
    b_slot = tl.maximum(tl.load(slots + o_t, mask=m_t, other=0).to(tl.int64), 0)
    if i_h < HEADS:
        o_d = tl.arange(0, BD)
        p_row = rows + b_slot // SIZE * sr_p + i_h * sr_h + b_slot % SIZE * sr_n
        m_k, m_v = m_t[:, None] & (o_d < D)[None, :], m_t[:, None] & (o_d < DV)[None, :]
        b_k = tl.load(key + o_t[:, None] * sk_t + i_h * sk_h + o_d[None, :], mask=m_k, other=0.0)
        b_v = tl.load(value + o_t[:, None] * sv_t + i_h * sv_h + o_d[None, :], mask=m_v, other=0.0)
        tl.store(p_row[:, None] + o_d[None, :], b_k.to(rows.dtype.element_ty), mask=m_k)
        tl.store(p_row[:, None] + D + o_d[None, :], b_v.to(rows.dtype.element_ty), mask=m_v)
    else:
        o_x = tl.arange(0, BX)
        p_row = index_rows + b_slot // SIZE * sx_p + b_slot % SIZE * sx_n
        b_x = tl.load(index + o_t[:, None] * si_t + o_x[None, :], mask=m_t[:, None] & (o_x < DX)[None, :], other=0.0)
        tl.store(
            p_row[:, None] + o_x[None, :],
            b_x.to(index_rows.dtype.element_ty),
            mask=m_t[:, None] & (o_x < COLUMNS)[None, :],
        )


@on_device
def write_pages_triton(
    rows: Tensor, key: Tensor, value: Tensor, slots: Tensor, index_rows: Tensor | None, index: Tensor | None
) -> None:
    """Launch the kernel; same contract as `write_pages_reference`."""
    tokens, heads, dim = key.shape
    if not tokens:
        return
    bt = 1 if tokens <= FEW else SOME
    extra = index is not None and index_rows is not None
    # without an index key, what is never read
    index, index_rows = (index, index_rows) if extra else (key[:, 0], rows[:, 0])
    _write_kernel[(cdiv(tokens, bt), heads + extra)](
        rows, key, value, slots, index_rows, index,
        *rows.stride()[:3], *key.stride()[:2], *value.stride()[:2], *index_rows.stride()[:2], index.stride(0), tokens,
        HEADS=heads, D=dim, DV=value.shape[2], DX=index.shape[1], COLUMNS=index_rows.shape[2], SIZE=rows.shape[2],
        BT=bt, BD=next_power_of_2(max(dim, value.shape[2])), BX=next_power_of_2(index_rows.shape[2]), num_warps=1 if bt == 1 else 4,
    )  # fmt: skip
