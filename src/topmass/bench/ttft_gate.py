"""The check before a time to first token: every layer's attention, and the logits, on a short prompt."""

import functools
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from topmass.bench.modes import Attention, Handle, Mode
from topmass.core.support import Support
from topmass.integrations.transformers._session import LayerCall
from topmass.ops import dense_lse, sparse_prefill
from topmass.selection import Selector, StreamingSelector
from topmass.selection.base import RankedSelector
from topmass.testing import assert_as_accurate_as

__all__ = ["GATE", "SINK", "check_mode"]

# tokens of the prompt on which results are checked, and of its end at which logits are compared
GATE, ROWS = 512, 64
# how many times less accurate logits may be than with plain arithmetic
FACTOR = 2.0
SINK = 4

Errors = dict[str, float]


def check_mode(model: nn.Module, mode: Mode, ids: Int[Tensor, "1 len"]) -> Errors:
    """Check a way to attend against float64 on the same inputs, layer by layer, and the logits that follow.

    A dense kernel has to be dense attention. A selector with a budget of the whole prompt has to be dense attention too, by
    the sparse kernels; with a quarter of it, attention over exactly the supports that it recorded.

    Raises:
        AssertionError: A layer, or the logits, are more than twice as inaccurate as plain arithmetic in the same dtype.
    """
    if mode.selector is None:
        return _check(model, mode, ids, {})
    n = ids.shape[1]
    whole = replace(mode, name=f"{mode.name}, full budget", selector=_with_budget(mode.selector, n))
    found = [_check(model, whole, ids, {})]
    if (least := _smallest(mode.selector)) < n:
        selector = _with_budget(mode.selector, max(least, n // 4))
        part = replace(mode, name=f"{mode.name}, a quarter of the prompt", selector=selector)
        found.append(_check(model, part, ids, None))
    return {name: max(f[name] for f in found) for name in found[0]}


def _check(model: Any, mode: Mode, ids: Int[Tensor, "1 len"], supports: dict[int, Support] | None) -> Errors:
    """`supports` that the attention has to be over: empty is dense, `None` those that it records."""
    errors: Errors = {}

    def watch(call: LayerCall, out: Tensor, handle: Handle) -> None:
        own = handle.supports() if supports is None else supports
        exact, plain = _exactly(call, own), _plainly(call, own)
        name = f"{mode.name}, layer {call.layer}"
        assert_as_accurate_as(out, exact=exact, baseline=plain, name=name)
        for key, x in (("gate_error", out), ("gate_plain_error", plain)):
            errors[key] = max(errors.get(key, 0.0), (x.double() - exact).abs().max().item())

    with mode.running(model, watch=watch) as handle:
        logits = _logits(model, ids)
        own = handle.supports() if supports is None else supports
    exact, plain = (_logits_with(model, functools.partial(f, supports=own), ids) for f in (_rounded, _plainly))
    size = exact.double().norm()
    error, baseline = (((x.double() - exact.double()).norm() / size).item() for x in (logits, plain))
    allowed = FACTOR * max(baseline, torch.finfo(logits.dtype).eps)
    if not error <= allowed:
        raise AssertionError(
            f"{mode.name}: logits are off by {error:.2e} (relative, 2-norm) from attention in float64, with plain arithmetic by "
            f"{baseline:.2e}; allowed {allowed:.2e}."
        )
    return {**errors, "gate_logits_error": error, "gate_logits_plain_error": baseline}


def _logits(model: Any, ids: Int[Tensor, "1 len"]) -> Float[Tensor, "1 rows vocab"]:
    return model(input_ids=ids, use_cache=False, logits_to_keep=min(ROWS, ids.shape[1])).logits


def _logits_with(model: Any, attend: Attention, ids: Int[Tensor, "1 len"]) -> Float[Tensor, "1 rows vocab"]:
    with Mode(name="check", role="dense", attend=attend).running(model):
        return _logits(model, ids)


def _exactly(call: LayerCall, supports: dict[int, Support]) -> Float[Tensor, "1 q_len q_heads v_dim"]:
    """Attention in float64; a layer without a support is dense."""
    q, k, v = call.q.double(), call.k.double(), call.v.double()
    sinks = None if call.sinks is None else call.sinks.double()
    settings: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap, "sinks": sinks, "backend": "reference"}
    if call.layer in supports:
        return sparse_prefill(q, k, v, supports[call.layer], **settings)[0]
    return dense_lse(q, k, v, **settings)[0]


def _rounded(call: LayerCall, supports: dict[int, Support]) -> Float[Tensor, "1 q_len q_heads v_dim"]:
    return _exactly(call, supports).to(call.q.dtype)


def _plainly(call: LayerCall, supports: dict[int, Support]) -> Float[Tensor, "1 q_len q_heads v_dim"]:
    """Plain PyTorch, every intermediate in the dtype of the model."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    heads = q.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.masked_fill(~_mask(call, supports, heads), -torch.inf)
    if call.sinks is not None:
        sink = call.sinks.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        return (torch.cat([logits, sink], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def _mask(call: LayerCall, supports: dict[int, Support], heads: int) -> Bool[Tensor, "1 heads q_len kv_len"]:
    n = call.k.shape[1]
    if call.layer in supports:
        mask = supports[call.layer].mask(n)
        return mask.repeat_interleave(heads // mask.shape[1], 1)
    key = torch.arange(n, device=call.q.device)
    return (key <= key[call.q_start :, None])[None, None]


def _with_budget(selector: Selector, budget: int) -> Selector:
    if isinstance(selector, StreamingSelector):
        sink = min(SINK, budget // 2)
        return replace(selector, sink=sink, window=budget - sink)
    assert isinstance(selector, RankedSelector)
    return replace(selector, budget=max(budget, _smallest(selector)), dense_below=0)


def _smallest(selector: Selector) -> int:
    """Smallest budget that the selector's granularity, sink and window leave room for."""
    if not isinstance(selector, RankedSelector):
        return 2 * SINK
    indexer = getattr(selector, "indexer", None)
    rules = [rule for i in ((0,) if indexer is None else indexer.info.layers) if (rule := selector.rule(i))]
    return max(replace(rule, budget=None).smallest_budget for rule in rules)
