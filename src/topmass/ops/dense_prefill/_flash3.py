"""FlashAttention-3 from either of its packages: `flash_attn_interface`, or the extension that vLLM is built with."""

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["flash3", "why_not_installed"]

_PACKAGE = "flash_attn_interface"
_EXTENSION = "_vllm_fa3_C"


def why_not_installed() -> str | None:
    """Return why there is no FlashAttention-3, or `None`."""
    if _has_package() or _extension() is not None:
        return None
    return f"needs {_PACKAGE} (FlashAttention's hopper folder) or vLLM's {_EXTENSION}."


def flash3(
    q: Float[Tensor, "batch q_len q_heads head_dim"],
    k: Float[Tensor, "batch kv_len kv_heads head_dim"],
    v: Float[Tensor, "batch kv_len kv_heads head_dim"],
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Tensor, "batch q_len q_heads head_dim"], Float[Tensor, "batch q_len q_heads"]]:
    """Causal attention, the last query with the last key, and its natural-log normaliser."""
    if not _has_package():
        return _from_extension(q, k, v, scale, softcap)
    settings: dict[str, Any] = {"softmax_scale": scale, "causal": True, "softcap": softcap or 0.0}
    attend = importlib.import_module(_PACKAGE).flash_attn_func
    try:
        out, lse, *_ = attend(q, k, v, return_attn_probs=True, **settings)
    except TypeError:  # before that argument it returned the normaliser always
        out, lse, *_ = attend(q, k, v, **settings)
    return out, lse.transpose(1, 2)


def _from_extension(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None
) -> tuple[Float[Tensor, "batch q_len q_heads head_dim"], Float[Tensor, "batch q_len q_heads"]]:
    b, q_len, h, _ = q.shape
    ends = torch.arange(b + 1, device=q.device, dtype=torch.int32)
    given: dict[str, Any] = {
        "q": q.flatten(0, 1),
        "k": k.flatten(0, 1),
        "v": v.flatten(0, 1),
        "cu_seqlens_q": ends * q_len,
        "cu_seqlens_k": ends * k.shape[1],
        "max_seqlen_q": q_len,
        "max_seqlen_k": k.shape[1],
        "softmax_scale": scale,
        "is_causal": True,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": softcap or 0.0,
        "is_rotary_interleaved": True,
        "num_splits": 1,
        "sm_margin": 0,
        "cp_world_size": 1,
        "cp_rank": 0,
    }
    # its arguments differ between versions; those without a name here are optional
    op = _op()
    out, lse, *_ = op(*(given.get(argument.name) for argument in op._schema.arguments))
    return out.view(b, q_len, h, -1), lse.view(h, b, q_len).permute(1, 2, 0)


@functools.cache
def _has_package() -> bool:
    return importlib.util.find_spec(_PACKAGE) is not None


@functools.cache
def _extension() -> Path | None:
    """The library: beside vLLM, or inside it, which is not imported for that."""
    found = importlib.util.find_spec(_EXTENSION)
    if found is not None and found.origin:
        return Path(found.origin)
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or not vllm.submodule_search_locations:
        return None
    folders = (Path(place) / "vllm_flash_attn" for place in vllm.submodule_search_locations)
    return next((path for folder in folders for path in sorted(folder.glob(f"{_EXTENSION}*.so"))), None)


@functools.cache
def _op() -> Any:
    path = _extension()
    assert path is not None, "asked for without why_not_installed"
    torch.ops.load_library(str(path))
    return getattr(torch.ops, _EXTENSION).fwd.default
