"""Figures of a report, as SVG without network. One palette; a selector has the same colour in every figure."""

import math
import re
from collections.abc import Sequence
from typing import Any

import altair as alt
import vl_convert

from topmass.report.aggregate import AuditTable, Cell, EvalTable, Setting, budget_name, budget_order
from topmass.report.gaps import Gap

__all__ = [
    "PALETTE",
    "accuracy_by_keys",
    "accuracy_by_task",
    "gap_bars",
    "granularity",
    "granularity_mass",
    "label_of",
    "layer_heat_map",
    "per_layer_plan",
    "tokens",
    "union_growth",
    "write_png",
    "write_svg",
]

# Okabe and Ito: told apart by readers with any colour vision
PALETTE = {
    "dense": "#1a1a1a",
    "oracle": "#0072B2",
    "indexer": "#D55E00",
    "untrained": "#e3ab85",
    "pooled": "#009E73",
    "previous_layer": "#CC79A7",
    "streaming": "#E69F00",
    "random": "#8a8a8a",
}
# shades of the oracle's colour, light is coarse: granularities are all oracles
_SHADES = [PALETTE["oracle"], "#3f9bd0", "#74b3dc", "#92bfda", "#b5cfde"]
_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross"]
_NAMES = {
    "previous_layer": "previous layer's",
    "pooled": "block-pooled",
    "streaming": "sink + window",
    "untrained": "untrained indexer",
}
_GAPS = {
    "oracle gap": PALETTE["oracle"],
    "indexer gap": PALETTE["indexer"],
    "sharing gap": PALETTE["previous_layer"],
    "dense minus served": PALETTE["dense"],
}
# dense kernels, and configurations of the sparse one
_DENSE = {"fa2": "#8a8a8a", "cudnn": PALETTE["streaming"], "fa3": PALETTE["dense"], "sdpa": PALETTE["dense"]}
_SPARSE = [PALETTE["indexer"], PALETTE["oracle"], PALETTE["pooled"], PALETTE["previous_layer"]]
_NAMED = alt.Legend(orient="top", title=None, symbolType="circle", columns=4, labelLimit=260)
_FONT = "Helvetica, Arial, sans-serif"
_INK, _GRID = "#333333", "#e6e6e6"
# shortest side of a label, as a share of the height of a panel
_LABEL = 0.068

Row = dict[str, Any]


def label_of(selector: str) -> str:
    """Name of a selector as a figure prints it."""
    return _NAMES.get(selector, selector)


def tokens(n: int | float) -> str:
    """A number of tokens as an axis prints it.

    Example:
        >>> tokens(16384), tokens(1536), tokens(1000)
        ('16K', '1.5K', '1000')
    """
    return f"{n / 1024:g}K" if n >= 1024 and n % 256 == 0 else f"{n:g}"


def write_svg(chart: alt.TopLevelMixin, prefix: str) -> str:
    """Render to SVG text whose ids start with `prefix`, so that several can stand in one page."""
    svg = vl_convert.vegalite_to_svg(chart.to_json(), show_warnings=False)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)


def write_png(chart: alt.TopLevelMixin, *, scale: float = 2.0) -> bytes:
    """Render to PNG."""
    return vl_convert.vegalite_to_png(chart.to_json(), scale=scale, show_warnings=False)


def accuracy_by_keys(table: EvalTable) -> alt.TopLevelMixin | None:
    """Macro score against achieved keys, one panel a length, one line a selector."""
    cells = table.cells(table.shown)
    panels = [_score_panel(table, [c for c in cells if c.length == n], n) for n in table.compared]
    panels = [p for p in panels if p is not None]
    return _finish(alt.concat(*panels, columns=3, spacing=14)) if panels else None


def accuracy_by_task(table: EvalTable, length: int) -> alt.TopLevelMixin | None:
    """Score against achieved keys at one length, one small panel a task."""
    panels = []
    for task in table.tasks_at(length):
        cells = [c for c in table.cells(table.shown, task=task) if c.length == length]
        if cells:
            base = _lines(cells, _band(cells), width=205, height=130, title=task, x_title="", y_title="")
            panels.append(base)
    if not panels:
        return None
    selectors = sorted({s.selector for s in table.settings if table.shown(s)}, key=_order)
    chart = alt.concat(*panels, columns=4, spacing=12)
    return _finish(alt.vconcat(_legend([(label_of(s), PALETTE.get(s, _INK)) for s in selectors]), chart, spacing=6))


