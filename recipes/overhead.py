"""What topmass costs where it does not help: short prompts that `dense_below` keeps dense, and generated tokens.

    PYTHONPATH=src python recipes/overhead.py --shape qwen3.5-9b --out overhead-qwen3.5-9b.json      # one GPU
    PYTHONPATH=src python recipes/overhead.py --shape tiny --device cpu --dtype float32 --lengths 64 --prompts 64 --rounds 3 --cycles 2

Prompts: the model as it is (`stock`), once more (`again`: what two equal ways differ by here), and inside `sparsify` with an
indexer that keeps these lengths dense (`auto`). Generated tokens: the model as it is, twice, and inside `sparsify` with an indexer
that ran the prompt sparse (`sparse`). Ways alternate prompt by prompt, and token by token, so that whatever drifts hits all of them.
For prompts blocks are entered anew, and a few tokens run in them before the clock starts: a block stays open for many prompts where it
is used. For tokens each way has modules of its own, over the same weights, and a cache of its own. Weights and tokens are random.

Each line says the median, the median of the ratios to `stock` with its 95 % interval, and the same of the fastest tenth: where
launches bound the time, a host with other work disturbs the median by more than what is looked for. Index keys of tokens wait, and
are written 257 at a time: the token that writes has a median of its own, and a 257th of the weight.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

import topmass
from topmass.bench.models import build_model
from topmass.bench.modes import Mode
from topmass.bench.stress import stress_indexer
from topmass.bench.timing import now, rotation
from topmass.bench.ttft import describe_linear, random_prompts
from topmass.integrations.transformers.index_features import describe_model, index_configs
from topmass.integrations.transformers.index_keys import MOST_WAITING
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.integrations.transformers.load import describe_device

# tokens until index keys are written, by the last of them
CYCLE = MOST_WAITING + 1
STOCK, AGAIN, AUTO, SPARSE = "stock", "again", "auto", "sparse"
# share of the rounds that a busy host disturbed least
FASTEST, RESAMPLES = 0.1, 2000
# rounds that a limit of time leaves
FEWEST = 3
Times = dict[str, list[float]]


def ways(model: Any, args: argparse.Namespace) -> dict[str, Mode]:
    """Ways to run the model: as it is, twice, and with one untrained indexer, dense up to `--dense-below` and sparse."""
    indexer = stress_indexer(index_configs(model, dim=args.dim), describe_model(model)[0])
    unit = topmass.Granularity(q_block=args.q_block)
    auto = indexer.selector(budget=args.budget, granularity=unit, dense_below=args.dense_below)
    sparse = indexer.selector(budget=args.budget, granularity=unit)
    return {
        STOCK: Mode(name=STOCK, role="dense"),
        AGAIN: Mode(name=AGAIN, role="dense"),
        AUTO: Mode(name=AUTO, role="sparse", selector=auto),
        SPARSE: Mode(name=SPARSE, role="sparse", selector=sparse),
    }


def prompts(model: Any, modes: dict[str, Mode], ids: torch.Tensor, rounds: int, end: float = math.inf) -> Times:
    """Milliseconds of a prompt until its last logits are on the host, by way."""

    def answer() -> None:
        forward(model, ids, None)[0].cpu()

    return alternate(modes, model, lambda _: answer, rounds, warm=3, before=lambda: begin(model, ids), end=end)


def tokens(
    model: Any, modes: dict[str, Mode], ids: torch.Tensor, cycles: int, end: float = math.inf
) -> dict[str, np.ndarray]:
    """Milliseconds of generated tokens after a prompt, `[cycles, CYCLE]` by way.

    The first cycle does not count. From the moment `end` on the cycles that there are will do, if they are `FEWEST`.
    """
    state, found = {}, {name: [] for name in modes}
    with ExitStack() as stack:
        models = {name: twin(model) for name in modes}
        for name, mode in modes.items():
            stack.enter_context(fast_linear_attention(models[name]))
            stack.enter_context(mode.running(models[name]))
            state[name] = forward(models[name], ids, None)
        for i in range((1 + cycles) * CYCLE):
            if i % CYCLE == 0 and i > FEWEST * CYCLE and time.monotonic() > end:
                break
            for name in rotation(list(modes), i):
                start = now(model.device)
                logits, cache = state[name]
                state[name] = forward(models[name], logits.argmax(-1), cache)
                found[name].append(now(model.device) - start)
    return {name: np.reshape(times, (-1, CYCLE))[1:] for name, times in found.items()}


def twin(model: Any) -> Any:
    """Modules and configuration of its own over the same weights."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def begin(model: Any, ids: torch.Tensor) -> None:
    """A short prompt and a token after it: the first of a block cost more than those that follow."""
    logits, cache = forward(model, ids[:, :8], None)
    forward(model, logits.argmax(-1), cache)


