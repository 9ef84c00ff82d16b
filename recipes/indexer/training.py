"""One short training of the reference checkpoint's indexer on stored text: what two_gpus.py and kill.py repeat.

PYTHONPATH=src python recipes/indexer/training.py WORK OUT --steps 60
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import Stored

import topmass
from topmass.distill import DistillConfig
from topmass.integrations.transformers.reference import load_reference
from topmass.results import load_run

# rounding of sums in another order, nats: no curve is closer to another one than this on a GPU
FLOOR = 1e-4
FACTS = {"model": "reference", "weights_hash": "as shipped"}


def start(
    work: Path, out: Path, options: Sequence[str], *, processes: int = 1, gpu: int | None = None
) -> "subprocess.Popen[bytes]":
    """Begin a training in a process of its own, or in several under torchrun."""
    script = [__file__, str(work), str(out), *options]
    launch = [sys.executable, "-W", "ignore"]
    if processes > 1:
        launch = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*launch, *script], env=environment, stdout=log, stderr=log)


def finish(process: "subprocess.Popen[bytes]", out: Path) -> None:
    """Wait for a training; the end of its log if it failed."""
    if process.wait():
        sys.exit(f"{out} failed:\n{out.with_suffix('.log').read_text()[-2000:]}")


def curve(out: Path) -> dict[int, float]:
    """KL by step, mean over layers."""
    return {r["step"]: r["value"] for r in load_run(out).records if r["metric"] == "kl" and r["layer"] == -1}


def rate(out: Path) -> float:
    """Median tokens/s of the second half of the steps."""
    rows = sorted((r["step"], r["value"]) for r in load_run(out).records if r["metric"] == "tokens_per_s")
    values = sorted(v for _, v in rows[len(rows) // 2 :])
    return values[len(values) // 2]


def difference(a: Path, b: Path) -> dict[str, float]:
    """Largest and mean distance of two curves, nats."""
    first, second = curve(a), curve(b)
    apart = [abs(first[s] - second[s]) for s in sorted(first.keys() | second.keys())]
    return {"largest": max(apart), "mean": sum(apart) / len(apart)}


def within(found: dict[str, float], noise: dict[str, float]) -> bool:
    """Whether curves are as near as two runs of one command are: at most twice as far on average, or rounding."""
    return found["mean"] <= max(2 * noise["mean"], FLOOR)


def verdict(name: str, holds: bool, detail: str) -> str:
    return f"{'PASS' if holds else 'FAIL'}  {name}: {detail}"


def publish(path: Path, found: dict[str, Any]) -> int:
    """Print and write results; 1 if a check failed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["runs"], indent=1), *found["checks"], sep="\n")
    return int(any(c.startswith("FAIL") for c in found["checks"]))


def options(parser: argparse.ArgumentParser) -> None:
    """Settings of the training."""
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)


def given(args: argparse.Namespace) -> list[str]:
    """The same settings, as options of another process."""
    names = ("steps", "batch", "micro_batch", "length", "checkpoint_minutes")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    options(parser)
    args = parser.parse_args()
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    model, tokenizer = load_reference(device=device)
    config = DistillConfig(
        length=args.length, batch=args.batch, micro_batch=args.micro_batch, steps=args.steps, evaluate_every=max(1, args.steps // 2), held_out=2,
        rows_fraction=1.0, lr=2e-3, patience=0, workers=0, checkpoint_minutes=args.checkpoint_minutes,
    )  # fmt: skip
    topmass.distill(model, tokenizer, Stored(args.work), config, out=args.out, facts=FACTS)


if __name__ == "__main__":
    main()
