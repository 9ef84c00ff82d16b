"""What a report says of the gaps: the points lost at each step between dense attention and what is served."""

from collections.abc import Sequence
from dataclasses import replace

from topmass.report import figures
from topmass.report.aggregate import EvalTable, Setting, budget_keys, budget_name
from topmass.report.content import Figure, Section, Table, add_figure
from topmass.report.figures import tokens
from topmass.report.gaps import NEAR, Gap, find_gaps
from topmass.report.wording import NOT_CAUSAL, budget_words, granularity_words, interval_points, points

__all__ = ["answers", "section"]


def answers(table: EvalTable) -> list[str]:
    """A sentence for each length at which an indexer chose per query."""
    return [answer for n in table.compared if (answer := _answer(table, n))]


def _answer(table: EvalTable, length: int) -> str:
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
    parts = [f"{points(i.point)} to {what} ({points(i.low)} to {points(i.high)})" for what, i in lost if i]
    where = f"At {tokens(length)} tokens and {budget_words(chosen)} per query{chosen.notes}"
    return f"{where}, points lost with 95 % intervals: {', '.join(parts)}."


def _shares(table: EvalTable, length: int, shared: Setting, alone: Setting) -> bool:
    """Whether `shared` is `alone` with queries that share: at its budget, or at one that reads as many keys."""
    if shared.alone() == alone:
        return True
    cells = [table.cell(length, s) for s in (shared, alone)]
    same = replace(shared.alone(), budget=None) == replace(alone, budget=None)
    read = [c.keys for c in cells if c is not None]
    return same and len(read) == 2 and abs(read[0] - read[1]) <= NEAR * read[1]


def section(table: EvalTable) -> Section:
    """All lengths together, then each alone: a figure and its tables."""
    items: list[Figure | Table] = []
    pooled = [table.compared] if len(table.compared) > 1 else []
    for lengths in [*pooled, *([n] for n in table.compared)]:
        gaps = find_gaps(table, lengths)
        if not gaps:
            continue
        where = f"{' and '.join(map(tokens, lengths))} tokens{' together' if len(lengths) > 1 else ''}"
        chart = figures.gap_bars(gaps, where)
        caption = "Points lost at each step, paired on the same samples, mean over tasks, with 95 % intervals."
        add_figure(
            items, f"gaps-{'-'.join(map(str, lengths))}", chart, caption, folded=len(lengths) == 1 and bool(pooled)
        )
        items.append(_table(table, gaps, lengths, where))
        by_task = _by_task(table, gaps, lengths, where)
        items += [by_task] if any(any(row[1:]) for row in by_task.rows) else []
    text = [
        "Dense minus oracle minus indexer minus shared: each step in points, on the same samples; a negative one gains.",
        "The oracle, per-query indexer and untrained indexer of a row have the same budget. Sharing is compared at equal "
        "achieved keys, the per-query score interpolated between budgets.",
        "Support recall: share of the keys of an oracle with the same budget and granularity, over sampled prompt queries.",
    ]
    return Section(title="The gaps: where quality is lost", text=text, items=items)


def _table(table: EvalTable, gaps: Sequence[Gap], lengths: Sequence[int], where: str) -> Table:
    rows = []
    for served in dict.fromkeys(g.served for g in gaps):
        mine = {g.name: g for g in gaps if g.served == served}
        recall = [table.recall(n, served) for n in lengths]
        known = [r for r in recall if r is not None]
        rows.append(
            [
                budget_name(served.budget),
                granularity_words(served.granularity) + served.notes,
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
    return interval_points(gap.interval) + note


def _by_task(table: EvalTable, gaps: Sequence[Gap], lengths: Sequence[int], where: str) -> Table:
    served = [s for s in dict.fromkeys(g.served for g in gaps) if s.q_block == 1]
    dense = table.dense()
    rows = []
    for task in table.tasks:
        found = []
        for s in served:
            oracle = s.oracle()
            terms = [{n: {dense: 1.0, oracle: -1.0} for n in lengths}, {n: {oracle: 1.0, s: -1.0} for n in lengths}]
            found += [interval_points(table.contrast(t, task)) for t in terms if dense is not None]
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
    return f"{budget_name(s.budget)} keys{groups}{s.notes}"