def forward(model: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits, out.past_key_values


def alternate(
    modes: dict[str, Mode],
    model: Any,
    work: Callable[[str], Callable[[], Any]],
    rounds: int,
    warm: int,
    before: Callable[[], Any],
    end: float = math.inf,
) -> Times:
    """Time every way once a round, in an order that turns, each after `before`; the first `warm` rounds do not count.

    From the moment `end` of the monotonic clock on the rounds that there are will do, if they are `FEWEST`.
    """
    found: Times = {name: [] for name in modes}
    for i in range(warm + rounds):
        if i >= warm + FEWEST and time.monotonic() > end:
            break
        for name in rotation(list(modes), i):
            with modes[name].running(model):
                before()
                call = work(name)
                start = now(model.device)
                call()
                taken = now(model.device) - start
            if i >= warm:
                found[name].append(taken)
    return found


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Distribution-free 95 % interval of a median, from order statistics (normal approximation of the binomial)."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * n**0.5
    low, high = int(n / 2 - reach), int(n / 2 + reach + 1)
    return ordered[max(low - 1, 0)], ordered[min(high, n) - 1]


def fastest_interval(values: Sequence[float], stock: Sequence[float]) -> tuple[float, float, float]:
    """Quantile of the fastest tenth over that of `stock`, and its 95 % interval by resampling rounds, pairs together."""
    pairs = np.array([values, stock])
    rounds = np.random.default_rng(0).integers(0, pairs.shape[1], (RESAMPLES, pairs.shape[1]))
    drawn, base = np.quantile(pairs[:, rounds], FASTEST, axis=2)
    low, high = np.quantile(drawn / base, [0.025, 0.975])
    point, under = np.quantile(pairs, FASTEST, axis=1)
    return float(point / under), float(low), float(high)


def told(times: Times) -> dict[str, dict[str, Any]]:
    """Median of each way, and of its ratio to `stock` round by round; and the fastest tenth beside that of `stock`."""
    found = {}
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[STOCK], strict=True)]
        low, high = median_interval(ratios)
        fastest, fastest_low, fastest_high = fastest_interval(values, times[STOCK])
        found[name] = {
            "milliseconds": statistics.median(values), "over_stock": statistics.median(ratios), "low": low, "high": high,
            "fastest": float(np.quantile(values, FASTEST)), "fastest_over_stock": fastest, "fastest_low": fastest_low,
            "fastest_high": fastest_high, "rounds": len(values),
        }  # fmt: skip
    return found


def told_tokens(times: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """As `told`, with a token's share of the one that writes; intervals resample cycles, those of all ways together."""
    count = len(times[STOCK])
    draws = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    every, found = np.arange(count), {}
    for name, values in times.items():
        ratios = values / times[STOCK]
        fastest = [shared(x, every, FASTEST) for x in (values, times[STOCK])]
        of_draws = np.array([[shared(x, d, FASTEST) for x in (values, times[STOCK])] for d in draws])
        low, high = np.quantile([shared(ratios, d) for d in draws], [0.025, 0.975])
        fastest_low, fastest_high = np.quantile(of_draws[:, 0] / of_draws[:, 1], [0.025, 0.975])
        numbers = {
            "milliseconds": shared(values, every), "over_stock": shared(ratios, every), "low": low, "high": high,
            "fastest": fastest[0], "fastest_over_stock": fastest[0] / fastest[1], "fastest_low": fastest_low, "fastest_high": fastest_high,
        }  # fmt: skip
        found[name] = {key: float(number) for key, number in numbers.items()} | {"rounds": count}
    return found


def shared(values: np.ndarray, cycles: np.ndarray, q: float = 0.5) -> float:
    """Quantile of these cycles' tokens, and of those that write, by their numbers."""
    drawn = values[cycles]
    return float(np.quantile(drawn[:, :-1], q) * (CYCLE - 1) + np.quantile(drawn[:, -1], q)) / CYCLE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3.5-9b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384], help="of prompts kept dense")
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[4096], help="lengths after which tokens are generated"
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cycles", type=int, default=5, help="of 257 generated tokens each, by every way")
    parser.add_argument("--seconds", type=float, default=math.inf, help="fewer rounds where the time is over")
    parser.add_argument("--dense-below", type=int, default=16384)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--q-block", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    model = build_model(args.shape, device=args.device, dtype=getattr(torch, args.dtype))
    modes, text = ways(model, args), random_prompts(model)
    found: dict[str, Any] = {
        "shape": args.shape, "device": describe_device(model), "linear_attention": describe_linear(model), "budget": args.budget,
        "q_block": args.q_block, "dense_below": args.dense_below, "dtype": args.dtype, "prompt": {}, "token": {},
    }  # fmt: skip
    with torch.inference_mode(), fast_linear_attention(model):
        for n in args.lengths:
            kept = {name: modes[name] for name in (STOCK, AGAIN, AUTO)}
            # long prompts drift less, and cost more
            rounds = max(args.rounds * 4096 // max(n, 4096), 3)
            found["prompt"][n] = told(prompts(model, kept, text(1, n), rounds, end))
            show(f"prompt of {n}", found["prompt"][n])
        for n in args.prompts:
            kept = {name: modes[name] for name in (STOCK, AGAIN, SPARSE)}
            found["token"][n] = told_tokens(tokens(model, kept, text(1, n), args.cycles, end))
            show(f"token after {n}", found["token"][n])
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def show(what: str, ways: dict[str, dict[str, Any]]) -> None:
    for name, x in ways.items():
        print(
            f"{what}: {name:8s} {x['milliseconds']:9.3f} ms, {x['over_stock']:.4f} [{x['low']:.4f}, {x['high']:.4f}] of stock; fastest "
            f"tenth {x['fastest']:.3f} ms, {x['fastest_over_stock']:.4f} [{x['fastest_low']:.4f}, {x['fastest_high']:.4f}]",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
