"""Everything that is published of the kernels: layers of three shapes from 8K to 256K tokens, oracle, loss, own union growth.

    PYTHONPATH=src python recipes/kernels/publish.py measure --out benchmarks/kernels/layers --seconds 340    # one GPU; resumes
    PYTHONPATH=src python recipes/kernels/publish.py finish --out benchmarks/kernels/layers            # anywhere: report

`measure` works through a list, the most telling first, each item with its dense kernels in the same interleaved rounds and its results
checked before. It leaves what does not fit in the time; the same command goes on there. Until `finish` everything lies in
`OUT.partial`: a manifest and a journal. `finish` completes the run and writes its report beside it (`OUT-report`).
FlashAttention-3 is timed where `flash_attn_interface` or vLLM's `_vllm_fa3_C` can be imported (PYTHONPATH).
`--small` runs the whole list with tiny shapes in plain PyTorch, to try the command on a CPU.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from topmass.bench.kernels import Setting, What, bench_kernels
from topmass.results import Run, finish_partial, make_manifest
from topmass.results.stats import spread

K = 1024
SHAPES = ("qwen3.5-9b", "qwen3.5-0.8b", "qwen3-8b")
GROWTHS = (1.0, 1.25, 1.5, 2.0, 3.0)
# what one item takes beside its dense kernels, seconds: compilation, checks, and the sparse layers themselves
BESIDE, PER_SHAPE = 3.0, 15.0
# FlashAttention-2, cuDNN and FlashAttention-3, TFLOP/s; only to foresee what fits in the time
DENSE = (280.0, 600.0, 700.0)
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One call of `bench_kernels` at one length."""

    setting: Setting
    length: int
    what: What = "layer"
    growths: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        """About how long it takes, compilation of a new shape aside."""
        shape, n = self.setting.layer, self.length
        flop = 2.0 * shape.q_heads * shape.head_dim * n * n
        calls = self.setting.rounds + (8 if self.what == "oracle" else 1)
        return BESIDE + calls * sum(flop / rate for rate in DENSE) / 1e12 + len(self.growths) * (1 + 3 * n / 2**20)


def plan(small: bool, rounds: int) -> list[Item]:
    """The list, the most telling first."""
    if small:
        base = Setting(shape="4/2x32", budget=64, dim=16, rounds=rounds, device="cpu")
        lengths, longest, oracle, loss, others = [192, 384], 768, 400, 300, ["2/1x32", "8/2x16"]
    else:
        base = Setting(shape=SHAPES[0], rounds=rounds)
        lengths, longest, oracle, loss, others = (
            [32 * K, 64 * K, 16 * K, 8 * K],
            128 * K,
            100 * K,
            32 * K,
            list(SHAPES[1:]),
        )
    query, token = replace(base, q_block=1, kv_block=4), replace(base, q_block=1)
    one = (1.5,)
    items = [
        Item(setting=base, length=longest),
        Item(setting=query, length=longest, growths=GROWTHS),
        Item(setting=token, length=oracle, what="oracle"),
        Item(setting=token, length=loss, what="kl"),
        *(Item(setting=base, length=n) for n in lengths),
    ]
    for name in others:
        shared, by_query = replace(base, shape=name), replace(query, shape=name)
        items += [Item(setting=shared, length=longest), Item(setting=by_query, length=longest, growths=one)]
        items += [Item(setting=shared, length=n) for n in lengths]
    items += [Item(setting=query, length=n, growths=one) for n in lengths]
    twice = [replace(s, rounds=min(rounds, 3)) for s in (base, query, *(replace(base, shape=name) for name in others))]
    items += [Item(setting=s, length=2 * longest, growths=one if s.q_block == 1 else ()) for s in twice]
    return items + [Item(setting=replace(query, shape=name), length=n, growths=one) for name in others for n in lengths]


# -- measuring


