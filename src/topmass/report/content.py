"""What a report says: the first screen and the sections, as plain values that the templates only lay out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from topmass.report import bench, bench_figures, figures, serve, ttft_figures, ttft_text
from topmass.report.aggregate import (
    ENOUGH_POINT,
    AuditTable,
    Cell,
    EvalTable,
    Setting,
    budget_keys,
    budget_name,
    budget_order,
)
from topmass.report.figures import label_of, tokens
from topmass.report.frontier import find_frontier
from topmass.report.gaps import NEAR, Gap, find_gaps
from topmass.report.timings import BenchTable
from topmass.results import LoadedRun
from topmass.results.stats import Interval

__all__ = ["Figure", "Report", "Section", "Table", "compose"]

QUESTION = "How much dense attention does this model need?"
FRONTIER_QUESTION = "Which configuration is as good as dense attention, and faster?"
TTFT_QUESTION = "How long does the first token take beside dense attention and the floor?"
SERVE_QUESTION = "How does a serving engine answer requests with sparse prefill, beside dense attention and the floor?"
BENCH_QUESTION = "How long does a sparse layer take beside dense kernels?"
NOT_CAUSAL = "selection looks at the block's later queries: not causal"
_ENOUGH = "at most 1 point below dense, with the upper end of the 95 % interval at 2 points or less"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture with its caption.

    Attributes:
        name: File name without suffix, unique in the report.
        svg: The picture.
        caption: What it shows and under which conditions.
        folded: Whether HTML shows it only when asked.
    """

    name: str
    svg: str
    caption: str
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        caption: What it shows and under which conditions.
        header: One text a column.
        rows: One list of texts a row, as long as the header.
        folded: Whether HTML shows it only when asked.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, what to know, and what there is to see."""

    title: str
    text: list[str] = field(default_factory=list)
    items: list[Figure | Table] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that a reader sees.

    Attributes:
        model: Name of the model.
        question: What the first screen answers.
        answers: The answer, a sentence a length, each with its interval.
        figure: The one figure of the first screen.
        facts: Machine, versions, commands, run ids: name and value.
        notes: What limits the answer.
        sections: The rest.
    """

    model: str
    question: str
    answers: list[str]
    figure: Figure | None
    facts: list[tuple[str, str]]
    notes: list[str]
    sections: list[Section]


def compose(runs: Sequence[LoadedRun], *, command: str) -> Report:
    """Make the report of runs of one model.

    Args:
        runs: Evaluation runs, audit runs, or both; benchmark runs; or times to first token, alone or with evaluations.
        command: How this report is made again.
    """
    if all(run.kind == "bench" for run in runs):
        return _compose_bench(runs, command)
    if all(run.kind == "serve" for run in runs):
        return _compose_serve(runs, command)
    if any(run.kind == "ttft" for run in runs):
        return _compose_frontier(runs, command)
    evals = EvalTable([run for run in runs if run.kind == "eval"])
    audits = AuditTable([run for run in runs if run.kind == "audit"])
    scored = bool(evals.variant and evals.dense())
    answers = _eval_answers(evals) if scored else []
    answers += _audit_answers(audits)[-1 if scored else 0 :]
    answers += _gap_answers(evals) if scored else []
    if not scored and answers:
        answers.append("Whether scores on tasks hold at these budgets was not measured.")
    sections = [*_eval_sections(evals), *_audit_sections(audits)]
    figure, sections = _lead(sections)
    return Report(
        model=runs[0].manifest["model"],
        question=QUESTION,
        answers=answers or ["These runs do not say: no oracle beside dense attention, and no audit."],
        figure=figure,
        facts=_facts(runs, command),
        notes=_notes(evals, audits, runs),
        sections=sections,
    )


