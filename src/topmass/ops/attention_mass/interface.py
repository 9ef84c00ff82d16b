"""Public entry point of the op: checks, picks a backend, calls it."""

import importlib.util

from jaxtyping import Float
from torch import Tensor

from topmass.core.granularity import Share
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import gpu_priority
from topmass.ops.attention_mass.reference import attention_mass_reference

__all__ = ["attention_mass"]

_dispatch.register("attention_mass", _dispatch.KernelBackend(name="reference", fn=attention_mass_reference))

# the reference must import where triton is absent
if importlib.util.find_spec("triton"):
    from topmass.ops.attention_mass import _triton

    _dispatch.register(
        "attention_mass",
        _dispatch.KernelBackend(
            name="triton", fn=_triton.attention_mass_triton, why_not=_triton.why_not, priority=gpu_priority(10)
        ),
    )


def attention_mass(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    lse: Float[Tensor, "batch q_len q_heads"] | None = None,
    *,
    scale: float,
    q_start: int = 0,
    softcap: float | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    share: Share = "layer",
    backend: str = "auto",
) -> Float[Tensor, "batch share_heads q_len kv_len"]:
    """Attention probability of every key, averaged over the heads that share a selection.

    Keys are positions `0 ... kv_len - 1`; queries are positions `q_start ... q_start + q_len - 1`. Rows sum to 1, less
    the mass of the learned sinks. Call it on chunks of queries: memory is `q_heads x q_len x kv_len`.

    Args:
        lse: Natural-log normaliser of the dense attention, learned sinks included. `None` computes it.
        scale: Multiplies the logits.
        q_start: Position of the first query.
        softcap: Logits become `softcap * tanh(logits / softcap)`. `None` leaves them.
        sinks: One learned sink logit per query head: a virtual key without a value.
        share: Heads averaged together.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Returns:
        Mass in float32, or float64 for float64 inputs.

    Raises:
        ConfigError: Heads do not divide, or the chunk reaches past the keys.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8)
        >>> attention_mass(q, k, scale=8**-0.5, q_start=2).sum(-1).allclose(torch.ones(1, 1, 3))
        True
    """
    if q.shape[2] % k.shape[2]:
        raise ConfigError(f"q_heads must be a multiple of kv_heads, got {q.shape[2]} and {k.shape[2]}.")
    if q_start + q.shape[1] > k.shape[1]:
        raise ConfigError(f"Queries {q_start}..{q_start + q.shape[1] - 1} reach past the {k.shape[1]} keys given.")
    kwargs = {"scale": scale, "q_start": q_start, "softcap": softcap, "sinks": sinks, "share": share}
    impl = _dispatch.resolve("attention_mass", backend, q, k, lse, **kwargs)
    return impl.fn(q, k, lse, **kwargs)
