"""Records of runs of kind `serve` as tables, sentences and a figure: how an engine answers requests, by mode."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import altair as alt

from topmass.report.figures import _NAMED, PALETTE, _finish, _log_scale, _token_axis, tokens
from topmass.results import LoadedRun
from topmass.results.stats import Spread, spread

__all__ = ["HEADER", "ServeCase", "ServeTable", "answers", "line", "notes", "tables", "ttft_by_length"]

Row = dict[str, Any]

_SPARSE = (PALETTE["indexer"], PALETTE["oracle"], PALETTE["streaming"])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeCase:
    """Every mode's answers to the same requests.

    Attributes:
        driver: offline, or server.
        length: Prompt length, tokens.
        rate: Requests a second; 0: one after the other.
        rows: Records by mode.
    """

    driver: str
    length: int
    rate: float
    rows: dict[str, list[Row]]

    @property
    def modes(self) -> list[str]:
        """Engines that ran: dense, the sparse ones, the floor."""
        return [mode for mode in ("dense", *self.sparse, "floor") if mode in self.rows]

    @property
    def sparse(self) -> list[str]:
        """Sparse engines, in the order in which they ran."""
        return [mode for mode in self.rows if mode.startswith("sparse")]

    def values(self, mode: str, metric: str) -> list[float]:
        """A metric of every request, in their order."""
        found = [r for r in self.rows.get(mode, ()) if r["metric"] == metric and r["request"] >= 0]
        return [r["value"] for r in sorted(found, key=lambda r: r["request"]) if r["value"] is not None]

    def spread(self, mode: str, metric: str) -> Spread | None:
        """Median, p10 and p90 over requests."""
        values = self.values(mode, metric)
        return spread(values) if values else None

    def total(self, mode: str, metric: str) -> float | None:
        """A metric of all requests together."""
        return next((r["value"] for r in self.rows.get(mode, ()) if r["metric"] == metric and r["request"] < 0), None)

    def ratio(self, mode: str, over: str, metric: str = "ttft") -> Spread | None:
        """A metric of `mode` over that of `over`, paired by request."""
        pairs = list(zip(self.values(mode, metric), self.values(over, metric), strict=False))
        return spread([a / b for a, b in pairs]) if pairs else None

    def over_floor(self, mode: str) -> float | None:
        """Median of a sparse engine's times to first token over the floor's, paired by request, less 1."""
        found = self.ratio(mode, "floor")
        return found and found.median - 1

    def attained(self, mode: str) -> float | None:
        """Median saving of a sparse engine, as a share of what the floor saves."""
        dense, sparse, floor = (self.spread(name, "ttft") for name in ("dense", mode, "floor"))
        if dense is None or sparse is None or floor is None or dense.median <= floor.median:
            return None
        return (dense.median - sparse.median) / (dense.median - floor.median)


class ServeTable:
    """Records of `serve` runs; of a case that was run twice, the later counts."""

    def __init__(self, runs: Iterable[LoadedRun]):
        found: dict[tuple[str, float, int], dict[str, list[Row]]] = {}
        for run in sorted(runs, key=lambda run: run.manifest["started"]):
            mine: dict[tuple[str, float, int], dict[str, list[Row]]] = {}
            for row in run.records:
                case = mine.setdefault((row["driver"], row["rate"], row["length"]), {})
                case.setdefault(row["mode"], []).append(row)
            found |= mine
        self.cases = [ServeCase(driver=d, length=n, rate=r, rows=rows) for (d, r, n), rows in sorted(found.items())]


HEADER = [
    "mode", "TTFT p50 ms", "p90 ms", "dense / this", "ms/token p50", "p90", "dense / this",
    "tokens/s", "prompt tokens/s", "prefix hits", "KV in use", "KV GiB",
]  # fmt: skip


def line(case: ServeCase, mode: str) -> list[str]:
    """One row of the table of a case."""
    ttft, tpot = case.spread(mode, "ttft"), case.spread(mode, "tpot")
    faster = [case.ratio("dense", mode, metric) for metric in ("ttft", "tpot")]
    shown = [f"{r.median:.3g}x" if r and mode != "dense" else "" for r in faster]
    out, prompt, hits, usage, memory = (
        case.total(mode, m) for m in ("throughput", "prompt_throughput", "prefix_hits", "kv_usage", "kv_memory")
    )
    return [
        mode,
        f"{ttft.median:.4g}" if ttft else "-",
        f"{ttft.p90:.4g}" if ttft else "",
        shown[0],
        f"{tpot.median:.3g}" if tpot else "",
        f"{tpot.p90:.3g}" if tpot else "",
        shown[1],
        f"{out:,.1f}" if out is not None else "",
        f"{prompt:,.0f}" if prompt is not None else "",
        f"{hits:.1%}" if hits is not None else "",
        f"{usage:.1%}" if usage is not None else "",
        f"{memory:.3g}" if memory is not None else "",
    ]


def _where(case: ServeCase) -> str:
    pace = f"{case.rate:g} requests/s" if case.rate else "one request after the other"
    return f"{case.driver}, {tokens(case.length)} tokens, {pace}"


def tables(table: ServeTable) -> list[tuple[str, list[str], list[list[str]]]]:
    """Caption, header and rows of every case."""
    return [
        (
            f"{_where(case)}: {len(case.values(case.modes[0], 'ttft'))} requests, the same for every mode; ratios are medians of "
            "pairs.",
            HEADER,
            [line(case, mode) for mode in case.modes],
        )
        for case in table.cases
    ]


def answers(table: ServeTable) -> list[str]:
    """A sentence for each case and sparse engine beside dense attention."""
    return [text for case in table.cases for mode in case.sparse if (text := _answer(case, mode))] or [
        "Nothing sparse ran beside dense attention, so nothing can be compared."
    ]


def _answer(case: ServeCase, mode: str) -> str:
    ratio, time, token = case.ratio("dense", mode), case.spread(mode, "ttft"), case.ratio(mode, "dense", "tpot")
    attained, over = case.attained(mode), case.over_floor(mode)
    if ratio is None or time is None:
        return ""
    text = (
        f"{_where(case)}: {mode} takes {time.median:,.4g} ms to the first token (p90 {time.p90:,.4g}), {ratio.median:.3g} times "
        f"(p10-p90 {ratio.p10:.3g} to {ratio.p90:.3g}) as fast as dense"
    )
    if attained is not None:
        text += f", {f'{attained:.0%}' if attained > 0 else 'none'} of what the floor saves"
    if over is not None:
        text += f", {over:.1%} over the floor"
    return text + (f"; time per output token {token.median - 1:+.1%}." if token else ".")


def notes(runs: Sequence[LoadedRun]) -> list[str]:
    """What limits the numbers."""
    found = [
        "Times are the client's: from the moment at which a request is due. The floor copies values in the place of the attention "
        "of every batch with a prompt: its tokens mean nothing.",
        "These runs say nothing of quality. The same requests go to every mode.",
        *dict.fromkeys(_prompts(run.manifest["config"]) for run in runs),
    ]
    if any(run.manifest["device"].startswith("cpu") for run in runs):
        found.insert(0, "Timed on a CPU: it shows that the command works, and says nothing of any kernel.")
    if any(not run.manifest["config"].get("interleave", True) for run in runs):
        found.append("Modes ran one after the other, not interleaved: drifts of the machine are in the ratios.")
    return found


def _prompts(config: Mapping[str, Any]) -> str:
    if text := config.get("text"):
        return f"Prompts are windows of {text}."
    rows = f", each {config['repeat']} times in a row" if config.get("repeat", 1) > 1 else ""
    if config.get("stand_in"):
        # a tile of the kernel holds 32 queries at least
        apart = any(block < 32 for block in config.get("q_blocks") or (1,))
        alike = ": 32 neighbouring queries select 3 to 4 times what one does" if apart else ""
        return f"Prompts are random tokens{rows}. An untrained indexer stands in for a trained one{alike}."
    if rows:
        return f"Prompts are random tokens{rows}, and the indexer is untrained: how alike neighbouring queries select is not known."
    return (
        "Prompts are random tokens: what neighbouring queries of an indexer select there has little in common, which costs the sparse "
        "mode most."
    )


def ttft_by_length(table: ServeTable, model: str, device: str) -> alt.TopLevelMixin | None:
    """Time to first token against length: a panel for each driver and rate, a line for each mode."""
    panels = dict.fromkeys((case.driver, case.rate) for case in table.cases)
    charts = [_panel([c for c in table.cases if (c.driver, c.rate) == key]) for key in panels]
    if not charts:
        return None
    return _finish(alt.concat(*charts, columns=2, spacing=16).properties(title=f"{model}, {device}"))


def _panel(cases: Sequence[ServeCase]) -> alt.LayerChart:
    rows = [
        {"name": mode, "x": c.length, "y": s.median, "low": s.p10, "high": s.p90}
        for c in cases
        for mode in c.modes
        if (s := c.spread(mode, "ttft"))
    ]
    x = alt.X("x:Q", title="prompt length (tokens)", scale=_log_scale([r["x"] for r in rows]), axis=_token_axis())
    domain = [min(r["low"] for r in rows) / 1.3, max(r["high"] for r in rows) * 1.3]
    y = alt.Y("y:Q", title="time to first token (ms)", scale=alt.Scale(type="log", domain=domain, nice=False))
    names = list(dict.fromkeys(mode for c in cases for mode in c.modes))
    sparse = cycle(_SPARSE)
    fixed = {"dense": PALETTE["dense"], "floor": PALETTE["pooled"]}
    colours = [fixed.get(name) or next(sparse) for name in names]
    tint = alt.Color("name:N", scale=alt.Scale(domain=names, range=colours), legend=_NAMED)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=tint)
    layers = [
        base.mark_rule(strokeWidth=1.4).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=1.8).encode(y=y),
        base.mark_point(filled=True, size=40, opacity=1).encode(y=y),
    ]
    title = _where(cases[0]).split(", ")
    return alt.LayerChart(layer=layers, width=400, height=260, title=f"{title[0]}, {title[2]}")