def _compose_bench(runs: Sequence[LoadedRun], command: str) -> Report:
    table = BenchTable(runs)
    titles = {"layer": "The layer", "oracle": "The oracle", "kl": "The indexer's loss"}
    sections = []
    for what, title in titles.items():
        items: list[Figure | Table] = []
        for name, draw, caption in bench_figures.FIGURES:
            _add(items, f"{what}-{name}", draw(table, what), caption)
        items += [Table(caption=c, header=h, rows=r) for c, h, r in bench.summaries(table, what)]
        items += [Table(caption=c, header=h, rows=r, folded=True) for c, h, r in bench.tables(table, what)]
        sections += [Section(title=title, items=items)] if items else []
    figure, sections = _lead(sections)
    return Report(
        model=runs[0].manifest["model"],
        question=BENCH_QUESTION,
        answers=bench.answers(table),
        figure=figure,
        facts=_facts(runs, command),
        notes=bench.notes(table),
        sections=sections,
    )


def _compose_serve(runs: Sequence[LoadedRun], command: str) -> Report:
    table, manifest = serve.ServeTable(runs), runs[0].manifest
    items: list[Figure | Table] = []
    caption = "Time to first token against length, bars are p10 to p90 over requests."
    _add(items, "serve-ttft", serve.ttft_by_length(table, manifest["model"], manifest["device"]), caption)
    items += [Table(caption=c, header=h, rows=r) for c, h, r in serve.tables(table)]
    figure, sections = _lead([Section(title="Requests", items=items)])
    return Report(
        model=manifest["model"] + ("" if manifest["weights_hash"] else " (random weights)"),
        question=SERVE_QUESTION,
        answers=serve.answers(table),
        figure=figure,
        facts=_facts(runs, command),
        notes=serve.notes(runs),
        sections=sections,
    )


def _compose_frontier(runs: Sequence[LoadedRun], command: str) -> Report:
    frontier = find_frontier(runs)
    evals = EvalTable([run for run in runs if run.kind == "eval"])
    items: list[Figure | Table] = []
    # random weights have no scores to stand beside times
    for n in () if frontier.stress else reversed(frontier.points):
        caption = (
            f"Score minus dense's, paired, against time at {tokens(n)} tokens; bars are 95 % intervals. The line is the frontier; "
            "hollow marks see the model's own attention, or nothing, and are not for serving."
        )
        _add(items, f"frontier-{n}", ttft_figures.score_by_time(frontier, n), caption)
        caption, header, rows = ttft_text.frontier_table(frontier, n)
        items.append(Table(caption=caption, header=header, rows=rows))
    times: list[Figure | Table] = []
    against = " against length" if len(frontier.table.line(frontier.batch, frontier.chunk)) > 1 else ""
    caption = f"Time to first token{against}, bars are p10 to p90; of the selectors the fastest."
    _add(times, "ttft", ttft_figures.ttft_by_length(frontier), caption)
    times += [Table(caption=c, header=h, rows=r) for c, h, r in ttft_text.times_tables(frontier)]
    sections = [Section(title="Score and time of the same configurations", items=items)] if items else []
    sections += [Section(title="Times to first token", items=times), *_eval_sections(evals)]
    figure, sections = _lead(sections)
    return Report(
        model=frontier.model + (" (random weights)" if frontier.stress else ""),
        question=FRONTIER_QUESTION if evals.lengths else TTFT_QUESTION,
        answers=ttft_text.answers(frontier),
        figure=figure,
        facts=_facts(runs, command),
        notes=ttft_text.notes(frontier, runs),
        sections=sections,
    )


def _lead(sections: list[Section]) -> tuple[Figure | None, list[Section]]:
    """Move the first figure to the first screen."""
    for i, section in enumerate(sections):
        for item in section.items:
            if isinstance(item, Figure):
                rest = Section(
                    title=section.title, text=section.text, items=[x for x in section.items if x is not item]
                )
                keep = [rest] if rest.items else []
                return item, [*sections[:i], *keep, *sections[i + 1 :]]
    return None, sections


# -- answers


