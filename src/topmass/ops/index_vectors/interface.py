"""Public entry point of the op: checks, picks a backend, calls it."""

from jaxtyping import Float
from torch import Tensor

from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import register_triton
from topmass.ops.index_vectors.reference import index_vectors_reference

__all__ = ["index_vectors"]

_dispatch.register("index_vectors", _dispatch.KernelBackend(name="reference", fn=index_vectors_reference))
register_triton("index_vectors", "topmass.ops.index_vectors._triton", "index_vectors_triton")


def index_vectors(
    raw: Float[Tensor, "batch groups members heads dim"],
    weight: Float[Tensor, " dim"],
    *,
    eps: float,
    cos: Float[Tensor, "#batch groups rotary"] | None = None,
    sin: Float[Tensor, "#batch groups rotary"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch groups heads dim"]:
    """Index keys (or queries) of groups of tokens: the mean of the raw ones, RMS norm, RoPE.

    Args:
        raw: What the indexer projected; queries are groups of one.
        weight: Of the norm.
        eps: Of the norm.
        cos: Cosines of each group's position, the same in both halves; `None` without RoPE.
        sin: Sines, likewise.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Returns:
        In the dtype of `raw`, rounded once.

    Raises:
        ConfigError: One of the tables is missing, or they do not fit the groups.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch
        >>> raw = torch.tensor([3.0, 5.0, 4.0, 4.0]).view(1, 1, 2, 1, 2)
        >>> [round(x, 3) for x in index_vectors(raw, torch.ones(2), eps=0.0).flatten().tolist()]
        [0.868, 1.116]
    """
    if (cos is None) != (sin is None):
        raise ConfigError("RoPE takes cosines and sines: give both or neither.")
    if cos is not None and sin is not None:
        rows, width = cos.shape[1:]
        # a kernel would read past them
        if cos.shape != sin.shape or rows != raw.shape[1] or width % 2 or width > raw.shape[-1]:
            raise ConfigError(
                f"RoPE tables of {raw.shape[1]} groups of {raw.shape[-1]} dimensions have as many rows and an even width of at most "
                f"that, got {tuple(cos.shape)} and {tuple(sin.shape)}."
            )
    return _dispatch.resolve("index_vectors", backend, raw, weight, eps, cos, sin).fn(raw, weight, eps, cos, sin)
