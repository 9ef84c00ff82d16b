"""Plain PyTorch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["page_rows_reference"]


def page_rows_reference(
    pages: Float[Tensor, "pages heads page_size columns"],
    rows: Float[Tensor, "tokens width"],
    slots: Int[Tensor, " tokens"],
) -> None:
    """The op of README.md."""
    heads, size, columns = pages.shape[1:]
    pieces = torch.nn.functional.pad(rows, (0, heads * columns - rows.shape[1])).unflatten(1, (heads, columns))
    slots = slots.clamp_min(0)
    pages.transpose(1, 2)[slots // size, slots % size] = pieces.to(pages.dtype)
