"""Attention logits and the two products around the softmax, shared by the plain PyTorch references.

Half-precision inputs give float32 logits: the products of two halves are exact in float32, so only the order of the
sum differs between devices. Float64 inputs stay float64 throughout.
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["causal_logits", "rows_that_fit", "softmax_and_normaliser", "weighted_values", "workspace"]

# what a chunk of queries may take: laptops have little memory, GPUs need large chunks to be busy
WORKSPACE_BYTES = 256 * 2**20
GPU_WORKSPACE_BYTES = 2**31


def rows_that_fit(q: Tensor, kv_len: int, *, heads: int | None = None, multiple: int = 1) -> int:
    """Query rows whose `[batch, heads, rows, kv_len]` logits fit the workspace; at least `multiple`, a multiple of it."""
    row_bytes = max(q.shape[0], 1) * (heads or q.shape[2]) * max(kv_len, 1) * (8 if q.dtype == torch.float64 else 4)
    return max(workspace(q) // row_bytes // multiple, 1) * multiple


def workspace(q: Tensor) -> int:
    """Bytes that a chunk of queries may take on the device of `q`."""
    return GPU_WORKSPACE_BYTES if q.is_cuda else WORKSPACE_BYTES


def causal_logits(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    *,
    scale: float,
    q_start: int,
    softcap: float | None = None,
) -> Float[Tensor, "batch q_heads q_len kv_len"]:
    """Scaled (and soft-capped) logits of queries at positions `q_start ...`; future keys hold -inf."""
    b, q_len, h, d = q.shape
    kv_len, hk = k.shape[1:3]
    # [b * hk, group * q_len, d]
    q = q.reshape(b, q_len, hk, h // hk, d).permute(0, 2, 3, 1, 4).reshape(b * hk, h // hk * q_len, d)
    k = k.permute(0, 2, 3, 1).reshape(b * hk, d, kv_len)
    logits = _bmm(q, k).view(b, h, q_len, kv_len).mul_(scale)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if kv_len > q_start + 1:
        key = torch.arange(q_start, kv_len, device=q.device)
        t = torch.arange(q_start, q_start + q_len, device=q.device)
        logits[..., q_start:].masked_fill_(key > t[:, None], float("-inf"))
    return logits


def softmax_and_normaliser(
    logits: Float[Tensor, "batch q_heads q_len kv_len"], sinks: Float[Tensor, " q_heads"] | None = None
) -> tuple[Float[Tensor, "batch q_heads q_len kv_len"], Float[Tensor, "batch q_heads q_len"]]:
    """Probabilities, written over `logits`, and the log-sum-exp over keys and the head's learned sink if it has one.

    A row without any key has probabilities 0 and normaliser -inf.
    """
    sink = None if sinks is None else sinks.to(logits)[:, None, None]
    top = logits.amax(-1, keepdim=True)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == float("-inf"), 0.0)
    p = logits.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - top).exp()
    normaliser = (top + total.log()).squeeze(-1)
    return p.div_(total.masked_fill(total == 0, 1.0)), normaliser


def weighted_values(
    p: Float[Tensor, "batch q_heads q_len kv_len"], v: Float[Tensor, "batch kv_len kv_heads v_dim"]
) -> Float[Tensor, "batch q_len q_heads v_dim"]:
    """Probabilities times values, accumulated in the dtype of `p` (of `v` on CUDA, as fused kernels do)."""
    b, h, q_len, kv_len = p.shape
    hk, dv = v.shape[2:]
    p = p.reshape(b * hk, h // hk * q_len, kv_len)
    v = v.permute(0, 2, 1, 3).reshape(b * hk, kv_len, dv)
    out = _bmm(p.to(v.dtype), v) if p.is_cuda else torch.bmm(p, v.to(p.dtype))
    return out.view(b, h, q_len, dv).transpose(1, 2)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype in (torch.float32, torch.float64):
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
