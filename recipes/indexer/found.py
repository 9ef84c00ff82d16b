"""What loaded runs hold: scores and differences by label, with their intervals."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compared import LENGTHS

from topmass.results import LoadedRun, load_run
from topmass.results.stats import Interval


def load_parts(out: Path, part: str) -> list[LoadedRun]:
    """Complete runs of a part, by length."""
    found = [load_run(p) for p in out.glob(f"{part}-*") if p.is_dir() and not p.name.endswith((".partial", ".old"))]
    return sorted(found, key=lambda run: run.manifest["config"]["length"])


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


def pooled(lengths: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Every length, and the three of the published comparison together."""
    together = [n for n in lengths if n in LENGTHS] or list(lengths)
    return [(f"{n:,}", [n]) for n in lengths] + ([("together", together)] if len(together) > 1 else [])


def real_gaps(ten: Found) -> list[str]:
    """Tasks on which the indexer's loss against dense attention is above zero with its whole interval, all lengths together or at one."""
    found = []
    for task in ten.tasks:
        losses = [ten.difference("dense", "indexer", lengths, task) for _, lengths in pooled(ten.lengths)]
        if any(loss is not None and loss.low > 0 for loss in losses):
            found.append(task)
    return found
