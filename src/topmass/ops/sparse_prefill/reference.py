"""Definition of sparse prefill in plain PyTorch; every other implementation is tested against it."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topmass.core.support import Support
from topmass.ops._logits import causal_logits, rows_that_fit, softmax_and_normaliser, weighted_values

__all__ = ["expand_to_heads", "sparse_prefill_reference"]


def sparse_prefill_reference(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "kv_batch kv_len kv_heads head_dim"],
    v: Float[Tensor, "kv_batch kv_len kv_heads v_dim"],
    support: Support,
    *,
    scale: float,
    softcap: float | None,
    sinks: Float[Tensor, " q_heads"] | None,
    page_table: Int[Tensor, "batch pages"] | None = None,
) -> tuple[Float[Tensor, "batch q_len q_heads v_dim"], Float[Tensor, "batch q_len q_heads"]]:
    """Masked softmax attention, a chunk of queries at a time; keys past the chunk are never touched."""
    b, q_len, h, _ = q.shape
    if page_table is not None:
        table = page_table[:, : -(-(support.q_start + q_len) // k.shape[1])].long()
        k, v = (x[table].flatten(1, 2) for x in (k, v))
    out = torch.empty(b, q_len, h, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(b, q_len, h, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32, device=q.device)
    step = rows_that_fit(q, support.q_start + q_len)
    for lo in range(0, q_len, step):
        hi = min(lo + step, q_len)
        part = support.rows(lo, hi)
        kv_len = part.q_start + part.q_len
        logits = causal_logits(q[:, lo:hi], k[:, :kv_len], scale=scale, q_start=part.q_start, softcap=softcap)
        logits.masked_fill_(~expand_to_heads(part.mask(kv_len), h), float("-inf"))
        p, norm = softmax_and_normaliser(logits, sinks)
        out[:, lo:hi] = weighted_values(p, v[:, :kv_len])
        lse[:, lo:hi] = norm.transpose(1, 2)
    return out, lse


def expand_to_heads(
    mask: Bool[Tensor, "batch share_heads q_len kv_len"], q_heads: int
) -> Bool[Tensor, "batch heads q_len kv_len"]:
    """Repeat a mask for every query head, or keep one head to broadcast."""
    return mask if mask.shape[1] in (1, q_heads) else mask.repeat_interleave(q_heads // mask.shape[1], 1)
