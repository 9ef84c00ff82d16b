"""Measure the reference checkpoint's indexer against dense attention, the oracle and the baselines, on the same samples.

    PYTHONPATH=src python recipes/indexer/gaps.py choose --out benchmarks/indexer
    PYTHONPATH=src python recipes/indexer/gaps.py test --out benchmarks/indexer --lengths 4096
    PYTHONPATH=src python recipes/indexer/gaps.py layers --out benchmarks/indexer
    PYTHONPATH=src python recipes/indexer/gaps.py test --out benchmarks/indexer-uniform --budget 1/16 --n 100 --n-far 10
    PYTHONPATH=src python recipes/indexer/gaps.py report --out benchmarks/indexer

`choose` compares budgets of at most 1/16 of the context on development seeds and writes the best to `choice.json`. `test` runs that
budget on other seeds: dense attention and the indexer on all haystacks, the oracle and the shared selection on the first
`--n-baselines` of them, baselines on the first `--n-far`. `layers` makes one full-attention layer sparse at a time. `report` prints the
tables and the checks, writes them to `gaps.md`, and exits with 1 if a check fails. It also reads the same test with the largest permitted budget in
every layer, from `OUT-uniform`, and what distillation costs, if they are there.

Every length is a run of its own that resumes where it stopped, so processes share the work by `--lengths`. `--close` publishes a run
that has not seen all its haystacks yet; its manifest then says where it stopped. One H200 takes, per haystack, about 10 / 22 / 45 ms dense and 14 / 30 / 70 ms sparse at 4K /
8K / 16K.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from common import COUNTING, NINE, TENTH, Known, Library, Shares, blocks, common_options, untrained

import topmass
from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.errors import ConfigError
from topmass.eval.runner import evaluate_samples
from topmass.eval.settings import Infeasible
from topmass.eval.tasks import list_tasks
from topmass.integrations.transformers.load import describe_device, weights_hash
from topmass.integrations.transformers.reference import load_reference
from topmass.results import LoadedRun, Run, finish_partial, load_run, make_manifest
from topmass.results.stats import Interval
from topmass.selection.indexer import named_indexer

# neither has made another published table
DEV_SEED, TEST_SEED = 1001, 2003
LENGTHS = (4096, 8192, 16384)
# twice what the indexer was trained at; reported beside the others, not among them
LONG = 32768
SHARED = 32
# shares of the context in the first and in the second full-attention layer, or in both
CANDIDATES = ("1/16", "1/32", "1/64,7/64", "1/32,3/32", "3/32,1/32", "7/64,1/64", "1/16v", "1/32,3/32v")
CANDIDATE_TASKS = (*COUNTING, "variable_tracking", "niah_uuid")
LARGEST = Fraction(1, 16)
# what must hold of the shipped indexer, in fractions of the full score
FAR, POINT, HIGH, SAMPLES = 0.15, 0.01, 0.02, 300
# candidates this near are equal, and the one that reads fewer keys is taken
NEAR = 0.002
FAR_ROLES = ("streaming", "random", "untrained", "pooled", "previous layer")


# --- what runs ---------------------------------------------------------------------------------------------------------


def possible(make: Callable[[], Any], name: str, budget: Any) -> Any:
    """A selector, or the mark that its budget is too small."""
    try:
        return make()
    except ConfigError as error:
        return Infeasible(settings={"selector": name, "budget": str(budget)}, reason=str(error))


def roles(indexer: topmass.Indexer, shares: Shares, length: int) -> dict[str, Any]:
    """Everything that is compared, by what it is called in the tables."""
    layers = sorted(indexer.info.layers)
    budget, tokens = shares.budget(length, layers), shares.tokens(length)
    block = Granularity(q_block=SHARED, kv_block=indexer.info.kv_block)
    # a block keeps room for its own queries and reads them half on average: with this much more it reads as many keys
    wider = shares.budget(length, layers, extra=SHARED // 2)
    makers: dict[str, tuple[Any, Callable[[], Any]]] = {
        "dense": (None, topmass.DenseSelector),
        "indexer": (budget, lambda: indexer.selector(budget=budget)),
        "oracle": (budget, lambda: topmass.OracleSelector(budget=budget)),
        "indexer shared": (wider, lambda: indexer.selector(budget=wider, granularity=block)),
        "streaming": (tokens, lambda: topmass.StreamingSelector(sink=4, window=tokens - 4)),
        "random": (budget, lambda: topmass.RandomSelector(budget=budget)),
        "untrained": (budget, lambda: untrained(indexer).selector(budget=budget)),
        "pooled": (budget, lambda: topmass.PooledSelector(budget=budget)),
        "previous layer": (tokens, lambda: topmass.PreviousLayerSelector(budget=tokens)),
    }
    return {name: possible(make, name, nominal) for name, (nominal, make) in makers.items()}


def candidates(indexer: topmass.Indexer, specs: Sequence[str], length: int) -> dict[str, Any]:
    """Dense, the indexer at every candidate budget, and what has to fail at each."""
    found: dict[str, Any] = {"dense": topmass.DenseSelector()}
    for spec in specs:
        all_roles = roles(indexer, Shares.parse(spec), length)
        found |= {f"{name} {spec}": all_roles[name] for name in ("indexer", "streaming", "random", "untrained")}
    return found


def one_layer(indexer: topmass.Indexer, shares: Shares, length: int) -> dict[str, Any]:
    """Dense, and indexer and oracle in one full-attention layer while the others stay dense."""
    layers = sorted(indexer.info.layers)
    whole = shares.budget(length, layers)
    found: dict[str, Any] = {"dense": topmass.DenseSelector()}
    for layer in layers:
        own = whole.budget(layer) if isinstance(whole, Plan) else whole
        plan = Plan(layers={**dict.fromkeys(layers), layer: own})
        found[f"indexer layer {layer}"] = indexer.selector(budget=plan)
        found[f"oracle layer {layer}"] = topmass.OracleSelector(budget=plan)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One run: what is measured on how many haystacks of which tasks.

    Attributes:
        part: Name of the part; the run lies in `PART-LENGTH`.
        length: Tokens of prompt and answer.
        tasks: Names.
        seed: Seed of the samples.
        selectors: By label.
        counts: Haystacks per task by label.
        facts: What else identifies the run.
    """

    part: str
    length: int
    tasks: tuple[str, ...]
    seed: int
    selectors: Mapping[str, Any]
    counts: Mapping[str, int]
    facts: Mapping[str, Any]

    def config(self) -> dict[str, Any]:
        """What must not change when the run resumes."""
        described = {
            name: dict(s.settings) if isinstance(s, Infeasible) else s.config() for name, s in self.selectors.items()
        }
        fixed = {"part": self.part, "length": self.length, "tasks": self.tasks, "haystacks": dict(self.counts)}
        return {**fixed, "selectors": described, **self.facts}


