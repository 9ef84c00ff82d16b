"""Memory and speed of distillation for a model of 9B parameters (random weights): a training step beside the plain dense forward.

    PYTHONPATH=src python recipes/indexer/memory.py --out benchmarks/indexer/memory.json

One process, interleaved rounds, about 80 s on one H100. The plain forward is the unchanged decoder with the model's own attention and the same
linear layers. A step is what `topmass distill` does with one sequence: forward, KL and gradient of every layer, optimiser. It runs with the rows
that are drawn by default and with all of them. Exits with 1 if the former takes more than the target.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from topmass.bench.models import build_model
from topmass.distill import DistillConfig, Sequences
from topmass.distill.parallel import World
from topmass.distill.trainer import _Trainer
from topmass.integrations.transformers.families import find_layers
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.integrations.transformers.load import describe_device
from topmass.results.stats import spread

TARGET = 2.5


class RandomIds(Sequences):
    """Tokens of no text: their number matters, not what they say."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self.length, self.about, self._vocabulary = length, "random ids", vocabulary

    def sequence(self, index: int, *, held_out: bool = False) -> list[int]:
        generator = torch.Generator().manual_seed(index + 10_000 * held_out)
        return torch.randint(self._vocabulary, (self.length,), generator=generator).tolist()


class Modes:
    """What is timed, as functions of a batch that return when the device is done."""

    def __init__(self, model: Any, tokens: int) -> None:
        self.model, self.decoder = model, find_layers(model)[0]
        self.sequences = RandomIds(tokens, model.config.get_text_config().vocab_size)
        self.configs: dict[str, DistillConfig] = {}

    def forward(self, ids: torch.Tensor) -> None:
        """The dense model alone."""
        with torch.no_grad(), fast_linear_attention(self.model):
            self.decoder(input_ids=ids, use_cache=False)
        synchronise(ids)

    def step(self, name: str, rows_fraction: float | None) -> Callable[[torch.Tensor], None]:
        """A training step."""
        gpu = next(self.model.parameters()).device.type == "cuda"
        config = DistillConfig(
            length=self.sequences.length, batch=1, micro_batch=1, rows_fraction=rows_fraction, workers=0
        )
        self.configs[name] = config.resolve(positions=None, gpu=gpu)
        trainer = _Trainer(
            self.model, self.configs[name], self.sequences, start=None, world=World(), run=None, progress=None
        )

        def run(ids: torch.Tensor) -> None:
            with trainer.teacher.open():
                trainer._train_step([ids], time.perf_counter())
            synchronise(ids)

        return run


def synchronise(ids: torch.Tensor) -> None:
    if ids.device.type == "cuda":
        torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds of every mode."""
    begin = time.time()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device == "cuda"
    model = build_model(args.shape, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    print(f"{args.shape}: ready after {time.time() - begin:.0f} s", flush=True)
    modes = Modes(model, args.tokens)
    functions = {
        "dense forward": modes.forward,
        "distillation step, rows drawn by default": modes.step("default", None),
        "distillation step, all rows": modes.step("all", 1.0),
    }
    ids = torch.tensor(modes.sequences.sequence(0), device=device)[None]
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    peak = dict.fromkeys(functions, 0.0)
    for turn in range(args.rounds + 1):  # the first warms up
        if turn > 1 and time.time() - begin > args.seconds:
            break
        for name, run in functions.items():
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run(ids)
            took = time.perf_counter() - start
            if gpu:
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() / 2**30)
            if turn:
                seconds[name].append(took)
            print(f"round {turn}, {name}: {took:.2f} s, peak {peak[name]:.1f} GiB", flush=True)
    base = seconds["dense forward"]
    ratios = {name: spread([a / b for a, b in zip(s, base, strict=True)]).median for name, s in seconds.items()}
    return {
        "shape": args.shape, "tokens": args.tokens, "rounds": len(base), "device": describe_device(model), "torch": torch.__version__,
        "modes": {n: {**asdict(spread(s)), "peak_gib": peak[n], "ratio": ratios[n]} for n, s in seconds.items()},
        "rows_fraction": {n: c.rows_fraction for n, c in modes.configs.items()},
        "ratio": ratios["distillation step, rows drawn by default"], "ratio_all_rows": ratios["distillation step, all rows"],
        "target": TARGET, "full_score_matrix_gib": args.tokens**2 * 2 / 2**30,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="qwen3.5-9b")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=75, help="no round begins after this")
    parser.add_argument("--device")
    args = parser.parse_args()
    found = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    holds = found["ratio"] <= TARGET
    print(
        f"{'PASS' if holds else 'FAIL'}  step {found['ratio']:.2f} x the forward, all rows {found['ratio_all_rows']:.2f} x; target {TARGET}"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