def granularity(table: EvalTable, length: int) -> alt.TopLevelMixin | None:
    """Macro score of the oracle at several granularities, at achieved keys: queries sharing, keys grouped."""
    cells = [c for c in table.cells(lambda s: s.selector == "dense" or table.oracle(s)) if c.length == length]
    return _granularity_panels(cells, "score, mean over tasks (%)")


def granularity_mass(table: AuditTable, length: int) -> alt.TopLevelMixin | None:
    """Retained mass of the oracle at several granularities, at achieved keys, mean over layers."""
    cells = []
    for s in table.settings:
        mass, keys = (table.over_layers(length, s, m) for m in ("retained_mass_mean", "keys_read_mean"))
        if table.oracle(s) and mass and keys:
            cells.append(Cell(length=length, setting=s, task=None, keys=keys.point, score=mass, loss=None))
    return _granularity_panels(sorted(cells, key=lambda c: c.keys), "retained mass, mean over layers (%)")


def _granularity_panels(cells: Sequence[Cell], y_title: str) -> alt.TopLevelMixin | None:
    panels = []
    for axis, unit, title in (
        (0, "{} sharing", "Queries that share one selection (not causal above 1)"),
        (1, "groups of {}", "Keys taken together"),
    ):
        mine = [c for c in cells if c.setting.selector == "oracle" and c.setting.granularity[1 - axis] == 1]
        sizes = sorted({c.setting.granularity[axis] for c in mine})
        names = {g: unit.format(g) if g > 1 else ("per query", "tokens")[axis] for g in sizes}
        series = [
            (names[g], [c for c in mine if c.setting.granularity[axis] == g], _shade(i)) for i, g in enumerate(sizes)
        ]
        if len(sizes) > 1:
            panels.append(_series_panel(series, _band(cells), title, y_title=y_title))
    return _finish(alt.hconcat(*panels, spacing=20)) if panels else None


def layer_heat_map(table: AuditTable, metric: str, title: str, *, log: bool = False) -> alt.TopLevelMixin | None:
    """A metric of each layer and budget of the per-query oracle, one panel a length."""
    panels = []
    for length in table.lengths:
        rows = _heat_rows(table, length, metric)
        if rows:
            panels.append(_heat_panel(rows, f"{tokens(length)} tokens", title, log=log))
    return _finish(alt.concat(*panels, columns=2, spacing=20)) if panels else None


def per_layer_plan(table: AuditTable) -> alt.TopLevelMixin | None:
    """Smallest budget of each layer that retains a given mass, with intervals over texts."""
    if not table.lengths:
        return None
    length = table.lengths[-1]
    entries = table.plan(length)
    if not entries:
        return None
    masses = sorted({mass for _, mass, _ in entries})
    colour = {mass: _shade(len(masses) - 1 - i) for i, mass in enumerate(masses)}
    rows = [
        {
            "layer": str(layer),
            "mass": f"{mass:.0%} of the mass",
            "low": _positive(i.low, i.point),
            "high": _positive(i.high, i.point),
            "keys": i.point,
        }
        for layer, mass, i in entries
    ]
    scale = alt.Scale(domain=[f"{m:.0%} of the mass" for m in masses], range=[colour[m] for m in masses])
    x = alt.X("layer:O", title="full-attention layer", sort=None, axis=alt.Axis(labelAngle=0))
    y = alt.Y(
        "keys:Q",
        title="keys per query",
        scale=_log_scale([r["low"] for r in rows] + [r["high"] for r in rows]),
        axis=_token_axis(),
    )
    offset = alt.XOffset("mass:N", sort=None)
    tint = alt.Color("mass:N", scale=scale, legend=alt.Legend(orient="top", title=None, symbolType="circle"))
    base = alt.Chart(alt.Data(values=rows))
    dots = base.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, xOffset=offset, color=tint)
    bars = base.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", xOffset=offset, color=tint)
    layers = len({r["layer"] for r in rows})
    return _finish(
        (bars + dots).properties(width=min(900, 60 + 90 * layers), height=230, title=f"{tokens(length)} tokens")
    )


