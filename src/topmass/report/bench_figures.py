"""Figures of kernel benchmarks: time against length, its split by stage, and time against union growth."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import altair as alt

from topmass.report.figures import _DENSE, _INK, _NAMED, _SPARSE, PALETTE, _finish, _log_scale, _token_axis, tokens
from topmass.report.timings import BenchCase, BenchTable

__all__ = ["FIGURES", "time_by_growth", "time_by_length", "time_by_stage"]

Row = dict[str, Any]

_DENSE_NAMES = {"fa2": "FlashAttention-2", "cudnn": "cuDNN", "fa3": "FlashAttention-3", "sdpa": "SDPA on CPU"}
_STAGES = {
    "index": PALETTE["indexer"],
    "union": PALETTE["previous_layer"],
    "attend": PALETTE["oracle"],
    "lse": PALETTE["streaming"],
    "select": PALETTE["indexer"],
}
_WIDTH, _HEIGHT = 300, 250


def time_by_length(table: BenchTable, what: str) -> alt.TopLevelMixin | None:
    """Milliseconds against prompt length, one panel a shape, one line a dense kernel and one a selection."""
    rows = []
    for line in table.lines(what):
        name = _name(line)
        for case in line:
            rows += [_row(case, dense, _DENSE_NAMES.get(dense, dense), case.length) for dense in case.names("dense")]
            rows.append(_row(case, what, name, case.length))
    known = [row for row in rows if row is not None]
    if len({row["x"] for row in known}) < 2:
        return None
    x = alt.X("x:Q", title="prompt length (tokens)", scale=_log_scale([r["x"] for r in known]), axis=_token_axis())
    return _panels(known, x, marks=[])


def time_by_growth(table: BenchTable, what: str) -> alt.TopLevelMixin | None:
    """Milliseconds against the measured union growth, at the greatest length of a shape that has several."""
    rows: list[Row] = []
    for shape in dict.fromkeys(case.shape for case in table.of(what)):
        grown = [c for c in table.of(what) if c.shape == shape and c.growth is not None and _growth(c)]
        length = max((c.length for c in grown if sum(o.length == c.length for o in grown) > 1), default=None)
        for case in sorted((c for c in grown if c.length == length), key=_growth):
            name, x = f"{what}, {case.selection}", _growth(case)
            known = [_row(case, d, _DENSE_NAMES.get(d, d), x) for d in case.names("dense")] + [
                _row(case, what, name, x)
            ]
            rows += [row | {"panel": f"{shape}, {tokens(case.length)} tokens"} for row in known if row is not None]
    if not rows:
        return None
    marks = _own(table)
    span = [row["x"] for row in rows] + [mark["x"] for mark in marks]
    scale = alt.Scale(domain=[1.0, max(span) * 1.04], nice=False)
    x = alt.X("x:Q", title="U/K: union of 32 neighbours' selections / one", scale=scale, axis=alt.Axis(grid=False))
    return _panels(rows, x, marks=marks)


def time_by_stage(table: BenchTable, what: str) -> alt.TopLevelMixin | None:
    """Milliseconds of the stages, stacked, one panel a shape, at the greatest length of each selection."""
    rows: list[Row] = []
    for line in table.lines(what):
        case = line[-1]
        times = {name: t.median for name in case.names("stage", "part") if name in _STAGES and (t := case.time(name))}
        if "union" in times and "attend" in times:
            # the union is a part of it
            times["attend"] = max(times["attend"] - times["union"], 0.0)
        at = f"{case.selection}{_at(case)}, {tokens(case.length)}"
        start = 0.0
        for name in (n for n in _STAGES if n in times):
            rows.append({"panel": case.shape, "bar": at, "stage": name, "a": start, "z": start + times[name]})
            start += times[name]
    if len({row["stage"] for row in rows}) < 2:
        return None
    names = [name for name in _STAGES if name in {row["stage"] for row in rows}]
    tint = alt.Color("stage:N", scale=alt.Scale(domain=names, range=[_STAGES[n] for n in names]), legend=_NAMED)
    panels = []
    for panel in dict.fromkeys(row["panel"] for row in rows):
        mine = [row for row in rows if row["panel"] == panel]
        y = alt.Y("bar:N", title=None, sort=None, axis=alt.Axis(labelLimit=260))
        base = alt.Chart(alt.Data(values=mine)).encode(y=y, x=alt.X("a:Q", title="time (ms)"), x2="z:Q", color=tint)
        bars = base.mark_bar(height=15)
        height = 26 * len({row["bar"] for row in mine})
        panels.append(alt.LayerChart(layer=[bars], title=panel, width=_WIDTH, height=height))
    return _finish(alt.concat(*panels, columns=1, spacing=10))


FIGURES = (
    ("time", time_by_length, "Time of one layer against length; bars are p10 to p90. Where inputs were made for a union growth, the line is that of U/K nearest to 1.5."),
    ("stages", time_by_stage, "Where the time goes, medians. `union` is timed alone and taken off `attend`, which contains it."),
    (
        "growth",
        time_by_growth,
        "Time against union growth at one length, beside the dense kernels of the same rounds. Dashed: what a model's own selections grow by, mean over its layers, at each length.",
    ),
)  # fmt: skip


def _growth(case: BenchCase) -> float:
    return case.value(case.what, "union_growth") or 0.0


def _at(case: BenchCase) -> str:
    return "" if case.growth is None else f", U/K {_growth(case):.1f}"


def _name(line: Sequence[BenchCase]) -> str:
    asked = {case.growth for case in line}
    at = f", U/K {growth:g}" if len(asked) == 1 and (growth := next(iter(asked))) is not None else ""
    return f"{line[0].what}, {line[0].selection}{at}"


def _row(case: BenchCase, name: str, label: str, x: int | float) -> Row | None:
    time = case.time(name)
    if time is None:
        return None
    colour = _DENSE.get(name, _INK) if case.role(name) == "dense" else ""
    return {
        "panel": case.shape,
        "name": label,
        "x": x,
        "y": time.median,
        "low": time.p10,
        "high": time.p90,
        "colour": colour,
    }


def _own(table: BenchTable) -> list[Row]:
    """One mark a length at which a model's own growth was measured."""
    found = [(length, fmean(values)) for length, values in sorted(table.own.items())]
    return [{"x": mean, "text": f"own at {tokens(length)}"} for length, mean in found]