def _eval_answers(table: EvalTable) -> list[str]:
    """A sentence a length, the decided ones first; where none is, what the same samples do decide leads."""
    unsure = [n for n in table.compared if _undecided(table, n)]
    sure = [n for n in table.compared if n not in unsure]
    lead = [] if sure else [text for n in unsure if (text := _choice_answer(table, n))][:1]
    return [*lead, *(_eval_answer(table, n) for n in (*sure, *unsure))]


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
        f"At {tokens(length)} tokens: which keys are read decides. With {_budget(ours.setting)} per query, {_share(ours)}, the "
        f"{ours.setting.selector} scores {_points(ours.score.point)} %, {_points(gain.point)} points more (95 % interval "
        f"{_points(gain.low)} to {_points(gain.high)}) than {_BLIND[theirs.setting.selector]} of that budget, on "
        f"{_tasks(table, length)}."
    )


def _eval_answer(table: EvalTable, length: int) -> str:
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
        f"At {tokens(length)} tokens: {_budget(cell.setting)} per query are enough{smallest}, {_share(cell)}. The "
        f"oracle scores {_points(cell.score.point)} %, {_below(cell.loss)}, on {_tasks(table, length)} with "
        f"{cell.loss.clusters // tasks} haystacks each."
    )


def _unanswered(table: EvalTable, length: int, tried: Sequence[Cell]) -> str:
    """No budget is as good as dense beyond doubt: for want of budget, or of samples?"""
    close = _undecided(table, length)
    if close is None:
        most = max(tried, key=lambda c: c.keys)
        return (
            f"At {tokens(length)} tokens: more than {_budget(most.setting)}, the largest budget that was run, which is "
            f"{_below(most.loss)} on {_tasks(table, length)}."
        )
    return (
        f"At {tokens(length)} tokens: not decided. With {_budget(close.setting)} per query, {_share(close)}, the oracle is "
        f"{_below(close.loss)} on {_tasks(table, length)}; more haystacks would narrow the interval."
    )


def _tasks(table: EvalTable, length: int) -> str:
    n = len(table.tasks_at(length))
    return "1 task" if n == 1 else f"{n} tasks"


def _budget(setting: Setting) -> str:
    budget = setting.budget or "?"
    if budget.startswith("plan("):
        return f"{budget_name(budget)} keys by layer"
    return (
        f"{int(budget):,} keys" if budget.isdigit() else f"{budget} of the keys" if "%" in budget else f"{budget} keys"
    )


def _share(cell: Cell) -> str:
    return f"{cell.keys:,.0f} achieved, {cell.keys / cell.length:.1%} of the context"


def _below(loss: Interval | None) -> str:
    assert loss is not None
    return f"{_points(loss.point)} points below dense (95 % interval {_points(loss.low)} to {_points(loss.high)})"


def _points(fraction: float) -> str:
    text = f"{fraction * 100:+.1f}" if fraction < 0 else f"{fraction * 100:.1f}"
    return "0.0" if text == "-0.0" else text


def _gap_answers(table: EvalTable) -> list[str]:
    return [answer for n in table.compared if (answer := _gap_answer(table, n))]


def _gap_answer(table: EvalTable, length: int) -> str:
    """The gaps of one budget: the largest of at most a sixteenth of the context, or else the smallest."""
    found = {(g.served, g.name): g.interval for g in find_gaps(table, [length]) if g.interval}
    alone = [s for s, name in found if s.per_query and name == "indexer"]
    keys = {s: k for s in alone if (k := budget_keys(s.budget)) is not None}
    small = [s for s in keys if keys[s] <= length / 16]
    if not keys:
        return ""
    chosen = max(small, key=keys.__getitem__) if small else min(keys, key=keys.__getitem__)
    shared = [s for s, name in found if name == "sharing" and _shares(table, length, s, chosen)]
    lost = [("the budget", found.get((chosen, "oracle"))), ("the indexer", found[chosen, "indexer"])]
    lost += [(f"sharing by {s.q_block}", found[s, "sharing"]) for s in shared]
    parts = [f"{_points(i.point)} to {what} ({_points(i.low)} to {_points(i.high)})" for what, i in lost if i]
    where = f"At {tokens(length)} tokens and {_budget(chosen)} per query{chosen.kept_dense}"
    return f"{where}, points lost with 95 % intervals: {', '.join(parts)}."


