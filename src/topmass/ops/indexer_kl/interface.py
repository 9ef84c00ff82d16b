"""Public entry point of the op: checks, picks a backend, calls it."""

from jaxtyping import Float, Int
from torch import Tensor

from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import register_triton
from topmass.ops.indexer_kl.reference import kl_rows_reference

__all__ = ["kl_rows"]

_dispatch.register("indexer_kl", _dispatch.KernelBackend(name="reference", fn=kl_rows_reference))
register_triton("indexer_kl", "topmass.ops.indexer_kl._triton", "kl_rows_triton")


def kl_rows(
    mass: Float[Tensor, "batch rows groups"],
    scores: Float[Tensor, "batch rows groups"],
    *,
    first: int,
    stop: Int[Tensor, " rows"],
    wants_slope: bool = True,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows groups"] | None]:
    """KL of the softmax of scores from normalised mass, row by row, and its gradient with respect to the scores.

    Row `i` is over groups `first ... stop[i] - 1`; a row without any, or without mass there, has loss and gradient 0.

    Args:
        mass: Not negative; need not sum to 1. May be overwritten.
        scores: Left alone. What lies outside a row's groups has no effect.
        first: First group of every row.
        stop: One past the last group of each row.
        wants_slope: Whether to compute the gradient.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Returns:
        Loss in nats; gradient, 0 outside the row's groups, or `None`.

    Raises:
        ConfigError: Shapes do not match.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch
        >>> mass, scores = torch.tensor([[[3.0, 1.0, 9.0]]]), torch.zeros(1, 1, 3)
        >>> kl_rows(mass, scores, first=0, stop=torch.tensor([2]))[1].tolist()
        [[[-0.25, 0.25, 0.0]]]
    """
    if mass.shape != scores.shape or stop.shape != scores.shape[1:2]:
        raise ConfigError(
            f"mass, scores and stop must agree, got {tuple(mass.shape)}, {tuple(scores.shape)} and {tuple(stop.shape)}."
        )
    kwargs = {"first": first, "stop": stop, "wants_slope": wants_slope}
    return _dispatch.resolve("indexer_kl", backend, mass, scores, **kwargs).fn(mass, scores, **kwargs)
