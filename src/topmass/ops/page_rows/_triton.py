"""Triton: some tokens a program, all heads of each."""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from topmass.ops._triton_common import INTERPRETED, on_device

__all__ = ["page_rows_triton", "why_not"]

# values that a program holds
VALUES = 4096


def why_not(pages: Tensor, rows: Tensor, slots: Tensor) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    if not (all(x.is_cuda for x in (pages, rows, slots)) or INTERPRETED):
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before import."
    if pages.stride(-1) != 1 or rows.stride(-1) != 1:
        return "needs the columns of pages and rows contiguous."
    return None


# what depends on the batch may not compile a kernel again
@triton.jit(
    do_not_specialize=["s_r", "s_p", "s_h", "s_n", "T"], do_not_specialize_on_alignment=["pages", "rows", "slots"]
)
@no_type_check
def _page_rows_kernel(
    pages, rows, slots, s_r, s_p, s_h, s_n, T,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    b_slot = tl.maximum(tl.load(slots + o_t, mask=m_t, other=0).to(tl.int64), 0)
    b_row = tl.load(rows + o_t[:, None] * s_r + o_d[None, :], mask=m_t[:, None] & (o_d < WIDTH)[None, :], other=0.0)
    p_page = pages + b_slot // SIZE * s_p + b_slot % SIZE * s_n
    o_piece = (o_d // COLUMNS).to(tl.int64) * s_h + o_d % COLUMNS
    m_d = o_d < HEADS * COLUMNS
    tl.store(
        p_page[:, None] + o_piece[None, :], b_row.to(pages.dtype.element_ty), mask=m_t[:, None] & m_d[None, :]
    )


@on_device
def page_rows_triton(
    pages: Float[Tensor, "pages heads page_size columns"],
    rows: Float[Tensor, "tokens width"],
    slots: Int[Tensor, " tokens"],
) -> None:
    """Launch the kernel; same contract as `page_rows_reference`."""
    heads, size, columns = pages.shape[1:]
    if not rows.shape[0]:
        return
    bd = triton.next_power_of_2(heads * columns)
    bt = triton.next_power_of_2(max(VALUES // bd, 1))
    _page_rows_kernel[(triton.cdiv(rows.shape[0], bt),)](
        pages, rows, slots, rows.stride(0), *pages.stride()[:3], rows.shape[0],
        WIDTH=rows.shape[1], HEADS=heads, COLUMNS=columns, SIZE=size, BT=bt, BD=bd, num_warps=4,
    )  # fmt: skip