def union_growth(table: AuditTable) -> alt.TopLevelMixin | None:
    """Keys in the union of the supports of neighbouring queries, over the keys of one."""
    setting = _middle_budget(table)
    if setting is None:
        return None
    length = table.lengths[-1]
    rows = []
    for layer in table.layers:
        for metric in table.metrics:
            if metric.startswith("union_growth_") and (i := table.value(length, setting, layer, metric)):
                tile = int(metric.rpartition("_")[2])
                rows.append(
                    {
                        "layer": f"layer {layer}",
                        "tile": tile,
                        "y": i.point,
                        "low": _or(i.low, i.point),
                        "high": _or(i.high, i.point),
                    }
                )
    if not rows:
        return None
    labels = [r for r in rows if r["tile"] == max(q["tile"] for q in rows)]
    x = alt.X(
        "tile:Q",
        title="neighbouring queries in a tile",
        scale=_log_scale([r["tile"] for r in rows]),
        axis=_token_axis(),
    )
    y = alt.Y("y:Q", title="keys in the union / keys of one query", scale=alt.Scale(zero=False, domainMin=1))
    names = list(dict.fromkeys(r["layer"] for r in rows))
    if len(names) > 8:  # the extremes say enough
        labels = sorted(labels, key=lambda r: r["y"])[:: len(labels) - 1]
    tint = alt.Color("layer:N", scale=alt.Scale(domain=names, range=[PALETTE["oracle"]]), legend=None)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=tint)
    chart = base.mark_line(point=True).encode(y=y, detail="layer:N") + base.mark_rule().encode(y="low:Q", y2="high:Q")
    placed = _dodge([(r["layer"], r["y"]) for r in labels], 1.0, max(r["high"] for r in rows), 0.08)
    values = [{"layer": n, "y": p, "tile": labels[0]["tile"]} for n, p in placed.items()]
    chart += (
        alt.Chart(alt.Data(values=values))
        .mark_text(align="left", dx=8, fontSize=11)
        .encode(x=x, y=y, text="layer:N", color=tint)
    )
    title = f"{tokens(length)} tokens, budget {budget_name(setting.budget)}"
    return _finish(chart.properties(width=420, height=230, title=title))


def gap_bars(gaps: Sequence[Gap], title: str) -> alt.TopLevelMixin | None:
    """Each gap with its interval, one group of marks a served setting."""
    rows = [
        {
            "served": (g.served.budget or "").removeprefix("plan(").removesuffix(")")
            + (f", {g.served.q_block}, share" if g.served.q_block > 1 else "")
            + (f", groups, of {g.served.kv_block}" if g.served.kv_block > 1 else "")
            + g.served.notes,
            "gap": f"{g.name} gap" if g.name != "total" else "dense minus served",
            "point": 100 * g.interval.point,
            "low": 100 * _or(g.interval.low, g.interval.point),
            "high": 100 * _or(g.interval.high, g.interval.point),
        }
        for g in gaps
        if g.interval is not None
    ]
    if not rows:
        return None
    names = [n for n in _GAPS if n in {r["gap"] for r in rows}]
    # a line for each layer of a plan, and short ones for the granularity
    axis = alt.Axis(labelAngle=0, labelExpr="slice(split(datum.label, ', '), 0, 6)")
    x = alt.X("served:O", title="budget (keys per query)", sort=None, axis=axis)
    y = alt.Y("point:Q", title="points lost, mean over tasks")
    offset = alt.XOffset("gap:N", sort=names)
    scale = alt.Scale(domain=names, range=[_GAPS[n] for n in names])
    tint = alt.Color("gap:N", scale=scale, legend=alt.Legend(orient="top", title=None, symbolType="circle"))
    base = alt.Chart(alt.Data(values=rows))
    zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(color=_INK).encode(y=alt.Y("zero:Q"))
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(x=x, y=y, xOffset=offset, color=tint)
    bars = base.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", xOffset=offset, color=tint)
    groups = len({r["served"] for r in rows})
    return _finish((zero + bars + dots).properties(width=min(900, 60 + 110 * groups), height=230, title=title))


def _order(selector: str) -> int:
    names = list(PALETTE)
    return names.index(selector) if selector in names else len(names)


def _shade(i: int) -> str:
    return _SHADES[min(i, len(_SHADES) - 1)]


def _or(value: float, instead: float) -> float:
    return instead if math.isnan(value) else value


def _positive(value: float, instead: float) -> float:
    return max(_or(value, instead), 1.0)


def _band(cells: Sequence[Cell]) -> Cell | None:
    return next((c for c in cells if c.setting.selector == "dense"), None)


def _score_panel(table: EvalTable, cells: list[Cell], length: int) -> alt.LayerChart | None:
    if not cells:
        return None
    series = []
    for selector in sorted({c.setting.selector for c in cells} - {"dense"}, key=_order):
        mine = [c for c in cells if c.setting.selector == selector]
        series.append((label_of(selector), mine, PALETTE.get(selector, _INK)))
    return _series_panel(series, _band(cells), f"{tokens(length)} tokens", width=212, height=250)


