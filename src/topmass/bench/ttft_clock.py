"""One prompt through a model, on the clock: its times, what each layer ran, and how large its cache is."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from topmass.bench.modes import Handle, Mode
from topmass.bench.timing import now
from topmass.integrations.transformers.families import find_layers
from topmass.integrations.transformers.sparsify import LayerReceipt

__all__ = ["prefill", "time_prompt"]

# a prompt run before the clock starts, so that what is loaded on first use is there
WAKE = 64


def time_prompt(
    model: Any, mode: Mode, ids: Int[Tensor, "batch len"], *, chunk: int = 0, new_tokens: int = 0
) -> tuple[dict[str, float], Sequence[LayerReceipt], dict[str, float]]:
    """Times, receipts of the prompt and sizes of its cache, in one pass.

    Args:
        model: Any that `topmass.sparsify` takes, on the device.
        mode: How it attends.
        ids: The prompt, on the device.
        chunk: Tokens computed in one forward; 0 means all of them.
        new_tokens: Tokens generated after the prompt, for the time of one; 0 for none.
    """
    with mode.running(model) as handle, _layer_clock(model) as layer_time:
        prefill(model, ids[:, :WAKE], 0)
        # events can be read once they have happened
        now(ids.device)
        handle.clear()
        layer_time()
        if ids.is_cuda:
            torch.cuda.reset_peak_memory_stats(ids.device)
        start = now(ids.device)
        logits, cache = prefill(model, ids, chunk)
        logits.cpu()
        values = {"ttft": now(ids.device) - start, "layer": layer_time()}
        receipts = _snapshot(handle)
        sizes = _sizes(cache)
        if ids.is_cuda:
            sizes["peak_memory"] = torch.cuda.max_memory_allocated(ids.device) / 2**30
        if new_tokens:
            values["tpot"] = _decode(model, logits, cache, new_tokens)
    return values, receipts, sizes


def prefill(model: Any, ids: Int[Tensor, "batch len"], chunk: int) -> tuple[Float[Tensor, "batch 1 vocab"], Any]:
    """Logits of the last token, and the cache; `chunk` as in `time_prompt`."""
    logits, cache = None, None
    for part in ids.split(chunk or ids.shape[1], 1):
        out = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = out.logits, out.past_key_values
    assert logits is not None
    return logits, cache


def _decode(model: Any, logits: Float[Tensor, "batch 1 vocab"], cache: Any, tokens: int) -> float:
    token = logits.argmax(-1)
    start = now(token.device)
    for _ in range(tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return (now(token.device) - start) / tokens


@contextmanager
def _layer_clock(model: nn.Module) -> Iterator[Callable[[], float]]:
    """Gives a function: milliseconds in a full-attention module since its last call, mean over these layers."""
    modules = find_layers(model)[1].values()
    on_gpu = next(model.parameters()).is_cuda
    marks: list[tuple[Any, Any]] = []
    begun: list[Any] = []

    def mark() -> Any:
        if not on_gpu:
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read() -> float:
        spans = [a.elapsed_time(b) if on_gpu else b - a for a, b in marks]
        marks.clear()
        return sum(spans) / len(modules)

    hooks = [m.register_forward_pre_hook(lambda *_: begun.append(mark())) for m in modules]
    hooks += [m.register_forward_hook(lambda *_: marks.append((begun.pop(), mark()))) for m in modules]
    try:
        yield read
    finally:
        for hook in hooks:
            hook.remove()


def _snapshot(handle: Handle) -> Sequence[LayerReceipt]:
    # decoding counts on
    return [
        replace(x, backends=dict(x.backends), selection=dict(x.selection), dense_queries=dict(x.dense_queries))
        for x in handle.layers()
    ]


def _sizes(cache: Any) -> dict[str, float]:
    """MiB of keys and values, and of index keys."""
    found = {"kv_memory": 0, "index_memory": 0}
    for layer in cache.layers:
        found["kv_memory"] += _bytes(getattr(layer, "keys", None), getattr(layer, "values", None))
        if (rows := getattr(layer, "index_rows", None)) is not None:
            found["index_memory"] += _bytes(rows.raw, rows.cos, rows.sin)
        if (alone := getattr(layer, "index_alone", None)) is not None:
            found["index_memory"] += _bytes(*(x.features for x in alone()))
    return {name: size / 2**20 for name, size in found.items()}


def _bytes(*tensors: object) -> int:
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))
