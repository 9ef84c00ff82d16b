"""Plain PyTorch, differentiable."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["index_vectors_reference", "rotate_half_split"]


def index_vectors_reference(
    raw: Float[Tensor, "batch groups members heads dim"],
    weight: Float[Tensor, " dim"],
    eps: float,
    cos: Float[Tensor, "#batch groups rotary"] | None,
    sin: Float[Tensor, "#batch groups rotary"] | None,
) -> Float[Tensor, "batch groups heads dim"]:
    """The op of README.md."""
    wide = torch.promote_types(raw.dtype, torch.float32)
    x = raw.to(wide)
    x = x[:, :, 0] if raw.shape[2] == 1 else x.mean(2)
    x = F.rms_norm(x, x.shape[-1:], weight.to(wide), eps)
    if cos is not None and sin is not None:
        x = rotate_half_split(x, cos[:, :, None], sin[:, :, None])
    return x.to(raw.dtype)


def rotate_half_split(
    x: Float[Tensor, "*shape dim"], cos: Float[Tensor, "*#shape rotary"], sin: Float[Tensor, "*#shape rotary"]
) -> Float[Tensor, "*shape dim"]:
    """RoPE in half-split layout: dimension `i` is paired with `i + rotary / 2`; those past `rotary` stay.

    Args:
        cos: Cosines, the same in both halves, as transformers' rotary embeddings give them.
        sin: Sines, likewise.
    """
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, -1)
    turned = turned * cos.to(x.dtype) + torch.cat([-high, low], -1) * sin.to(x.dtype)
    return torch.cat([turned, kept], -1)