def _series_panel(
    series: Sequence[tuple[str, list[Cell], str]],
    dense: Cell | None,
    title: str,
    *,
    width: int = 360,
    height: int = 250,
    y_title: str = "score, mean over tasks (%)",
) -> alt.LayerChart:
    """Lines with their names at the right end."""
    cells = [c for _, group, _ in series for c in group]
    chart = _lines(cells, dense, series=series, width=width, height=height, title=title, y_title=y_title)
    ends = [
        (name, group[-1].score.point * 100, colour, _SHAPES[i % len(_SHAPES)])
        for i, (name, group, colour) in enumerate(series)
        if group and group[-1].score
    ]
    if dense is not None and dense.score is not None:
        ends.append(("dense", dense.score.point * 100, PALETTE["dense"], "circle"))
    placed = _dodge([(name, y) for name, y, *_ in ends], 0.0, 100.0, _LABEL * 250 / height)
    rows = [{"name": n, "y": placed[n], "colour": colour, "shape": shape} for n, _, colour, shape in ends]
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("y:Q"), color=alt.Color("colour:N", scale=None))
    marks = base.mark_point(filled=True, size=40, opacity=1).encode(
        x=alt.value(width + 10), shape=alt.Shape("shape:N", scale=None)
    )
    names = base.mark_text(align="left", fontSize=11).encode(
        x=alt.value(width + 18), text="name:N", color=alt.value(_INK)
    )
    return chart + marks + names


def _lines(
    cells: Sequence[Cell],
    dense: Cell | None,
    *,
    series: Sequence[tuple[str, list[Cell], str]] | None = None,
    width: int,
    height: int,
    title: str,
    x_title: str = "achieved keys per query",
    y_title: str = "score, mean over tasks (%)",
) -> alt.LayerChart:
    """Score against achieved keys with intervals; dense as a band across."""
    if series is None:
        names = sorted({c.setting.selector for c in cells} - {"dense"}, key=_order)
        series = [(n, [c for c in cells if c.setting.selector == n], PALETTE.get(n, _INK)) for n in names]
    rows = [_point(name, c, colour, i) for i, (name, group, colour) in enumerate(series) for c in group]
    extent = [r["keys"] for r in rows] + ([dense.keys] if dense else [])
    x = alt.X("keys:Q", title=x_title or None, scale=_log_scale(extent), axis=_token_axis())
    y = alt.Y(
        "score:Q", title=y_title or None, scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(values=[0, 25, 50, 75, 100])
    )
    tint = alt.Color("colour:N", scale=None)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=tint)
    shape = alt.Shape("shape:N", scale=None)
    layers = [
        *_dense_band(dense, x, y),
        base.mark_rule(strokeWidth=1.4, opacity=0.75).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=1.8).encode(y=y, detail="name:N"),
        base.mark_point(filled=True, size=34, opacity=1).encode(y=y, shape=shape),
    ]
    return alt.LayerChart(layer=layers, width=width, height=height, title=title)


