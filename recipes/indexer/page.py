"""Write docs/results/indexer.md from result files; no number on it is typed by hand.

    PYTHONPATH=src python recipes/indexer/page.py

What has not been measured is named together with the command that measures it. `verdict.md` beside the ablations, if there is one, is
taken in as it is: what the defaults should be, in words.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from topmass.results import load_run
from topmass.results.stats import Interval, macro_mean

FIRST = "dim-64"
QUESTIONS = {
    "dim": "Width of an index query and key",
    "heads": "Heads",
    "features": "What is projected",
    "pooling": "Keys pooled into one, and how the target pools",
    "sharing": "Trained for a selection that 32 queries share",
    "tokens": "The indexer that ships",
}
NOTES = {
    "dim": "`seed-1` is `dim-64` with another seed: the difference between two trainings that should not differ.",
    "pooling": "Recall is against the oracle at the same key groups, so it is not one scale over the rows; mass and tasks are.",
    "sharing": "Recall is against the oracle that shares as well; mass and tasks are on one scale with the others.",
}
# labels that the first variant ran besides itself -> what they are compared with, and the table they stand in
SERVED: dict[str, tuple[str, Sequence[str]]] = {
    "Budgets: fixed, by mass, by layer": (FIRST, ("budget 1/32", "budget 1/8", "mass 0.8", "mass 0.9", "mass 0.95", "budget 1/64,7/64", "budget 1/32,3/32", "budget 3/32,1/32")),
    "The oracle: head-averaged and per KV head": ("dense", ("oracle", "oracle per KV head", FIRST)),
    "One selection for 32 queries, indexer trained per query": (FIRST, ("shared by 32, mean", "shared by 32, max")),
    "One indexer for neighbouring layers": (FIRST, ("first layer's selection for both",)),
}  # fmt: skip
SERVED_NOTES = {
    "Budgets: fixed, by mass, by layer": "A mass is the indexer's opinion, with twice the fixed budget as its cap. Compare at the achieved keys.",
    "The oracle: head-averaged and per KV head": "An indexer with one collapsed head scores once for all heads and cannot serve a selection per KV head. What that would be worth at "
    "most is the oracle's difference between the two.",
    "One indexer for neighbouring layers": "The selection of the first full-attention layer serves the second too. The indexer was not trained for that: a target over several layers "
    "is not offered, so this is a lower bound.",
}  # fmt: skip

Rows = Mapping[tuple[int, str, int, int], float]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def points(interval: Interval | None) -> str:
    """An interval in points."""
    if interval is None:
        return ""
    # 0.0 is added so that nothing reads -0.0
    point, low, high = (round(100 * x, 1) + 0.0 for x in (interval.point, interval.low, interval.high))
    return f"{point:.1f} [{low:.1f}, {high:.1f}]"


def missing(what: str, command: str) -> str:
    """What stands where nothing has been measured."""
    return f"Not measured yet: {what}. Run\n\n```\n{command}\n```"


class Ablations:
    """Results of ablations.py."""

    def __init__(self, folder: Path) -> None:
        self.about = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        self.runs = {name: load_run(folder / name) for name in self.about}
        self.scores: dict[str, dict[tuple[int, str, int, int], float]] = {}
        self.keys: dict[tuple[str, int], list[float]] = {}
        for run in self.runs.values():
            for r in run.records:
                if r["score"] is not None:
                    sample = (r["length"], r["task"], r["haystack"], r["question_id"])
                    self.scores.setdefault(r["config"], {})[sample] = r["score"]
                    self.keys.setdefault((r["config"], r["length"]), []).append(r["keys_read_mean"])
        self.lengths = sorted({key[0] for rows in self.scores.values() for key in rows})

    def minus(self, a: str, b: str, lengths: Sequence[int]) -> Interval | None:
        """How much higher `a` scores than `b`, on common samples of these lengths."""
        first, second = self.scores.get(a, {}), self.scores.get(b, {})
        strata: dict[str, tuple[list[float], list[tuple[int, int]]]] = {}
        for sample in first.keys() & second.keys():
            length, task, haystack, _ = sample
            if length in lengths:
                values, clusters = strata.setdefault(f"{length} {task}", ([], []))
                values.append(first[sample] - second[sample])
                clusters.append((length, haystack))
        return macro_mean(dict(sorted(strata.items())), bounds=(-1.0, 1.0)) if strata else None

    def mean(self, label: str, length: int) -> str:
        """Macro score at a length, and the achieved keys."""
        by_task: dict[str, list[float]] = {}
        for (n, task, *_), score in self.scores.get(label, {}).items():
            if n == length:
                by_task.setdefault(task, []).append(score)
        if not by_task:
            return ""
        score = sum(sum(s) / len(s) for s in by_task.values()) / len(by_task)
        keys = self.keys[label, length]
        return f"{100 * score:.1f} ({sum(keys) / len(keys):,.0f})"

    def held_out(self, name: str, metric: str) -> str:
        """A metric at every held-out length, mean over layers."""
        by_length = self.about[name]["held_out"]
        values = [[row[metric] for row in rows.values()] for rows in by_length.values()]
        return " / ".join(f"{sum(v) / len(v):.3f}" for v in values)


def ablation_parts(found: Ablations) -> list[str]:
    """Tables of the trained variants and of what needs no training."""
    first = found.about[FIRST]
    sizes = " / ".join(f"{int(n):,}" for n in first["held_out"])
    header = ["variant", f"recall at {sizes}", "mass on the keys", "mass on the oracle's", "KL (nats)", *(f"tasks at {n:,} (keys)" for n in found.lengths), "minus the first, all lengths"]  # fmt: skip
    parts = [
        f"Every variant learned from the same {first['training']['tokens'] / 1e6:.1f} million tokens, sequences of {first['training']['config']['length']:,}, on {first['device']}; the budget is "
        f"{first['budget']} of the context. Recall, mass and KL on held-out text, mean over the full-attention layers. Tasks: macro average in per cent, "
        "achieved keys per query beside; differences in points with paired 95 % intervals. Training and measuring took the processes "
        f"{sum(a['seconds'] for a in found.about.values()) / 60:.0f} minutes in sum.",
    ]  # fmt: skip
    for question, title in QUESTIONS.items():
        names = [n for n in found.about if found.about[n]["question"] == question and n != FIRST]
        if not names:
            continue
        rows = [
            [f"`{n}`", *(found.held_out(n, m) for m in ("recall", "retained_mass", "oracle_mass", "kl")),
             *(found.mean(n, length) for length in found.lengths), "" if n == FIRST else points(found.minus(n, FIRST, found.lengths))]
            for n in (FIRST, *names)
        ]  # fmt: skip
        parts += [f"### {title}", *([NOTES[question]] if question in NOTES else []), table(header, rows)]
    parts += ["### Training tokens", curve(first), "### Trained at one length, tested at others", by_layer(found)]
    for title, (reference, labels) in SERVED.items():
        shown = [n for n in (reference, *labels) if n in found.scores]
        rows = [
            [f"`{n}`", *(found.mean(n, length) for length in found.lengths), "" if n == reference else points(found.minus(n, reference, found.lengths))]
            for n in shown
        ]  # fmt: skip
        head = ["keys by", *(f"tasks at {n:,} (keys)" for n in found.lengths), f"minus `{reference}`, all lengths"]
        parts += [f"### {title}", *([SERVED_NOTES[title]] if title in SERVED_NOTES else []), table(head, rows)]
    return parts


def curve(first: Mapping[str, Any]) -> str:
    """Held-out recall and mass against tokens, from the log of the first variant."""
    at: dict[int, dict[str, float]] = {}
    for row in first["training"]["curve"]:
        at.setdefault(row["step"], {}).update(row)
    tokens = first["training"]["tokens_per_step"]
    rows = [
        [f"{s * tokens / 1e6:.1f}", f"{r['recall']:.3f}", f"{r['retained_mass']:.3f}"] for s, r in sorted(at.items())
    ]
    return table(["million tokens", "recall", "mass on the keys"], rows)


def by_layer(found: Ablations) -> str:
    """Recall of the first variant, and of the indexer that ships, by length and layer."""
    names = [n for n in (FIRST, "shipped") if n in found.about]
    lengths = list(found.about[FIRST]["held_out"])
    rows = []
    for n in names:
        told = found.about[n]["training"]
        trained = told.get("config", told.get("recipe", {})).get("length")
        for layer in found.about[n]["held_out"][lengths[0]]:
            values = [found.about[n]["held_out"][length][layer] for length in lengths]
            rows.append(
                [
                    f"`{n}`",
                    f"{trained:,}",
                    layer,
                    *(f"{v['recall']:.3f} ({v['retained_mass']:.3f} of {v['oracle_mass']:.3f})" for v in values),
                ]
            )
    header = [
        "indexer",
        "longest training sequence",
        "layer",
        *(f"recall (mass of the oracle's) at {int(n):,}" for n in lengths),
    ]
    return table(header, rows)


def cost_parts(found: Mapping[str, Any]) -> list[str]:
    """Memory and speed of distillation."""
    return [
        f"`{found['shape']}` with random weights, one sequence of {found['tokens']:,} tokens, {found['device']}; {found['rounds']} interleaved rounds in one process, medians "
        "with 10th and 90th percentile.",
        table(
            ["", "seconds", "tokens/s", "peak GiB"],
            [[name, f"{r['median']:.2f} [{r['p10']:.2f}, {r['p90']:.2f}]", f"{found['tokens'] / r['median']:,.0f}", f"{r['peak_gib']:.1f}"] for name, r in found["modes"].items()],
        ),
        f"One step of distillation takes {found['ratio']:.2f} times the plain dense forward (target: at most {found['target']}).",
    ]  # fmt: skip


def curve_parts(found: Mapping[str, Any]) -> list[str]:
    """Whether two runs have one loss curve."""
    rows = [[name, f"{r['tokens_per_s']:,.0f}" if r.get("tokens_per_s") else "", f"{r['largest']:.2e}", f"{r['mean']:.2e}"] for name, r in found["runs"].items()]  # fmt: skip
    parts = [found["about"], table(["run", "tokens/s", "largest difference of KL (nats)", "mean difference"], rows)]
    return [*parts, *(f"- {line}" for line in found["checks"])]


def read(path: Path, make: Callable[[Any], list[str]], what: str, command: str) -> list[str]:
    """The parts made of a JSON file, or what is missing."""
    return make(json.loads(path.read_text())) if path.is_file() else [missing(what, command)]


def page(results: Path, ablations: Path) -> str:
    """The whole page."""
    recipe = "PYTHONPATH=src python recipes/indexer"
    parts = [
        "# The reference checkpoint's indexer, measured",
        "Made by `recipes/indexer/page.py` from the files beside [the runs](../../benchmarks); do not edit.",
    ]
    gaps = results / "gaps.md"
    if gaps.is_file():
        parts.append(gaps.read_text().strip())
    else:
        parts += [
            "## Gaps",
            missing(
                "dense attention, oracle, indexer and baselines on the same samples",
                f"{recipe}/gaps.py test --out {results}",
            ),
        ]
    verdict = ablations / "verdict.md"
    parts += ["## What the defaults should be", verdict.read_text().strip()] if verdict.is_file() else []
    parts.append("## Ablations")
    if (ablations / f"{FIRST}.json").is_file():
        parts += ablation_parts(Ablations(ablations))
    else:
        parts.append(missing("variants of the indexer", f"{recipe}/ablations.py run --work WORK --out {ablations}"))
    parts += [
        "## Memory and speed of distillation",
        *read(
            results / "memory.json",
            cost_parts,
            "a model of 9B parameters at 32K",
            f"{recipe}/memory.py --out {results}/memory.json",
        ),
    ]
    parts += [
        "## Two GPUs against one",
        *read(
            results / "two-gpus.json",
            curve_parts,
            "the same training on two GPUs",
            f"{recipe}/two_gpus.py --out {results}/two-gpus.json",
        ),
    ]
    parts += [
        "## Killed and resumed",
        *read(
            results / "kill.json",
            curve_parts,
            "a training that is killed",
            f"{recipe}/kill.py --out {results}/kill.json",
        ),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("benchmarks/indexer"))
    parser.add_argument("--ablations", type=Path, default=Path("benchmarks/indexer-ablations"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/indexer.md"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(args.results, args.ablations))
    print(args.out)


if __name__ == "__main__":
    main()
