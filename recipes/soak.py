"""Soak one kernel backend: random prompts, chunkings, batches and settings; every attention call is shadowed.

    PYTHONPATH=src python recipes/soak.py --minutes 8 --seed 0 --out soak-0.json
    TRITON_INTERPRET=1 PYTHONPATH=src python recipes/soak.py --device cpu --dtype float16 --cases 4 --max-length 96

A case draws a model (the reference checkpoint, or two attention layers of Qwen3.5-9B's shape with random weights), prompts, how
they are cut and padded, a selector, its granularity and its budget, and runs the prompt with the backend asked for by name.
On sampled rows of every call of a full-attention layer

- the output is compared with float64 arithmetic over the support that the call recorded, and
- the backend attends once more over a support that lists every key, none of them forced by a dense row; that is dense attention.

Either may be at most twice as inaccurate as plain PyTorch in the model's dtype. The exit status is 1 after a mismatch, an exception,
memory that grew, or if the backend refused more than a fifth of the cases. `--only INDEX` runs one case again.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import math
import platform
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import topmass
from topmass.bench.models import MODELS, TINY
from topmass.bench.modes import Handle, Mode
from topmass.bench.ttft_gate import _exactly, _plainly
from topmass.core.support import Support
from topmass.errors import BackendUnavailableError, ConfigError
from topmass.integrations.transformers._session import LayerCall
from topmass.integrations.transformers.index_features import describe_model, index_configs
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.ops import sparse_prefill

# rows shadowed at a call's own budget (in three places) and over the list of all keys (in one)
OWN, LISTED = 32, 128
# share of the run until caches are warm and most kernels compiled, and what may be held beyond that, MiB
WARM, GPU_GROWTH, HOST_GROWTH = 0.5, 64, 256
# seconds between two readings of memory
READING = 20
MOST_CRASHES = 3
# share of the cases that the backend may refuse
REFUSED = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, its untrained or shipped indexers by key group, and where its prompts come from."""

    name: str
    model: Any
    indexers: dict[int, topmass.Indexer]
    text: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prompt and how it is run."""

    index: int
    subject: Subject
    selector: topmass.selection.Selector
    lengths: tuple[int, ...]
    cuts: tuple[int, ...]
    generated: int

    def __str__(self) -> str:
        config = {k: v for k, v in self.selector.config().items() if k != "indexer"}
        return f"case {self.index}: {self.subject.name}, tokens {self.lengths}, cut at {self.cuts}, {config}"


@dataclass(slots=True)
class Tally:
    """What was checked, and what was found."""

    calls: int = 0
    rows: int = 0
    listed_rows: int = 0
    worst: dict[str, float] = field(default_factory=lambda: {"own": 0.0, "listed": 0.0})
    backends: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)
    mismatches: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


# -- the shadow


class Shadow:
    """Checks every call of a full-attention layer."""

    def __init__(self, backend: str, tally: Tally, rng: random.Random) -> None:
        self.backend, self.tally, self.rng = backend, tally, rng

    def __call__(self, call: LayerCall, out: Tensor, handle: Handle) -> None:
        self.tally.calls += 1
        found = handle.supports().get(call.layer)
        own = found[-1] if isinstance(found, list) else found
        ran = {name for receipt in handle.layers() for name in receipt.backends}
        handle.clear()
        self.tally.backends.update(ran)
        if not bool(out.isfinite().all()):
            raise MismatchError(f"layer {call.layer}: output is not finite")
        if own is None:
            if not call.decode:
                raise MismatchError(f"layer {call.layer}: {out.shape[1]} queries of the prompt recorded no support")
            return
        if ran != {self.backend}:
            raise MismatchError(f"layer {call.layer}: ran {sorted(ran)} instead of {self.backend}")
        self._own(call, out, own)
        self._listed(call, own.granularity)

    def _own(self, call: LayerCall, out: Tensor, support: Support) -> None:
        for lo, hi in self._ranges(call.q.shape[1]):
            i = self.rng.randrange(call.q.shape[0])
            part = cut(call, lo, hi, i)
            supports = {call.layer: support.rows(lo, hi).sequence(i)}
            self._gate("own", call, lo, out[i : i + 1, lo:hi], _exactly(part, supports), _plainly(part, supports))
            self.tally.rows += hi - lo

    def _listed(self, call: LayerCall, granularity: topmass.Granularity) -> None:
        rows = call.q.shape[1]
        lo = self.rng.randrange(rows)
        hi = min(lo + LISTED, rows)
        part = cut(call, lo, hi)
        support = every_key(part, granularity)
        settings = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        out, _ = sparse_prefill(part.q, part.k, part.v, support, **settings, backend=self.backend)
        i = self.rng.randrange(call.q.shape[0])
        part = cut(call, lo, hi, i)
        self._gate("listed", call, lo, out[i : i + 1], _exactly(part, {}), _plainly(part, {}))
        self.tally.listed_rows += hi - lo

    def _ranges(self, rows: int) -> list[tuple[int, int]]:
        starts = {0, max(rows - OWN, 0), self.rng.randrange(rows)}
        return [(lo, min(lo + OWN, rows)) for lo in sorted(starts)]

    def _gate(self, kind: str, call: LayerCall, lo: int, out: Tensor, exact: Tensor, plain: Tensor) -> None:
        error, allowed = ((x.double() - exact).abs().max().item() for x in (out, plain))
        rounding = (exact.to(out.dtype).double() - exact).abs().max().item()
        allowed = 2 * max(allowed, rounding)
        self.tally.worst[kind] = max(self.tally.worst[kind], error / allowed if allowed else float(error > 0))
        if not error <= allowed:
            raise MismatchError(
                f"layer {call.layer}, {kind} support, rows from {call.q_start + lo} of {call.k.shape[1]}: error {error:.3e}, "
                f"allowed {allowed:.3e}"
            )


class MismatchError(Exception):
    """An output that the arithmetic does not explain."""


def cut(call: LayerCall, lo: int, hi: int, sequence: int | None = None) -> LayerCall:
    """Queries `lo ... hi - 1` of a call, of one sequence or of all."""
    stop = call.q_start + hi
    of = slice(None) if sequence is None else slice(sequence, sequence + 1)
    return LayerCall(
        layer=call.layer, q=call.q[of, lo:hi], k=call.k[of, :stop], v=call.v[of, :stop], scale=call.scale, softcap=call.softcap,
        sinks=call.sinks, decode=call.decode, sample=call.sample,
    )  # fmt: skip


def every_key(call: LayerCall, granularity: topmass.Granularity) -> Support:
    """A support that lists all key groups before the window, and forces none of them."""
    # without a budget no row is dense by the rule
    rule = topmass.SupportRule(budget=None, granularity=granularity)
    q_start, q_len = call.q_start, call.q.shape[1]
    first, stop = rule.candidate_range(rule.block_starts(q_start, q_len, call.q.device))
    groups = torch.arange(first, max(int(stop.max()), first + 1), device=call.q.device)
    groups = torch.where(groups < stop[:, None], groups, -1)
    heads = granularity.share_heads(call.q.shape[2], call.k.shape[2])
    groups = groups.expand(call.q.shape[0], heads, -1, -1)
    return Support.from_groups(groups, (groups >= 0).sum(-1), rule=rule, q_start=q_start, q_len=q_len)


# -- the cases


def subjects(device: str, dtype: torch.dtype, max_length: int) -> list[Subject]:
    """The reference checkpoint with real text, and two layers of the 9B shape (of a tiny one without a GPU)."""
    model, tokenizer = topmass.load_reference(device=device, dtype=dtype)
    sample = topmass.make_samples("niah_uuid", tokenizer, length=max(max_length, 1024), n=1)[0]
    text = torch.tensor(tokenizer(sample.prompt)["input_ids"], device=device)
    text = text.repeat(max_length // len(text) + 1)
    stack = two_layers("qwen3.5-9b" if device == "cuda" else TINY, device, dtype)
    return [
        Subject(name="reference", model=model, indexers=indexers(model, shipped=True), text=text),
        Subject(name="two layers", model=stack, indexers=indexers(stack), text=None),
    ]


def two_layers(shape: str, device: str, dtype: torch.dtype) -> Any:
    """Two full-attention layers of a named shape, random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = MODELS[shape]
    changes = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "vocab_size": 4096}
    config = AutoConfig.for_model(kind, **{**settings, **changes}, max_position_embeddings=2**17)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


