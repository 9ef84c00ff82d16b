"""Plain PyTorch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["write_pages_reference"]


def write_pages_reference(
    rows: Float[Tensor, "pages heads page_size columns"],
    key: Float[Tensor, "tokens heads head_dim"],
    value: Float[Tensor, "tokens heads v_dim"],
    slots: Int[Tensor, " tokens"],
    index_rows: Float[Tensor, "pages page_size index_columns"] | None,
    index: Float[Tensor, "tokens dim"] | None,
) -> None:
    """The op of README.md."""
    size = rows.shape[2]
    page, place = slots.clamp_min(0) // size, slots.clamp_min(0) % size
    rows.transpose(1, 2)[page, place] = torch.cat([key, value], -1).to(rows.dtype)
    if index_rows is not None and index is not None:
        padded = torch.nn.functional.pad(index, (0, index_rows.shape[-1] - index.shape[-1]))
        index_rows[page, place] = padded.to(index_rows.dtype)
