"""Public entry point of the op: checks, picks a backend, calls it."""

from jaxtyping import Float, Int
from torch import Tensor

from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import register_triton
from topmass.ops.write_pages.reference import write_pages_reference

__all__ = ["write_pages"]

_dispatch.register("write_pages", _dispatch.KernelBackend(name="reference", fn=write_pages_reference))
register_triton("write_pages", "topmass.ops.write_pages._triton", "write_pages_triton")


def write_pages(
    rows: Float[Tensor, "pages heads page_size columns"],
    key: Float[Tensor, "tokens heads head_dim"],
    value: Float[Tensor, "tokens heads v_dim"],
    slots: Int[Tensor, " tokens"],
    *,
    index_rows: Float[Tensor, "pages page_size index_columns"] | None = None,
    index: Float[Tensor, "tokens dim"] | None = None,
    backend: str = "auto",
) -> None:
    """Write the keys, values and index keys of tokens into pages.

    Args:
        rows: Where `[key | value]` of every token and head goes, of any strides.
        slots: `page * page_size + place` of each token. Below 0 is padding, which writes to slot 0.
        index_rows: Where index keys go, with zeros after their end; `None` for a layer without them.
        index: Index keys, at most `index_columns` wide.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Raises:
        ConfigError: The widths do not fit, or there are index keys without a place, or a place without index keys.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch
        >>> rows, index_rows = torch.zeros(2, 1, 3, 3), torch.zeros(2, 3, 2)
        >>> key, value, index = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]), torch.tensor([[4.0]])
        >>> write_pages(rows, key, value, torch.tensor([4]), index_rows=index_rows, index=index)
        >>> rows[1, 0, 1].tolist(), index_rows[1, 1].tolist()
        ([1.0, 2.0, 3.0], [4.0, 0.0])
    """
    if rows.shape[-1] != key.shape[-1] + value.shape[-1]:
        raise ConfigError(
            f"A row of these pages holds {rows.shape[-1]} values, got a key of {key.shape[-1]} and a value of {value.shape[-1]}."
        )
    if (index is None) != (index_rows is None):
        raise ConfigError("Index keys need a place in the pages, and the place index keys: give both or neither.")
    if index is not None and index_rows is not None and index.shape[-1] > index_rows.shape[-1]:
        raise ConfigError(
            f"These pages hold index keys of {index_rows.shape[-1]} values at most, got {index.shape[-1]}."
        )
    given = rows, key, value, slots, index_rows, index
    _dispatch.resolve("write_pages", backend, *given).fn(*given)
