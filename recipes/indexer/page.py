"""Write docs/results/indexer.md from result files; no number on it is typed by hand.

    PYTHONPATH=src python recipes/indexer/page.py

What has not been measured is named together with the command that measures it. Every table of the ablations ends with what it tells, worked
out from the same files. `verdict.md` beside the ablations, if there is one, is taken in as it is: what the defaults should be, in words.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from topmass.results import load_run
from topmass.results.stats import Interval, macro_mean

FIRST = "dim-64"
SHARED = 32
# variants by the table they stand in, as ablations.py trains them
QUESTIONS = {
    "Head dim: width of an index query and key": ("dim-16", "dim-32", "dim-128", "seed-1"),
    "Heads: one collapsed head or four": ("heads-4",),
    "Features: the layer's input or its own queries and keys": ("features-qk",),
    "Pooling: keys in groups of 1, 4 and 16": ("kv-4", "kv-16"),
}
NOTES = {
    "Head dim: width of an index query and key": "`seed-1` is `dim-64` with another seed: the difference between two trainings that should not differ.",
    "Pooling: keys in groups of 1, 4 and 16": "A group is scored by one key, the mean of its raw keys. Recall and mass of the oracle are those of the oracle at the same groups, "
    "so recall is not one scale over the rows; mass on the keys and tasks are.",
}  # fmt: skip
POOLED_TARGET, SHARED_TRAINED = ("kv-4", "kv-4-max"), ("q-32-max", "q-32-mean")
SHIPPED = "shipped"
# a fact of the reference checkpoint (eight layers, the fourth and the eighth with full attention) and of causal attention
LAST_LAYER = (
    "This model has two full-attention layers, and the second is its last layer: there the attention of the prompt reaches the answer only through the "
    "prompt's last position, so its selection can hardly matter, and a deeper model may answer this question otherwise."
)
EXPECTED = (FIRST, *(n for names in QUESTIONS.values() for n in names), POOLED_TARGET[1], *SHARED_TRAINED, SHIPPED)


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

    def contrast(self, terms: Mapping[int, Mapping[str, float]]) -> Interval | None:
        """Weighted sum of the scores of several labels on their common samples, mean over tasks and lengths; `None` if there are none."""
        strata: dict[str, tuple[list[float], list[tuple[int, int]]]] = {}
        for n, weights in terms.items():
            rows = [self.scores.get(label, {}) for label in weights]
            for sample in sorted(set.intersection(*(set(r) for r in rows))):
                length, task, haystack, _ = sample
                if length == n:
                    values, clusters = strata.setdefault(f"{n} {task}", ([], []))
                    values.append(sum(w * r[sample] for w, r in zip(weights.values(), rows, strict=True)))
                    clusters.append((n, haystack))
        return macro_mean(dict(sorted(strata.items())), bounds=(-1.0, 1.0)) if strata else None

    def minus(self, a: str, b: str) -> Interval | None:
        """How much higher `a` scores than `b`, over all lengths."""
        return self.contrast({n: {a: 1.0, b: -1.0} for n in self.lengths})

    def minus_between(self, a: str, low: str, high: str) -> Interval | None:
        """How much higher `a` scores than two budgets around it, interpolated linearly in the logarithm of the achieved keys."""
        terms = {}
        for n in self.lengths:
            below, at, above = (self.mean_keys(label, n) for label in (low, a, high))
            if not below < at < above:
                return None
            share = math.log(at / below) / math.log(above / below)
            terms[n] = {a: 1.0, low: share - 1.0, high: -share}
        return self.contrast(terms)

    def differing(self, a: str, b: str) -> str:
        """On how many common samples two labels score differently."""
        first, second = self.scores[a], self.scores[b]
        common = first.keys() & second.keys()
        return f"{sum(first[i] != second[i] for i in common)} of {len(common)}"

    def mean(self, label: str, length: int) -> float:
        """Macro score at a length, per cent."""
        by_task: dict[str, list[float]] = {}
        for (n, task, *_), score in self.scores[label].items():
            if n == length:
                by_task.setdefault(task, []).append(score)
        return 100 * sum(sum(x) / len(x) for x in by_task.values()) / len(by_task)

    def mean_keys(self, label: str, length: int) -> float:
        """Achieved keys per query."""
        keys = self.keys.get((label, length), [])
        return sum(keys) / len(keys) if keys else float("nan")

    def tasks(self, label: str) -> list[str]:
        """Macro scores by length, and the achieved keys as a share of the context."""
        share = sum(self.mean_keys(label, n) / n for n in self.lengths) / len(self.lengths)
        return [" / ".join(f"{self.mean(label, n):.1f}" for n in self.lengths), f"{share:.1%}".replace("%", " %")]

    def held_out(self, name: str, metric: str) -> list[float]:
        """A metric at every held-out length, mean over layers."""
        by_length = self.about[name]["held_out"]
        return [sum(row[metric] for row in rows.values()) / len(rows) for rows in by_length.values()]

    def over_lengths(self, name: str, metric: str) -> float:
        """A metric, mean over layers and held-out lengths."""
        values = self.held_out(name, metric)
        return sum(values) / len(values)


def compared(found: Ablations, names: Sequence[str], against: str = FIRST) -> str:
    """Table of trained variants beside one of them."""
    sizes = " / ".join(f"{int(n) // 1024}K" for n in found.about[against]["held_out"])
    at = " / ".join(f"{n // 1024}K" for n in found.lengths)
    header = ["variant", f"recall at {sizes}", "mass on its keys, of the oracle's", "KL (nats)", f"tasks (%) at {at}", "keys, of the context", f"minus `{against}` (points)"]  # fmt: skip
    rows = [
        [f"`{n}`", " / ".join(f"{x:.2f}" for x in found.held_out(n, "recall")),
         f"{found.over_lengths(n, 'retained_mass'):.3f} of {found.over_lengths(n, 'oracle_mass'):.3f}", f"{found.over_lengths(n, 'kl'):.3f}",
         *found.tasks(n), "" if n == against else points(found.minus(n, against))]
        for n in (against, *names)
    ]  # fmt: skip
    return table(header, rows)


def served(
    found: Ablations, labels: Sequence[str], against: str, more: Mapping[str, Sequence[str]] | None = None
) -> str:
    """Table of what one indexer serves in several ways; `more` holds further columns by their heading."""
    more = more or {}
    at = " / ".join(f"{n // 1024}K" for n in found.lengths)
    rows = [
        [f"`{n}`", *found.tasks(n), "" if n == against else points(found.minus(n, against)), *(column[i] for column in more.values())]
        for i, n in enumerate((against, *labels))
    ]  # fmt: skip
    return table(["keys by", f"tasks (%) at {at}", "keys, of the context", f"minus `{against}` (points)", *more], rows)


def word(interval: Interval | None) -> str:
    """What an interval of a difference says."""
    if interval is None:
        return "not compared"
    told = "better" if interval.low > 0 else "worse" if interval.high < 0 else "not told apart"
    return f"{told} ({points(interval)} points)"


def tells(*sentences: str) -> str:
    """What a table tells, in a list below it."""
    return "What it tells:\n\n" + "\n".join(f"- {s}" for s in sentences if s)


def against_first(found: Ablations, name: str, *, same_scale: bool = True) -> str:
    """One variant against the first, in a sentence."""
    kept, first = (found.over_lengths(n, "retained_mass") for n in (name, FIRST))
    recall = (
        f"{found.over_lengths(name, 'recall') - found.over_lengths(FIRST, 'recall'):+.2f} recall, "
        if same_scale
        else ""
    )
    return f"`{name}` against `{FIRST}`: {recall}{100 * (kept - first):+.1f} points of mass; tasks {word(found.minus(name, FIRST))}."


def about_devices(found: Ablations) -> str:
    """Which variants ran where."""
    by_device: dict[str, list[str]] = {}
    for name, about in found.about.items():
        by_device.setdefault(about["device"].partition(",")[0], []).append(name)
    if len(by_device) == 1:
        return next(iter(by_device))
    return "; ".join(f"{device} ({', '.join(f'`{n}`' for n in names)})" for device, names in by_device.items())


def minutes(found: Ablations) -> str:
    """Minutes of training and of measuring, summed over processes."""
    trained = [a["training"] for a in found.about.values() if "tokens_per_s" in a["training"]]
    training = sum(t["tokens"] / t["tokens_per_s"] for t in trained)
    measuring = sum(a["seconds"] - a["training"].get("seconds", 0.0) for a in found.about.values())
    return f"{training / 60:.0f} minutes of training, by the median rate of each, and {measuring / 60:.0f} of measuring"


def seed_words(found: Ablations) -> str:
    """How far two trainings are apart that differ in the seed."""
    if "seed-1" not in found.about:
        return ""
    recall, mass = (
        abs(found.over_lengths("seed-1", m) - found.over_lengths(FIRST, m)) for m in ("recall", "retained_mass")
    )
    return f"Two seeds (`seed-1`) are {recall:.2f} of recall and {100 * mass:.1f} points of mass apart: differences of that size say nothing. "


def ablation_parts(found: Ablations) -> list[str]:
    """Tables of the trained variants and of what needs no training, in a fixed order."""
    first = found.about[FIRST]
    samples = len(found.scores[FIRST])
    tasks = sorted({task for _, task, *_ in found.scores[FIRST]})
    parts = [
        f"`{FIRST}` is the first variant: dim 64, one head, the layer's input, single keys, trained per query. The others differ from it in what their name says. Every variant but `{SHIPPED}` learned from "
        f"the same {first['training']['tokens'] / 1e6:.1f} million tokens, sequences of {first['training']['config']['length']:,}; the budget is {first['budget']} of the context in every layer where nothing else is said. "
        f"{about_devices(found)}.",
        f"Recall, mass and KL are means over the full-attention layers on held-out text, a few sequences a length, without intervals; mass and KL also over the lengths. "
        f"Tasks: macro average of {', '.join(f'`{t}`' for t in tasks)}, {samples} samples; differences pool the lengths, with paired 95 % intervals. These are some "
        f"four points to either side, so the tasks tell large differences only; recall and mass tell the small ones. {seed_words(found)}Processes that shared a GPU took {minutes(found)}.",
    ]  # fmt: skip
    if left := [n for n in EXPECTED if n not in found.about]:
        parts.append(
            missing(f"the variants {', '.join(left)}", "PYTHONPATH=src python recipes/indexer/ablations.py run --work WORK --variants " + " ".join(left))
        )  # fmt: skip
    for title, wanted in QUESTIONS.items():
        names = [n for n in wanted if n in found.about]
        if names:
            same = not title.startswith("Pooling")
            lines = [against_first(found, n, same_scale=same) for n in names]
            parts += [
                f"### {title}",
                *([NOTES[title]] if title in NOTES else []),
                compared(found, names),
                tells(*lines),
            ]
    parts += shared_parts(found) + target_parts(found) + token_parts(found) + length_parts(found)
    return parts + head_parts(found) + budget_parts(found) + plan_parts(found) + neighbour_parts(found)


def shared_parts(found: Ablations) -> list[str]:
    """Mean or max over the queries that share, trained for it or not."""
    names = [n for n in SHARED_TRAINED if n in found.about]
    plain = {r: f"shared by {SHARED}, {r}" for r in ("max", "mean")}
    other = [n for n in (SHIPPED, f"{SHIPPED}, {plain['max']}") if n in found.scores]
    parts = [
        f"### Mean or max over {SHARED} queries that share",
        f"`shared by {SHARED}` is `{FIRST}`, trained per query, served so; `q-{SHARED}` is trained for the shared selection, `{SHIPPED}` is the indexer in the package. In the second table recall is against the oracle that shares as well.",
        served(found, [*plain.values(), *names, *other], FIRST),
    ]  # fmt: skip
    best, other_way = SHARED_TRAINED
    lines = [f"Trained per query, mean against max: {word(found.minus(plain['mean'], plain['max']))}."]
    if len(names) == len(SHARED_TRAINED):
        lines.append(f"Trained for sharing, mean against max: {word(found.minus(other_way, best))}.")
    if SHARED_TRAINED[0] in names:
        lines.append(
            f"Max, trained for sharing against trained per query: {word(found.minus(SHARED_TRAINED[0], plain['max']))}."
        )
    if len(other) == 2:
        lines.append(
            f"Sharing costs the indexer that ships {points(found.minus(*other))} points; shared, it is, against `{FIRST}` shared, {word(found.minus(other[1], plain['max']))}."
        )
    return [*parts, *([compared(found, names[1:], names[0])] if names else []), tells(*lines)]


def target_parts(found: Ablations) -> list[str]:
    """Sum or max of the target over a key group."""
    one, other = POOLED_TARGET
    parts = ["### Sum or max: how the target pools a group of 4 keys"]
    if one not in found.about or other not in found.about:
        return [*parts, f"`{other}` is not measured yet."]
    kept = 100 * (found.over_lengths(other, "retained_mass") - found.over_lengths(one, "retained_mass"))
    return [
        *parts,
        compared(found, [other], one),
        tells(f"`{other}` against `{one}`: {kept:+.1f} points of mass on the keys; tasks {word(found.minus(other, one))}."),
    ]  # fmt: skip


def token_parts(found: Ablations) -> list[str]:
    """Held-out recall and mass against tokens, from the log of the first variant, and the indexer that ships."""
    training = found.about[FIRST]["training"]
    at: dict[int, dict[str, float]] = {}
    for row in training["curve"]:
        at.setdefault(row["step"], {}).update(row)
    per_step = training["tokens_per_step"]
    steps = sorted(at)
    rows = [[f"{s * per_step / 1e6:.1f}", f"{at[s]['recall']:.3f}", f"{at[s]['retained_mass']:.3f}"] for s in steps]
    half, last = steps[(len(steps) - 1) // 2], steps[-1]
    lines = [
        f"Going from {half * per_step / 1e6:.1f} to {last * per_step / 1e6:.1f} million tokens adds {at[last]['recall'] - at[half]['recall']:.3f} of recall and "
        f"{100 * (at[last]['retained_mass'] - at[half]['retained_mass']):.1f} points of mass; the learning rate falls to its end meanwhile."
    ]  # fmt: skip
    parts = [
        "### Training tokens",
        f"One training of `{FIRST}`, read on the way: recall and mass on sequences of {training['config']['length']:,} held out from it, mean over the layers.",
        table(["million tokens", "recall", "mass on its keys"], rows),
    ]  # fmt: skip
    if SHIPPED in found.about:
        tokens = found.about[SHIPPED]["training"]["tokens"] / 1e6
        parts += [
            f"`{SHIPPED}` is the indexer in the package: the same shape, {tokens:.0f} million tokens, sequences up to 8,192.",
            compared(found, [SHIPPED]),
        ]
        lines.append(against_first(found, SHIPPED))
    return [*parts, tells(*lines)]


def length_parts(found: Ablations) -> list[str]:
    """The first variant, and the indexer that ships, at lengths that they were not trained at."""
    names = [n for n in (FIRST, SHIPPED) if n in found.about]
    lengths = list(found.about[FIRST]["held_out"])
    rows, lines = [], []
    for n in names:
        told = found.about[n]["training"]
        trained = int(told.get("config", told.get("recipe", {})).get("length", 0))
        for layer in found.about[n]["held_out"][lengths[0]]:
            values = [found.about[n]["held_out"][length][layer] for length in lengths]
            cells = [
                f"{v['recall']:.2f} ({v['retained_mass'] / v['oracle_mass']:.1%})".replace("%", " %") for v in values
            ]
            rows.append([f"`{n}`", f"{trained:,}", layer, *cells])
        recall, kept, most = (found.held_out(n, m) for m in ("recall", "retained_mass", "oracle_mass"))
        lines.append(
            f"`{n}`, trained on up to {trained:,}: from {int(lengths[0]):,} to {int(lengths[-1]):,} tokens recall goes from {recall[0]:.2f} to {recall[-1]:.2f}, and its "
            f"keys' mass from {100 * kept[0] / most[0]:.1f} to {100 * kept[-1] / most[-1]:.1f} % of the oracle's."
        )  # fmt: skip
    by_length = [f"{n:,}: {points(found.contrast({n: {FIRST: 1.0, 'oracle': -1.0}}))}" for n in found.lengths]
    lines.append(f"Tasks, `{FIRST}` minus the oracle, points: {'; '.join(by_length)}.")
    header = [
        "indexer",
        "longest training sequence",
        "layer",
        *(f"recall (mass, of the oracle's) at {int(n) // 1024}K" for n in lengths),
    ]
    return ["### Trained at one length, tested at others", table(header, rows), tells(*lines)]


def head_parts(found: Ablations) -> list[str]:
    """One selection for all heads or one per KV head, by the oracle."""
    own = "oracle per KV head"
    return [
        "### Head-averaged or per-KV-head selection",
        "An indexer with one collapsed head scores once for all heads and cannot select per KV head. What that could be worth at most is the oracle's difference between the two.",
        served(found, ["oracle", own, FIRST], "dense"),
        tells(f"The oracle per KV head against the head-averaged one: {word(found.minus(own, 'oracle'))}."),
    ]  # fmt: skip


def budget_parts(found: Ablations) -> list[str]:
    """Fixed budgets and budgets by mass, at equal keys."""
    larger = "budget 1/8"
    masses = sorted(n for n in found.scores if n.startswith("mass "))
    even = {n: found.minus_between(n, FIRST, larger) for n in masses}
    labels = ["budget 1/32", larger, *masses]
    column = ["", *(points(even.get(n)) for n in labels)]
    lines = [f"`{n}` against a fixed budget of as many keys: {word(i)}." for n, i in even.items()]
    return [
        "### Fixed k or a budget by mass",
        "A mass is what the indexer itself believes to have covered, with twice the fixed budget as its cap. The last column compares at equal achieved keys: the score of the fixed "
        "budgets 1/16 and 1/8, interpolated sample by sample in the logarithm of the keys.",
        served(found, labels, FIRST, {"minus fixed at as many keys (points)": column}),
        tells(*lines),
    ]  # fmt: skip


def plan_parts(found: Ablations) -> list[str]:
    """The same mean budget spread over the layers in several ways."""
    plans = sorted(
        (n for n in found.scores if n.startswith("budget ") and "," in n),
        key=lambda n: Fraction(n.split()[1].split(",")[0]),
    )
    lines = [f"`{n}` against 1/16 in each: {word(found.minus(n, FIRST))}." for n in plans]
    if "budget 1/32,3/32" in plans:
        lines.append(
            f"`budget 1/32,3/32` and `budget 1/32`, which differ in the second layer alone, score differently on {found.differing('budget 1/32,3/32', 'budget 1/32')} samples."
        )  # fmt: skip
    return [
        "### Per-layer plan or uniform budget",
        f"All but `budget 1/32` have 1/16 of the context in the mean; `{FIRST}` has it in each layer. The names say first layer, second layer. {LAST_LAYER}",
        served(found, ["budget 1/32", *plans], FIRST),
        tells(*lines),
    ]


def neighbour_parts(found: Ablations) -> list[str]:
    """One layer's selection for both."""
    label = "first layer's selection for both"
    return [
        "### One indexer shared by neighbouring layers",
        f"The selection of the first full-attention layer serves the second too. The indexer was not trained for that: a target over several layers is not offered. {LAST_LAYER}",
        served(found, [label], FIRST),
        tells(f"Against a selection of its own for each layer: {word(found.minus(label, FIRST))}; the score differs on {found.differing(label, FIRST)} samples."),
    ]  # fmt: skip


