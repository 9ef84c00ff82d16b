"""Public entry points of the op: checks, picks a backend, calls it."""

from typing import get_args

from jaxtyping import Float, Int
from torch import Tensor

from topmass.core.granularity import Granularity, Share
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import register_triton
from topmass.ops.attention_mass.reference import attention_mass_reference
from topmass.ops.topk_support.interface import Pool

__all__ = ["attention_mass", "pooled_mass"]

_dispatch.register("attention_mass", _dispatch.KernelBackend(name="reference", fn=attention_mass_reference))
register_triton("attention_mass", "topmass.ops.attention_mass._triton", "attention_mass_triton")


def attention_mass(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    lse: Float[Tensor, "batch q_len q_heads"] | None = None,
    *,
    scale: float,
    q_start: int = 0,
    positions: Int[Tensor, " q_len"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    share: Share = "layer",
    backend: str = "auto",
) -> Float[Tensor, "batch share_heads q_len kv_len"]:
    """Attention probability of every key, averaged over the heads that share a selection.

    Keys are positions `0 ... kv_len - 1`; queries are positions `q_start ... q_start + q_len - 1`, or any others. Rows
    sum to 1, less the mass of the learned sinks. Call it on chunks of queries: the result has
    `share_heads x q_len x kv_len` elements.

    Args:
        lse: Natural-log normaliser of the dense attention, learned sinks included. `None` computes it.
        scale: Multiplies the logits.
        q_start: Position of the first query.
        positions: Position of every query, below `kv_len`, in any order, instead of `q_start`.
        softcap: Logits become `softcap * tanh(logits / softcap)`. `None` leaves them.
        sinks: One learned sink logit per query head: a virtual key without a value.
        share: Heads averaged together.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Returns:
        Mass in float32, or float64 for float64 inputs.

    Raises:
        ConfigError: Heads do not divide, the chunk reaches past the keys, or both kinds of position are given.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8)
        >>> attention_mass(q, k, scale=8**-0.5, q_start=2).sum(-1).allclose(torch.ones(1, 1, 3))
        True
    """
    mass, _ = pooled_mass(
        q,
        k,
        lse,
        scale=scale,
        granularity=Granularity(share=share),
        q_start=q_start,
        positions=positions,
        softcap=softcap,
        sinks=sinks,
        backend=backend,
    )
    return mass


def pooled_mass(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    lse: Float[Tensor, "batch q_len q_heads"] | None = None,
    *,
    scale: float,
    granularity: Granularity,
    pool: Pool = "sum",
    q_start: int = 0,
    positions: Int[Tensor, " q_len"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch share_heads q_blocks groups"], Float[Tensor, "batch share_heads q_len"]]:
    """Attention mass at the granularity of a selection, and what each query's row of it sums to.

    The mass is that of `attention_mass`, averaged over each block's existing queries, then summed (or maximised) over each
    complete key group: `pool_scores(attention_mass(...))`, without the full rows where a kernel can.

    Args:
        lse: Natural-log normaliser of the dense attention, learned sinks included. `None` computes it.
        scale: Multiplies the logits.
        granularity: Unit of selection; its `share` says which heads are averaged.
        pool: How a key group is scored from its tokens.
        q_start: Position of the first query; blocks are aligned to absolute positions.
        positions: Position of every query, below `kv_len`, in any order, instead of `q_start`; needs `q_block=1`.
        softcap: Logits become `softcap * tanh(logits / softcap)`. `None` leaves them.
        sinks: One learned sink logit per query head.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Returns:
        Pooled mass, and the sum of every row over all keys: 1, less the mass of the learned sinks.

    Raises:
        ConfigError: Shapes do not fit together, the chunk reaches past the keys, or a setting does not go with another.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch
        >>> q, k = torch.randn(1, 5, 4, 8), torch.randn(1, 5, 2, 8)
        >>> mass, total = pooled_mass(q, k, scale=8**-0.5, granularity=Granularity(q_block=4, kv_block=2))
        >>> mass.shape, total.shape
        (torch.Size([1, 1, 2, 2]), torch.Size([1, 1, 5]))
    """
    if q.shape[2] % k.shape[2]:
        raise ConfigError(f"q_heads must be a multiple of kv_heads, got {q.shape[2]} and {k.shape[2]}.")
    if q.shape[0] != k.shape[0]:
        raise ConfigError(f"There are {q.shape[0]} sequences of queries, {k.shape[0]} of keys.")
    if q.shape[-1] != k.shape[-1]:
        raise ConfigError(f"Queries and keys need one head dimension, got {q.shape[-1]} and {k.shape[-1]}.")
    if lse is not None and lse.shape != q.shape[:3]:
        raise ConfigError(f"lse must be {tuple(q.shape[:3])}, got {tuple(lse.shape)}.")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ConfigError(f"There must be one sink per query head: {q.shape[2]}, got {sinks.numel()}.")
    if positions is not None and positions.shape != q.shape[1:2]:
        raise ConfigError(f"There are {q.shape[1]} queries, but {positions.numel()} positions.")
    if pool not in get_args(Pool):
        raise ConfigError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}.")
    if positions is not None and (q_start or granularity.q_block > 1):
        raise ConfigError("positions= goes with neither q_start nor q_block > 1: pool over the queries afterwards.")
    if positions is None and q_start + q.shape[1] > k.shape[1]:
        raise ConfigError(f"Queries {q_start}..{q_start + q.shape[1] - 1} reach past the {k.shape[1]} keys given.")
    kwargs = {
        "scale": scale,
        "q_start": q_start,
        "positions": positions,
        "softcap": softcap,
        "sinks": sinks,
        "granularity": granularity,
        "pool": pool,
    }
    impl = _dispatch.resolve("attention_mass", backend, q, k, lse, **kwargs)
    return impl.fn(q, k, lse, **kwargs)