def _shares(table: EvalTable, length: int, shared: Setting, alone: Setting) -> bool:
    """Whether `shared` is `alone` with queries that share: at its budget, or at one that reads as many keys."""
    if replace(shared, q_block=1) == alone:
        return True
    cells = [table.cell(length, s) for s in (shared, alone)]
    same = replace(shared, q_block=1, budget=None) == replace(alone, budget=None)
    read = [c.keys for c in cells if c is not None]
    return same and len(read) == 2 and abs(read[0] - read[1]) <= NEAR * read[1]


def _audit_answers(table: AuditTable) -> list[str]:
    return [answer for n in table.lengths if (answer := _audit_answer(table, n))]


def _audit_answer(table: AuditTable, length: int) -> str:
    plan = table.plan(length)
    if not plan:
        return ""
    mass = min({m for _, m, _ in plan}, key=lambda m: abs(m - 0.95))
    layers = sorted(((i, layer) for layer, m, i in plan if m == mass), key=lambda entry: entry[0].point)
    most, layer = layers[-1]
    least, other = layers[0]
    return (
        f"At {tokens(length)} tokens: {most.point:,.0f} keys per query{_range(most)} retain {mass:.0%} of the attention "
        f"mass in every full-attention layer; layer {layer} needs the most, layer {other} the least ({least.point:,.0f})."
    )


def _range(interval: Interval, spec: str = ",.0f") -> str:
    if math.isnan(interval.low):
        return ""
    return f" (95 % interval {interval.low:{spec}} to {interval.high:{spec}})"


# -- evaluation


def _eval_sections(table: EvalTable) -> list[Section]:
    if not table.lengths:
        return []
    sections = (_accuracy_section(table), _gaps_section(table), _oracle_section(table), _settings_section(table))
    return [s for s in sections if s.items]


def _accuracy_section(table: EvalTable) -> Section:
    items: list[Figure | Table] = []
    caption = (
        "Score against achieved keys per query, mean over tasks. Bars and the grey band around dense are 95 % intervals "
        f"(cluster bootstrap over haystacks). {_conditions(table)}"
    )
    _add(items, "accuracy", figures.accuracy_by_keys(table), caption)
    for n in table.compared:
        caption = f"The same for each task at {tokens(n)} tokens; x: achieved keys per query, y: score (%)."
        _add(items, f"tasks-{n}", figures.accuracy_by_task(table, n), caption, folded=n != table.compared[-1])
    items += [_dense_table(table)]
    return Section(title="Accuracy against achieved keys", items=items)


def _dense_table(table: EvalTable) -> Table:
    dense = table.dense()
    rows = []
    for task in [*table.tasks, None]:
        cells = [table.cell(n, dense, task) if dense else None for n in table.lengths]
        rows.append([task or "mean over tasks", *(_score(c.score if c else None) for c in cells)])
    header = ["task", *(f"{tokens(n)} tokens" for n in table.lengths)]
    return Table(caption="Dense attention: score (%) with 95 % interval.", header=header, rows=rows if dense else [])


def _score(score: Interval | None) -> str:
    return "" if score is None else f"{_points(score.point)} [{_points(score.low)}, {_points(score.high)}]"


def _oracle_section(table: EvalTable) -> Section:
    text = [
        "The oracle sees the model's own attention mass: it shows what a selection could do, and accelerates nothing.",
        f"With more than one query sharing, the {NOT_CAUSAL}.",
        f"Bold: {_ENOUGH}. A dash: the budget is below the smallest workable one.",
    ]
    items: list[Figure | Table] = []
    for n in table.compared:
        caption = f"Granularity of selection at {tokens(n)} tokens, at achieved keys; mean over tasks, 95 % intervals."
        _add(items, f"granularity-{n}", figures.granularity(table, n), caption)
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
        header=["nominal budget", *map(_granularity, sizes)],
        rows=rows,
    )