def cost_parts(found: Mapping[str, Any]) -> list[str]:
    """Memory and speed of distillation."""
    peaks = [r["peak_gib"] for r in found["modes"].values()]
    whole = found.get("full_score_matrix_gib")
    return [
        f"`{found['shape']}` with random weights, one sequence of {found['tokens']:,} tokens, {found['device']}; {found['rounds']} interleaved rounds in one process, medians "
        "with 10th and 90th percentile.",
        table(
            ["", "seconds", "tokens/s", "peak (GiB)"],
            [[name, f"{r['median']:.2f} [{r['p10']:.2f}, {r['p90']:.2f}]", f"{found['tokens'] / r['median']:,.0f}", f"{r['peak_gib']:.1f}"] for name, r in found["modes"].items()],
        ),
        f"One step of distillation takes {found['ratio']:.2f} times the plain dense forward (target: at most {found['target']})."
        + (f" With all rows it takes {found['ratio_all_rows']:.2f} times." if "ratio_all_rows" in found else ""),
        f"Every peak includes the model, the indexers and their optimiser state; a step's is {max(peaks) - peaks[0]:.1f} GiB above the forward's."
        + (f" One matrix of all scores, queries by keys, would take {whole:.1f} GiB in bfloat16." if whole else ""),
    ]  # fmt: skip


def curve_parts(found: Mapping[str, Any]) -> list[str]:
    """Whether two runs have one loss curve."""
    rows = [[name, f"{r['tokens_per_s']:,.0f}" if r.get("tokens_per_s") else "", f"{r['largest']:.2e}", f"{r['mean']:.2e}"] for name, r in found["runs"].items()]  # fmt: skip
    parts = [found["about"], table(["run", "tokens/s", "largest difference of KL (nats)", "mean difference"], rows)]
    return [*parts, "\n".join(f"- {line}" for line in found["checks"])]


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
