"""Minutes of mixed load on one engine: no error, answers as good as alone, memory flat.

    PYTHONPATH=src python recipes/vllm/soak.py --seconds 360 --out out/vllm

The reference checkpoint with its indexer answers task samples one at a time; then, for the minutes asked, the same samples among prompts
of 100 tokens to the longest length, up to 16 at once, some cancelled, in a KV cache too small for all of them, so that some are
preempted. The exit status is 1 after an error, if scores differ beyond the paired interval, or if memory grew.
"""

import argparse
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    INDEXER,
    REFERENCE,
    Clock,
    Store,
    engine,
    generate,
    ids_of,
    on_gpu,
    ran,
    samples,
    stops,
    tokenizer,
    version,
)
from transformers import AutoConfig

import topmass
from topmass.eval.tasks import score
from topmass.results.stats import mean

# longest prompts that the KV cache holds: too few for all that are open, so that some are preempted
ROOM = 1.5
# share of the requests that generate long answers
LONG = 0.3
# MiB that may be held beyond what was held after a quarter of the time
GPU_GROWTH, HOST_GROWTH = 64, 512


class Load:
    """Requests that come and go."""

    def __init__(self, llm: Any, args: argparse.Namespace, known: list[tuple[list[int], int]]):
        self.llm, self.args, self.known = llm.llm_engine, args, known
        self.random, self.ends = random.Random(args.seed), stops()
        self.open: dict[str, tuple[str, int, float]] = {}
        self.answers: dict[int, list[list[int]]] = {}
        self.counts = dict.fromkeys(("sent", "finished", "cancelled", "preempted", "tokens"), 0)
        self.scheduler = self.llm.engine_core.engine_core.scheduler
        original = self.scheduler._preempt_request

        def preempt(*a: Any, **k: Any) -> Any:
            self.counts["preempted"] += 1
            return original(*a, **k)

        self.scheduler._preempt_request = preempt

    def send(self) -> None:
        from vllm import SamplingParams

        name = str(self.counts["sent"])
        self.counts["sent"] += 1
        if self.random.random() < 0.4:
            which = self.random.randrange(len(self.known))
            prompt, new = self.known[which]
            sampling = SamplingParams(max_tokens=new, temperature=0, stop_token_ids=self.ends, detokenize=False)
            kind = "sample"
        else:
            # as many short ones as long ones
            which, most = -1, self.args.longest - 64
            length = round(100 * (most / 100) ** self.random.random())
            prompt = [self.random.randrange(8, 2000) for _ in range(length)]
            # long answers outgrow the blocks that there were when they began
            new = self.random.randrange(1, 1024 if self.random.random() < LONG else 64)
            new = min(new, self.args.longest - length)
            sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
            kind = "cancel" if self.random.random() < 0.15 else "filler"
        end = time.monotonic() + self.random.random() * 2 if kind == "cancel" else 0.0
        self.llm.add_request(name, {"prompt_token_ids": prompt}, sampling)
        self.open[name] = kind, which, end

    def step(self) -> None:
        for out in self.llm.step():
            name = out.request_id.split("-")[0]
            if out.finished and name in self.open:
                kind, which, _ = self.open.pop(name)
                self.counts["finished"] += 1
                self.counts["tokens"] += len(out.prompt_token_ids or ()) + len(out.outputs[0].token_ids)
                if kind == "sample":
                    tokens = [t for t in out.outputs[0].token_ids if t not in self.ends]
                    self.answers.setdefault(which, []).append(tokens)
        late = [n for n, (kind, _, end) in self.open.items() if kind == "cancel" and time.monotonic() > end]
        if late:
            self.llm.abort_request(late)
            self.counts["cancelled"] += len(late)
            for name in late:
                self.open.pop(name)

    def run(self, clock: Clock) -> list[tuple[float, float, float]]:
        """Load until the time is over, then finish what is open; memory every ten seconds."""
        held, mark = [], clock.used
        while clock.left() or self.open:
            while clock.left() and len(self.open) < self.args.concurrent:
                self.send()
            self.step()
            if clock.used >= mark:
                held.append((clock.used, *memory()))
                mark = clock.used + 10
                print(
                    f"{clock.used:5.0f} s {self.counts} GPU {held[-1][1]:.0f} MiB host {held[-1][2]:.0f} MiB",
                    flush=True,
                )
        return held