def indexers(model: Any, *, shipped: bool = False) -> dict[int, topmass.Indexer]:
    """Untrained indexers over groups of 1, 4 and 16 keys; the shipped one in place of its own."""
    fingerprint, _ = describe_model(model)
    found = {r: topmass.Indexer.create(index_configs(model, kv_block=r), fingerprint) for r in (1, 4, 16)}
    if shipped:
        try:
            own = topmass.load_reference_indexer()
            found[own.info.kv_block] = own
        except topmass.errors.DataError:
            pass
    return found


def draw(index: int, seed: int, there: list[Subject], max_length: int, most_tokens: int) -> Case:
    """Case `index`, a function of the seed."""
    rng = random.Random(f"{seed} {index}")
    subject = rng.choice(there)
    longest = draw_length(rng, max_length)
    batch = rng.choice([b for b in (1, 1, 2, 3, 4) if b * longest <= most_tokens] or [1])
    lengths = [longest] * batch
    # a hybrid's linear layers take padding for text once there is a cache
    if subject.text is None and batch > 1 and rng.random() < 0.5:
        lengths = [longest, *(rng.randint(1, longest) for _ in range(batch - 1))]
    while True:
        try:
            selector = draw_selector(rng, subject, longest)
            break
        except ConfigError:
            continue
    return Case(
        index=index, subject=subject, selector=selector, lengths=tuple(lengths), cuts=draw_cuts(rng, longest),
        generated=rng.randrange(3),
    )  # fmt: skip


