"""Dense causal attention: PyTorch's own kernel, or plain arithmetic where that has no equivalent."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from topmass.ops._logits import causal_logits, rows_that_fit, softmax_and_normaliser, weighted_values

__all__ = ["dense_prefill"]


def dense_prefill(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    v: Float[Tensor, "batch kv_len kv_heads v_dim"],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
) -> Float[Tensor, "batch q_len q_heads v_dim"]:
    """Causal attention over all keys; queries are the last `q_len` of the `kv_len` positions.

    Args:
        scale: Multiplies the logits.
        softcap: Logits become `softcap * tanh(logits / softcap)`. `None` leaves them.
        sinks: One learned sink logit per query head.
    """
    if softcap is not None or sinks is not None:
        return _plain(q, k, v, scale=scale, softcap=softcap, sinks=sinks)
    q_len, kv_len = q.shape[1], k.shape[1]
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]
    if q_len == kv_len or q_len == 1:
        out = F.scaled_dot_product_attention(qt, kt, vt, is_causal=q_len > 1, scale=scale, enable_gqa=gqa)
    else:
        bias = causal_lower_right(q_len, kv_len)
        if q.is_cuda and gqa:
            kt, vt = (x.repeat_interleave(q.shape[2] // k.shape[2], 1) for x in (kt, vt))
        elif not q.is_cuda:
            return _plain(q, k, v, scale=scale, softcap=None, sinks=None)
        out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=bias, scale=scale)
    return out.transpose(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    q_len = q.shape[1]
    q_start = k.shape[1] - q_len
    step = rows_that_fit(q, k.shape[1])
    parts = []
    for lo in range(0, q_len, step):
        rows = q[:, lo : lo + step]
        stop = q_start + lo + rows.shape[1]
        logits = causal_logits(rows, k[:, :stop], scale=scale, q_start=q_start + lo, softcap=softcap)
        p, _ = softmax_and_normaliser(logits, sinks)
        parts.append(weighted_values(p, v[:, :stop]).to(q.dtype))
    return torch.cat(parts, 1)
