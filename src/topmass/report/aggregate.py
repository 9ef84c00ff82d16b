"""From records to the numbers of a report: settings, achieved keys, scores and paired differences with intervals."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from topmass.results import LoadedRun
from topmass.results.stats import Interval, macro_mean, mean

__all__ = ["AuditTable", "Cell", "EvalTable", "Setting", "budget_keys", "budget_name"]

Row = dict[str, Any]
Sample = tuple[int, int, int]

# what a cell may lose against dense and still count as "as good": point and upper end, as fractions of the full score
ENOUGH_POINT, ENOUGH_HIGH = 0.01, 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How keys are chosen, as a record says it."""

    selector: str
    budget: str | None
    q_block: int
    kv_block: int
    share: str
    pool: str
    sink: int
    window: int
    dense_below: int = 0
    decode: str = "dense"
    reduce: str = "max"

    @classmethod
    def of(cls, row: Row) -> "Setting":
        """Return the setting of a record."""
        return _setting(tuple((name, row[name]) for name in cls.__slots__ if name in row))

    @property
    def per_query(self) -> bool:
        """Whether every query of every layer chooses single tokens of its own."""
        return (self.q_block, self.kv_block, self.share) == (1, 1, "layer")

    @property
    def granularity(self) -> tuple[int, int]:
        """Queries that share a selection, keys taken together."""
        return self.q_block, self.kv_block

    @property
    def causal(self) -> bool:
        """Whether the selection looks at no later query."""
        return self.q_block == 1 or self.selector in {"dense", "streaming", "random"}

    def alone(self) -> "Setting":
        """The setting with a selection for every query."""
        return replace(self, q_block=1, reduce="max")

    def oracle(self) -> "Setting":
        """The oracle in the place of this selector."""
        return replace(self, selector="oracle", reduce="max")

    @property
    def notes(self) -> str:
        """What a name adds for `reduce` and `dense_below`; empty where they are the usual ones.

        Example:
            >>> s = Setting(
            ...     selector="random", budget="64", q_block=1, kv_block=1, share="layer", pool="sum", sink=0, window=1
            ... )
            >>> s.notes, replace(s, dense_below=1024).notes, replace(s, reduce="max_prob").notes
            ('', ', dense below 1024', ', by max_prob')
        """
        by = f", by {self.reduce}" if self.reduce != "max" else ""
        return f"{by}, dense below {self.dense_below}" if self.dense_below else by

    def family(self) -> "Setting":
        """The setting without its budget, which for a streaming selector is its sink and window."""
        fixed = replace(self, budget=None)
        return replace(fixed, sink=0, window=0) if self.selector == "streaming" else fixed

    def variant(self) -> "Setting":
        """The setting without budget and granularity: what a comparison over those holds fixed."""
        return replace(self, budget=None, q_block=1, kv_block=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setting at one length, over all tasks or on one.

    Attributes:
        length: Nominal prompt length, tokens.
        setting: How keys are chosen.
        task: `None` is the unweighted mean over all tasks.
        keys: Achieved keys per query; nan where infeasible.
        score: Mean score, a fraction; `None` where infeasible or not run on every task.
        loss: Dense minus this, on the same samples; `None` also where there is no dense run.
        infeasible: Whether the budget is below the smallest workable one.
    """

    length: int
    setting: Setting
    task: str | None
    keys: float
    score: Interval | None
    loss: Interval | None
    infeasible: bool = False

    @property
    def enough(self) -> bool:
        """Whether it is as good as dense: at most 1 point lost, and the interval ends at 2 points."""
        return self.loss is not None and self.loss.point <= ENOUGH_POINT and self.loss.high <= ENOUGH_HIGH


@functools.lru_cache(maxsize=4096)
def _setting(columns: tuple[tuple[str, Any], ...]) -> Setting:
    # what older records do not say, and what says nothing of this selector, is the default
    known: dict[str, Any] = {name: value for name, value in columns if value is not None or name == "budget"}
    return Setting(**known)


def _by_layer(budget: str | None) -> dict[str, str]:
    """Budget by layer of a plan as records spell it; empty if it is no plan."""
    text = budget or ""
    if not text.startswith("plan("):
        return {}
    entries = (part.rpartition(":") for part in text.removeprefix("plan(").removesuffix(")").split(", "))
    return {layer: own for layer, _, own in entries}


def budget_name(budget: str | None) -> str:
    """A nominal budget for people: a plan is named by its layers' budgets in their order.

    Example:
        >>> budget_name("256"), budget_name("plan(3:448, 7:64, default:dense)")
        ('256', '448+64')
        >>> budget_name("plan(0:64, 1:64, 2:64, 3:512, 4:512, 5:1024, default:dense)")
        '64x3+512x2+1024'
    """
    plan = _by_layer(budget)
    if not plan:
        return budget or ""
    # every layer is named, or else the default has a say as well
    own = [b for layer, b in plan.items() if layer != "default"]
    runs = [(b, len(list(group))) for b, group in itertools.groupby(own)]
    short = len(own) > 4
    name = "+".join(f"{b}x{n}" if short and n > 1 else "+".join([b] * n) for b, n in runs)
    return name if plan.get("default") == "dense" else f"{name}, others {plan.get('default')}"


def budget_keys(budget: str | None) -> float | None:
    """Tokens of a nominal budget, of a plan their mean over the layers that it names; `None` if it is not in tokens."""
    plan = _by_layer(budget)
    own = [b for layer, b in plan.items() if layer != "default"] if plan else [budget or ""]
    if not own or not all(b.isdigit() for b in own) or plan.get("default", "dense") != "dense":
        return None
    return sum(map(int, own)) / len(own)


def budget_order(budget: str | None) -> tuple[int, float, str]:
    """Sort key of nominal budgets: tokens by size, then fractions, then the rest."""
    text = budget or ""
    if (keys := budget_keys(budget)) is not None:
        return 0, keys, text
    if text.endswith("%"):
        return 1, float(Fraction(text[:-1])), text
    return 2, 0.0, text


# length, task, setting
_Key = tuple[int, str, Setting]


class EvalTable:
    """Records of evaluation runs, indexed for paired comparison."""

    def __init__(self, runs: Sequence[LoadedRun]):
        self._rows: dict[_Key, dict[Sample, Row]] = {}
        self.repeated = 0
        plain: dict[_Key, dict[Sample, Row]] = {}
        for run in sorted(runs, key=lambda run: run.manifest["started"]):
            for key, rows in _by_key(run.records).items():
                group = (plain if all(r.get("backend") == "reference" for r in rows) else self._rows).setdefault(
                    key, {}
                )
                for row in rows:
                    self.repeated += _sample(row) in group
                    group[_sample(row)] = row
        # plain arithmetic beside a kernel is there to be compared with it, alone it is what ran
        self._arithmetic = {key: group for key, group in plain.items() if key in self._rows}
        self._rows = plain | self._rows
        self.lengths = sorted({length for length, _, _ in self._rows})
        self.tasks = sorted({task for _, task, _ in self._rows})
        self.settings = sorted({setting for _, _, setting in self._rows}, key=_setting_order)

    def tasks_at(self, length: int) -> list[str]:
        """Tasks that were run at this length."""
        return sorted({task for n, task, _ in self._rows if n == length})

    @functools.cached_property
    def variant(self) -> Setting | None:
        """The oracle whose budgets and granularities are compared: plain top-k if it was run."""
        oracles = [s for s in self.settings if s.selector == "oracle" and s.share == "layer"]
        return _plainest(oracles)

    def dense(self) -> Setting | None:
        """The dense setting."""
        return next((s for s in self.settings if s.selector == "dense"), None)

    @functools.cache  # noqa: B019 -- a table lives as long as its report
    def cell(self, length: int, setting: Setting, task: str | None = None) -> Cell | None:
        """Aggregate one cell; `None` if it was not run."""
        tasks = self.tasks_at(length) if task is None else [task]
        groups = {t: self._rows[length, t, setting] for t in tasks if (length, t, setting) in self._rows}
        if not groups:
            return None
        rows = [row for group in groups.values() for row in group.values()]
        infeasible = any(row["status"] != "ok" for row in rows)
        if infeasible or len(groups) < len(tasks):
            nan = float("nan")
            return Cell(
                length=length, setting=setting, task=task, keys=nan, score=None, loss=None, infeasible=infeasible
            )
        score = macro_mean({t: _values(g, lambda row: row["score"]) for t, g in groups.items()})
        return Cell(
            length=length,
            setting=setting,
            task=task,
            keys=_mean_keys(groups),
            score=score,
            loss=self._loss(length, setting, groups),
        )

    def _loss(self, length: int, setting: Setting, groups: dict[str, dict[Sample, Row]]) -> Interval | None:
        dense = self.dense()
        if dense is None or setting == dense:
            return None
        strata = {}
        for task, group in groups.items():
            reference = self._rows.get((length, task, dense), {})
            common = {sample: row for sample, row in group.items() if sample in reference}
            if not common:
                return None
            strata[task] = _values(common, lambda row, r=reference: r[_sample(row)]["score"] - row["score"])
        return macro_mean(strata, bounds=(-1.0, 1.0))

    def contrast(self, terms: Mapping[int, Mapping[Setting, float]], task: str | None = None) -> Interval | None:
        """Weighted sum of the scores of several settings on their common samples, mean over tasks and lengths.

        Args:
            terms: By length the weight of each setting; the positive ones sum to 1, the negative ones to -1.
            task: `None` takes the unweighted mean over all tasks.

        Returns:
            `None` if a setting was not run on every task, is infeasible, or shares no sample with the others.
        """
        strata = {}
        for length, weights in terms.items():
            for name in self.tasks_at(length) if task is None else [task]:
                groups = [(self._rows.get((length, name, s), {}), w) for s, w in weights.items()]
                common = [i for i in groups[0][0] if all(i in g and g[i]["score"] is not None for g, _ in groups)]
                if not common:
                    return None
                values = [sum(w * g[i]["score"] for g, w in groups) for i in common]
                strata[f"{length} {name}"] = values, [i[:2] for i in common]
        return macro_mean(strata, bounds=(-1.0, 1.0)) if strata else None

    def realization(self, lengths: Iterable[int], setting: Setting) -> Interval | None:
        """Score by plain arithmetic minus score by the kernel, on their common samples, mean over tasks and lengths.

        Returns:
            `None` where a task has no sample that both answered.
        """
        strata = {}
        for key in ((n, task, setting) for n in lengths for task in self.tasks_at(n)):
            kernel, plain = self._rows.get(key, {}), self._arithmetic.get(key, {})
            both = (i for i in plain.keys() & kernel.keys() if None not in (plain[i]["score"], kernel[i]["score"]))
            common = {i: plain[i] for i in sorted(both)}
            if not common:
                return None
            strata[f"{key[0]} {key[1]}"] = _values(
                common, lambda row, k=kernel: row["score"] - k[_sample(row)]["score"]
            )
        return macro_mean(strata, bounds=(-1.0, 1.0)) if strata else None

    def recall(self, length: int, setting: Setting) -> float | None:
        """Mean support recall over tasks; `None` if it was not measured."""
        means = []
        for task in self.tasks_at(length):
            rows = self._rows.get((length, task, setting), {}).values()
            found = [row["support_recall"] for row in rows if row["support_recall"] is not None]
            if not found:
                return None
            means.append(sum(found) / len(found))
        return sum(means) / len(means) if means else None

    def cells(self, keep: Callable[[Setting], bool], *, task: str | None = None) -> list[Cell]:
        """Feasible cells of the settings to keep, by length and achieved keys."""
        found = [
            self.cell(n, s, task)
            for n in self.lengths
            for s in self.settings
            if keep(s) and (task is None or (n, task, s) in self._rows)
        ]
        return sorted((c for c in found if c is not None and c.score), key=lambda c: (c.length, c.keys))

    @functools.cached_property
    def compared(self) -> list[int]:
        """Lengths at which something other than dense attention ran; all lengths if there is none."""
        dense = self.dense()
        sparse = {n for n, _, s in self._rows if s != dense}
        return [n for n in self.lengths if n in sparse] or self.lengths

    def oracle(self, setting: Setting) -> bool:
        """Whether the setting belongs to the oracle that is compared over budgets and granularities."""
        return self.variant is not None and setting.variant() == self.variant

    @functools.cached_property
    def _families(self) -> dict[str, Setting]:
        """Of every selector, the per-query variant that figures show."""
        families: dict[str, Setting] = {}
        for s in sorted((s for s in self.settings if s.q_block == 1), key=_plainness):
            families.setdefault(s.selector, s.family())
        return families

    def shown(self, setting: Setting) -> bool:
        """Whether figures over budgets show the setting: one causal variant of each selector."""
        if setting.selector == "oracle":
            return self.oracle(setting) and setting.per_query
        return setting.family() == self._families.get(setting.selector)

    def answer(self, length: int) -> Cell | None:
        """The cell with the fewest achieved keys among the per-query oracles that are as good as dense."""
        cells = self.cells(lambda s: self.oracle(s) and s.per_query)
        return next((c for c in cells if c.length == length and c.enough), None)


class AuditTable:
    """Records of audit runs; texts are the clusters."""

    def __init__(self, runs: Sequence[LoadedRun]):
        self._values: dict[tuple[int, Setting, int, str], dict[tuple[str, int], float]] = {}
        for run in runs:
            for row in run.records:
                if row["value"] is not None:
                    key = (_nominal(run, row["q_len"]), Setting.of(row), row["layer"], row["metric"])
                    self._values.setdefault(key, {})[run.id, row["text"]] = row["value"]
        self.lengths = sorted({key[0] for key in self._values})
        self.settings = sorted({key[1] for key in self._values}, key=_setting_order)
        self.layers = sorted({key[2] for key in self._values} - {-1})
        self.metrics = sorted({key[3] for key in self._values})

    @functools.cached_property
    def variant(self) -> Setting | None:
        """The oracle whose budgets and granularities are compared."""
        return _plainest([s for s in self.settings if s.selector == "oracle" and s.share == "layer"])

    def oracle(self, setting: Setting) -> bool:
        """Whether the setting belongs to that oracle."""
        return self.variant is not None and setting.variant() == self.variant

    def value(self, length: int, setting: Setting, layer: int, metric: str) -> Interval | None:
        """Mean over texts, `None` if it was not measured."""
        values = self._values.get((length, setting, layer, metric))
        return None if values is None else mean(list(values.values()), list(values), bounds=None)

    def over_layers(self, length: int, setting: Setting, metric: str) -> Interval | None:
        """Mean over layers and texts."""
        found = [
            (text, value)
            for layer in self.layers
            for text, value in self._values.get((length, setting, layer, metric), {}).items()
        ]
        return mean([v for _, v in found], [t for t, _ in found], bounds=None) if found else None

    def plan(self, length: int) -> list[tuple[int, float, Interval]]:
        """Layer, mass to retain, and the smallest budget that does."""
        found = []
        for key in self._values:
            n, setting, layer, metric = key
            if n == length and metric.startswith("plan_budget@") and layer >= 0:
                budget = self.value(n, setting, layer, metric)
                assert budget is not None
                found.append((layer, float(metric.partition("@")[2]), budget))
        return sorted(found, key=lambda entry: entry[:2])


def _by_key(records: Iterable[Row]) -> dict[_Key, list[Row]]:
    found: dict[_Key, list[Row]] = {}
    for row in records:
        found.setdefault((row["length"], row["task"], Setting.of(row)), []).append(row)
    return found


def _nominal(run: LoadedRun, q_len: int) -> int:
    """Length that the run asked for, if the text has nearly that length."""
    asked = run.manifest["config"].get("length")
    return asked if isinstance(asked, int) and 0.8 * asked <= q_len <= asked else q_len


def _setting_order(setting: Setting) -> tuple[Any, ...]:
    return (
        setting.selector,
        setting.granularity,
        setting.share,
        budget_order(setting.budget),
        setting.sink,
        setting.window,
        setting.pool,
        setting.dense_below,
        setting.decode,
        setting.reduce,
    )


def _plainest(settings: Iterable[Setting]) -> Setting | None:
    """The variant nearest to plain top-k, which the other granularities are compared with."""
    return min((s.variant() for s in settings), key=_plainness, default=None)


def _plainness(s: Setting) -> tuple[Any, ...]:
    return (
        s.decode != "dense",
        s.dense_below,
        s.share != "layer",
        s.pool != "sum",
        s.reduce != "max",
        s.sink,
        s.window,
        s.kv_block,
    )


def _sample(row: Row) -> Sample:
    return row["seed"], row["haystack"], row["question_id"]


def _values(group: dict[Sample, Row], of: Callable[[Row], float]) -> tuple[list[float], list[tuple[int, int]]]:
    """Values of a group and the haystack of each."""
    return [of(row) for row in group.values()], [sample[:2] for sample in group]


def _mean_keys(groups: dict[str, dict[Sample, Row]]) -> float:
    """Achieved keys, averaged as the scores are: samples within a task, then tasks."""
    means = []
    for group in groups.values():
        keys = [row["keys_read_mean"] for row in group.values() if row["keys_read_mean"] is not None]
        means.append(sum(keys) / len(keys) if keys else float("nan"))
    return sum(means) / len(means)
