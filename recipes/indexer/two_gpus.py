"""The same training on one GPU, on one with its sums in another order, and on two: loss curves and throughput.

    PYTHONPATH=src python recipes/indexer/two_gpus.py --out benchmarks/indexer/two-gpus.json --work /tmp/two-gpus --workers 16

The second run does everything that the first does with half as many sequences per forward, so that gradients are added up in another order,
as they are on two GPUs: its distance from the first is the noise that the distance of the run on two GPUs is held against. One runs after
another, each process with one thread on the CPU as under torchrun, so that their throughputs compare. About a minute on two H200s.
Without GPUs the processes share the CPU.
"""

import argparse
import sys
from pathlib import Path

import torch
from common import store
from training import difference, finish, given, options, publish, rate, start, verdict, within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for text and runs")
    parser.add_argument("--workers", type=int, default=8, help="processes that write text")
    options(parser)
    args = parser.parse_args()
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and gpus < 2:
        sys.exit("There is one GPU; this comparison needs two.")
    store(args.work, length=args.length, sequences=args.steps * args.batch, seed=6, workers=args.workers)
    one, regrouped, two = (args.work / name for name in ("one", "regrouped", "two"))
    halves = [*given(args), "--micro-batch", str(max(1, args.micro_batch // 2))]
    for out, settings in ((one, given(args)), (regrouped, halves)):
        finish(start(args.work, out, settings, gpu=0 if gpus else None), out)
    finish(start(args.work, two, given(args), processes=2), two)
    noise, found = difference(one, regrouped), difference(one, two)
    rates = {out.name: rate(out) for out in (one, regrouped, two)}
    ratio = rates["two"] / rates["one"]
    where = torch.cuda.get_device_name(0) if gpus else "the CPU"
    return publish(
        args.out,
        {
            "about": f"Reference checkpoint on {where}: {args.steps} steps of {args.batch} sequences of {args.length:,} tokens. Distances of the KL curve from the first run.",
            "runs": {
                "one process": {"tokens_per_s": rates["one"], "largest": 0.0, "mean": 0.0},
                "one process, sums in another order": {"tokens_per_s": rates["regrouped"], **noise},
                "two processes": {"tokens_per_s": rates["two"], **found},
            },
            "throughput_ratio": ratio,
            "checks": [
                verdict("two have the curve of one", within(found, noise), f"mean distance {found['mean']:.1e} nats, sums in another order {noise['mean']:.1e}"),
                f"Throughput: {ratio:.2f} times that of one process.",
            ],
        },
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