def _granularity(size: tuple[int, int]) -> str:
    queries = "per query" if size[0] == 1 else f"{size[0]} queries share"
    keys = "tokens" if size[1] == 1 else f"groups of {size[1]}"
    return f"{queries}, {keys}"


def _loss(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.infeasible:
        return "-"
    if cell.score is None:
        return "not run on every task"
    if cell.loss is None:
        return ""
    text = f"{_points(cell.loss.point)} [{_points(cell.loss.low)}, {_points(cell.loss.high)}]; {cell.keys:,.0f}"
    return f"**{text}**" if cell.enough else text


def _gaps_section(table: EvalTable) -> Section:
    items: list[Figure | Table] = []
    pooled = [table.compared] if len(table.compared) > 1 else []
    for lengths in [*pooled, *([n] for n in table.compared)]:
        gaps = find_gaps(table, lengths)
        if not gaps:
            continue
        where = f"{' and '.join(map(tokens, lengths))} tokens{' together' if len(lengths) > 1 else ''}"
        chart = figures.gap_bars(gaps, where)
        caption = "Points lost at each step, paired on the same samples, mean over tasks, with 95 % intervals."
        _add(items, f"gaps-{'-'.join(map(str, lengths))}", chart, caption, folded=len(lengths) == 1 and bool(pooled))
        items.append(_gaps_table(table, gaps, lengths, where))
        by_task = _gaps_by_task(table, gaps, lengths, where)
        items += [by_task] if any(any(row[1:]) for row in by_task.rows) else []
    text = [
        "Dense minus oracle minus indexer minus shared: each step in points, on the same samples; a negative one gains.",
        "The oracle, per-query indexer and untrained indexer of a row have the same budget. Sharing is compared at equal "
        "achieved keys, the per-query score interpolated between budgets.",
        "Support recall: share of the keys of an oracle with the same budget and granularity, over sampled prompt queries.",
    ]
    return Section(title="The gaps: where quality is lost", text=text, items=items)


def _gaps_table(table: EvalTable, gaps: Sequence[Gap], lengths: Sequence[int], where: str) -> Table:
    rows = []
    for served in dict.fromkeys(g.served for g in gaps):
        mine = {g.name: g for g in gaps if g.served == served}
        recall = [table.recall(n, served) for n in lengths]
        known = [r for r in recall if r is not None]
        rows.append(
            [
                budget_name(served.budget),
                _granularity(served.granularity) + served.kept_dense,
                *(_gap(mine.get(name)) for name in ("oracle", "indexer", "sharing", "realization", "total")),
                f"{sum(known) / len(known):.3f}" if known else "",
            ]
        )
    header = ["budget", "granularity", "oracle gap", "indexer gap", "sharing gap", "realization gap", "total", "recall"]
    shared = any(g.served.q_block > 1 for g in gaps)
    marked = (
        f" {NOT_CAUSAL.capitalize()} where queries share; their other gaps are those of the row per query."
        if shared
        else ""
    )
    return Table(caption=f"{where}: points with 95 % interval, mean over tasks.{marked}", header=header, rows=rows)


def _gap(gap: Gap | None) -> str:
    if gap is None:
        return ""
    if gap.interval is None:
        return f"not measured ({gap.reason})"
    note = f" {gap.reason}" if gap.reason else ""
    return f"{_points(gap.interval.point)} [{_points(gap.interval.low)}, {_points(gap.interval.high)}]{note}"


def _gaps_by_task(table: EvalTable, gaps: Sequence[Gap], lengths: Sequence[int], where: str) -> Table:
    served = [s for s in dict.fromkeys(g.served for g in gaps) if s.q_block == 1]
    dense = table.dense()
    rows = []
    for task in table.tasks:
        found = []
        for s in served:
            oracle = replace(s, selector="oracle")
            terms = [{n: {dense: 1.0, oracle: -1.0} for n in lengths}, {n: {oracle: 1.0, s: -1.0} for n in lengths}]
            found += [_score(table.contrast(t, task)) for t in terms if dense is not None]
        rows.append([task, *found])
    header = [
        "task",
        *(f"{step}, {_served_name(s)}" for s in served for step in ("dense - oracle", "oracle - indexer")),
    ]
    return Table(
        caption=f"{where}: oracle and indexer gap of each task in points.", header=header, rows=rows, folded=True
    )


def _served_name(s: Setting) -> str:
    groups = f" in groups of {s.kv_block}" if s.kv_block > 1 else ""
    return f"{budget_name(s.budget)} keys{groups}{s.kept_dense}"


def _settings_section(table: EvalTable) -> Section:
    cells = [(n, s, table.cell(n, s)) for n in table.lengths for s in table.settings if not table.oracle(s)]
    rows = [
        [tokens(n), *_setting(s), _score(c.score), _loss(c).replace("**", "").partition(";")[0], _keys(c)]
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
        _granularity(s.granularity) + s.kept_dense + note,
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


# -- audit


def _audit_sections(table: AuditTable) -> list[Section]:
    if not table.lengths:
        return []
    return [s for s in (_mass_section(table), _model_section(table), _neighbour_section(table)) if s.items]


def _mass_section(table: AuditTable) -> Section:
    items: list[Figure | Table] = []
    chart = figures.layer_heat_map(table, "retained_mass_mean", "retained attention mass (fraction)")
    _add(
        items,
        "retained-mass",
        chart,
        "Attention mass retained per layer and budget, per query, mean over queries and texts.",
    )
    caption = "Per-layer plan: smallest budget that retains the mass; bars are 95 % intervals over texts."
    _add(items, "plan", figures.per_layer_plan(table), caption)
    items += _plan_tables(table)
    for n in table.lengths:
        caption = f"Granularity of selection at {tokens(n)} tokens, at achieved keys; 95 % intervals over texts."
        _add(items, f"granularity-mass-{n}", figures.granularity_mass(table, n), caption)
        items += [t for t in [_granularity_table(table, n)] if t]
    return Section(title="Attention mass", items=items)


def _plan_tables(table: AuditTable) -> list[Table]:
    tables = []
    for n in table.lengths:
        plan = {(layer, mass): i for layer, mass, i in table.plan(n)}
        masses = sorted({mass for _, mass in plan})
        rows = [
            [str(layer), *(_number(plan.get((layer, m)), ",.0f") for m in masses)]
            for layer in sorted({x for x, _ in plan})
        ]
        header = ["layer", *(f"{m:.0%} of the mass" for m in masses)]
        if rows:
            tables.append(
                Table(caption=f"Plan at {tokens(n)} tokens: keys per query, 95 % interval.", header=header, rows=rows)
            )
    return tables


def _granularity_table(table: AuditTable, length: int) -> Table | None:
    rows = []
    for s in table.settings:
        if table.oracle(s) and (mass := table.over_layers(length, s, "retained_mass_mean")):
            keys = table.over_layers(length, s, "keys_read_mean")
            rows.append(
                [
                    budget_name(s.budget),
                    _granularity(s.granularity),
                    _number(keys, ",.0f", bare=True),
                    _number(mass, ".3f"),
                ]
            )
    if not rows:
        return None
    return Table(
        caption=f"Retained mass at {tokens(length)} tokens, mean over layers, with 95 % interval over texts. Where queries "
        f"share, {NOT_CAUSAL}.",
        header=["budget", "granularity", "achieved keys", "retained mass"],
        rows=rows,
        folded=True,
    )


def _model_section(table: AuditTable) -> Section:
    items: list[Figure | Table] = []
    for n in table.lengths:
        rows = []
        for s in table.settings:
            values = [table.value(n, s, -1, m) for m in ("logit_kl", "top1_agreement", "ppl_change")]
            if any(values):
                note = "" if s.causal else " (not causal)"
                numbers = [_number(v, spec) for v, spec in zip(values, (".2g", ".4f", "+.2%"), strict=True)]
                rows.append([label_of(s.selector), budget_name(s.budget), _granularity(s.granularity) + note, *numbers])
        header = ["selector", "budget", "granularity", "logit KL (nats)", "top-1 agreement", "perplexity change"]
        if rows:
            caption = f"All full-attention layers sparse, {tokens(n)} tokens, with 95 % interval over texts."
            items.append(Table(caption=caption, header=header, rows=rows, folded=len(rows) > 12))
    chart = figures.layer_heat_map(table, "logit_kl", "logit KL (nats), this layer sparse alone", log=True)
    _add(items, "logit-kl", chart, "KL of the final logits with one layer sparse at a time.")
    return Section(title="Effect on the model's output", items=items)


def _neighbour_section(table: AuditTable) -> Section:
    items: list[Figure | Table] = []
    caption = "Growth of the union of neighbouring queries' supports: what a tile of queries must gather together."
    _add(items, "union-growth", figures.union_growth(table), caption)
    return Section(title="Neighbouring queries", items=items)


def _number(interval: Interval | None, spec: str, *, bare: bool = False) -> str:
    if interval is None:
        return ""
    text = f"{interval.point:{spec}}"
    return text if bare or math.isnan(interval.low) else f"{text} [{interval.low:{spec}}, {interval.high:{spec}}]"


# -- conditions


def _notes(evals: EvalTable, audits: AuditTable, runs: Sequence[LoadedRun]) -> list[str]:
    notes = []
    if evals.variant:
        notes.append(f"Enough means {_ENOUGH}, paired on the same samples.")
        notes.append("The oracle selects by the model's own attention mass; it is a diagnostic, not an accelerator.")
        if len({v for s in evals.settings if s.selector == "oracle" and (v := s.variant())}) > 1:
            notes.append(
                f"The figures show the oracle with {_variant(evals.variant)}; the others are in the last tables."
            )
    if any(not s.causal for s in [*evals.settings, *audits.settings]):
        notes.append(f"Settings in which queries share: {NOT_CAUSAL}.")
    if evals.repeated:
        notes.append(f"{evals.repeated:,} samples occur in more than one run; the latest run counts.")
    if changed := [run.id for run in runs if _environments(run) > 1]:
        notes.append(f"Resumed with other versions or on another device: {', '.join(changed)} (see the manifests).")
    return notes


def _variant(s: Setting) -> str:
    return f"share={s.share}, pool={s.pool}, sink={s.sink}, window={s.window}, decode={s.decode}{s.kept_dense}"


def _environments(run: LoadedRun) -> int:
    attempts: list[dict[str, Any]] = run.manifest.get("attempts", [])
    return len({str([a.get(name) for name in ("versions", "git_commit", "device")]) for a in attempts})


def _facts(runs: Sequence[LoadedRun], command: str) -> list[tuple[str, str]]:
    first = runs[0].manifest
    facts = [("model", f"{first['model']} (weights {(first.get('weights_hash') or 'not hashed')[:12]})")]
    facts += [("machine", text) for text in dict.fromkeys(_machine(run.manifest) for run in runs)]
    facts += [("versions", text) for text in dict.fromkeys(_versions(run.manifest) for run in runs)]
    facts += [("reproduce", text) for text in dict.fromkeys([*(run.manifest["command"] for run in runs), command])]
    facts += [("run", f"{run.id}, {len(run.records):,} records, finished {run.manifest['finished']}") for run in runs]
    return facts


def _machine(manifest: dict[str, Any]) -> str:
    m = manifest["machine"]
    return f"{manifest['device']}; {m['processor']}, {m['cores']} cores, {m['system']}"


def _versions(manifest: dict[str, Any]) -> str:
    commit = manifest.get("git_commit")
    text = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return f"{text}, commit {commit[:10] + '+' * commit.endswith('+')}" if commit else text


def _add(items: list[Figure | Table], name: str, chart: Any, caption: str, *, folded: bool = False) -> None:
    if chart is not None:
        items.append(Figure(name=name, svg=figures.write_svg(chart, name), caption=caption, folded=folded))