def draw_length(rng: random.Random, most: int) -> int:
    edges = [n for n in (1, 2, 31, 32, 33, 63, 65, 127, 1023, 2049, most) if n <= most]
    return rng.choice(edges) if rng.random() < 0.2 else round(math.exp(rng.uniform(0, math.log(most))))


def draw_cuts(rng: random.Random, length: int) -> tuple[int, ...]:
    kind = rng.randrange(3)
    if kind == 0 or length < 3:
        return ()
    if kind == 1:
        size = rng.randint(max(length // 16, 1), length - 1)
        return tuple(range(size, length, size))
    return tuple(sorted(rng.sample(range(1, length), min(rng.randint(1, 8), length - 1))))


def draw_selector(rng: random.Random, subject: Subject, length: int) -> topmass.selection.Selector:
    kind = rng.choice(["indexer", "indexer", "oracle", "random", "pooled", "streaming"])
    unit = {"q_block": rng.choice([1, 1, 8, 16, 32, 64]), "kv_block": rng.choice([1, 4, 16])}
    tokens = round(math.exp(rng.uniform(0, math.log(4096))))
    budget = rng.choice([tokens, tokens, "5%", "30%", length])
    sink, window = rng.choice([(0, 1), (4, 1), (4, 32), (16, 64)])
    if kind == "streaming":
        return topmass.StreamingSelector(sink=sink, window=max(tokens, 1))
    settings: dict[str, Any] = {"budget": budget, "sink": sink, "window": window}
    if kind == "indexer":
        return subject.indexers[unit["kv_block"]].selector(granularity=topmass.Granularity(**unit), **settings)
    granularity = topmass.Granularity(**unit, share=rng.choice(["layer", "layer", "kv_head"]))
    if kind == "random":
        return topmass.RandomSelector(granularity=granularity, seed=rng.randrange(100), **settings)
    build = topmass.OracleSelector if kind == "oracle" else topmass.PooledSelector
    return build(granularity=granularity, **settings)


def run_case(case: Case, backend: str, shadow: Shadow) -> None:
    """Prefill in pieces, then a few tokens more."""
    rng = torch.Generator().manual_seed(case.index)
    model, device = case.subject.model, next(case.subject.model.parameters()).device
    batch, longest = len(case.lengths), max(case.lengths)
    if case.subject.text is None:
        ids = torch.randint(0, model.config.vocab_size, (batch, longest), generator=rng).to(device)
    else:
        at = torch.randint(0, len(case.subject.text) - longest + 1, (batch,), generator=rng)
        ids = torch.stack([case.subject.text[i : i + longest] for i in at.tolist()])
    real = torch.arange(longest, device=device) >= longest - torch.tensor(case.lengths, device=device)[:, None]
    padded = len(set(case.lengths)) > 1
    mode = Mode(name="soak", role="sparse", selector=case.selector, backend=backend)
    cache, token = None, None
    with torch.inference_mode(), fast_linear_attention(model), mode.running(model, watch=shadow):
        for lo, hi in zip((0, *case.cuts), (*case.cuts, longest), strict=True):
            mask = real[:, :hi] if padded else None
            out = model(
                input_ids=ids[:, lo:hi], attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache, token = out.past_key_values, out.logits.argmax(-1)
        for _ in range(case.generated):
            real = torch.cat([real, real.new_ones(batch, 1)], 1)
            mask = real if padded else None
            out = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an output that a kernel leaves out is seen."""

    def fill(allocate: Any) -> Any:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocated

    with mock.patch("torch.empty", fill(torch.empty)), mock.patch("torch.empty_like", fill(torch.empty_like)):
        yield


# -- the run


def memory(begin: float) -> dict[str, float]:
    """Seconds since `begin`, MiB held on the GPU and by the process, and kernels compiled so far."""
    gc.collect()
    # what the compiler freed and the allocator keeps is not held
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    host = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    gpu = torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {"seconds": time.monotonic() - begin, "gpu": gpu, "host": host, "kernels": compiled()}


def compiled() -> int:
    """Kernels that Triton holds for this process, all specialisations; none where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return 0
    from triton.runtime.jit import JITFunction

    found = [k for k in gc.get_objects() if type(k) is JITFunction]
    return sum(len(caches[0]) for k in found for caches in getattr(k, "device_caches", {}).values())


def grew(held: list[dict[str, float]]) -> bool:
    """Whether memory went on growing when caches were warm."""
    end = held[-1]
    warm = next(m for m in held if m["seconds"] >= WARM * end["seconds"])
    return end["gpu"] > warm["gpu"] + GPU_GROWTH or end["host"] > warm["host"] + HOST_GROWTH


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Run cases until the time or their number is up."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = subjects(device, getattr(torch, args.dtype), args.max_length)
    tally, begin, held = Tally(), time.monotonic(), []
    numbers = [args.only] if args.only is not None else range(args.cases or sys.maxsize)
    done, peak = 0, 0.0
    for index in numbers:
        if time.monotonic() - begin > args.minutes * 60 or len(tally.crashes) >= MOST_CRASHES:
            break
        if not held or time.monotonic() - begin > held[-1]["seconds"] + READING:
            held.append(memory(begin))
        case = draw(index % args.pool if args.pool else index, args.seed, there, args.max_length, args.most_tokens)
        tally.drawn.update([case.subject.name, case.selector.name, f"q{case.selector.config().get('q_block', 1)}"])
        tally.drawn.update(["chunked"] * bool(case.cuts) + ["padded"] * (len(set(case.lengths)) > 1))
        try:
            with poisoned():
                run_case(case, args.backend, Shadow(args.backend, tally, random.Random(f"{args.seed} {index} rows")))
        except MismatchError as found:
            tally.mismatches.append(f"{case}: {found}")
            print(tally.mismatches[-1], file=sys.stderr, flush=True)
        except BackendUnavailableError as reason:
            tally.refused[str(reason)] += 1
        except Exception as error:
            tally.crashes.append(f"{case}: {type(error).__name__}: {error}")
            print(case, traceback.format_exc(), sep="\n", file=sys.stderr, flush=True)
        done += 1
        if args.verbose:
            print(f"{time.monotonic() - begin:6.0f} s  {case}", file=sys.stderr, flush=True)
    held.append(memory(begin))
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {
        "ok": not (tally.mismatches or tally.crashes or grew(held))
        and tally.refused.total() <= REFUSED * done
        and tally.calls > 0,
        "seed": args.seed,
        "backend": args.backend,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "topmass": topmass.__version__},
        "max_length": args.max_length,
        "seconds": round(time.monotonic() - begin, 1),
        "cases": done,
        "calls": tally.calls,
        "rows_own": tally.rows,
        "rows_listed": tally.listed_rows,
        "worst_share_of_allowance": {k: round(v, 3) for k, v in tally.worst.items()},
        "backends": dict(tally.backends),
        "refused": dict(tally.refused),
        "drawn": dict(sorted(tally.drawn.items())),
        "memory": {
            "grew": grew(held),
            "gpu_peak": peak,
            "held": [{k: round(v, 1) for k, v in m.items()} for m in held],
        },
        "mismatches": tally.mismatches,
        "crashes": tally.crashes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, help="run the first so many cases over and over: no new kernels after them")
    parser.add_argument("--only", type=int, metavar="INDEX", help="one case")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-length", type=int, default=32768)
    parser.add_argument("--most-tokens", type=int, default=65536, help="of the prompts of a batch together")
    parser.add_argument("--out", type=Path, help="JSON file for the summary")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    summary = soak(args)
    text = json.dumps(summary, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0 if summary["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
