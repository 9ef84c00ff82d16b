"""Dense attention with its normaliser, from each kernel that returns one."""

import torch
from jaxtyping import Float
from torch import Tensor

from topmass.ops._logits import causal_logits, rows_that_fit, softmax_and_normaliser, weighted_values
from topmass.ops.dense_prefill import _flash3

__all__ = ["cudnn", "flash2", "flash3", "reference", "why_not_cudnn", "why_not_flash2", "why_not_flash3"]

_OutAndLse = tuple[Float[Tensor, "batch q_len q_heads v_dim"], Float[Tensor, "batch q_len q_heads"]]


def reference(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    v: Float[Tensor, "batch kv_len kv_heads v_dim"],
    *,
    scale: float,
    softcap: float | None,
    sinks: Float[Tensor, " q_heads"] | None,
) -> _OutAndLse:
    """Plain arithmetic, a few rows at a time."""
    q_len = q.shape[1]
    q_start = k.shape[1] - q_len
    step = rows_that_fit(q, k.shape[1])
    parts, norms = [], []
    for lo in range(0, q_len, step):
        rows = q[:, lo : lo + step]
        stop = q_start + lo + rows.shape[1]
        logits = causal_logits(rows, k[:, :stop], scale=scale, q_start=q_start + lo, softcap=softcap)
        p, lse = softmax_and_normaliser(logits, sinks)
        parts.append(weighted_values(p, v[:, :stop]).to(q.dtype))
        norms.append(lse.transpose(1, 2))
    return torch.cat(parts, 1), torch.cat(norms, 1)


def why_not_flash2(q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None, **settings: object) -> str | None:
    """Return why PyTorch's FlashAttention-2 cannot run the call, or `None`."""
    if softcap is not None:
        return "has no soft-cap in PyTorch."
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs an Ampere GPU or a newer one."
    return _why_not_fused(q, k, v)


def flash2(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None) -> _OutAndLse:
    """PyTorch's FlashAttention-2: `is_causal` of this operator aligns the last query with the last key."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(qt, kt, vt, 0.0, True, False, scale=scale)
    return _with_sinks(out.transpose(1, 2), lse[..., : q.shape[1]].transpose(1, 2), sinks)


def why_not_cudnn(q: Tensor, k: Tensor, v: Tensor, *, softcap: float | None, **settings: object) -> str | None:
    """Return why cuDNN's attention cannot run the call, or `None`."""
    if softcap is not None:
        return "has no soft-cap in PyTorch."
    if q.shape[1] != k.shape[1]:
        return "aligns the first query with the first key: it needs as many queries as keys."
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (9, 0):
        return "needs a Hopper GPU or a newer one."
    return _why_not_fused(q, k, v)


def cudnn(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None) -> _OutAndLse:
    """CuDNN's attention."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        qt, kt, vt, None, True, 0.0, True, False, scale=scale
    )
    return _with_sinks(out.transpose(1, 2), lse.reshape(out.shape[:3]).transpose(1, 2), sinks)


def why_not_flash3(q: Tensor, k: Tensor, v: Tensor, **settings: object) -> str | None:
    """Return why FlashAttention-3 cannot run the call, or `None`."""
    if reason := _flash3.why_not_installed():
        return reason
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] != 9:
        return "needs a Hopper GPU."
    return _why_not_fused(q, k, v)


def flash3(q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None) -> _OutAndLse:
    """FlashAttention-3, causal to the lower right."""
    out, lse = _flash3.flash3(q, k, v, scale=scale, softcap=softcap)
    return _with_sinks(out, lse, sinks)


def _why_not_fused(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if not (q.is_cuda and k.is_cuda and v.is_cuda):
        return "needs CUDA tensors."
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"supports float16 and bfloat16, got {q.dtype}."
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "needs all inputs in one dtype."
    if v.shape[-1] != q.shape[-1] or q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"needs one head dimension up to 256, a multiple of 8, got {q.shape[-1]} and {v.shape[-1]} for v."
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "needs the head dimension contiguous."
    return None


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> _OutAndLse:
    # a learned sink takes its share of the weight and brings no value
    if sinks is None:
        return out, lse
    whole = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
    return (out * (lse - whole).exp()[..., None]).to(out.dtype), whole
