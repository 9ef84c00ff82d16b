"""Times in vLLM of a shape with random weights: dense, sparse and the floor, asked in turns.

    PYTHONPATH=src python recipes/vllm/times.py qwen3.5-9b --lengths 16384 32768 65536 131072 --out out/vllm/serve-9b --seconds 500
    PYTHONPATH=src python recipes/vllm/times.py qwen3.5-9b --modes dense sparse ...     # where memory holds two engines only
    PYTHONPATH=src python recipes/vllm/times.py qwen3.5-9b --q-blocks 1 32 ...          # one that shares selections beside

Does what `topmass bench serve` does, in parts that a time limit cuts: every length is kept as it ends, and the same command goes on.
With `--finish` (where pyarrow is) the parts become a run that `topmass report` reads.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from topmass.bench.serve import ServeSetting, bench_serve
from topmass.bench.serve_models import prepare
from topmass.errors import TopmassError
from topmass.results import Run, finish_partial, make_manifest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class EnoughError(Exception):
    """The time is over."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("out/vllm/serve"))
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 32768, 65536, 131072])
    parser.add_argument("--modes", nargs="+", default=["dense", "sparse", "floor"])
    parser.add_argument("--drivers", nargs="+", default=["offline"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0])
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--budget", default="2048")
    parser.add_argument("--q-blocks", type=int, nargs="*", default=[])
    parser.add_argument("--kv-block", type=int, default=1)
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--finish", action="store_true")
    parser.add_argument("--engine", default='{"max_num_batched_tokens": 16384, "max_num_seqs": 8}')
    args = parser.parse_args(argv)
    if args.finish:
        finish(args.out)
        return
    setting = ServeSetting(
        lengths=tuple(args.lengths),
        modes=tuple(args.modes),
        drivers=tuple(args.drivers),
        rates=tuple(args.rates),
        requests=args.requests,
        new_tokens=args.new_tokens,
        interleave=not args.one_by_one,
        sparse={"budget": args.budget},
        q_blocks=tuple(args.q_blocks),
        engine=json.loads(args.engine),
    )
    with tempfile.TemporaryDirectory(prefix="topmass-serve-") as folder:
        launch, facts = prepare(args.model, setting, Path(folder), kv_block=args.kv_block)
        config = {
            **json.loads(json.dumps(vars(args), default=str)),
            "interleave": not args.one_by_one,
            "text": launch.source,
            "stand_in": launch.stand_in,
        }
        # a limit, and where it lies, are no part of what is measured
        for name in ("seconds", "out", "finish"):
            config.pop(name)
        manifest = make_manifest("serve", config, seeds={"samples": setting.seed}, **facts)
        with Run.open(args.out, manifest) as run:
            try:
                bench_serve(launch, setting, run=run, progress=limit(args.seconds))
            except EnoughError:
                print("the time is over; the same command goes on", flush=True)
            show(run.rows)


def finish(out: Path) -> None:
    """Make the parts at `out` a run, described as when they were timed."""
    print(out, len(finish_partial(out).records))


def limit(seconds: float) -> Any:
    """A progress that ends the run when its time is over."""
    end = time.monotonic() + seconds

    def progress(done: int, total: int, what: str) -> None:
        print(f"{seconds - (end - time.monotonic()):5.0f} s {done}/{total} {what}", flush=True)
        if time.monotonic() > end:
            raise EnoughError

    return progress


def show(rows: list[dict[str, Any]]) -> None:
    """Print medians."""
    for case in dict.fromkeys((r["driver"], r["length"], r["rate"]) for r in rows):
        mine = [r for r in rows if (r["driver"], r["length"], r["rate"]) == case]
        for mode in dict.fromkeys(r["mode"] for r in mine):
            values = {
                metric: statistics.median(r["value"] for r in mine if r["mode"] == mode and r["metric"] == metric)
                for metric in dict.fromkeys(r["metric"] for r in mine if r["mode"] == mode)
            }
            print(*case, mode, {metric: float(f"{value:.4g}") for metric, value in values.items()}, flush=True)


if __name__ == "__main__":
    try:
        main()
    except TopmassError as error:
        sys.exit(f"{type(error).__name__}: {error}")
