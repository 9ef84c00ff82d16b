"""Comparison helpers and random supports; shipped so that kernels outside this package can use the same gate."""

from jaxtyping import Float
from torch import Tensor

from topmass.testing.supports import random_support

__all__ = ["assert_as_accurate_as", "random_support"]


def assert_as_accurate_as(
    actual: Float[Tensor, "*shape"],
    *,
    exact: Float[Tensor, "*shape"],
    baseline: Float[Tensor, "*shape"],
    factor: float = 2.0,
    name: str = "out",
) -> None:
    """Check that `actual` is at most `factor` times less accurate than plain PyTorch in the same dtype.

    Args:
        actual: What is being tested.
        exact: The reference evaluated in float64 on the same, already rounded, inputs.
        baseline: The reference evaluated in the dtype of `actual`.
        factor: Allowed ratio of maximum absolute errors.
        name: What to call it in the message.
    """
    if not bool(actual.isfinite().eq(exact.isfinite()).all()):
        raise AssertionError(f"{name}: finite and non-finite elements differ from the reference.")
    fin = exact.isfinite()
    error = (actual.double()[fin] - exact.double()[fin]).abs().max().item()
    allowed = (baseline.double()[fin] - exact.double()[fin]).abs().max().item()
    ulp = (exact.to(actual.dtype).double()[fin] - exact.double()[fin]).abs().max().item()
    if error > factor * max(allowed, ulp):
        raise AssertionError(
            f"{name}: max error {error:.3e} > {factor} x baseline error {allowed:.3e} (1 ulp: {ulp:.3e})."
        )