def measure(args: argparse.Namespace) -> int:
    """Work through the list until the time is up."""
    begin, failed = time.monotonic(), 0
    items = plan(args.small, args.rounds)
    device = "cpu" if args.small else torch.cuda.get_device_name()
    manifest = make_manifest(
        "bench", config(items, args), model=", ".join(dict.fromkeys(item.setting.layer.name for item in items)),
        seeds={"samples": items[0].setting.seed}, device=device,
        command=f"python recipes/kernels/publish.py measure --out {args.out}" + (" --small" if args.small else ""),
    )  # fmt: skip
    with Run.open(args.out, manifest) as run:
        for number, item in enumerate([*items[:4], None, *items[4:]]):
            left = args.seconds - (time.monotonic() - begin)
            name = "reference checkpoint's own U/K" if item is None else describe(item)
            if done(run, item, args):
                continue
            if left < (BESIDE + PER_SHAPE if item is None else item.seconds):
                print(f"left out, {left:.0f} s remain: {name}", flush=True)
                continue
            try:
                rows = own_growth(args, run) if item is None else time_item(item, run)
                print(f"{time.monotonic() - begin:6.0f} s  {number}  {name}", *lines(rows), sep="\n    ", flush=True)
            except Exception as error:  # the rest may run
                failed += 1
                print(f"FAILED {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
                traceback.print_exc(limit=-3)
            if not args.small:
                torch.cuda.empty_cache()
    return 1 if failed else 0


def config(items: list[Item], args: argparse.Namespace) -> Row:
    settings = [asdict(item.setting) | {"backend": item.setting.kernels} for item in items]
    return {
        "items": [s | {"length": i.length, "what": i.what, "growths": i.growths} for s, i in zip(settings, items, strict=True)],
        "own": {"lengths": args.own_lengths, "budget": args.own_budget},
    }  # fmt: skip


def describe(item: Item) -> str:
    grown = f", U/K {', '.join(map(str, item.growths))}" if item.growths else ""
    setting = item.setting
    return f"{setting.layer.name} {item.what} {item.length} tokens, q{setting.q_block} k{setting.kv_block}{grown}"


def done(run: Run, item: Item | None, args: argparse.Namespace) -> bool:
    if item is None:
        return {row["length"] for row in run.rows if row["what"] == "growth"} >= set(args.own_lengths)
    name, setting = item.setting.layer.name, item.setting
    return all(run.done((name, item.length, item.what, setting.label(u))) for u in item.growths or (None,))


def time_item(item: Item, run: Run) -> list[Row]:
    return bench_kernels(item.setting, lengths=[item.length], what=[item.what], growths=item.growths, run=run)


def own_growth(args: argparse.Namespace, run: Run) -> list[Row]:
    """Union growth of the reference checkpoint with its own indexer, or with the oracle where it ships none."""
    import topmass
    from topmass.bench.growth import model_growth
    from topmass.bench.ttft import text_prompts
    from topmass.errors import DataError
    from topmass.integrations.transformers.reference import load_reference

    model, tokenizer = load_reference(device="cpu" if args.small else "cuda")
    unit = topmass.Granularity()
    try:
        selector = topmass.load_reference_indexer().selector(budget=args.own_budget, granularity=unit)
    except DataError as error:
        print(f"the oracle selects: {error}", flush=True)
        selector = topmass.OracleSelector(budget=args.own_budget, granularity=unit)
    rows = model_growth(model, text_prompts(model, tokenizer), selector, name="reference", lengths=args.own_lengths)
    run.append(rows)
    return rows


def lines(rows: list[Row]) -> Iterator[str]:
    """What a person at a terminal wants to see at once."""
    for label in dict.fromkeys(row["config"] for row in rows):
        mine = [row for row in rows if row["config"] == label]
        times = {
            n: [r["value"] for r in mine if r["name"] == n and r["metric"] == "time" and r["value"]]
            for n in names(mine)
        }
        facts = {r["metric"]: r["value"] for r in mine if r["role"] == "total" and r["metric"] != "time"}
        total = next((r["name"] for r in mine if r["role"] == "total"), None)
        yield label + " " + ", ".join(f"{n} {spread(t).median:.3f} ms" for n, t in times.items() if t)
        if total is not None:
            dense = {r["name"] for r in mine if r["role"] == "dense" and r["value"] is not None}
            ratios = [
                f"{spread([a / b for a, b in zip(times[d], times[total], strict=True)]).median:.2f}x {d}" for d in dense
            ]
            known = [
                f"{m} {facts[m]:.4g}"
                for m in ("union_growth", "keys_read_mean", "peak_memory", "gate_error")
                if m in facts
            ]
            yield "  " + ", ".join(sorted(ratios) + known)
        elif facts or not any(times.values()):
            yield "  " + ", ".join(f"{r['length']} {r['name']} {r['value']:.3f}" for r in mine)


def names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["name"] for row in rows))


# -- what came out


def finish(args: argparse.Namespace) -> int:
    """Complete the run and report it."""
    if args.out.with_name(args.out.name + ".partial").is_dir():
        print(args.out, len(finish_partial(args.out).records), "rows")
    report = args.out.with_name(args.out.name + "-report")
    return subprocess.run(
        [sys.executable, "-m", "topmass.cli", "report", str(args.out), "--out", str(report)]
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["measure", "finish"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=340.0, help="of measuring; an item that would not fit is left out"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--own-lengths", type=int, nargs="*", help="of the reference checkpoint's own union growth")
    parser.add_argument("--own-budget", type=int)
    parser.add_argument("--small", action="store_true", help="tiny shapes in plain PyTorch, to try it on a CPU")
    args = parser.parse_args()
    args.own_lengths = args.own_lengths or ([512, 1024] if args.small else [8 * K, 16 * K, 32 * K])
    args.own_budget = args.own_budget or (64 if args.small else 2048)
    return measure(args) if args.part == "measure" else finish(args)


if __name__ == "__main__":
    sys.exit(main())
