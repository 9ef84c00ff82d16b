"""Quality and time of the same configurations of the reference checkpoint, and reference arithmetic beside the kernels.

    PYTHONPATH=src python recipes/frontier.py measure --out benchmarks/frontier --seconds 280     # one GPU; resumes
    PYTHONPATH=src python recipes/frontier.py finish --out benchmarks/frontier                    # anywhere: reports

`measure` times every configuration (`OUT/ttft`), answers the tasks with it (`OUT/eval`), and answers the same samples once more by
plain PyTorch, selection and attention (`OUT/arithmetic`), for some of them. Configurations are per query, shared by 8, 16, 32 and 64 queries over single keys, and
per query over groups of 4 and 16 keys, at three budgets. An indexer serves the key groups it was trained for (`--indexers`); for groups
without one the oracle stands in, which is a diagnostic and never recommended.
`finish` completes the runs, writes the frontier's report and `recommended.toml`, and says whether kernels and arithmetic agree: equal
answers on at least 99.5 % of the samples, and an interval of the realization gap that contains 0. It exits with 1 if not.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import topmass
from topmass.bench.ttft import Setting, bench_ttft, describe_linear, text_prompts
from topmass.eval.runner import evaluate_samples
from topmass.eval.settings import label
from topmass.eval.tasks import Sample, list_tasks, make_samples
from topmass.integrations.transformers.load import describe_device, weights_hash
from topmass.integrations.transformers.reference import REFERENCE, load_reference
from topmass.results import Run, finish_partial, load_run, make_manifest
from topmass.results.stats import macro_mean
from topmass.selection import Selector
from topmass.selection.indexer import named_indexer

RUNS = ("ttft", "eval", "arithmetic")
SEED = 11
EQUAL = 0.995
Row = dict[str, Any]


# -- what is compared


def configurations(args: argparse.Namespace, indexers: dict[str, topmass.Indexer]) -> dict[str, Selector]:
    """Every selector by its label; budgets too small for a granularity are left out, with a line."""
    by_group = {indexer.info.kv_block: indexer for indexer in indexers.values()}
    if len(by_group) < len(indexers):
        raise topmass.errors.ConfigError("Give one indexer for each key group; two of --indexers are for the same.")
    units = [topmass.Granularity(q_block=g) for g in args.q_blocks]
    units += [topmass.Granularity(kv_block=r) for r in args.groups if r > 1]
    found: dict[str, Selector] = {}
    for budget in args.budgets:
        for unit in units:
            indexer = by_group.get(unit.kv_block)
            try:
                if indexer is None:
                    selector: Selector = topmass.OracleSelector(budget=budget, granularity=unit)
                else:
                    selector = indexer.selector(budget=budget, granularity=unit)
            except topmass.errors.ConfigError as error:
                print(f"left out: budget {budget}, {unit}: {error}", flush=True)
                continue
            found[label(selector)] = selector
        streaming = topmass.StreamingSelector(sink=4, window=budget - 4)
        found[label(streaming)] = streaming
    return found


def arithmetic_of(selectors: dict[str, Selector], args: argparse.Namespace) -> dict[str, Selector]:
    """The configurations that plain PyTorch answers too: the middle budget, per query and shared."""
    middle = str(sorted(args.budgets)[len(args.budgets) // 2])
    served = {name: s for name, s in selectors.items() if s.config().get("budget") == middle}
    wanted = {(1, 1), (max(g for g in args.q_blocks if g <= 32), 1)}
    return {name: s for name, s in served.items() if (s.config()["q_block"], s.config()["kv_block"]) in wanted}


def load_indexers(paths: Sequence[str]) -> dict[str, topmass.Indexer]:
    """Indexers by directory; none where the package ships none and none was named."""
    try:
        return {p: named_indexer(p) for p in paths}
    except topmass.errors.DataError as error:
        if list(paths) != ["reference"]:
            raise
        print(f"no indexer, the oracle stands in: {error}", flush=True)
        return {}


# -- measuring


def make(job: tuple[str, int, int]) -> list[Sample]:
    from transformers import AutoTokenizer

    task, length, n = job
    return make_samples(task, AutoTokenizer.from_pretrained(REFERENCE), length=length, n=n, seed=SEED)


def measure(args: argparse.Namespace) -> int:
    """Times, scores, and scores by plain PyTorch, until the time is up."""
    begin = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = [(task, length, args.haystacks) for length in args.lengths for task in args.tasks]
    with ProcessPoolExecutor(args.workers) as pool:
        model, tokenizer = load_reference(device=device)
        indexers = load_indexers(args.indexers)
        selectors = configurations(args, indexers)
        facts = {"model": "reference", "weights_hash": weights_hash(model), "device": describe_device(model)}
        paths = {indexer.digest: path for path, indexer in indexers.items()}
        take_times(args, model, tokenizer, selectors, paths, facts)
        mark(begin, "times")
        # not before: busy cores would be in the times of a model that waits for launches
        texts = [pool.submit(make, job) for job in jobs]
        samples = gather(texts)
        mark(begin, "text")
    dense: dict[str, Selector] = {"dense": topmass.DenseSelector()}
    arithmetic = arithmetic_of(selectors, args)
    share = args.seconds - (time.monotonic() - begin)
    for name, chosen, backend, seconds in (
        ("eval", dense | selectors, "auto", share * (1 - args.arithmetic_share)),
        ("arithmetic", arithmetic, "reference", share * args.arithmetic_share),
    ):
        score(args, name, model, tokenizer, samples, chosen, backend, facts, time.monotonic() + seconds)
        mark(begin, name)
    return 0


def take_times(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    selectors: dict[str, Selector],
    paths: dict[str, str],
    facts: Row,
) -> None:
    dense = None if model.device.type == "cuda" else ("stock",)
    setting = Setting(selectors=(), new_tokens=args.new_tokens, rounds=args.rounds, dense=dense)
    config = asdict(setting) | {
        "lengths": args.lengths, "batch": [1], "weights": "checkpoint", "linear_attention": describe_linear(model),
        "indexers": paths, "selectors": {name: s.config() for name, s in selectors.items()},
    }  # fmt: skip
    with Run.open(args.out / "ttft", manifest("ttft", config, facts)) as run:
        prompts, more = text_prompts(model, tokenizer, SEED), list(selectors.values())
        bench_ttft(model, setting, lengths=args.lengths, prompts=prompts, more=more, run=run)


def score(
    args: argparse.Namespace,
    name: str,
    model: Any,
    tokenizer: Any,
    samples: list[Sample],
    selectors: dict[str, Selector],
    backend: str,
    facts: Row,
    deadline: float,
) -> None:
    def progress(done: int, total: int, what: str) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError

    config = {
        "lengths": args.lengths, "haystacks": args.haystacks, "tasks": list(args.tasks), "backend": backend,
        "selectors": {key: s.config() for key, s in selectors.items()},
    }  # fmt: skip
    with Run.open(args.out / name, manifest("eval", config, facts)) as run:
        try:
            evaluate_samples(
                model, tokenizer, samples, selectors=selectors, backend=backend, batch_tokens=args.batch_tokens, run=run,
                progress=progress,
            )  # fmt: skip
        except TimeoutError:
            print(f"{name}: out of time after {len(run.rows)} rows; the same command resumes", flush=True)


def manifest(kind: Any, config: Row, facts: Row) -> Row:
    command = shlex.join(["python", "recipes/frontier.py", *sys.argv[1:]])
    return make_manifest(kind, config, seeds={"samples": SEED}, command=command, **facts)


def gather(texts: Sequence[Future[list[Sample]]]) -> list[Sample]:
    """Haystack by haystack over all tasks, so that whatever time allows is balanced."""
    samples = [sample for future in texts for sample in future.result()]
    return sorted(samples, key=lambda s: (s.length, s.haystack, s.task))


def mark(begin: float, what: str) -> None:
    print(f"{time.monotonic() - begin:6.0f} s  {what}", flush=True)


# -- what came out


def finish(args: argparse.Namespace) -> int:
    """Complete the runs, report them, and check that kernels and arithmetic agree."""
    for name in RUNS:
        if (args.out / f"{name}.partial").is_dir():
            run = finish_partial(args.out / name, keep=None if name == "ttft" else complete_haystacks)
            print(run.path, len(run.records), "rows")
    command = [sys.executable, "-m", "topmass.cli", "frontier", *(str(args.out / n) for n in RUNS)]
    subprocess.run([*command, "--out", str(args.out / "report")], check=True)
    found = realization(load_run(args.out / "eval").records, load_run(args.out / "arithmetic").records)
    (args.out / "realization.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if found["pass"] else 1


def complete_haystacks(rows: list[Row]) -> list[Row]:
    """Rows of the haystacks that every configuration answered on every task; time may have ended within one."""
    wanted = len({(row["task"], row["config"]) for row in rows})
    found: dict[tuple[int, int], set[tuple[str, str]]] = {}
    for row in rows:
        found.setdefault((row["length"], row["haystack"]), set()).add((row["task"], row["config"]))
    kept = [row for row in rows if len(found[row["length"], row["haystack"]]) == wanted]
    if len(kept) < len(rows):
        print(
            f"dropped {len(rows) - len(kept)} rows of haystacks that not every configuration and task has", flush=True
        )
    return kept


def realization(kernels: Sequence[Row], arithmetic: Sequence[Row]) -> Row:
    """Agreement of two runs on their common samples: equal answers, and what the kernels lose."""
    mine = {sample_of(row): row for row in kernels}
    pairs = [(row, mine[sample_of(row)]) for row in arithmetic if sample_of(row) in mine]
    if not pairs:
        return {"samples": 0, "pass": False}
    equal = sum(a["prediction"] == b["prediction"] for a, b in pairs) / len(pairs)
    strata: dict[str, tuple[list[float], list[Any]]] = {}
    for a, b in pairs:
        values, clusters = strata.setdefault(a["task"], ([], []))
        values.append(a["score"] - b["score"])
        clusters.append((a["length"], a["haystack"]))
    gap = macro_mean(strata, bounds=(-1.0, 1.0))
    return {
        "samples": len(pairs),
        "configurations": sorted({a["config"] for a, _ in pairs}),
        "kernels": sorted({b["backend"] for _, b in pairs}),
        "arithmetic": sorted({a["backend"] for a, _ in pairs}),
        "equal_predictions": equal,
        "different": [{k: a[k] for k in ("task", "haystack", "config", "prediction")} | {"kernel": b["prediction"]}
                      for a, b in pairs if a["prediction"] != b["prediction"]],
        "realization_gap": {"point": gap.point, "low": gap.low, "high": gap.high, "method": gap.method},
        "pass": equal >= EQUAL and gap.low <= 0 <= gap.high,
    }  # fmt: skip


def sample_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("task", "length", "seed", "haystack", "question_id", "config"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["measure", "finish"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--seconds", type=float, default=280.0, help="of measuring; times are always taken to their end"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384])
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--q-blocks", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 16], help="keys taken together, per query")
    parser.add_argument("--indexers", nargs="+", default=["reference"], help="directories, or `reference`")
    parser.add_argument("--tasks", nargs="+", default=list_tasks())
    parser.add_argument("--haystacks", type=int, default=20, help="per task and length")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=0, help="for the time per output token")
    parser.add_argument("--arithmetic-share", type=float, default=0.25, help="of the time left after the times")
    parser.add_argument("--batch-tokens", type=int, default=262144)
    parser.add_argument("--workers", type=int, default=2, help="processes that write text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    return measure(args) if args.part == "measure" else finish(args)


if __name__ == "__main__":
    sys.exit(main())
