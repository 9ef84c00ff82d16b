"""Measure the reference checkpoint: dense scores, the oracle's decisive settings, its full grid, and attention zeroed.

    PYTHONPATH=src python recipes/reference/tables.py dense --out benchmarks/reference/dense
    PYTHONPATH=src python recipes/reference/tables.py decisive --out benchmarks/reference/decisive
    PYTHONPATH=src python recipes/reference/tables.py grid --out benchmarks/reference/grid
    PYTHONPATH=src python recipes/reference/tables.py eighth --out benchmarks/reference/eighth
    PYTHONPATH=src python recipes/reference/tables.py zero --out benchmarks/reference-zeroed

`eighth` is the oracle at 1/8 of 16K on as many haystacks as `dense` has, to decide what 30 of them cannot.
Each is one run directory that resumes where it stopped. On one H100 a part takes minutes; a CPU can do it, slowly.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import topmass
from topmass.eval.runner import evaluate_samples, greedy_answers
from topmass.eval.settings import columns, label, oracle_grid
from topmass.eval.tasks import Sample, list_tasks, make_samples, score
from topmass.integrations.transformers._session import LayerCall, Session
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.integrations.transformers.load import describe_device, weights_hash
from topmass.integrations.transformers.reference import REFERENCE, load_reference
from topmass.results import Run, make_manifest

BUDGETS = (32, 64, 128, 256, 512, 1024, 2048)
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One table: haystacks per task, lengths and settings."""

    n: int
    lengths: tuple[int, ...]
    settings: dict


def parts() -> dict[str, Part]:
    dense = {"dense": topmass.DenseSelector()}
    baselines = [
        topmass.StreamingSelector(sink=4, window=252),
        topmass.RandomSelector(budget=256),
        topmass.PooledSelector(budget=256),
        topmass.PreviousLayerSelector(budget=256),
    ]
    decisive = oracle_grid(BUDGETS)
    decisive |= oracle_grid((512, 1024, 2048), share="kv_head")
    decisive |= oracle_grid((128, 256, 512), (64,)) | {label(b): b for b in baselines}
    grid = oracle_grid(BUDGETS, (1, 8, 32, 64), (1, 4, 16, 64))
    return {
        "dense": Part(n=100, lengths=(1024, 2048, 4096, 8192, 16384, 32768), settings=dense),
        "decisive": Part(n=30, lengths=(4096, 8192, 16384), settings=decisive),
        "grid": Part(n=5, lengths=(4096, 8192, 16384), settings=grid),
        "eighth": Part(n=100, lengths=(16384,), settings=oracle_grid((2048,))),
        "zero": Part(n=10, lengths=(4096, 16384), settings={}),
    }


def make(job: tuple[str, int, int]) -> list[Sample]:
    from transformers import AutoTokenizer

    task, length, n = job
    return make_samples(task, AutoTokenizer.from_pretrained(REFERENCE), length=length, n=n, seed=SEED)


class Zero:
    """Full attention that outputs nothing."""

    def begin_forward(self) -> None:
        pass

    def __call__(self, call: LayerCall) -> torch.Tensor:
        return torch.zeros_like(call.q)


def ablate(model, tokenizer, samples: list[Sample]) -> list[dict]:
    """Records of the model with its full-attention output zeroed; the setting columns are those of a dense run."""
    records = []
    with fast_linear_attention(model), Session(model, Zero()):
        for i in range(0, len(samples), 10):
            batch = samples[i : i + 10]
            start = time.perf_counter()
            answers = greedy_answers(model, tokenizer, batch)
            seconds = (time.perf_counter() - start) / len(batch)
            records += [zeroed(s, text, tokens, seconds) for s, (text, tokens) in zip(batch, answers, strict=True)]
    return records


def zeroed(sample: Sample, text: str, tokens: int, seconds: float) -> dict:
    return columns(topmass.DenseSelector()) | {
        "selector": "zeroed",
        "task": sample.task,
        "length": sample.length,
        "haystack": sample.haystack,
        "question_id": sample.question_id,
        "seed": sample.seed,
        "config": "attention zeroed",
        "dense_below": 0,
        "decode": "dense",
        "fingerprint": "",
        "status": "ok",
        "score": score(sample, text),
        "prediction": text,
        "references": json.dumps(sample.references),
        "prompt_tokens": tokens,
        "keys_read_mean": 0.0,
        "seconds": seconds,
        "support_recall": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(parts()))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--n", type=int, help="haystacks per task, instead of the published number")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop (and resume with the same command) after this")
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    begin = time.time()
    part = parts()[args.part]
    n, lengths = args.n or part.n, tuple(args.lengths or part.lengths)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = [(task, length, n) for length in lengths for task in list_tasks()]
    with ProcessPoolExecutor(args.workers) as pool:
        futures = {job: pool.submit(make, job) for job in jobs}
        model, tokenizer = load_reference(device=device)
        config = {"part": args.part, "n": n, "lengths": lengths, "batch_tokens": args.batch_tokens}
        config["selectors"] = {
            k: getattr(s, "config", lambda s=s: dict(s.settings))() for k, s in part.settings.items()
        }
        manifest = make_manifest(
            "eval", config, model="reference", weights_hash=weights_hash(model), seeds={"tasks": SEED},
            device=describe_device(model), command=f"python recipes/reference/tables.py {args.part}",
        )  # fmt: skip

        def progress(done: int, total: int, what: str) -> None:
            if time.time() - begin > args.seconds:
                raise TimeoutError

        with Run.open(args.out, manifest) as run:
            try:
                for length in lengths:
                    start = time.time()
                    samples = [s for task in list_tasks() for s in futures[task, length, n].result()]
                    samples.sort(key=lambda s: (s.haystack, s.task))
                    waited = time.time() - start
                    if args.part == "zero":
                        run.append(ablate(model, tokenizer, samples))
                        continue
                    evaluate_samples(
                        model,
                        tokenizer,
                        samples,
                        selectors=part.settings,
                        batch_tokens=args.batch_tokens,
                        run=run,
                        progress=progress,
                    )
                    print(
                        f"{args.part} {length}: {time.time() - start:.1f} s, {waited:.1f} s of them for text",
                        flush=True,
                    )
                run.finish()
            except TimeoutError:
                print(f"{args.part}: out of time after {len(run.rows)} rows; the same command resumes", flush=True)


if __name__ == "__main__":
    main()
