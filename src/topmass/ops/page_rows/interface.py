"""Public entry point of the op: checks, picks a backend, calls it."""

import importlib.util

from jaxtyping import Float, Int
from torch import Tensor

from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import gpu_priority
from topmass.ops.page_rows.reference import page_rows_reference

__all__ = ["page_rows"]

_dispatch.register("page_rows", _dispatch.KernelBackend(name="reference", fn=page_rows_reference))

# the reference must import where triton is absent
if importlib.util.find_spec("triton"):
    from topmass.ops.page_rows import _triton

    _dispatch.register(
        "page_rows",
        _dispatch.KernelBackend(
            name="triton", fn=_triton.page_rows_triton, why_not=_triton.why_not, priority=gpu_priority(10)
        ),
    )


def page_rows(
    pages: Float[Tensor, "pages heads page_size columns"],
    rows: Float[Tensor, "tokens width"],
    slots: Int[Tensor, " tokens"],
    *,
    backend: str = "auto",
) -> None:
    """Write one row per token into pages, in pieces of `columns` values per head, zeros after the row's end.

    Args:
        pages: A view of the columns that are written, of any strides.
        rows: At most `heads * columns` values a token.
        slots: `page * page_size + place` of each token. Below 0 is padding, which writes to slot 0.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Raises:
        ConfigError: A row is wider than what a page holds of a token.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch
        >>> pages = torch.zeros(2, 2, 3, 2)
        >>> page_rows(pages, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([4]))
        >>> pages[1, :, 1].tolist()
        [[1.0, 2.0], [3.0, 0.0]]
    """
    _, heads, _, columns = pages.shape
    if rows.shape[1] > heads * columns:
        raise ConfigError(f"A token's row in these pages holds {heads} x {columns} values, got {rows.shape[1]}.")
    _dispatch.resolve("page_rows", backend, pages, rows, slots).fn(pages, rows, slots)