def token_bytes() -> int:
    """Bytes of one position in the KV cache: keys, values and index keys of the full-attention layers."""
    model, info = AutoConfig.from_pretrained(REFERENCE).get_text_config(), topmass.load_indexer(INDEXER).info
    width = 2 * model.num_key_value_heads * model.head_dim
    return 2 * sum(width + config.dim for config in info.layers.values())


def memory() -> tuple[float, float]:
    """MiB in use on the GPU, and the most that this process ever held on the host."""
    gpu = torch.cuda.memory_allocated() / 2**20 if on_gpu() else 0.0
    return gpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/vllm"))
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--longest", type=int, default=65536)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=0, help="blocks of the KV cache; default ROOM longest prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(version(), flush=True)
    words, store = tokenizer(), Store(args.out / "soak.json")
    batch = samples(args.samples, args.length, questions=1, seed=2)
    known = list(zip(ids_of(words, batch), [s.max_new_tokens for s in batch], strict=True))
    options = {"max_model_len": args.longest, "max_num_batched_tokens": 8192, "max_num_seqs": args.concurrent}
    settings = {"budget": args.budget, "dense_below": 0}
    if args.blocks:
        options["num_gpu_blocks_override"] = args.blocks
    elif on_gpu():
        options["kv_cache_memory_bytes"] = round(ROOM * args.longest * token_bytes())
    llm = engine(settings, **options)
    cache = llm.llm_engine.vllm_config.cache_config
    print(f"KV cache: {cache.num_gpu_blocks} blocks of {cache.block_size} tokens", flush=True)
    alone = [generate(llm, [p], new, stops())[0] for p, new in known]
    load = Load(llm, args, known)
    held = load.run(Clock(args.seconds))
    return judge(args, store, batch, alone, load, held, ran(llm), words)


def judge(args: Any, store: Store, batch: Any, alone: Any, load: Load, held: Any, done: Any, words: Any) -> int:
    """Print what was found; 1 if anything is wrong."""

    def scored(sample: Any, tokens: list[int]) -> float:
        return score(sample, words.decode(tokens, skip_special_tokens=True))

    pairs = [
        (i, scored(batch[i], tokens), scored(batch[i], alone[i])) for i, many in load.answers.items() for tokens in many
    ]
    gap = mean([a - b for _, a, b in pairs], [i for i, _, _ in pairs], bounds=(-1.0, 1.0)) if pairs else None
    settled = [h for h in held if h[0] >= held[-1][0] / 4] or held
    growth = [settled[-1][i] - settled[0][i] for i in (1, 2)]
    same = sum(t == alone[i] for i, many in load.answers.items() for t in many)
    print(f"{load.counts}; {done['total']}; kernels {done['backends']}")
    if gap:
        print(f"score beside alone: {100 * gap.point:+.2f} [{100 * gap.low:+.2f}, {100 * gap.high:+.2f}] points, {len(pairs)} answers, {same} equal")  # fmt: skip
    print(f"growth after a quarter of the time: GPU {growth[0]:+.0f} MiB, host {growth[1]:+.0f} MiB")
    wrong = [] if gap and gap.low <= 0 <= gap.high else ["scores"]
    wrong += ["GPU memory"] * (growth[0] > GPU_GROWTH) + ["host memory"] * (growth[1] > HOST_GROWTH)
    wrong += ["nothing was preempted"] * (not load.counts["preempted"]) + ["nothing was cancelled"] * (
        not load.counts["cancelled"]
    )
    store.put(
        f"soak {args.seed}",
        {"counts": load.counts, "held": held, "pairs": pairs, "equal": same, "wrong": wrong, "version": version()},
    )
    print("ok" if not wrong else f"WRONG: {', '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
