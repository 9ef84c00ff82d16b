"""A training that is killed at random steps and resumed, beside two that are left alone.

    PYTHONPATH=src python recipes/indexer/kill.py --out benchmarks/indexer/kill.json --work /tmp/kill --workers 14

SIGKILL, so nothing can be saved on the way out; the same command goes on from the last checkpoint. The three runs share the device. On a
CPU all curves are equal bit for bit; on a GPU the two that were left alone show the noise. About a minute on one H100.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
from common import store
from training import curve, difference, finish, given, options, publish, start, verdict, within

from topmass.selection.indexer import load_indexer


def steps_of(out: Path) -> int:
    """Steps that the unfinished run has logged."""
    journal = out.with_name(out.name + ".partial") / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def killed(work: Path, out: Path, settings: list[str], steps: list[int]) -> list[int]:
    """Train, with SIGKILL once each of these steps is logged; where it really hit."""
    hit = []
    for step in steps:
        process = start(work, out, settings)
        while process.poll() is None and steps_of(out) < step:
            time.sleep(0.01)
        process.kill()
        process.wait()
        hit.append(steps_of(out))
        print(f"killed at step {hit[-1]}", flush=True)
    finish(start(work, out, settings), out)
    return hit


def same_weights(a: Path, b: Path) -> float:
    """Largest difference of a weight."""
    first, second = (load_indexer(p).state_dict() for p in (a, b))
    return max(float((first[n] - second[n]).abs().max()) for n in first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for text and runs")
    parser.add_argument("--workers", type=int, default=8, help="processes that write text")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, help="of the steps; without it they differ every time")
    options(parser)
    parser.set_defaults(checkpoint_minutes=0.02)
    args = parser.parse_args()
    store(args.work, length=args.length, sequences=args.steps * args.batch, seed=6, workers=args.workers)
    left, again, broken = (args.work / name for name in ("left-alone", "again", "killed"))
    alone = [(start(args.work, out, given(args)), out) for out in (left, again)]
    rng = random.Random(args.seed)
    hit = killed(args.work, broken, given(args), sorted(rng.sample(range(2, args.steps), args.kills)))
    for process, out in alone:
        finish(process, out)
    noise, found = difference(left, again), difference(left, broken)
    weights = same_weights(left, broken)
    gpu = torch.cuda.is_available()
    holds = within(found, noise) if gpu else found["largest"] == weights == 0
    at = " and ".join(map(str, hit))
    return publish(
        args.out,
        {
            "about": f"Reference checkpoint on {torch.cuda.get_device_name(0) if gpu else 'the CPU'}: {args.steps} steps, SIGKILL at step {at}, each time the same command again. "
            "Distances of the KL curve from the first run.",
            "killed_at": hit,
            "runs": {
                "left alone": {"largest": 0.0, "mean": 0.0},
                "left alone, again": noise,
                "killed and resumed": found,
            },
            "checks": [
                verdict("every step is there once", len(curve(broken)) == args.steps, f"{len(curve(broken))} of {args.steps}"),
                verdict("killed before the end", all(0 < step < args.steps for step in hit), f"at {hit}"),
                verdict("a killed run ends like one left alone", holds, f"mean distance {found['mean']:.1e} nats, run to run {noise['mean']:.1e}; weights differ by {weights:.1e} at most"),
            ],
        },
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
