"""The reference checkpoint in vLLM: answers beside transformers', and how often variations of the scheduler change a token.

    PYTHONPATH=src python recipes/vllm/correct.py answers --out out/vllm --seconds 240
    PYTHONPATH=src python recipes/vllm/correct.py variations --out out/vllm --seconds 400

`answers`: samples of five tasks with the shipped indexer, the same budget and greedy decoding in both; also dense in both, because
bfloat16 alone changes some answers. With `--tasks common_words majority --budget 64` sparse prefill loses points, so that which keys were
read shows in the answers. `variations`: the first divergence of the generated tokens from those of whole prompts with CUDA
graphs, for chunks, prefix caching, eager execution and two GPUs, and with the same variations of the stock engine beside. What is in
the file is not run again: after a change of the code take another `--out`. Several processes may share one (`--kinds`, `--variations`).
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from common import (
    INDEXER,
    REFERENCE,
    TASKS,
    Clock,
    Store,
    close,
    engine,
    generate,
    ids_of,
    on_gpu,
    ran,
    samples,
    stops,
    version,
)
from common import tokenizer as load_tokenizer

import topmass
from topmass.eval.runner import greedy_answers
from topmass.eval.tasks import score
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.results.stats import mean

BUDGET = 256
VARIATIONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks of 512": {"max_num_batched_tokens": 512},
    "prefix cache": {"enable_prefix_caching": True},
    "eager": {"enforce_eager": True},
    "two GPUs": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "disable_custom_all_reduce": True},
}


def with_transformers(batch: list[Any], budget: int | None) -> list[str]:
    """Answers of transformers, sparse with a budget."""
    where = "cuda" if on_gpu() else "cpu"
    model, words = topmass.load_reference(dtype=torch.bfloat16, device=where)
    by_haystack: dict[tuple[str, int], list[int]] = {}
    for i, s in enumerate(batch):
        by_haystack.setdefault((s.task, s.haystack), []).append(i)
    answers = [""] * len(batch)
    with torch.inference_mode(), fast_linear_attention(model):
        for members in by_haystack.values():
            group = [batch[i] for i in members]
            if budget is None:
                found = greedy_answers(model, words, group)
            else:
                selector = topmass.load_indexer(INDEXER).selector(budget=budget)
                with topmass.sparsify(model, selector):
                    found = greedy_answers(model, words, group)
            for i, (text, _) in zip(members, found, strict=True):
                answers[i] = text
    return answers


def with_vllm(batch: list[Any], budget: int | None, length: int) -> list[str]:
    """Answers of vLLM, sparse with a budget."""
    words = load_tokenizer()
    llm = engine(None if budget is None else {"budget": budget}, max_model_len=length, max_num_batched_tokens=8192)
    answers = [""] * len(batch)
    # requests of one call have one number of new tokens
    for new in sorted({s.max_new_tokens for s in batch}):
        members = [i for i, s in enumerate(batch) if s.max_new_tokens == new]
        tokens = generate(llm, ids_of(words, [batch[i] for i in members]), new, stops())
        for i, text in zip(members, words.batch_decode(tokens, skip_special_tokens=True), strict=True):
            answers[i] = text
    if budget is not None:
        print("kernels:", ran(llm), flush=True)
    close(llm)
    return answers


def answers(args: argparse.Namespace, store: Store, clock: Clock) -> None:
    """Print how many answers agree, and the paired difference of scores."""
    batch = samples(args.samples, args.length, tasks=args.tasks)
    # as files of the default tasks name them
    of = "" if tuple(args.tasks) == TASKS else f" of {' '.join(args.tasks)}"
    for kind in args.kinds:
        budget = args.budget if kind == "sparse" else None
        for side, run in (("vllm", with_vllm), ("transformers", with_transformers)):
            name = f"answers {kind} {side} {len(batch)} x {args.length} b={budget}{of}"
            if name not in store and clock.left(20):
                begin = clock.used
                store.put(name, run(batch, budget, args.length) if side == "vllm" else run(batch, budget))
                print(f"{name}: {clock.used - begin:.0f} s", flush=True)
        names = [f"answers {kind} {s} {len(batch)} x {args.length} b={budget}{of}" for s in ("vllm", "transformers")]
        if all(name in store for name in names):
            compare(kind, batch, store[names[0]], store[names[1]])


def compare(kind: str, batch: list[Any], ours: list[str], theirs: list[str]) -> None:
    """Print agreement and the difference of scores."""
    same = sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True))
    scores = [[score(s, a) for s, a in zip(batch, side, strict=True)] for side in (ours, theirs)]
    gap = mean([a - b for a, b in zip(*scores, strict=True)], [(s.task, s.haystack) for s in batch], bounds=(-1.0, 1.0))
    score_of = [100 * sum(side) / len(side) for side in scores]
    print(
        f"{kind}: {same}/{len(batch)} answers equal ({100 * same / len(batch):.2f} %); score vLLM {score_of[0]:.2f}, transformers "
        f"{score_of[1]:.2f}, difference {100 * gap.point:+.2f} [{100 * gap.low:+.2f}, {100 * gap.high:+.2f}] points",
        flush=True,
    )


def variations(args: argparse.Namespace, store: Store, clock: Clock) -> None:
    """Print first divergences by variation, sparse beside dense."""
    batch = samples(args.prompts, args.length, questions=1, seed=1)
    prompts = ids_of(load_tokenizer(), batch)
    # odd lengths, so that chunks and pages end everywhere
    prompts = [p[i % 61 :] for i, p in enumerate(prompts)]
    for name in args.variations:
        options = VARIATIONS[name]
        if (name == "eager" and not on_gpu()) or (name == "two GPUs" and torch.cuda.device_count() < 2):
            continue
        for kind in args.kinds:
            key = where(kind, len(prompts), args).format(name)
            if key in store or not clock.left(25):
                continue
            begin = clock.used
            settings = {"budget": args.budget, "decode": args.decode} if kind == "sparse" else None
            common: dict[str, Any] = {"max_model_len": args.length + args.tokens, "max_num_batched_tokens": 8192}
            llm = engine(settings, **{**common, **options})
            found = generate(llm, prompts, args.tokens)
            if "cache" in name:
                # the second time prompts are there
                found = generate(llm, prompts, args.tokens)
            if settings:
                ran(llm)
            store.put(key, found)
            close(llm)
            print(f"{key}: {clock.used - begin:.0f} s", flush=True)
    show(args, store, len(prompts))


def where(kind: str, n: int, args: argparse.Namespace) -> str:
    """Key of a result in the file, but for the variation's name."""
    decode = " decode=sparse" if kind == "sparse" and args.decode == "sparse" else ""
    return f"variation {kind} {{}} {n} x {args.length} b={args.budget}{decode}"


