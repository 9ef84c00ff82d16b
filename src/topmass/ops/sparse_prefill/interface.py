"""Public entry point of the op: checks, picks a backend, calls it."""

from jaxtyping import Float, Int
from torch import Tensor

from topmass.core.support import Support
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops._triton_common import register_triton
from topmass.ops.sparse_prefill.reference import sparse_prefill_reference

__all__ = ["resolve_backend", "sparse_prefill"]

_dispatch.register("sparse_prefill", _dispatch.KernelBackend(name="reference", fn=sparse_prefill_reference))
register_triton(
    "sparse_prefill", "topmass.ops.sparse_prefill._masked", "sparse_prefill_masked", name="masked", priority=5
)
register_triton("sparse_prefill", "topmass.ops.sparse_prefill._triton", "sparse_prefill_triton")


def sparse_prefill(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "kv_batch kv_len kv_heads head_dim"],
    v: Float[Tensor, "kv_batch kv_len kv_heads v_dim"],
    support: Support,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    page_table: Int[Tensor, "batch pages"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch q_len q_heads v_dim"], Float[Tensor, "batch q_len q_heads"]]:
    """Softmax attention of every query over exactly the keys of its support, renormalised.

    Keys are positions `0 ... kv_len - 1`; the support says at which position the queries start.

    Args:
        scale: Multiplies the logits. `None` means `head_dim ** -0.5`.
        softcap: Logits become `softcap * tanh(logits / softcap)`. `None` leaves them.
        sinks: One learned sink logit per query head; it is always kept and holds its mass.
        page_table: Which page of `k` and `v`, then pools of pages `[pages, page_size, heads, dim]`, holds the tokens
            `i * page_size ...` of each sequence. `None` means that `k` and `v` hold one sequence per row.
        backend: `"auto"`, or the name of a backend; a name never falls back.

    Returns:
        The output in the dtype of `q`, and the natural-log normaliser (float32, or float64 for float64 inputs). A query
        without any key has output 0 and normaliser -inf.

    Raises:
        ConfigError: Shapes of queries, keys and support do not fit together.
        BackendUnavailableError: No backend can run this call.

    Example:
        >>> import torch, topmass
        >>> q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8)
        >>> selector = topmass.StreamingSelector(sink=1, window=2)
        >>> support = selector.select(topmass.selection.AttentionInputs(q=q, k=k))
        >>> sparse_prefill(q, k, k, support)[0].shape
        torch.Size([1, 6, 4, 8])
    """
    kwargs = _checked(q, k, v, support, scale, softcap, sinks, page_table)
    return resolve_backend(backend, q, k, v, support, **kwargs).fn(q, k, v, support, **kwargs)


def resolve_backend(backend: str, *args: object, **kwargs: object) -> _dispatch.KernelBackend:
    """The backend that would run a call, for receipts."""
    return _dispatch.resolve("sparse_prefill", backend, *args, **kwargs)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    support: Support,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    page_table: Tensor | None,
):
    h, hk = q.shape[2], k.shape[2]
    if h % hk:
        raise ConfigError(f"q_heads must be a multiple of kv_heads, got {h} and {hk}.")
    if k.shape[:3] != v.shape[:3]:
        raise ConfigError(
            f"Keys and values must agree but for the head dimension, got {tuple(k.shape[:3])} and {tuple(v.shape[:3])}."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ConfigError(f"Queries and keys need one head dimension, got {q.shape[-1]} and {k.shape[-1]}.")
    if sinks is not None and sinks.shape != (h,):
        raise ConfigError(f"There must be one sink per query head: {h}, got {sinks.numel()}.")
    if support.q_len != q.shape[1] or support.groups.shape[0] != q.shape[0]:
        raise ConfigError(
            f"The support covers {support.groups.shape[0]} x {support.q_len} queries, but q has {q.shape[0]} x {q.shape[1]}."
        )
    if support.groups.shape[1] != (expected := support.granularity.share_heads(h, hk)):
        raise ConfigError(
            f"share={support.granularity.share!r} needs {expected} selections, the support has {support.groups.shape[1]}."
        )
    sequences, kv_len = k.shape[:2]
    if page_table is not None:
        sequences, kv_len = page_table.shape[0], page_table.shape[1] * k.shape[1]
    if sequences != q.shape[0]:
        raise ConfigError(
            f"q holds {q.shape[0]} sequences, the {'keys' if page_table is None else 'page table'} {sequences}."
        )
    if support.q_start + support.q_len > kv_len:
        raise ConfigError(
            f"The support reaches position {support.q_start + support.q_len - 1}, past the {kv_len} keys given."
        )
    settings = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap, "sinks": sinks}
    return settings if page_table is None else settings | {"page_table": page_table}