def _panels(rows: Sequence[Row], x: alt.X, *, marks: Sequence[Row]) -> alt.TopLevelMixin:
    """One panel a shape; all share axes, colours and the legend."""
    sparse = list(dict.fromkeys(r["name"] for r in rows if not r["colour"]))
    colours = {r["name"]: r["colour"] or _SPARSE[sparse.index(r["name"]) % len(_SPARSE)] for r in rows}
    domain = [min(r["low"] for r in rows) / 1.3, max(r["high"] for r in rows) * 1.4]
    ticks = alt.Axis(values=[digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)])
    axis: Row = {
        "title": "time of one layer (ms)",
        "scale": alt.Scale(type="log", domain=domain, nice=False),
        "axis": ticks,
    }
    legend = alt.Legend(orient="top", title=None, symbolType="circle", columns=3, labelLimit=300)
    tint = alt.Color("name:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=legend)
    panels = []
    # lengths that several selections were timed at have several times of each dense kernel: the line goes through their means
    for panel in dict.fromkeys(r["panel"] for r in rows):
        base = alt.Chart(alt.Data(values=[r for r in rows if r["panel"] == panel])).encode(x=x, color=tint)
        layers = [
            base.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q", **axis), y2="high:Q"),
            base.mark_line(strokeWidth=1.8).encode(y=alt.Y("mean(y):Q", **axis)),
            base.mark_point(filled=True, size=34, opacity=1).encode(y=alt.Y("y:Q", **axis)),
        ]
        if marks:
            dashed = alt.Chart(alt.Data(values=list(marks))).encode(x=x)
            layers.append(dashed.mark_rule(color=_INK, strokeDash=[4, 3], strokeWidth=1))
            words = dashed.mark_text(angle=270, align="left", dx=4, dy=-6, fontSize=10, color=_INK)
            layers.append(words.encode(text="text:N", y=alt.value(_HEIGHT)))
        layered = alt.LayerChart(layer=layers, width=_WIDTH, height=_HEIGHT, title=panel)
        panels.append(layered)
    return _finish(alt.concat(*panels, columns=3, spacing=14))
