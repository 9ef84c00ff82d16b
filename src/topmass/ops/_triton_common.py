"""What every Triton backend asks before it runs.

Kernels are marked `@no_type_check`: jaxtyping's import hook would wrap them, and Triton's interpreter would look for the
helpers they call among the globals of the wrapper.
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from topmass.ops import _dispatch

__all__ = ["INTERPRETED", "cdiv", "half_on_gpu", "next_power_of_2", "on_device", "register_triton"]

_Launch = TypeVar("_Launch", bound=Callable[..., Any])

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def register_triton(op: str, module: str, fn: str, *, name: str = "triton", priority: int = 10) -> None:
    """Add a backend of `op` written in Triton; without Triton nothing, so that the op and its reference import.

    Args:
        op: Name of the op.
        module: Has the backend, and a `why_not`.
        fn: Name of the backend there.
        name: What users pass as `backend=`.
        priority: As in `KernelBackend`; below the reference in Triton's interpreter, which is for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return
    found = importlib.import_module(module)
    backend = _dispatch.KernelBackend(
        name=name, fn=getattr(found, fn), why_not=found.why_not, priority=-1 if INTERPRETED else priority
    )
    _dispatch.register(op, backend)


# Triton's own take ten times as long on the host, in every launch


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def on_device(launch: _Launch) -> _Launch:
    """Run a launcher on the device of its first tensor: Triton launches on the current one, wherever the tensors lie."""

    @wraps(launch)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return launch(*args, **kwargs)

    return cast(_Launch, run)


def half_on_gpu(*tensors: Tensor, also: torch.dtype | None = None) -> str | None:
    """Reason why a kernel for half-precision CUDA tensors (or those of one dtype more) cannot take these, or `None`."""
    if not (all(t.is_cuda for t in tensors) or INTERPRETED):
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before import."
    if any(t.device != tensors[0].device for t in tensors):
        return f"needs all inputs on one device, got {', '.join(str(t.device) for t in tensors)}."
    if tensors[0].dtype not in (torch.float16, torch.bfloat16, also):
        more = "" if also is None else f" and {also}".replace("torch.", "")
        return f"supports float16 and bfloat16{more}, got {tensors[0].dtype}."
    if any(t.dtype != tensors[0].dtype for t in tensors):
        return "needs all inputs in one dtype."
    if any(t.shape[-1] > 256 for t in tensors):
        return f"supports head dimensions up to 256, got {max(t.shape[-1] for t in tensors)}."
    if any(t.stride(-1) != 1 for t in tensors):
        return "needs the head dimension contiguous."
    return None
