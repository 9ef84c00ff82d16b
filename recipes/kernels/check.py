"""What only a GPU can show of the kernels: equal selections, equal bits, near ties, no waiting, memory, tensors past 2^31 elements.

    PYTHONPATH=src python recipes/kernels/check.py --out benchmarks/kernels/checks.json      # one GPU, about a minute
    TRITON_INTERPRET=1 PYTHONPATH=src python recipes/kernels/check.py --small                # a CPU: tries the command

Parts run in processes of their own, side by side; a part that fails leaves the others running. Each line says what was found and
whether it passes; the exit status is 1 if one does not. Attention itself is held against float64 in `tests/ops` (`make test-gpu`).
"""

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.ops import attention_mass, index_topk, kl_rows, pooled_mass, sparse_prefill, tile_union, topk_support
from topmass.ops.index_topk import _triton as index_kernels
from topmass.ops.index_topk.reference import mean_queries
from topmass.ops.sparse_prefill import _triton as sparse_kernels
from topmass.ops.topk_support import _triton as select_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = DEVICE == "cpu"
FLOAT8 = torch.float8_e4m3fn
# Triton's interpreter has no product of bfloat16
HALF = torch.float16 if SMALL else torch.bfloat16
GIB = 2**30
# more than float16 places between a group that was missed and one that was taken is no rounding
PLACES = 1.0


@dataclass(frozen=True, slots=True)
class Found:
    """One line: what was looked at, what came out, and whether that is right."""

    what: str
    result: str
    passed: bool


# -- inputs


