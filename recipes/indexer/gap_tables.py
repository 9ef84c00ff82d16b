"""The tables of the gaps, and the sentences that go with them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from compared import SHARED
from found import Found, pooled

from topmass.results import LoadedRun
from topmass.results.stats import Interval

STEPS = (
    ("oracle: dense minus oracle", "dense", "oracle"),
    ("indexer: oracle minus indexer", "oracle", "indexer"),
    (f"sharing by {SHARED}: indexer minus shared", "indexer", "indexer shared"),
    ("dense minus indexer", "dense", "indexer"),
    ("dense minus shared", "dense", "indexer shared"),
)
SERVED = ("oracle", "indexer", "indexer shared")


def points(interval: Interval | None) -> str:
    """An interval in points."""
    if interval is None:
        return "not run"
    # 0.0 is added so that nothing reads -0.0
    point, low, high = (round(100 * x, 1) + 0.0 for x in (interval.point, interval.low, interval.high))
    return f"{point:.1f} [{low:.1f}, {high:.1f}]"


def sentence(names: Sequence[str], *, ticks: bool = True) -> str:
    """Names as a list in words."""
    marked = [f"`{n}`" if ticks else n for n in names]
    return ", ".join(marked[:-1]) + f" and {marked[-1]}" if len(marked) > 1 else "".join(marked)


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


def gap_table(nine: Found, ten: Found, steps: Sequence[tuple[str, str, str]] = STEPS) -> str:
    columns = pooled(ten.lengths)
    rows = [
        [gap, tasks, *(points(f.difference(a, b, lengths)) for _, lengths in columns)]
        for gap, a, b in steps
        for tasks, f in (("nine", nine), ("ten", ten))
    ]
    return table(["gap", "tasks", *(name for name, _ in columns)], rows)


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
