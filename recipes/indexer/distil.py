"""Distil the indexer that ships with the package: 4096 tokens for most of the time, then 8192.

    PYTHONPATH=src python recipes/indexer/distil.py --out indexer-runs

1,471 steps of 65,536 tokens, then 383; some three minutes on one H200. Each part is a run directory, an interrupted one resumes; the
logs of the indexer that ships are in `benchmarks/indexer`. Settings can be changed to see what they do.
"""

import argparse
import time
from pathlib import Path

import torch

import topmass
from topmass.distill import DistillConfig

TOKENS = 65536
PARTS = ((4096, 1471, 2e-3), (8192, 383, 1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--features", default="hidden")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps; for a try")
    parser.add_argument("--shorter", type=int, default=1, help="divides the lengths; for a try")
    parser.add_argument("--workers", type=int, default=12)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = topmass.load_reference(device=device)
    begin, indexer = time.perf_counter(), None
    for length, steps, lr in PARTS:
        batch, length = TOKENS // length, length // args.shorter
        steps = max(int(steps * args.share), 2)
        config = DistillConfig(
            length=length, steps=steps, batch=batch, micro_batch=batch, lr=lr, budget=256,
            dim=args.dim, heads=args.heads, features=args.features, rows_fraction=1.0,
            evaluate_every=max(1, steps // 5), held_out=6, patience=0, workers=args.workers,
        )  # fmt: skip
        indexer = topmass.distill(model, tokenizer, "tasks", config, out=args.out / str(length), start=indexer)
        held_out = {layer: round(value, 3) for layer, value in indexer.info.recall.items()}
        print(f"{length} tokens: {steps} steps, recall {held_out}, {time.perf_counter() - begin:.0f} s", flush=True)
    assert indexer is not None
    indexer.save(args.out / "indexer")


if __name__ == "__main__":
    main()