def integers(n: int, q_start: int, heads: int, dim: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Products that every order of summing gives alike, with many ties."""
    gen = torch.Generator(DEVICE).manual_seed(1)
    shapes = (2, n - q_start, heads, dim), (2, n // r, dim)
    iq, ik = (torch.randint(-2, 3, shape, generator=gen, device=DEVICE).to(dtype) for shape in shapes)
    return iq, ik


def reals(n: int, heads: int, dim: int, r: int, dtype: torch.dtype, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Neighbouring keys, and the queries of a block, share a direction: rows differ in where their scores lie and in their tails."""
    gen = torch.Generator(DEVICE).manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=DEVICE)

    iq = draw(batch, n, heads, dim) + draw(batch, -(-n // 32), heads, dim).repeat_interleave(32, 1)[:, :n]
    groups = n // r
    ik = draw(batch, groups, dim) + 0.5 * draw(batch, -(-groups // 64), dim).repeat_interleave(64, 1)[:, :groups]
    return iq.to(dtype), ik.to(dtype)


def paged(ik: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The keys in shuffled pages with NaN columns beside them, and a table that goes on past the sequence."""
    b, n, dim = ik.shape
    pages = -(-n // size)
    order = torch.randperm(b * pages, generator=torch.Generator().manual_seed(1)).view(b, pages).to(ik.device)
    pool = torch.full((b * pages, size, dim + 16), float("nan"), device=ik.device).to(ik.dtype)
    whole = torch.cat([ik, ik[:, :1].expand(-1, pages * size - n, -1)], 1)
    pool[order.flatten(), :, :dim] = whole.unflatten(1, (pages, size)).flatten(0, 1)
    later = torch.full((b, 3), 2**30, device=ik.device, dtype=order.dtype)
    return pool[..., :dim], torch.cat([order, later], 1).int()


def same(a: Support, b: Support) -> bool:
    return torch.equal(a.groups, b.groups) and torch.equal(a.counts, b.counts)


# -- selections of the indexer


def exact(dtype: torch.dtype, heads: int, dims: tuple[int, ...]) -> Iterator[Found]:
    """Integer scores: the reference's selection, ties included."""
    cases, different = 0, []
    for dim in dims:
        for g, reduce in ((1, "mean"), (8, "max"), (32, "mean")):
            for r, (n, q_start) in ((1, (150, 101)),) if SMALL else ((1, (2049, 0)), (4, (5003, 4001))):
                iq, ik = integers(n, q_start, heads, dim, r, dtype)
                unit = Granularity(q_block=g, kv_block=r)
                settings: dict[str, Any] = {
                    "budget": "12%",
                    "granularity": unit,
                    "sink": 5,
                    "window": 9,
                    "q_start": q_start,
                    "reduce": reduce,
                }
                a, b = (index_topk(iq, ik, backend=name, **settings) for name in ("triton", "reference"))
                cases += 1
                if not same(a, b):
                    different.append(f"dim {dim}, {unit}, {reduce}")
    name = f"selections of integer scores, {dtype}, {heads} heads, dims {', '.join(map(str, dims))}"
    yield Found(name, f"{len(different)} of {cases} cases differ from the reference {different or ''}", not different)


def everything(unit: Granularity) -> SupportRule:
    """The rule whose candidates are all complete groups."""
    return SupportRule(budget=Budget(tokens=10**6), granularity=unit)


def block_scores(queries: Tensor, keys: Tensor, unit: Granularity, reduce: str) -> Iterator[Tensor]:
    """Scores of a sequence in float64, 1,024 blocks at a time: of the mean query of a block, or the maximum over its queries.

    Under `max_prob` the maximum is over logarithms of probabilities, each query's over the candidates of its block.
    """
    g = unit.q_block
    starts = everything(unit).block_starts(0, len(queries), queries.device)
    stops = everything(unit).candidate_range(starts)[1]
    if reduce == "mean":
        queries, g = mean_queries(queries[None, :, None], q_block=g, q_start=0)[0, :, 0], 1
    # a block that ends early repeats its last query
    queries = torch.cat([queries, queries[-1:].expand(-len(queries) % g, -1)]).double()
    for part, stop in zip(queries.split(1024 * g), stops.split(1024), strict=True):
        scores = (part @ keys.double().T / queries.shape[-1] ** 0.5).unflatten(0, (-1, g))
        if reduce == "max_prob":
            seen = torch.arange(scores.shape[-1], device=scores.device) < stop[:, None, None]
            scores = scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
        yield scores.amax(1)


def gap(iq: Tensor, ik: Tensor, support: Support, reduce: str) -> float:
    """How far the best group that was missed scores above the worst one taken, in places of float16; one head, first sequence."""
    rule = everything(support.granularity)
    stops = rule.candidate_range(rule.block_starts(0, iq.shape[1], iq.device))[1]
    worst, lo = 0.0, 0
    for scores in block_scores(iq[0, :, 0].float(), ik[0].float(), support.granularity, reduce):
        rows, width = scores.shape
        ids = support.groups[0, 0, lo : lo + rows].long()
        taken = torch.zeros(rows, width + 1, dtype=torch.bool, device=scores.device)
        taken = taken.scatter_(-1, ids.masked_fill(ids < 0, width), True)[:, :-1]
        seen = torch.arange(width, device=scores.device) < stops[lo : lo + rows, None]
        low = scores.masked_fill(~taken, torch.inf).amin(-1)
        high = scores.masked_fill(taken | ~seen, -torch.inf).amax(-1)
        place = scores.abs().masked_fill(~seen, 0).amax(-1).clamp_min(1e-3) * 2**-10
        worst, lo = max(worst, ((high - low) / place).clamp_min(0).amax().item()), lo + rows
    return worst


def near(heads: int, g: int, r: int, dtype: torch.dtype, reduce: str = "mean") -> Iterator[Found]:
    """Real scores: near ties alone change places, and every way to call has the same bits."""
    n = 144 if SMALL else 8192
    iq, ik = reals(n, heads, 128, r, dtype, batch=2)
    unit = Granularity(q_block=g, kv_block=r)
    settings: dict[str, Any] = {"budget": max(n // 8, 48), "granularity": unit, "reduce": reduce}
    a, b = (index_topk(iq, ik, backend=name, **settings) for name in ("triton", "reference"))
    name = f"{unit}, {reduce}, {heads} heads, {dtype}"
    text = f"{(a.groups != b.groups).any(-1).sum().item()} of {a.counts.numel()} rows differ from the reference"
    passed = True
    # of several heads float32 adds rounded sums
    if heads == 1:
        mine, theirs = (gap(iq[:1], ik[:1], x, reduce) for x in (a, b))
        passed = mine <= max(theirs, PLACES)
        text += f"; a missed group is at most {mine:.2f} places of float16 above a taken one (reference: {theirs:.2f})"
    yield Found(f"near ties, {name}", text, passed)

    def run(*tensors: Tensor, **more: Any) -> Support:
        return index_topk(*tensors, **{"backend": "triton", **settings, **more})

    old, index_kernels.WORKSPACE_BYTES = index_kernels.WORKSPACE_BYTES, 2**12 if SMALL else 2**21
    try:
        small = same(run(iq, ik), a)
    finally:
        index_kernels.WORKSPACE_BYTES = old
    alone = run(iq[1:], ik[1:])
    cut = n // 2 // g * g + (0 if g > 1 else 37)
    first, second = run(iq[:, :cut], ik[:, : cut // r]), run(iq[:, cut:], ik, q_start=cut)
    blocks = first.groups.shape[2]
    found = {
        "runs": all(same(run(iq, ik), a) for _ in range(1 if SMALL else 20)),
        "smaller workspace": small,
        "alone and in a batch": torch.equal(alone.groups, a.groups[1:]) and torch.equal(alone.counts, a.counts[1:]),
        "chunks of the prompt": torch.equal(first.groups, a.groups[:, :, :blocks, : first.groups.shape[3]])
        and torch.equal(second.groups, a.groups[:, :, -second.groups.shape[2] :]),
    }
    for size in (16, 24) if SMALL else (16, 24, 1056):
        pool, table = paged(ik, size)
        found[f"pages of {size}"] = same(run(iq, pool, page_table=table), a)
    wrong = [what for what, good in found.items() if not good]
    yield Found(f"equal bits, {name}", f"differ: {', '.join(wrong)}" if wrong else ", ".join(found), not wrong)


def graph() -> Iterator[Found]:
    """Captured and replayed: nothing waits for the host."""
    for g, r, dtype, q_start, size in ((1, 4, HALF, 0, 0), (32, 1, HALF, 0, 0), (32, 1, FLOAT8, 4001, 24)):
        iq, ik = reals(8192, 1, 128, r, dtype)
        settings: dict[str, Any] = {
            "budget": 1024,
            "granularity": Granularity(q_block=g, kv_block=r),
            "backend": "triton",
        }
        if q_start:
            iq, settings["q_start"] = iq[:, q_start:], q_start
        if size:
            ik, settings["page_table"] = paged(ik, size)
        want = index_topk(iq, ik, **settings).groups
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            got = index_topk(iq, ik, **settings).groups
        got.zero_()
        captured.replay()
        torch.cuda.synchronize()
        equal = torch.equal(got, want)
        name = (
            f"CUDA graph, {settings['granularity']}, {dtype}{', chunk' if q_start else ''}{', pages' if size else ''}"
        )
        yield Found(name, "equal" if equal else "differs", equal)


# -- all kernels


def many_equal() -> Iterator[Found]:
    """More equal scores than any list of candidates holds."""
    n, top = (4096, 1500) if SMALL else (131072, 65536 + 99)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scores = torch.rand(3, 1, 1, n, device=DEVICE).to(dtype)
        scores[..., :top] = 2
        rule = SupportRule(budget=Budget(tokens=top + 900))
        a, b = (topk_support(scores, rule=rule, q_start=n - 1, q_len=1, backend=x) for x in ("triton", "reference"))
        yield Found(f"{top + 900} of {n} scores, most of them equal, {dtype}", "the reference's ids", same(a, b))


def no_waiting() -> Iterator[Found]:
    """Every kernel of a layer under PyTorch's check for synchronisation."""
    q, k = (torch.randn(1, n, h, 128, device=DEVICE, dtype=HALF) for n, h in ((4096, 16), (8192, 4)))
    iq, ik = q[:, :, :1].contiguous(), torch.randn(1, 2048, 128, device=DEVICE, dtype=HALF)
    unit = Granularity(kv_block=4)
    rule = SupportRule(budget=Budget(tokens=512), granularity=unit, sink=4, window=64)

    def layer() -> None:
        support = index_topk(iq, ik, budget=512, granularity=unit, sink=4, window=64, q_start=4096, backend="triton")
        tile_union(support, tile=32, backend="triton")
        sparse_prefill(q, k, k, support, backend="triton")
        mass, _ = pooled_mass(q, k, scale=0.1, granularity=unit, q_start=4096, backend="triton")
        topk_support(mass, rule=rule, q_start=4096, q_len=4096, backend="triton")
        support.keys_read().double().sum()

    layer()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    except RuntimeError as error:
        yield Found("no synchronisation with the host", str(error)[:120], False)
    else:
        yield Found("no synchronisation with the host", "index, union, attention, mass, selection", True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def few_variants() -> Iterator[Found]:
    """Lengths do not compile a kernel again."""
    kernels = {
        "scores": index_kernels._scores_kernel,
        "selection": select_kernels._select_kernel,
        "attention": sparse_kernels._sparse_kernel,
    }

    def count() -> dict[str, int]:
        return {n: sum(len(c[0]) for c in f.device_caches.values()) for n, f in kernels.items()}

    before = count()
    lengths = (1000, 1001, 1024, 2047, 3001, 4096, 7777, 8192, 12345, 16001, 16384)
    for length in lengths:
        q, k = (torch.randn(1, length, h, 128, device=DEVICE, dtype=HALF) for h in (8, 2))
        support = index_topk(q[:, :, :1], k[:, :, 0].contiguous(), budget=256, granularity=Granularity(), window=16)
        sparse_prefill(q, k, k, support)
    grew = {n: x - before[n] for n, x in count().items()}
    yield Found(f"variants compiled for {len(lengths)} lengths", str(grew), all(x <= 8 for x in grew.values()))


def long_prompt() -> Iterator[Found]:
    """Peak memory at 128K tokens over single keys, and the last rows beside the reference."""
    n = 131072
    draws = ((1, 64), (8, 64), (2, 64))
    iq, q, k = (torch.randn(1, n, h, d, device=DEVICE, dtype=HALF) for h, d in draws)
    ik = torch.randn(1, n, 64, device=DEVICE, dtype=HALF)

    def peak(work: Callable[[], Any]) -> tuple[Any, float]:
        torch.cuda.synchronize()
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - base) / GIB

    support, index = peak(lambda: index_topk(iq, ik, budget=2049, granularity=Granularity(), backend="triton"))
    own = support.groups.numel() * 4 / GIB
    yield Found("memory of index_topk, 128K tokens", f"{index:.2f} GiB for {own:.2f} GiB of ids", index < own + 0.45)
    (out, _), more = peak(lambda: sparse_prefill(q, k, k, support, backend="triton"))
    yield Found("memory of sparse_prefill, 128K tokens", f"{more:.2f} GiB", more < out.numel() * 2 / GIB + 1)
    last = slice(n - 40, n - 8)
    expected, _ = sparse_prefill(q[:, last], k, k, support.rows(n - 40, n - 8), backend="reference")
    close = torch.allclose(out[:, last].float(), expected.float(), rtol=2e-2, atol=4e-3)
    yield Found("its last rows", "the reference's" if close else "differ from the reference", close)


def past_two_to_the_31() -> Iterator[Found]:
    """A mass of more elements than 32 bits number: its last rows, their selection, its divergence from itself."""
    n, rows, last = 131072, 20000, 40
    q, k = (torch.randn(1, x, 1, 64, device=DEVICE, dtype=HALF) for x in (rows, n))
    mass = attention_mass(q, k, scale=0.125, q_start=n - rows, backend="triton")
    expected = attention_mass(q[:, -last:], k, scale=0.125, q_start=n - last, backend="reference")
    close = torch.allclose(mass[:, :, -last:], expected, rtol=1e-2, atol=1e-6)
    yield Found(f"attention_mass of {mass.numel() / 2**31:.2f} x 2^31", "the reference's last rows", close)
    rule = SupportRule(budget=Budget(tokens=257))
    a = topk_support(mass, rule=rule, q_start=n - rows, q_len=rows, backend="triton").rows(rows - last, rows)
    tail = mass[:, :, -last:].contiguous()
    b = topk_support(tail, rule=rule, q_start=n - last, q_len=last, backend="reference")
    yield Found("its selection", "the reference's last rows", torch.equal(a.groups, b.groups))
    loss, slope = kl_rows(mass[0], mass[0].clone(), first=0, stop=torch.arange(n - rows, n), backend="triton")
    finite = bool(loss.isfinite().all()) and bool(slope.isfinite().all())
    yield Found("its divergence", "finite" if finite else "not finite", finite)


PARTS: dict[str, Callable[[], Iterator[Found]]] = {
    "bf16": lambda: exact(HALF, 1, (128, 256, 17)),
    "bf16-heads": lambda: exact(HALF, 4, (64,)),
    "fp16": lambda: exact(torch.float16, 3, (16, 64)),
    "fp8": lambda: exact(FLOAT8, 1, (128, 24)),
    "fp8-heads": lambda: exact(FLOAT8, 4, (64,)),
    "near-query": lambda: near(1, 1, 4, HALF),
    "near-shared": lambda: near(1, 32, 1, HALF, "max"),
    "near-prob": lambda: near(1, 32, 1, HALF, "max_prob"),
    "near-mean": lambda: near(1, 32, 1, HALF),
    "near-heads": lambda: near(4, 1, 4, HALF),
    "near-query-fp8": lambda: near(1, 1, 4, FLOAT8),
    "near-shared-fp8": lambda: near(1, 32, 1, FLOAT8, "max"),
    "many-equal": many_equal,
}
# these need a GPU
LARGE: dict[str, Callable[[], Iterator[Found]]] = {
    "graph": graph,
    "no-waiting": no_waiting,
    "few-variants": few_variants,
    "long-prompt": long_prompt,
    "past-2-31": past_two_to_the_31,
}


def part(name: str) -> int:
    """One part, a line of JSON each finding."""
    try:
        for found in (PARTS | LARGE)[name]():
            print(json.dumps([found.what, found.result, found.passed]), flush=True)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps([name, f"{type(error).__name__}: {str(error)[:300]}", False]), flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON of what was found")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, *LARGE], metavar="PART", help=", ".join([*PARTS, *LARGE]))
    parser.add_argument("--small", action="store_true", help="without a GPU: small inputs, in Triton's interpreter")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return part(args.part)
    if args.small != SMALL:
        parser.error("there is no GPU: give --small" if SMALL else "--small is for machines without a GPU")
    names = args.only or [*PARTS, *({} if SMALL else LARGE)]
    together = 1 if SMALL else 6
    found: list[list[Any]] = []
    for i in range(0, len(names), together):
        command = [sys.executable, "-W", "ignore", __file__, *(["--small"] if SMALL else []), "--part"]
        running = [
            subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in names[i : i + together]
        ]
        for process, name in zip(running, names[i : i + together], strict=True):
            lines = [json.loads(line) for line in process.communicate()[0].splitlines() if line.startswith("[")]
            for what, result, passed in lines or [[name, "ended without a word", False]]:
                print(f"{'ok  ' if passed else 'FAIL'} {what}: {result}", flush=True)
                found.append([what, result, passed])
    if args.out:
        device = "cpu" if SMALL else torch.cuda.get_device_name()
        about = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "checks": found}
        args.out.write_text(json.dumps(about, indent=1) + "\n")
    return 0 if all(passed for *_, passed in found) else 1


if __name__ == "__main__":
    sys.exit(main())
