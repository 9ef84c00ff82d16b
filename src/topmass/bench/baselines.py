"""Dense attention kernels that a sparse layer is timed against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from topmass.ops.dense_prefill._flash3 import flash3, why_not_installed

__all__ = ["BASELINES", "Baseline", "baselines_for"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One dense kernel, causal over as many queries as keys.

    Attributes:
        name: Short name in tables.
        about: What it is, for people.
        device: Type of device that it is a baseline on.
        run: Takes q, k, v as `[batch, len, heads, dim]` and returns the output likewise.
        why_not: Returns `None` if it can run here, else the reason in one sentence.
    """

    name: str
    about: str
    device: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    why_not: Callable[[], str | None] = lambda: None


def _sdpa(
    q: Float[Tensor, "batch len q_heads dim"],
    k: Float[Tensor, "batch len kv_heads dim"],
    v: Float[Tensor, "batch len kv_heads dim"],
) -> Float[Tensor, "batch len q_heads dim"]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _fa2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q, k, v)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash3(q, k, v, scale=q.shape[-1] ** -0.5)[0]


def _why_not_fa3() -> str | None:
    if reason := why_not_installed():
        return f"not installed: {reason}"
    return None if torch.cuda.get_device_capability()[0] == 9 else "needs a Hopper GPU."


def _why_not_cudnn() -> str | None:
    return None if torch.backends.cudnn.is_available() else "not installed: this PyTorch has no cuDNN."


BASELINES = {
    baseline.name: baseline
    for baseline in (
        Baseline(name="fa2", about="FlashAttention-2 (SDPA)", device="cuda", run=_fa2),
        Baseline(name="cudnn", about="cuDNN (SDPA)", device="cuda", run=_cudnn, why_not=_why_not_cudnn),
        Baseline(name="fa3", about="FlashAttention-3", device="cuda", run=_fa3, why_not=_why_not_fa3),
        Baseline(name="sdpa", about="PyTorch's SDPA on CPU", device="cpu", run=_sdpa),
    )
}


def baselines_for(device: torch.device | str) -> tuple[list[Baseline], dict[str, str]]:
    """The baselines that run on this device, and why each of the others of its type does not."""
    kind = torch.device(device).type
    mine = [b for b in BASELINES.values() if b.device == kind]
    reasons = {b.name: reason for b in mine if (reason := b.why_not())}
    return [b for b in mine if b.name not in reasons], reasons