class Bench:
    """The model, the processes that write samples, and the clock."""

    def __init__(self, args: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
        self.args, self.pool, self.begin = args, pool, time.time()
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = None

    def load(self) -> None:
        """Load the model, once the pool has its first jobs."""
        if self.model is None:
            self.model, tokenizer = load_reference(device=self.device)
            self.known = Known(tokenizer)
            self.hash = weights_hash(self.model)

    def tick(self, *_: Any) -> None:
        """Stop when the time is over."""
        if time.time() - self.begin > self.args.seconds:
            raise TimeoutError

    def measure(self, work: Work) -> bool:
        """Do what is left of one run; whether it is complete."""
        path = self.args.out / f"{work.part}-{work.length}"
        if path.is_dir():
            print(f"{path} is complete", flush=True)
            return True
        library = Library(self.pool, seed=work.seed)
        jobs = list(blocks(work.length, list(work.counts.values()), self.args.batch_tokens))
        for lo, hi in jobs:
            for task in work.tasks:
                library.order(task, work.length, lo, hi - lo)
        self.load()
        manifest = make_manifest(
            "eval", work.config(), model="reference", weights_hash=self.hash, seeds={"tasks": work.seed},
            device=describe_device(self.model),
        )  # fmt: skip
        with Run.open(path, manifest) as run:
            try:
                for lo, hi in jobs:
                    self._block(work, library, run, lo, hi)
                run.finish()
                return True
            except TimeoutError:
                print(f"{path}: out of time after {len(run.rows)} rows; the same command resumes", flush=True)
        if self.args.close:
            finish_partial(path, stopped=f"out of time after {len(run.rows):,} rows")
        return self.args.close

    def _block(self, work: Work, library: Library, run: Run, lo: int, hi: int) -> None:
        start = time.time()
        chosen = {name: s for name, s in work.selectors.items() if work.counts[name] >= hi}
        waited = 0.0
        for task in work.tasks:
            keys = [(task, work.length, work.seed, h, 0, name) for h in range(lo, hi) for name in chosen]
            if all(map(run.done, keys)):
                continue
            self.tick()
            asked = time.time()
            samples = library.take(self.known, task, work.length, lo, hi - lo)
            waited += time.time() - asked
            evaluate_samples(
                self.model,
                self.known,
                samples,
                selectors=chosen,
                batch_tokens=work.length * len(samples),
                run=run,
                progress=self.tick,
            )
        rows = [r for r in run.rows if lo <= r["haystack"] < hi]
        print(
            f"{work.part} {work.length} haystacks {lo}..{hi - 1}, {time.time() - start:.1f} s, {waited:.1f} s of them for text: "
            + ", ".join(f"{name} {100 * score:.1f}" for name, score in means(rows).items()),
            flush=True,
        )


def means(rows: Iterable[Mapping[str, Any]], tasks: Sequence[str] | None = None) -> dict[str, float]:
    """Macro average by label."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        if r["score"] is not None and (tasks is None or r["task"] in tasks):
            scores[r["config"]][r["task"]].append(r["score"])
    return {
        name: sum(sum(s) / len(s) for s in by_task.values()) / len(by_task)
        for name, by_task in scores.items()
    }  # fmt: skip


# --- parts -------------------------------------------------------------------------------------------------------------


def choose(args: argparse.Namespace, bench: Bench) -> int:
    """Compare candidate budgets on the development seed; write the best one's name."""
    indexer = named_indexer(args.indexer)
    n = args.n or 10
    done = []
    for length in args.lengths or (4096, 16384):
        selectors = candidates(indexer, args.candidates, length)
        # baselines are far away: few haystacks tell
        counts = {name: n if name.split()[0] in ("dense", "indexer") else min(n, 4) for name in selectors}
        work = Work(
            part="choose", length=length, tasks=tuple(args.tasks or CANDIDATE_TASKS), seed=args.dev_seed, selectors=selectors,
            counts=counts, facts={"indexer": indexer.digest},
        )  # fmt: skip
        done.append(bench.measure(work))
    if not all(done):
        return 3
    found = ranked(load_parts(args.out, "choose"), args.candidates)
    for entry in found:
        print(json.dumps(entry))
    good = [c for c in found if c["feasible"]]
    if not good:
        print(
            "no candidate of at most 1/16 leaves streaming, random and the untrained indexer 15 points behind; give other --candidates"
        )
        return 1
    best = min(c["loss"] for c in good)
    chosen = min((c for c in good if c["loss"] <= best + NEAR), key=lambda c: (c["keys"], c["loss"]))
    choice = {"budget": chosen["budget"], "seed": args.dev_seed, "indexer": indexer.digest, "candidates": found}
    (args.out / "choice.json").write_text(json.dumps(choice, indent=2) + "\n")
    print(f"chosen: {chosen['budget']}")
    return 0


def ranked(runs: Sequence[LoadedRun], specs: Sequence[str]) -> list[dict[str, Any]]:
    """What every candidate loses, pooled over the lengths that ran, and how far the baselines are."""
    found = []
    for spec in specs:
        losses: dict[str, list[float]] = defaultdict(list)
        keys = []
        for run in runs:
            few = {r["haystack"] for r in run.records if r["config"] == f"random {spec}"}
            score = means(run.records)
            paired = means(r for r in run.records if r["haystack"] in few)
            losses["indexer"].append(score["dense"] - score.get(f"indexer {spec}", float("-inf")))
            for name in ("streaming", "random", "untrained"):
                losses[name].append(paired["dense"] - paired.get(f"{name} {spec}", float("nan")))
            read = [r["keys_read_mean"] for r in run.records if r["config"] == f"indexer {spec}"]
            length = run.manifest["config"]["length"]
            keys.append(sum(read) / len(read) / length if read and None not in read else float("inf"))
        mean = {name: sum(x) / len(x) for name, x in losses.items()}
        far = min(mean[name] for name in ("streaming", "random", "untrained"))
        found.append(
            {"budget": spec, "loss": mean["indexer"], "keys": sum(keys) / len(keys), "nearest_baseline": far,
             "feasible": far >= FAR and Shares.parse(spec).mean <= LARGEST}
        )  # fmt: skip
    return found


def chosen_budget(args: argparse.Namespace) -> Shares:
    """The budget that was asked for, or the one that `choose` wrote."""
    if args.budget:
        return Shares.parse(args.budget)
    path = args.out / "choice.json"
    if not path.is_file():
        sys.exit(f"There is no {path}; run the part `choose` first, or give --budget.")
    return Shares.parse(json.loads(path.read_text())["budget"])


def test(args: argparse.Namespace, bench: Bench) -> int:
    """The published comparison, on seeds that chose nothing."""
    indexer, shares = named_indexer(args.indexer), chosen_budget(args)
    if args.seed == args.dev_seed:
        sys.exit("The test seed chose the budget; give another --seed.")
    done = []
    for length in args.lengths or (*LENGTHS, LONG):
        n = args.n or (300 if length in LENGTHS else 100)
        near, far = min(n, args.n_baselines), min(n, args.n_far)
        selectors = roles(indexer, shares, length)
        counts = {name: far if name in FAR_ROLES else near for name in selectors} | {"dense": n, "indexer": n}
        facts = {"indexer": indexer.digest, "budget": str(shares), "trained_length": trained_length(indexer)}
        work = Work(
            part="test", length=length, tasks=tuple(args.tasks or list_tasks()), seed=args.seed, selectors=selectors, counts=counts,
            facts=facts,
        )  # fmt: skip
        done.append(bench.measure(work))
    return 0 if all(done) else 3


def trained_length(indexer: topmass.Indexer) -> int:
    """Tokens of the longest sequence that the indexer was trained on; 0 if it does not say."""
    return int(indexer.info.recipe.get("length") or 0)


def layers(args: argparse.Namespace, bench: Bench) -> int:
    """One sparse layer at a time, on the tasks that keep a gap."""
    indexer, shares = named_indexer(args.indexer), chosen_budget(args)
    n = args.n or 50
    done = []
    for length in args.lengths or LENGTHS:
        selectors = one_layer(indexer, shares, length)
        facts = {"indexer": indexer.digest, "budget": str(shares)}
        work = Work(
            part="layers", length=length, tasks=tuple(args.tasks or COUNTING), seed=args.seed, selectors=selectors,
            counts=dict.fromkeys(selectors, n), facts=facts,
        )  # fmt: skip
        done.append(bench.measure(work))
    return 0 if all(done) else 3


# --- report ------------------------------------------------------------------------------------------------------------


def load_parts(out: Path, part: str) -> list[LoadedRun]:
    """Complete runs of a part, by length."""
    found = [load_run(p) for p in out.glob(f"{part}-*") if p.is_dir() and not p.name.endswith((".partial", ".old"))]
    return sorted(found, key=lambda run: run.manifest["config"]["length"])


class Found:
    """Runs of one part: intervals by label, over all tasks that ran or some of them."""

    def __init__(self, runs: Sequence[LoadedRun], tasks: Sequence[str] | None = None) -> None:
        # figures need packages that a machine which only measures may lack
        from topmass.report.aggregate import EvalTable, Setting

        kept = [r.records for r in runs]
        if tasks is not None:
            kept = [[row for row in rows if row["task"] in tasks] for rows in kept]
        self.table = EvalTable([replace(run, records=rows) for run, rows in zip(runs, kept, strict=True)])
        self.lengths = self.table.lengths
        self.tasks = self.table.tasks
        self.rows = {n: [r for rows in kept for r in rows if r["length"] == n] for n in self.lengths}
        self.setting: dict[tuple[int, str], Setting] = {}
        for n, rows in self.rows.items():
            for r in rows:
                if r["status"] == "ok":
                    self.setting.setdefault((n, r["config"]), Setting.of(r))
        self.labels = list(dict.fromkeys(label for _, label in self.setting))

    def difference(self, a: str, b: str, lengths: Sequence[int], task: str | None = None) -> Interval | None:
        """How much higher `a` scores than `b` on their common samples; `None` if one did not run at one of the lengths."""
        if any((n, label) not in self.setting for n in lengths for label in (a, b)):
            return None
        terms = {n: {self.setting[n, a]: 1.0, self.setting[n, b]: -1.0} for n in lengths}
        return self.table.contrast(terms, task)

    def score(self, label: str, length: int) -> Interval | None:
        """Macro average of a label at a length."""
        cell = self.table.cell(length, self.setting[length, label]) if (length, label) in self.setting else None
        return cell.score if cell else None

    def haystacks(self, label: str, length: int) -> int:
        """Haystacks of the task that has the fewest."""
        found: dict[str, set[int]] = {task: set() for task in self.tasks}
        for r in self.rows[length]:
            if r["config"] == label:
                found[r["task"]].add(r["haystack"])
        return min(map(len, found.values()))

    def changed(self, label: str, task: str) -> tuple[int, int]:
        """On how many samples of a task a label scores otherwise than dense attention, and how many they are, all lengths together."""
        scores: dict[str, dict[tuple[int, int, int], float]] = {"dense": {}, label: {}}
        for n, rows in self.rows.items():
            for r in rows:
                if r["task"] == task and r["config"] in scores and r["score"] is not None:
                    scores[r["config"]][n, r["haystack"], r["question_id"]] = r["score"]
        common = scores["dense"].keys() & scores[label].keys()
        return sum(scores["dense"][i] != scores[label][i] for i in common), len(common)

    def keys(self, label: str, length: int) -> float:
        """Achieved keys per query."""
        cell = self.table.cell(length, self.setting[length, label])
        return cell.keys if cell else float("nan")


def points(interval: Interval | None) -> str:
    """An interval in points."""
    if interval is None:
        return "not run"
    # 0.0 is added so that nothing reads -0.0
    point, low, high = (round(100 * x, 1) + 0.0 for x in (interval.point, interval.low, interval.high))
    return f"{point:.1f} [{low:.1f}, {high:.1f}]"


def pooled(lengths: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Every length, and the three of the published comparison together."""
    together = [n for n in lengths if n in LENGTHS] or list(lengths)
    return [(f"{n:,}", [n]) for n in lengths] + ([("together", together)] if len(together) > 1 else [])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score_table(nine: Found, ten: Found) -> str:
    rows = []
    for n in ten.lengths:
        for label in ten.labels:
            if (n, label) not in ten.setting:
                continue
            losses = [
                "" if label == "dense" else points(f.difference("dense", label, [n]) if f.setting else None)
                for f in (nine, ten)
            ]
            per_task = ten.haystacks(label, n)
            recall = ten.table.recall(n, ten.setting[n, label])
            rows.append(
                [f"{n:,}", label, f"{ten.keys(label, n):,.0f}", f"{100 * ten.keys(label, n) / n:.1f} %", str(per_task),
                 points(nine.score(label, n)), *losses, "" if recall is None or label == "dense" else f"{recall:.2f}"]
            )  # fmt: skip
    header = ["context", "keys by", "achieved keys", "of the context", "haystacks a task", "nine tasks (%)", "points below dense, nine tasks", "ten tasks", "support recall"]  # fmt: skip
    return table(header, rows)


STEPS = (
    ("oracle: dense minus oracle", "dense", "oracle"),
    ("indexer: oracle minus indexer", "oracle", "indexer"),
    (f"sharing by {SHARED}: indexer minus shared", "indexer", "indexer shared"),
    ("dense minus indexer", "dense", "indexer"),
    ("dense minus shared", "dense", "indexer shared"),
)


def gap_table(nine: Found, ten: Found, steps: Sequence[tuple[str, str, str]] = STEPS) -> str:
    columns = pooled(ten.lengths)
    rows = [
        [gap, tasks, *(points(f.difference(a, b, lengths)) for _, lengths in columns)]
        for gap, a, b in steps
        for tasks, f in (("nine", nine), ("ten", ten))
    ]
    return table(["gap", "tasks", *(name for name, _ in columns)], rows)


SERVED = ("oracle", "indexer", "indexer shared")


def unchanged(found: Found, task: str) -> bool:
    """Whether every common sample of a task scores as with dense attention, whoever chooses its keys."""
    losses = [found.difference("dense", label, [n], task) for label in SERVED for n in found.lengths]
    return all(loss is None or (loss.point == 0 and "bootstrap" not in loss.method) for loss in losses)


def task_table(found: Found, tasks: Sequence[str], labels: Sequence[str]) -> list[str]:
    """What some labels lose on some tasks; empty if none of them ran."""
    columns = pooled(found.lengths)
    rows = [
        [f"`{task}`", label, *(points(found.difference("dense", label, lengths, task)) for _, lengths in columns)]
        for task in tasks
        for label in labels
        if label in found.labels
    ]
    return [table(["task", "keys by", *(name for name, _ in columns)], rows)] if rows else []


def task_parts(found: Found) -> list[str]:
    """A table of the tasks where some sample scores otherwise than with dense attention, and the names of the rest."""
    same = [task for task in found.tasks if unchanged(found, task)]
    parts = task_table(found, [task for task in found.tasks if task not in same], SERVED)
    if same:
        n = min(found.haystacks("indexer", length) for length in found.lengths)
        # two-sided 95 %, as topmass.results.stats has it
        bound = 100 * 3.84 / (n + 3.84)
        parts.append(
            f"On {sentence(same)} every sample scores as with dense attention, for the three alike: with {n} haystacks the indexer's difference lies within "
            f"{bound:.1f} points at each length."
        )
    return parts


def layer_parts(single: Sequence[LoadedRun], losing: Sequence[str], out: Path, *, budget: str = "") -> list[str]:
    """What one sparse layer loses, or how to find out; `budget` is one that no `choice.json` names."""
    if not single:
        if not losing:
            return []
        command = f"PYTHONPATH=src python recipes/indexer/gaps.py layers --out {out} --tasks {' '.join(losing)}"
        command += f" --budget {budget}" * bool(budget)
        return [f"Not measured yet: which layer it is on {sentence(losing)}. Run\n\n```\n{command}\n```"]
    found = Found(single)
    columns = pooled(found.lengths)
    rows = [
        [f"`{task}`", label, *(points(found.difference("dense", label, lengths, task)) for _, lengths in columns)]
        for task in found.tasks
        for label in found.labels
        if label != "dense"
    ]
    counted = " and ".join(str(c) for c in sorted({found.haystacks("dense", n) for n in found.lengths}))
    return [
        f"Each row makes one full-attention layer sparse, with the share of the budget that it has in the tables above; {counted} haystacks a task and length.",
        *(layer_words(found, task) for task in found.tasks),
        *([layers_together(found)] if len(found.tasks) > 1 else []),
        table(["task", "sparse", *(name for name, _ in columns)], rows),
    ]


def layer_losses(found: Found, task: str | None = None) -> dict[str, tuple[str, Interval]]:
    """Label and loss of the indexer in each layer alone, by the layer's name; all lengths together."""
    together = pooled(found.lengths)[-1][1]
    losses = {label: found.difference("dense", label, together, task) for label in found.labels}
    return {
        f"layer {label.split()[-1]}": (label, loss)
        for label, loss in losses.items()
        if label.startswith("indexer layer ") and loss is not None
    }


def layer_words(found: Found, task: str) -> str:
    """Which layer loses points on a task, in a sentence."""
    losses = layer_losses(found, task)
    real = [f"{layer} ({points(loss)})" for layer, (_, loss) in losses.items() if loss.low > 0]
    others = ", ".join(f"{layer} {points(loss)}" for layer, (_, loss) in losses.items() if loss.low <= 0)
    counts = {layer: found.changed(label, task) for layer, (label, _) in losses.items()}
    told = ", ".join(f"with {layer} sparse on {n} of {of}" for layer, (n, of) in counts.items())
    return (
        f"`{task}`: with the indexer "
        + (f"the loss is in {sentence(real, ticks=False)}" if real else "no single layer's loss is told from zero")
        + (f"; not told from zero: {others}" if real and others else f" ({others})" if others else "")
        + f". Samples that score otherwise than with dense attention: {told}."
    )


def layers_together(found: Found) -> str:
    """The same over all tasks that ran, where the samples are more."""
    losses = layer_losses(found)
    told = ", ".join(f"{layer} loses {points(loss)}" for layer, (_, loss) in losses.items())
    most = max(losses, key=lambda layer: losses[layer][1].point)
    together = pooled(found.lengths)[-1][1]
    apart = [
        f"that is {points(found.difference(label, losses[most][0], together))} points more in {most} than in {layer}"
        for layer, (label, _) in losses.items()
        if layer != most
    ]
    return f"{sentence(found.tasks)} together: {told}; on the same samples {' and '.join(apart)}."


def sentence(names: Sequence[str], *, ticks: bool = True) -> str:
    """Names as a list in words."""
    marked = [f"`{n}`" if ticks else n for n in names]
    return ", ".join(marked[:-1]) + f" and {marked[-1]}" if len(marked) > 1 else "".join(marked)


def real_gaps(ten: Found) -> list[str]:
    """Tasks on which the indexer's loss against dense attention is above zero with its whole interval, all lengths together or at one."""
    found = []
    for task in ten.tasks:
        losses = [ten.difference("dense", "indexer", lengths, task) for _, lengths in pooled(ten.lengths)]
        if any(loss is not None and loss.low > 0 for loss in losses):
            found.append(task)
    return found


def devices(runs: Sequence[LoadedRun]) -> str:
    """Where each length ran; more than one device where a run was resumed on another."""
    by_device: dict[str, list[str]] = {}
    for run in runs:
        used = [a["device"] for a in run.manifest.get("attempts", [])] or [run.manifest["device"]]
        name = " and ".join(dict.fromkeys(d.partition(",")[0] for d in used))
        by_device.setdefault(name, []).append(f"{run.manifest['config']['length']:,}")
    return "; ".join(f"{name} ({', '.join(lengths)} tokens)" for name, lengths in by_device.items())


def short_parts(
    runs: Sequence[LoadedRun],
    nine: Found,
    ten: Found,
    found: Sequence["Check"],
    *,
    single: Sequence[LoadedRun] = (),
    uniform: Sequence[LoadedRun] = (),
    out: Path | None = None,
) -> list[str]:
    """What was to be shown and whether it holds, and the rest of the answer in a few lines."""
    name, together = pooled(ten.lengths)[-1]
    where = sentence([f"{n:,}" for n in together], ticks=False) + " tokens" + " together" * (name == "together")

    def both(a: str, b: str, lengths: Sequence[int]) -> str:
        return f"{points(nine.difference(a, b, lengths))} points on nine tasks and {points(ten.difference(a, b, lengths))} on ten"

    keys = ", ".join(f"{ten.keys('indexer', n):,.0f}" for n in ten.lengths)
    by_length = "; ".join(f"{n:,}: {points(nine.difference('dense', 'indexer', [n]))}" for n in ten.lengths)
    lines = [
        f"**What it loses.** {both('dense', 'indexer', together)} against dense attention ({where}), reading {keys} keys per query. By length, nine tasks: {by_length}.",
    ]  # fmt: skip
    if uniform:
        lines.append(f"**With {LARGEST} in every layer** {uniform_words(uniform)}")
    losing = real_gaps(ten)
    alone = f" {layers_together(Found(single))}" if single and len(Found(single).tasks) > 1 else ""
    lines.append(
        f"**Where.** A real gap, its whole interval above zero at one length or together, remains on {sentence(losing)} and on no other task of the {len(ten.tasks)}."
        + (f" With one sparse layer at a time, on {alone.strip()}" if alone else "")
        if losing
        else "**Where.** On no task does the whole interval of the indexer's loss lie above zero."
    )
    if ten.difference("indexer", "indexer shared", together) is not None:
        worst = {t: ten.difference("indexer", "indexer shared", together, t) for t in ten.tasks}
        where_lost = [f"`{t}` {points(i)}" for t, i in worst.items() if i is not None and i.low > 0]
        lines.append(
            f"**Sharing.** One selection for {SHARED} queries loses another {both('indexer', 'indexer shared', together)}: {', '.join(where_lost)}."
        )
    failed = [c.name for c in found if not c.holds]
    lines.append(
        f"**[Checks](#checks) with this budget.** {len(found) - len(failed)} of {len(found)} hold"
        + (f"; not: {'; '.join(failed)}." if failed else ".")
    )
    return [promise_table(runs, nine, found, uniform, out), "\n".join(f"- {line}" for line in lines)]


def promise_table(
    runs: Sequence[LoadedRun], nine: Found, found: Sequence["Check"], uniform: Sequence[LoadedRun], out: Path | None
) -> str:
    """What was to be shown, what came out, and whether it holds."""
    shares = Shares.parse(runs[0].manifest["config"]["budget"])
    enough, near, ten, beyond = (
        next(c for c in found if c.name.startswith(name))
        for name in (f"{SAMPLES} samples", "indexer within", "the same, ten", "the same at one")
    )
    at = beyond.name.partition(": ")[2]
    kept = "yes" if max(shares.shares) <= LARGEST else "in the mean, not in every layer"
    weakest = min(
        ((loss.point, label, loss) for label in FAR_ROLES[:3] for _, lengths in pooled(nine.lengths) if (loss := nine.difference("dense", label, lengths))),
        default=None,
    )  # fmt: skip
    far = [c for c in found if " points under dense, " in c.name]
    rows = [
        ["at most 1 point below dense, its interval ending at 2 or less; all lengths together, nine tasks", near.detail, answer(near.holds)],
        ["the same on ten tasks", ten.detail, answer(ten.holds)],
        ["the same at one length twice beyond its training, nine tasks", f"{int(at):,} tokens: {beyond.detail}" if at else beyond.detail, answer(beyond.holds)],
        [f"with a budget of at most {LARGEST} of the context", f"{', '.join(map(str, shares.shares))} by layer, mean {shares.mean}", kept if shares.mean <= LARGEST else "no"],
    ]  # fmt: skip
    if uniform:
        there = checks(uniform, Found(uniform, NINE), Found(uniform))
        rows += [
            [f"the same with {LARGEST} in every layer, {tasks} tasks", c.detail, answer(c.holds)]
            for tasks, prefix in (("nine", "indexer within"), ("ten", "the same, ten"))
            for c in there
            if c.name.startswith(prefix)
        ]
    rows += [
        ["with the same budget streaming, random and an untrained indexer each at least 15 points below dense, at each length", f"nearest: {weakest[1]}, {points(weakest[2])}" if weakest else "not run", answer(all(c.holds for c in far))],
        [f"at least {SAMPLES} samples a task and length", enough.detail, answer(enough.holds)],
        *(cost_rows(out) if out else []),
    ]  # fmt: skip
    return table(["to be shown", "measured", "holds"], rows)


def answer(holds: bool) -> str:
    return "yes" if holds else "**no**"


def cost_rows(out: Path) -> list[list[str]]:
    """What distillation costs, as far as it was measured."""
    found = {p.stem: json.loads(p.read_text()) for p in (out / f"{n}.json" for n in ("memory", "two-gpus", "kill")) if p.is_file()}  # fmt: skip
    rows = []
    if about := found.get("memory"):
        rows.append(
            [f"distillation step of a model of the shape `{about['shape']}` at {about['tokens']:,} tokens: at most {about['target']} times the dense forward",
             f"{about['ratio']:.2f} times, peak {max(m['peak_gib'] for m in about['modes'].values()):.1f} GiB", answer(about["ratio"] <= about["target"])]
        )  # fmt: skip
    for name, what in (
        ("two-gpus", "two GPUs have the loss curve of one, within noise"),
        ("kill", "a training that is killed and resumed ends like one left alone"),
    ):
        if about := found.get(name):
            judged = [c for c in about["checks"] if c.startswith(("PASS", "FAIL"))]
            rate = f"; {about['throughput_ratio']:.2f} times the throughput" if "throughput_ratio" in about else ""
            rows.append([what, judged[-1].partition(": ")[2] + rate, answer(not any(c.startswith("FAIL") for c in judged))])  # fmt: skip
    return rows


def uniform_words(runs: Sequence[LoadedRun]) -> str:
    """What the largest permitted budget in every layer loses, with and without hindsight."""
    found = {"nine": Found(runs, NINE), "ten": Found(runs)}
    together = pooled(found["ten"].lengths)[-1][1]

    def shown(a: str, b: str) -> str:
        nine, ten = (points(f.difference(a, b, together)) for f in found.values())
        return f"{nine} points (nine tasks) and {ten} (ten)"

    return f"the indexer loses {shown('dense', 'indexer')}, the oracle {shown('dense', 'oracle')}, and the indexer against the oracle {shown('oracle', 'indexer')}."


def uniform_parts(runs: Sequence[LoadedRun]) -> list[str]:
    """The same test with the largest permitted budget in every layer."""
    nine, ten = Found(runs, NINE), Found(runs)
    failed = [c for c in checks(runs, nine, ten) if not c.holds]
    counted = sentence(sorted({f"{ten.haystacks('indexer', n)}" for n in ten.lengths}), ticks=False)
    far = sentence(sorted({f"{ten.haystacks('random', n)}" for n in ten.lengths}), ticks=False)
    steps = [step for step in STEPS if step[2] != "indexer shared"]
    return [
        f"The same samples, indexer and selectors, with {LARGEST} of the context in each full-attention layer instead of {LARGEST} in the mean; {counted} haystacks a task and length, baselines {far}. "
        f"{devices(runs)}. [Scores and every check](../../benchmarks/{runs[0].path.parent.name}/gaps.md).",
        *stopped(runs),
        gap_table(nine, ten, steps),
        *task_table(ten, real_gaps(ten), SERVED[:2]),
        "Checks that fail with this budget:\n\n" + "\n".join(f"- {c}" for c in failed) if failed else "All checks hold with this budget.",
    ]  # fmt: skip


def stopped(runs: Sequence[LoadedRun]) -> list[str]:
    """A sentence on runs that were published before they were complete."""
    cut = [f"{r.manifest['config']['length']:,} tokens: {r.manifest['stopped']}" for r in runs if r.manifest.get("stopped")]  # fmt: skip
    return [f"Published incomplete: {'; '.join(cut)}."] if cut else []


def choice_parts(runs: Sequence[LoadedRun]) -> list[str]:
    """The candidates for the budget on the development seed."""
    found = Found(runs)
    specs = [label.removeprefix("indexer ") for label in found.labels if label.startswith("indexer ")]
    lengths = found.lengths
    rows = [
        [spec, f"{Shares.parse(spec).mean}", points(found.difference("dense", f"indexer {spec}", lengths)),
         *(points(found.difference("dense", f"{name} {spec}", lengths)) for name in FAR_ROLES[:3])]
        for spec in specs
    ]  # fmt: skip
    counted = " and ".join(f"{found.haystacks('dense', n)} haystacks at {n:,}" for n in lengths)
    path = runs[0].path.parent / "choice.json"
    chosen = json.loads(path.read_text())["budget"] if path.is_file() else None
    return [
        f"Points below dense attention on the development seed, {sentence(found.tasks)}, {counted} together; baselines on fewer."
        + (
            f" Of the candidates within {100 * NEAR:.1f} points of the best, {chosen} read the fewest keys."
            if chosen
            else ""
        ),
        table(["budget by layer", "mean", "indexer", *FAR_ROLES[:3]], rows),
    ]


@dataclass(frozen=True, slots=True)
class Check:
    """One criterion, whether it holds, and the numbers."""

    name: str
    holds: bool
    detail: str

    def __str__(self) -> str:
        return f"{'PASS' if self.holds else 'FAIL'}  {self.name}: {self.detail}"


def checks(runs: Sequence[LoadedRun], nine: Found, ten: Found) -> list[Check]:
    """What must hold of the shipped indexer."""
    config = runs[0].manifest["config"]
    shares = Shares.parse(config["budget"])
    together = pooled(ten.lengths)[-1][1]
    found = [
        Check("the three lengths ran", set(LENGTHS) <= set(ten.lengths), f"{ten.lengths}"),
        Check(
            "budget at most 1/16 of the context, mean over the full-attention layers",
            shares.mean <= LARGEST,
            f"{shares}: mean {shares.mean}, largest {max(shares.shares)}",
        ),
        _fresh(runs),
        _enough(ten),
    ]  # fmt: skip
    found += [_far(nine, name, label, lengths) for name, lengths in pooled(ten.lengths) for label in FAR_ROLES[:3]]
    found.append(
        _near(nine, f"indexer within 1 point of dense at {', '.join(map(str, together))}, nine tasks", together)
    )
    found.append(_near(ten, "the same, ten tasks", together))
    trained = int(config.get("trained_length") or 0)
    beyond = [n for n in ten.lengths if trained and n >= 2 * trained]
    name = f"the same at one length twice beyond the {trained} trained at"
    tries = [_near(nine, f"{name}: {n}", [n]) for n in beyond]
    found.append(next((c for c in tries if c.holds), tries[0] if tries else Check(name, False, "no such length ran")))
    return found


def _fresh(runs: Sequence[LoadedRun]) -> Check:
    dev = {s for run in runs for s in [run.manifest["config"].get("dev_seed")] if s is not None}
    test = {run.manifest["seeds"]["tasks"] for run in runs}
    path = runs[0].path.parent / "choice.json"
    if path.is_file():
        dev.add(json.loads(path.read_text())["seed"])
    name = "budget chosen on other seeds"
    if not dev and Shares.parse(runs[0].manifest["config"]["budget"]).shares == (LARGEST,):
        return Check(name, True, f"{LARGEST} is the bound itself, chosen on no sample")
    return Check(name, bool(dev) and not dev & test, f"chosen on {sorted(dev)}, tested on {sorted(test)}")


def _enough(found: Found) -> Check:
    counts = [
        sum(r["config"] == label and r["task"] == task for r in found.rows[n])
        for n in found.lengths
        if n in LENGTHS
        for task in found.tasks
        for label in ("dense", "indexer")
    ]
    least = min(counts, default=0)
    return Check(f"{SAMPLES} samples a task and length, dense and indexer", least >= SAMPLES, f"{least}")


def _far(found: Found, name: str, label: str, lengths: Sequence[int]) -> Check:
    loss = found.difference("dense", label, lengths)
    return Check(
        f"{label} at least 15 points under dense, {name}", loss is not None and loss.point >= FAR, points(loss)
    )


def _near(found: Found, name: str, lengths: Sequence[int]) -> Check:
    loss = found.difference("dense", "indexer", lengths)
    return Check(name, loss is not None and loss.point <= POINT and loss.high <= HIGH, points(loss))


def report(args: argparse.Namespace) -> int:
    """Print tables and checks, and write them."""
    runs = load_parts(args.out, "test")
    if not runs:
        sys.exit(f"There is no complete run test-LENGTH in {args.out}; run the part `test` first.")
    nine, ten = Found(runs, NINE), Found(runs)
    found = checks(runs, nine, ten)
    config = runs[0].manifest["config"]
    single = load_parts(args.out, "layers")
    uniform = load_parts(args.uniform or args.out.with_name(f"{args.out.name}-uniform"), "test")
    backends = sorted({r["backend"] for run in runs for r in run.records if r["config"] != "dense" and r["backend"]})
    note = (
        f"Budget: {config['budget']} of the context. {devices(runs)}; bfloat16, begun {runs[0].manifest['started'][:10]}. Intervals resample haystacks. "
        f"Sparse attention ran on the backend {sentence(backends)}; what a kernel costs beside reference arithmetic, the [fourth gap](../../docs/concepts/gaps.md), is measured with [whole models](../../docs/results/transformers.md)."
    )
    parts = [
        "## In short",
        f"What the indexer that ships with the package loses on the bundled model, in points of score below the same model with dense attention, with paired 95 % intervals. "
        f"`{TENTH}` came after the nine tasks over which the average was defined, so it counts in the ten only.",
        *short_parts(runs, nine, ten, found, single=single, uniform=uniform, out=args.out),
        note,
        *stopped(runs),
        "## Gaps",
        "Points, by context. Each figure is taken on the samples that its two sides share: those with the oracle or the shared selection rest on fewer haystacks, so the "
        "steps add up to dense minus indexer only nearly. A negative gap gains.",
        gap_table(nine, ten),
    ]
    if uniform:
        parts += [f"## {LARGEST} in every layer", *uniform_parts(uniform)]
    parts += ["## Points below dense, by task", *task_parts(ten)]
    unnamed = "" if (args.out / "choice.json").is_file() else config["budget"]
    if layered := layer_parts(single, real_gaps(ten), args.out, budget=unnamed):
        parts += ["## One sparse layer, the others dense: points below dense", *layered]
    if chosen := load_parts(args.out, "choose"):
        parts += ["## How the budget was chosen", *choice_parts(chosen)]
    parts += [
        "## Scores",
        'A query attends to itself and to what comes before it, so dense attention reads half of the context in the mean. The pooled selector takes groups of 16 keys; "previous layer" '
        "takes the oracle's keys of the full-attention layer before, and in the first one the oracle's own.",
        score_table(nine, ten),
        "## Checks",
        "\n".join(f"- {c}" for c in found),
    ]
    text = "\n\n".join(parts) + "\n"
    (args.out / "gaps.md").write_text(text)
    print(text)
    return 0 if all(c.holds for c in found) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["choose", "test", "layers", "report"])
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs")
    parser.add_argument(
        "--n", type=int, help="haystacks a task and length, instead of the published number (test: 300, at 32K 100)"
    )
    parser.add_argument("--n-baselines", type=int, default=100, help="of these for the oracle and the shared selection")
    parser.add_argument(
        "--n-far", type=int, default=50, help="of these for streaming, random, untrained, pooled, previous layer"
    )
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--uniform", type=Path, help="runs with 1/16 in every layer, for the report (OUT-uniform)")
    parser.add_argument("--budget", help="such as 1/16, or 1/64,7/64 by layer; instead of what `choose` wrote")
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES)
    parser.add_argument("--seed", type=int, default=TEST_SEED)
    parser.add_argument("--dev-seed", type=int, default=DEV_SEED)
    parser.add_argument(
        "--close", action="store_true", help="out of time, publish what there is instead of resuming later"
    )
    common_options(parser)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "report":
        return report(args)
    with ProcessPoolExecutor(args.workers) as pool:
        try:
            return {"choose": choose, "test": test, "layers": layers}[args.part](args, Bench(args, pool))
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
