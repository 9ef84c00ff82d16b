"""A distillation small enough to be killed, repeated and split: also run as a program by the tests that kill it."""

import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from tiny_models import build, prompt

from topmass.distill import DistillConfig, Sequences, distill
from topmass.results import load_run

CONFIG = DistillConfig(
    length=48, steps=12, batch=4, micro_batch=2, rows_fraction=0.5, dim=8, budget=8, held_out=2, evaluate_every=4, lr=5e-3,
    checkpoint_minutes=0.0, patience=0,
)  # fmt: skip


class RandomIds(Sequences):
    """Token ids without a tokenizer."""

    def __init__(self, length: int = 48) -> None:
        self.length, self.about = length, "random ids"

    def sequence(self, index: int, *, held_out: bool = False) -> list[int]:
        return prompt(self.length, seed=index + 10_000 * held_out)[0].tolist()


def curve(out: Path | str) -> dict[str, list[float]]:
    """Values of every deterministic metric, in order of layer and step."""
    found = defaultdict(list)
    for r in load_run(out).records:
        if r["metric"] != "tokens_per_s":
            found[f"{r['metric']} {r['layer']}"].append((r["step"], r["value"]))
    return {name: [v for _, v in sorted(values)] for name, values in found.items()}


def run(out, *, config=CONFIG, family="qwen3_5", progress=None, **settings):
    model = build(family, dtype=torch.float32)
    return distill(model, None, RandomIds(config.length), config, out=out, progress=progress, facts=FACTS, **settings)


FACTS = {"model": "tiny", "weights_hash": "0"}

if __name__ == "__main__":
    torch.set_num_threads(1)
    directory, mode = sys.argv[1:]
    if mode == "slow":  # for the test to kill
        run(directory, progress=lambda *_: time.sleep(0.15))
    else:
        indexer = run(directory)
        if os.environ["RANK"] == "0":
            indexer.save(Path(directory) / "copy")
