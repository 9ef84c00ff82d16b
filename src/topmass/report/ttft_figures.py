"""Figures of times to first token: against length, and score against time."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from topmass.report.figures import _DENSE, _INK, _NAMED, _SPARSE, PALETTE, _finish, _log_scale, _or, _token_axis, tokens
from topmass.report.frontier import Frontier, Point

__all__ = ["score_by_time", "ttft_by_length"]

Row = dict[str, Any]

FLOOR = "#56B4E9"
# what a selection is made for: the kernels differ
_UNITS = {"circle": "per query", "square": "queries share", "triangle-up": "key groups"}


def ttft_by_length(frontier: Frontier) -> alt.TopLevelMixin | None:
    """Milliseconds against prompt length: dense kernels, the fastest configurations, the floor; by name at a single length."""
    cases = frontier.table.line(frontier.batch, frontier.chunk)
    sparse = list(dict.fromkeys(name for c in reversed(cases) for name in _quickest(c, len(_SPARSE))))[: len(_SPARSE)]
    colours = _DENSE | {"stock": "#b0b0b0", "floor": FLOOR} | dict(zip(sparse, _SPARSE, strict=False))
    rows = [
        {"name": name, "x": c.length, "y": t.median, "low": t.p10, "high": t.p90}
        for c in cases
        for name in c.names()
        if name in colours and (t := c.time(name))
    ]
    if not rows:
        return None
    if len({r["x"] for r in rows}) == 1:
        return _ttft_by_name(rows, colours, f"{frontier.model}, {tokens(rows[0]['x'])} tokens, {frontier.device}")
    names = [n for n in colours if n in {r["name"] for r in rows}]
    x = alt.X("x:Q", title="prompt length (tokens)", scale=_log_scale([r["x"] for r in rows]), axis=_token_axis())
    domain = [min(r["low"] for r in rows) / 1.3, max(r["high"] for r in rows) * 1.3]
    y = alt.Y("y:Q", title="time to first token (ms)", scale=alt.Scale(type="log", domain=domain, nice=False))
    tint = alt.Color("name:N", scale=alt.Scale(domain=names, range=[colours[n] for n in names]), legend=_NAMED)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=tint)
    layers = [
        base.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=1.8).encode(y=y),
        base.mark_point(filled=True, size=40, opacity=1).encode(y=y),
    ]
    return _finish(alt.LayerChart(layer=layers, width=460, height=280, title=f"{frontier.model}, {frontier.device}"))


def _ttft_by_name(rows: Sequence[Row], colours: dict[str, str], title: str) -> alt.TopLevelMixin:
    rows = sorted(rows, key=lambda row: row["y"])
    names = [row["name"] for row in rows]
    x = alt.X("y:Q", title="time to first token (ms), from 0", scale=alt.Scale(domainMin=0))
    y = alt.Y("name:N", title=None, sort=names, axis=alt.Axis(labelLimit=320, grid=False))
    tint = alt.Color("name:N", scale=alt.Scale(domain=names, range=[colours[n] for n in names]), legend=None)
    base = alt.Chart(alt.Data(values=rows)).encode(y=y, color=tint)
    layers = [
        base.mark_rule(strokeWidth=1.4).encode(x=alt.X("low:Q"), x2="high:Q"),
        base.mark_point(filled=True, size=50, opacity=1).encode(x=x),
    ]
    return _finish(alt.LayerChart(layer=layers, width=460, height=alt.Step(22), title=title))


def _quickest(case: Any, most: int) -> list[str]:
    found = [(t.median, name) for name in case.names("sparse") if (t := case.time(name))]
    return [name for _, name in sorted(found)[:most]]


def score_by_time(frontier: Frontier, length: int) -> alt.TopLevelMixin | None:
    """Score change against time to first token, and against a layer's time.

    The frontier is a line, diagnostics are hollow; shapes tell selections per query, shared ones, and groups of keys apart.
    """
    points = [p for p in frontier.points[length] if p.change is not None]
    if len(points) < 2:
        return None
    panels = [
        _panel(points, "time to first token (ms)", [p.ttft.median for p in points], [p.best for p in points]),
        _panel(
            points,
            "one full-attention layer (ms)",
            [p.layer.median if p.layer else float("nan") for p in points],
            [p.best_layer for p in points],
        ),
    ]
    title = alt.Title(f"{frontier.model}, {tokens(length)} tokens, {frontier.device}")
    return _finish(alt.hconcat(*panels, spacing=24).properties(title=title))


def _panel(points: Sequence[Point], x_title: str, times: Sequence[float], best: Sequence[bool]) -> alt.LayerChart:
    rows = [_dot(p, t, b) for p, t, b in zip(points, times, best, strict=True) if t == t]
    kinds = list(dict.fromkeys(r["kind"] for r in rows))
    scale = alt.Scale(domain=kinds, range=[PALETTE.get(k, _INK) for k in kinds])
    span = [r["x"] for r in rows]
    domain = [min(span) / 1.1, max(span) * 1.3]
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(type="log", domain=domain, nice=False), axis=alt.Axis(grid=False))
    y = alt.Y("y:Q", title="score minus dense (points)")
    tint = alt.Color("kind:N", scale=scale, legend=_NAMED)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=tint)
    known = base.transform_filter("datum.best")
    units = [u for u in _UNITS.values() if u in {r["unit"] for r in rows}]
    marks = alt.Scale(domain=units, range=[mark for mark, unit in _UNITS.items() if unit in units])
    legend = alt.Legend(orient="top", title=None) if len(units) > 1 else None
    shape = alt.Shape("unit:N", scale=marks, legend=legend)
    layers = [
        alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=_INK, strokeDash=[4, 3]).encode(y=alt.Y("zero:Q")),
        base.mark_rule(strokeWidth=1.2, opacity=0.6).encode(y=alt.Y("low:Q"), y2="high:Q"),
        known.mark_line(strokeWidth=1.4, interpolate="step-after").encode(y=y, color=alt.value(_INK)),
        base.transform_filter("!datum.hollow").mark_point(filled=True, size=45, opacity=1).encode(y=y, shape=shape),
        base.transform_filter("datum.hollow").mark_point(filled=False, size=45, opacity=1).encode(y=y, shape=shape),
        known.mark_text(align="left", dx=6, dy=-7, fontSize=9).encode(y=y, text="text:N", color=alt.value(_INK)),
    ]
    return alt.LayerChart(layer=layers, width=400, height=280)


def _dot(p: Point, x: float, best: bool) -> Row:
    assert p.change is not None
    point = 100 * p.change.point
    return {
        "x": x,
        "y": point,
        "low": 100 * _or(p.change.low, p.change.point),
        "high": 100 * _or(p.change.high, p.change.point),
        "kind": p.setting.selector,
        "hollow": p.diagnostic,
        "unit": "key groups" if p.setting.kv_block > 1 else "queries share" if p.setting.q_block > 1 else "per query",
        "best": best,
        "text": p.name.removesuffix(" layer"),
    }
