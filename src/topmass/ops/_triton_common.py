"""What every Triton backend asks before it runs.

Kernels are marked `@no_type_check`: jaxtyping's import hook would wrap them, and Triton's interpreter would look for the
helpers they call among the globals of the wrapper.
"""

import os

import torch
from torch import Tensor

__all__ = ["INTERPRETED", "gpu_priority", "half_on_gpu"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def gpu_priority(priority: int) -> int:
    """Priority of a kernel: below the reference where it would run in Triton's interpreter, which is for tests."""
    return -1 if INTERPRETED else priority


def half_on_gpu(*tensors: Tensor) -> str | None:
    """Reason why a kernel for half-precision CUDA tensors cannot take these, or `None`."""
    if not (all(t.is_cuda for t in tensors) or INTERPRETED):
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before import."
    if tensors[0].dtype not in (torch.float16, torch.bfloat16):
        return f"supports float16 and bfloat16, got {tensors[0].dtype}."
    if any(t.dtype != tensors[0].dtype for t in tensors):
        return "needs all inputs in one dtype."
    if any(t.shape[-1] > 256 for t in tensors):
        return f"supports head dimensions up to 256, got {max(t.shape[-1] for t in tensors)}."
    if any(t.stride(-1) != 1 for t in tensors):
        return "needs the head dimension contiguous."
    return None
