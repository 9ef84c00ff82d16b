"""Dense causal attention: PyTorch's own kernel, or plain arithmetic where that has no equivalent."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops.dense_prefill import _lse

__all__ = ["dense_lse", "dense_prefill"]

for _backend in (
    _dispatch.KernelBackend(name="flash3", fn=_lse.flash3, why_not=_lse.why_not_flash3, priority=30),
    _dispatch.KernelBackend(name="flash2", fn=_lse.flash2, why_not=_lse.why_not_flash2, priority=20),
    # after the reference, which runs everything: by name only
    _dispatch.KernelBackend(name="cudnn", fn=_lse.cudnn, why_not=_lse.why_not_cudnn, priority=-10),
    _dispatch.KernelBackend(name="reference", fn=_lse.reference),
):
    _dispatch.register("dense_lse", _backend)


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
        return _lse.reference(q, k, v, scale=scale, softcap=softcap, sinks=sinks)[0]
    q_len, kv_len = q.shape[1], k.shape[1]
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[2] != k.shape[2]
    if q_len == kv_len or q_len == 1:
        out = F.scaled_dot_product_attention(qt, kt, vt, is_causal=q_len > 1, scale=scale, enable_gqa=gqa)
    else:
        if not q.is_cuda:
            return _lse.reference(q, k, v, scale=scale, softcap=None, sinks=None)[0]
        if _lse.why_not_flash2(q, k, v, softcap=None) is None:
            return _lse.flash2(q, k, v, scale=scale, softcap=None, sinks=None)[0]
        # float32: the kernels that align to the lower right take as many heads of keys as of queries
        if gqa:
            kt, vt = (x.repeat_interleave(q.shape[2] // k.shape[2], 1) for x in (kt, vt))
        out = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=causal_lower_right(q_len, kv_len), scale=scale)
    return out.transpose(1, 2)


def dense_lse(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    v: Float[Tensor, "batch kv_len kv_heads v_dim"],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch q_len q_heads v_dim"], Float[Tensor, "batch q_len q_heads"]]:
    """Causal attention over all keys, and the log-sum-exp of every query's logits, which attention mass needs.

    Queries are the last `q_len` of the `kv_len` positions. There is no gradient.

    Args:
        scale: Multiplies the logits.
        softcap: Logits become `softcap * tanh(logits / softcap)`. `None` leaves them.
        sinks: One learned sink logit per query head; part of the normaliser.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Returns:
        The output in the dtype of `q`, and the natural-log normaliser in float32 (float64 for float64 inputs).

    Raises:
        ConfigError: There are no queries, more queries than keys, or heads do not divide.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch
        >>> q, k = torch.zeros(1, 2, 4, 8), torch.randn(1, 5, 2, 8)
        >>> dense_lse(q, k, k, scale=1.0)[1][0, :, 0].exp()
        tensor([4., 5.])
    """
    if not 1 <= q.shape[1] <= k.shape[1]:
        raise ConfigError(f"Queries are the last of the keys: got {q.shape[1]} queries and {k.shape[1]} keys.")
    if q.shape[2] % k.shape[2]:
        raise ConfigError(f"q_heads must be a multiple of kv_heads, got {q.shape[2]} and {k.shape[2]}.")
    kwargs = {"scale": scale, "softcap": softcap, "sinks": sinks}
    impl = _dispatch.resolve("dense_lse", backend, q, k, v, **kwargs)
    return impl.fn(q.detach(), k.detach(), v.detach(), **kwargs)
