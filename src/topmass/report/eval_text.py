"""What a report says of evaluations: how many keys are enough, and the tables and figures behind it."""

import math
from collections.abc import Sequence
from dataclasses import replace

from topmass.report import figures, gaps_text
from topmass.report.aggregate import ENOUGH_POINT, Cell, EvalTable, Setting, budget_name, budget_order
from topmass.report.content import Figure, Section, Table, add_figure
from topmass.report.figures import label_of, tokens
from topmass.report.wording import ENOUGH, NOT_CAUSAL, budget_words, granularity_words, interval_points, points
from topmass.results.stats import Interval

__all__ = ["answers", "sections"]


def answers(table: EvalTable) -> list[str]:
    """A sentence a length, the decided ones first; where none is, what the same samples do decide leads."""
    unsure = [n for n in table.compared if _undecided(table, n)]
    sure = [n for n in table.compared if n not in unsure]
    lead = [] if sure else [text for n in unsure if (text := _choice_answer(table, n))][:1]
    return [*lead, *(_answer(table, n) for n in (*sure, *unsure))]


def _tried(table: EvalTable, length: int) -> list[Cell]:
    """Per-query oracles beside dense attention, by achieved keys."""
    return [c for c in table.cells(lambda s: table.oracle(s) and s.per_query) if c.length == length and c.loss]


def _undecided(table: EvalTable, length: int) -> Cell | None:
    """The smallest budget that may be enough, where none is beyond doubt: samples are missing, not keys."""
    if table.answer(length):
        return None
    return next((c for c in _tried(table, length) if c.loss and c.loss.point <= ENOUGH_POINT), None)


_BLIND = {"streaming": "sink and window", "random": "random keys"}


def _choice_answer(table: EvalTable, length: int) -> str:
    """How much more a selection scores than as many keys kept unseen; empty where that is open as well."""
    close = _undecided(table, length)
    assert close is not None
    served = [table.cell(length, replace(close.setting, selector=kind)) for kind in ("indexer", "oracle")]
    same = [s for s in table.settings if s.selector in _BLIND and s.budget == close.setting.budget]
    blind = [c for s in same if (c := table.cell(length, s)) and c.score]
    ours = next(c for c in served if c and c.score)
    if not blind or ours.score is None:
        return ""
    theirs = max(blind, key=lambda c: c.score.point if c.score else 0.0)
    gain = table.contrast({length: {ours.setting: 1.0, theirs.setting: -1.0}})
    if gain is None or gain.low <= 0:
        return ""
    return (
        f"At {tokens(length)} tokens: which keys are read decides. With {budget_words(ours.setting)} per query, {_share(ours)}, the "
        f"{ours.setting.selector} scores {points(ours.score.point)} %, {points(gain.point)} points more (95 % interval "
        f"{points(gain.low)} to {points(gain.high)}) than {_BLIND[theirs.setting.selector]} of that budget, on "
        f"{_tasks(table, length)}."
    )


def _answer(table: EvalTable, length: int) -> str:
    tasks = len(table.tasks_at(length))
    tried = _tried(table, length)
    if not tried:
        return f"At {tokens(length)} tokens: no per-query oracle was run beside dense attention."
    cell = table.answer(length)
    if cell is None or cell.loss is None:
        return _unanswered(table, length, tried)
    smallest = " (the smallest that was run)" if cell is tried[0] else ""
    assert cell.score is not None
    return (
        f"At {tokens(length)} tokens: {budget_words(cell.setting)} per query are enough{smallest}, {_share(cell)}. The "
        f"oracle scores {points(cell.score.point)} %, {_below(cell.loss)}, on {_tasks(table, length)} with "
        f"{cell.loss.clusters // tasks} haystacks each."
    )


def _unanswered(table: EvalTable, length: int, tried: Sequence[Cell]) -> str:
    """No budget is as good as dense beyond doubt: for want of budget, or of samples?"""
    close = _undecided(table, length)
    if close is None:
        most = max(tried, key=lambda c: c.keys)
        return (
            f"At {tokens(length)} tokens: more than {budget_words(most.setting)}, the largest budget that was run, which is "
            f"{_below(most.loss)} on {_tasks(table, length)}."
        )
    return (
        f"At {tokens(length)} tokens: not decided. With {budget_words(close.setting)} per query, {_share(close)}, the oracle is "
        f"{_below(close.loss)} on {_tasks(table, length)}; more haystacks would narrow the interval."
    )


def _tasks(table: EvalTable, length: int) -> str:
    n = len(table.tasks_at(length))
    return "1 task" if n == 1 else f"{n} tasks"


def _share(cell: Cell) -> str:
    return f"{cell.keys:,.0f} achieved, {cell.keys / cell.length:.1%} of the context"


def _below(loss: Interval | None) -> str:
    assert loss is not None
    return f"{points(loss.point)} points below dense (95 % interval {points(loss.low)} to {points(loss.high)})"


def sections(table: EvalTable) -> list[Section]:
    """Accuracy, gaps, the oracle, and the rest; without what has nothing to show."""
    if not table.lengths:
        return []
    found = (_accuracy_section(table), gaps_text.section(table), _oracle_section(table), _settings_section(table))
    return [s for s in found if s.items]


def _accuracy_section(table: EvalTable) -> Section:
    items: list[Figure | Table] = []
    caption = (
        "Score against achieved keys per query, mean over tasks. Bars and the grey band around dense are 95 % intervals "
        f"(cluster bootstrap over haystacks). {_conditions(table)}"
    )
    add_figure(items, "accuracy", figures.accuracy_by_keys(table), caption)
    for n in table.compared:
        caption = f"The same for each task at {tokens(n)} tokens; x: achieved keys per query, y: score (%)."
        add_figure(items, f"tasks-{n}", figures.accuracy_by_task(table, n), caption, folded=n != table.compared[-1])
    items += [_dense_table(table)]
    return Section(title="Accuracy against achieved keys", items=items)