def _dense_band(dense: Cell | None, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    if dense is None or dense.score is None:
        return []
    row = {
        "score": dense.score.point * 100,
        "low": dense.score.low * 100,
        "high": dense.score.high * 100,
        "keys": dense.keys,
    }
    chart = alt.Chart(alt.Data(values=[row]))
    ink = PALETTE["dense"]
    return [
        chart.mark_rect(color=ink, opacity=0.1).encode(y=alt.Y("low:Q"), y2="high:Q"),
        chart.mark_rule(color=ink, strokeDash=[4, 3], strokeWidth=1.2).encode(y=y),
        chart.mark_point(color=ink, filled=True, size=40, opacity=1).encode(x=x, y=y),
    ]


def _point(name: str, cell: Cell, colour: str, i: int) -> Row:
    assert cell.score is not None
    return {
        "name": name,
        "keys": cell.keys,
        "score": cell.score.point * 100,
        "low": _or(cell.score.low, cell.score.point) * 100,
        "high": _or(cell.score.high, cell.score.point) * 100,
        "colour": colour,
        "shape": _SHAPES[i % len(_SHAPES)],
    }


def _dodge(points: Sequence[tuple[str, float]], low: float, high: float, gap: float) -> dict[str, float]:
    """Move labels apart so that neighbours are at least `gap` of the range apart, and none leaves it."""
    step = gap * (high - low)
    placed: dict[str, float] = {}
    ceiling = high
    for name, y in sorted(points, key=lambda p: -p[1]):
        placed[name] = min(y, ceiling)
        ceiling = placed[name] - step
    lowest = min(placed.values(), default=low)
    lift = max(0.0, low - lowest)
    if lift:
        floor = low
        for name in sorted(placed, key=placed.__getitem__):
            placed[name] = max(placed[name], floor)
            floor = placed[name] + step
    return placed


def _heat_rows(table: AuditTable, length: int, metric: str) -> list[Row]:
    settings = [s for s in table.settings if table.oracle(s) and s.per_query]
    found = [(layer, s.budget, table.value(length, s, layer, metric)) for s in settings for layer in table.layers]
    return [{"layer": n, "budget": b, "value": i.point, "text": _short(i.point)} for n, b, i in found if i is not None]


def _short(value: float) -> str:
    return f"{value:.0e}" if 0 < abs(value) < 0.0095 else f"{value:.2f}"


def _heat_panel(rows: list[Row], title: str, legend: str, *, log: bool) -> alt.LayerChart:
    budgets = sorted({r["budget"] for r in rows}, key=budget_order)
    layers = sorted({r["layer"] for r in rows})
    values = [r["value"] for r in rows]
    if log:
        low = max(min(values), max(values) * 1e-6, 1e-12)
        scale = alt.Scale(type="log", scheme="oranges", domain=[low, max(max(values), low * 10)], clamp=True)
        light = math.sqrt(low * max(values)) if max(values) > 0 else 1
        dark = f"datum.value > {light}"
    else:
        scale = alt.Scale(scheme="blues", domain=[0, 1])
        dark = "datum.value > 0.6"
    x = alt.X(
        "budget:O",
        sort=budgets,
        title="nominal budget (keys per query)",
        axis=alt.Axis(labelAngle=0, domain=False, ticks=False),
    )
    y = alt.Y("layer:O", sort=layers, title="layer", axis=alt.Axis(domain=False, ticks=False))
    height = 26 if len(layers) <= 16 else 15
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    colour = alt.Color(
        "value:Q",
        scale=scale,
        legend=alt.Legend(title=legend, orient="top", gradientLength=160, tickCount=3, titleLimit=320),
    )
    cells = base.mark_rect(stroke="white", strokeWidth=1.5).encode(color=colour)
    text = base.mark_text(fontSize=10 if height > 20 else 9).encode(
        text="text:N", color=alt.condition(dark, alt.value("white"), alt.value(_INK))
    )
    step = alt.Step(max(44, min(62, 420 // len(budgets))))
    return alt.LayerChart(layer=[cells, text], width=step, height=alt.Step(height), title=title)


def _middle_budget(table: AuditTable) -> Setting | None:
    settings = [s for s in table.settings if table.oracle(s) and s.per_query and (s.budget or "").isdigit()]
    return settings[len(settings) // 2] if settings else None


def _legend(entries: Sequence[tuple[str, str]]) -> alt.LayerChart:
    """A row of names in their colours."""
    rows = [{"name": name, "colour": colour, "x": 8 + 132 * i} for i, (name, colour) in enumerate(entries)]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("x:Q", scale=None, axis=None), color=alt.Color("colour:N", scale=None)
    )
    dots = base.mark_point(filled=True, size=70, opacity=1)
    names = base.mark_text(align="left", dx=9, fontSize=12).encode(text="name:N")
    return alt.LayerChart(layer=[dots, names], width=132 * len(entries), height=18)


def _log_scale(values: Sequence[int | float]) -> alt.Scale:
    """Base 2, the domain a little wider than the values."""
    known = [v for v in values if v > 0 and not math.isnan(v)] or [1.0, 2.0]
    return alt.Scale(type="log", base=2, domain=[min(known) / 1.25, max(known) * 1.25], nice=False)


def _token_axis() -> alt.Axis:
    powers = [2**i for i in range(21)]
    label = "datum.value >= 1024 ? datum.value / 1024 + 'K' : format(datum.value, 'd')"
    return alt.Axis(values=powers, labelExpr=label, labelOverlap="greedy", grid=False)


def _finish(chart: Any) -> alt.TopLevelMixin:
    """The look that all figures share; white, so that it reads on a dark page too."""
    return (
        chart.configure(background="#ffffff", font=_FONT, padding=10)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=_INK,
            titleColor=_INK,
            labelFontSize=11,
            titleFontSize=11,
            titleFontWeight="normal",
            gridColor=_GRID,
            domainColor="#999999",
            tickColor="#999999",
        )
        .configure_title(fontSize=12, anchor="start", color=_INK, fontWeight=600)
        .configure_legend(labelFontSize=11, titleFontSize=11, titleFontWeight="normal", labelColor=_INK)
        .configure_concat(spacing=14)
    )
