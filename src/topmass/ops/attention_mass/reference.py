"""Definition of attention mass in plain PyTorch."""

import torch
from jaxtyping import Float
from torch import Tensor

from topmass.core.granularity import Share
from topmass.ops._logits import causal_logits, softmax_and_normaliser

__all__ = ["attention_mass_reference", "average_heads"]


def attention_mass_reference(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    lse: Float[Tensor, "batch q_len q_heads"] | None,
    *,
    scale: float,
    q_start: int,
    softcap: float | None,
    sinks: Float[Tensor, " q_heads"] | None,
    share: Share,
) -> Float[Tensor, "batch share_heads q_len kv_len"]:
    """Mass rows for a chunk of queries; memory is `q_heads x q_len x kv_len`."""
    logits = causal_logits(q, k, scale=scale, q_start=q_start, softcap=softcap)
    if lse is None:
        p, _ = softmax_and_normaliser(logits, sinks)
    else:
        p = logits.sub_(lse.transpose(1, 2).to(logits.dtype)[..., None]).exp_()
    return average_heads(p, share=share, kv_heads=k.shape[2])


def average_heads(
    p: Float[Tensor, "batch q_heads q_len kv_len"], *, share: Share, kv_heads: int
) -> Float[Tensor, "batch share_heads q_len kv_len"]:
    """Average probabilities over the heads that share a selection."""
    if share == "q_head":
        return p
    if share == "layer":
        return p.mean(1, keepdim=True)
    b, h, q_len, kv_len = p.shape
    return torch.mean(p.view(b, kv_heads, h // kv_heads, q_len, kv_len), 2)