def _dense_table(table: EvalTable) -> Table:
    dense = table.dense()
    rows = []
    for task in [*table.tasks, None]:
        cells = [table.cell(n, dense, task) if dense else None for n in table.lengths]
        rows.append([task or "mean over tasks", *(interval_points(c.score if c else None) for c in cells)])
    header = ["task", *(f"{tokens(n)} tokens" for n in table.lengths)]
    return Table(caption="Dense attention: score (%) with 95 % interval.", header=header, rows=rows if dense else [])


def _oracle_section(table: EvalTable) -> Section:
    text = [
        "The oracle sees the model's own attention mass: it shows what a selection could do, and accelerates nothing.",
        f"With more than one query sharing, the {NOT_CAUSAL}.",
        f"Bold: {ENOUGH}. A dash: the budget is below the smallest workable one.",
    ]
    items: list[Figure | Table] = []
    for n in table.compared:
        caption = f"Granularity of selection at {tokens(n)} tokens, at achieved keys; mean over tasks, 95 % intervals."
        add_figure(items, f"granularity-{n}", figures.granularity(table, n), caption)
        items += _oracle_tables(table, n)
        items += _task_table(table, n)
    return Section(title="The oracle: budget and granularity", text=text, items=items)


def _task_table(table: EvalTable, length: int) -> list[Table]:
    settings = [s for s in table.settings if table.oracle(s) and s.per_query]
    rows = []
    for task in table.tasks_at(length):
        cells = [table.cell(length, s, task) for s in settings]
        rows.append([task, *(_loss(c).partition(";")[0].replace("**", "") for c in cells)])
    caption = f"{tokens(length)} tokens, per query: dense minus oracle in points for each task and nominal budget."
    header = ["task", *(budget_name(s.budget) for s in settings)]
    return [Table(caption=caption, header=header, rows=rows)] if settings else []


def _oracle_tables(table: EvalTable, length: int) -> list[Table]:
    """Queries sharing, keys grouped, then both together; one table if there are few columns."""
    cells = {s: table.cell(length, s) for s in table.settings if table.oracle(s)}
    grid = {(s.granularity, s.budget): c for s, c in cells.items() if c is not None}
    sizes = sorted({g for g, _ in grid})
    both = sorted({q for q, k in sizes if q > 1 and k > 1})
    groups = [[g for g in sizes if g[1] == 1], [g for g in sizes if g[0] == 1]]
    groups = [sizes] if len(sizes) <= 4 else [*groups, *([g for g in sizes if g[0] == q] for q in both)]
    return [_oracle_table(grid, group, length) for group in groups if group]


def _oracle_table(
    grid: dict[tuple[tuple[int, int], str | None], Cell], sizes: list[tuple[int, int]], length: int
) -> Table:
    budgets = sorted({b for g, b in grid if g in sizes}, key=budget_order)
    rows = [[budget_name(budget), *(_loss(grid.get((g, budget))) for g in sizes)] for budget in budgets]
    marked = f" {NOT_CAUSAL.capitalize()} where queries share." if any(q > 1 for q, _ in sizes) else ""
    return Table(
        caption=f"{tokens(length)} tokens: dense minus oracle in points, mean over tasks, with 95 % interval; achieved "
        f"keys per query after the semicolon.{marked}",
        header=["nominal budget", *map(granularity_words, sizes)],
        rows=rows,
    )


def _loss(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.infeasible:
        return "-"
    if cell.score is None:
        return "not run on every task"
    if cell.loss is None:
        return ""
    text = f"{interval_points(cell.loss)}; {cell.keys:,.0f}"
    return f"**{text}**" if cell.enough else text


def _settings_section(table: EvalTable) -> Section:
    cells = [(n, s, table.cell(n, s)) for n in table.lengths for s in table.settings if not table.oracle(s)]
    rows = [
        [tokens(n), *_setting(s), interval_points(c.score), _loss(c).replace("**", "").partition(";")[0], _keys(c)]
        for n, s, c in cells
        if c is not None
    ]
    header = ["length", *_SETTING, "score (%)", "dense minus this (points)", "achieved keys"]
    caption = "Everything else that was run, mean over tasks, with 95 % intervals."
    return Section(
        title="Baselines and other variants", items=[Table(caption=caption, header=header, rows=rows, folded=True)]
    )


_SETTING = ["selector", "budget", "granularity", "share", "sink", "window"]


def _setting(s: Setting) -> list[str]:
    if s.selector == "dense":
        return ["dense", "", "", "", "", ""]
    note = "" if s.causal else " (not causal)"
    return [
        label_of(s.selector),
        budget_name(s.budget),
        granularity_words(s.granularity) + s.notes + note,
        s.share,
        str(s.sink),
        str(s.window),
    ]


def _keys(cell: Cell) -> str:
    return "" if math.isnan(cell.keys) else f"{cell.keys:,.0f}"


def _conditions(table: EvalTable) -> str:
    dense = table.dense()
    decode = {s.decode for s in table.settings}
    counts = {c.score.clusters for n in table.compared if dense and (c := table.cell(n, dense)) and c.score}
    many = " to ".join(f"{k:,}" for k in sorted({min(counts), max(counts)})) if counts else "?"
    return f"Tasks: {', '.join(table.tasks)}; {many} haystacks a length in all; prefill sparse, decoding {'/'.join(sorted(decode))}."