def show(args: argparse.Namespace, store: Store, n: int) -> None:
    """Print the table, and whether sparse diverges more often than dense does."""
    keys = {k: where(k, n, args) for k in ("sparse", "dense")}
    for name in VARIATIONS:
        firsts = {}
        for kind, key in keys.items():
            if key.format("whole") in store and key.format(name) in store and name != "whole":
                pairs = zip(store[key.format("whole")], store[key.format(name)], strict=True)
                firsts[kind] = [f for f in (first(a, b) for a, b in pairs) if f is not None]
        if len(firsts) == 2:
            s, d = len(firsts["sparse"]), len(firsts["dense"])
            early = {kind: sorted(found)[:5] for kind, found in firsts.items()}
            print(
                f"{name}: diverged sparse {s}/{n}, dense {d}/{n} (one-sided p of 'sparse more often' {more_often(s, d, n):.3f}); "
                f"earliest {early}",
                flush=True,
            )


def first(a: list[int], b: list[int]) -> int | None:
    """Index of the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def more_often(a: int, b: int, n: int) -> float:
    """Fisher's exact test, one-sided: how likely at least `a` of the `a + b` fall to the first of two groups of `n`."""
    total = math.comb(2 * n, a + b)
    return sum(math.comb(n, k) * math.comb(n, a + b - k) for k in range(a, min(n, a + b) + 1)) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "variations"))
    parser.add_argument("--out", type=Path, default=Path("out/vllm"))
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of answers")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--variations", nargs="+", choices=tuple(VARIATIONS), default=list(VARIATIONS))
    parser.add_argument("--kinds", nargs="+", choices=("sparse", "dense"), default=["sparse", "dense"])
    parser.add_argument("--decode", choices=("dense", "sparse"), default="dense")
    args = parser.parse_args()
    if args.what == "answers" and args.decode == "sparse":
        parser.error("answers are generated with dense decoding; --decode is for variations.")
    clock, store = Clock(args.seconds), Store(args.out / f"{args.what}.json")
    print(f"{version()}; {REFERENCE.name}, budget {args.budget}", flush=True)
    (answers if args.what == "answers" else variations)(args, store, clock)


if __name__ == "__main__":
    main()
