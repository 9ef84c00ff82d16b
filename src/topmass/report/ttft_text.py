"""What a report says of times to first token, alone and joined with scores."""

from collections.abc import Sequence

from topmass.report.aggregate import ENOUGH_HIGH, ENOUGH_POINT
from topmass.report.figures import tokens
from topmass.report.frontier import Frontier, Point, Recommendation, recommend
from topmass.report.ttft import TtftCase
from topmass.results import LoadedRun
from topmass.results.stats import Interval, Spread

__all__ = ["BRIEF", "CLOCK", "answers", "brief_line", "frontier_table", "header", "line", "notes", "times_tables"]

CLOCK = (
    "A time to first token runs from the prompt's ids on the device to the last token's logits on the host: all layers of the "
    "prefill, the cache written, one row of logits. No tokeniser, no sampling, no server."
)
NAMES = {
    "stock": "the model as it is",
    "fa2": "FlashAttention-2",
    "cudnn": "cuDNN",
    "fa3": "FlashAttention-3",
    "sdpa": "SDPA on CPU",
}
# what is timed and cannot be served
_WHAT = {"oracle": "diagnostic", "untrained": "untrained: stands in for a trained one's cost"}

_Table = tuple[str, list[str], list[list[str]]]


def answers(frontier: Frontier) -> list[str]:
    """A sentence for each length."""
    if not frontier.points:
        return ["No dense kernel ran beside the others, so nothing can be compared."]
    return [_answer(frontier, found) for found in (recommend(frontier, n) for n in frontier.points)]


def _answer(frontier: Frontier, found: Recommendation) -> str:
    p, dense = found.point, frontier.points[found.length][0]
    where = f"At {tokens(found.length)} tokens"
    if frontier.stress:
        return f"{where}, random weights (a stress row: runtime only, no quality): {_fastest(frontier, found.length)}"
    if p.dense:
        return f"{where}: {found.text}. {dense.name} takes {_ms(dense.ttft)}."
    assert p.speedup is not None
    assert p.change is not None
    return (
        f"{where}: {found.text}, {_change(p.change)} points of score (95 % interval, paired), {_ms(p.ttft)} to the first token, "
        f"{_times(p.speedup)} as fast as {dense.name}."
    )


def _fastest(frontier: Frontier, length: int) -> str:
    dense, *rest = frontier.points[length]
    best = min((p for p in rest if p.setting.selector != "oracle"), key=lambda p: p.ttft.median, default=None)
    if best is None or best.speedup is None:
        return f"{dense.name} takes {_ms(dense.ttft)}; nothing sparse was timed."
    case = frontier.table.at(length, frontier.batch, frontier.chunk)
    assert case is not None
    share = case.attained(best.name)
    floor = case.ratio(best.name, case.floor) if case.floor else None
    text = f"{best.name} takes {_ms(best.ttft)}, {_times(best.speedup)} as fast as {dense.name}"
    if floor:
        text += f", {floor.median - 1:+.1%} from the floor"
    return text + (f", {share.median:.0%} of the attainable saving." if share and best.faster else ".")


def _times(ratio: Spread) -> str:
    return f"{ratio.median:.3g} times (p10-p90 {ratio.p10:.3g} to {ratio.p90:.3g})"


def _ms(time: Spread) -> str:
    return f"{_short(time.median, 4)} ms"


def _short(value: float, digits: int = 3) -> str:
    """A number with so many digits, but never as a power of ten."""
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _change(change: Interval) -> str:
    return f"{100 * change.point:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"


def frontier_table(frontier: Frontier, length: int) -> _Table:
    """Caption, header and rows of all points at a length."""
    head = [
        "configuration",
        "score change (points)",
        "TTFT (ms)",
        "p10-p90",
        "best dense / this",
        "layer (ms)",
        "keys/query",
        "",
    ]
    rows = [_point_line(p) for p in frontier.points[length]]
    where = f"batch {frontier.batch}" + (f", chunks of {tokens(frontier.chunk)}" if frontier.chunk else ", one shot")
    caption = (
        f"{tokens(length)} tokens, {where}, {frontier.device}: score minus dense's on the same samples with 95 % interval, beside "
        "the time of the same configuration. Bold: on the frontier of score and time to first token."
    )
    return caption, head, rows


def _point_line(p: Point) -> list[str]:
    marks = ["frontier"] * p.best + ["frontier by layer time"] * (p.best_layer and not p.best)
    marks += [_WHAT.get(p.setting.selector, "diagnostic")] * p.diagnostic + ["not causal"] * (not p.setting.causal)
    marks += [p.reason] * bool(p.reason and p.change)
    name = f"**{p.name}**" if p.best else p.name
    return [
        name,
        "0 by definition" if p.dense and p.change else _change(p.change) if p.change else p.reason,
        _short(p.ttft.median, 4),
        f"{_short(p.ttft.p10, 4)}-{_short(p.ttft.p90, 4)}",
        f"{p.speedup.median:.3g}x" if p.speedup and not p.dense else "",
        _short(p.layer.median) if p.layer else "",
        f"{p.keys:,.0f}" if p.keys is not None else "",
        ", ".join(marks),
    ]


def times_tables(frontier: Frontier) -> list[_Table]:
    """Caption, header and rows of every prompt shape that was timed."""
    return [
        (
            f"{tokens(case.length)} tokens, batch {case.batch}"
            + (f", chunks of {tokens(case.chunk)}" if case.chunk else "")
            + f": median and p10-p90 of {_rounds(case)} interleaved rounds. {_gate(case)}",
            header(case),
            [line(case, name) for name in case.names()],
        )
        for case in frontier.table.cases
    ]


def _rounds(case: TtftCase) -> int:
    return max((len(case.times(name)) for name in case.names()), default=0)


def header(case: TtftCase) -> list[str]:
    """Column titles of `line`."""
    dense = [f"{name} / this" for name in case.names("dense") if case.times(name)]
    tail = ["attention's share", "of attainable saving", "layer ms", "ms/token", "index MiB", "peak GiB", "note"]
    return ["what", "kernel", "TTFT ms", "p10-p90", *dense, *tail]


def line(case: TtftCase, name: str) -> list[str]:
    """One row of the table of a prompt shape."""
    time = case.time(name)
    dense = [case.ratio(d, name) for d in case.names("dense") if case.times(d)]
    share, attained = case.share(name), case.attained(name)
    sparse = case.first(name)["role"] == "sparse"
    layer, token = (case.time(name, metric) for metric in ("layer", "tpot"))
    index, peak = (case.value(name, metric) for metric in ("index_memory", "peak_memory"))
    return [
        NAMES.get(name, name),
        case.first(name)["backend"],
        _short(time.median, 4) if time else "-",
        f"{_short(time.p10, 4)}-{_short(time.p90, 4)}" if time else "",
        *(f"{ratio.median:.3g}x" if ratio else "" for ratio in dense),
        f"{share.median:.1%}" if share and name != case.floor else "",
        _saving(attained) if attained and sparse else "",
        _short(layer.median) if layer else "",
        _short(token.median) if token else "",
        _short(index) if index else "",
        _short(peak) if peak is not None else "",
        _note(case, name),
    ]


def _saving(share: Spread) -> str:
    """Slower than dense saves nothing; how many times nothing depends on the floor alone."""
    return f"{share.median:.0%}" if share.median > 0 else "none"


BRIEF = ["what", "TTFT ms", "p10-p90", "best dense / this", "of attainable", "layer ms", "ms/token", "note"]


def brief_line(case: TtftCase, name: str) -> list[str]:
    """The same row for a terminal."""
    time, attained = case.time(name), case.attained(name)
    layer, token = (case.time(name, metric) for metric in ("layer", "tpot"))
    ratio = case.ratio(case.best_dense, name) if case.best_dense else None
    return [
        NAMES.get(name, name),
        _short(time.median, 4) if time else "-",
        f"{_short(time.p10)}-{_short(time.p90)}" if time else "",
        f"{ratio.median:.3g}x" if ratio else "",
        _saving(attained) if attained and case.first(name)["role"] == "sparse" else "",
        _short(layer.median) if layer else "",
        _short(token.median) if token else "",
        _note(case, name),
    ]


def _note(case: TtftCase, name: str) -> str:
    if reason := case.reason(name):
        return reason
    if case.first(name)["role"] == "floor":
        return "attention replaced by a copy of the values"
    notes = [f"{keys:,.0f} keys/query"] if (keys := case.value(name, "keys_read_mean")) is not None else []
    kind = case.setting(name)
    notes += [_WHAT.get(kind.selector, "")] * (kind.selector in _WHAT) + ["not causal"] * (not kind.causal)
    notes += ["all within the budget: dense"] * (
        case.first(name)["role"] == "sparse" and case.first(name)["backend"] == "dense"
    )
    return ", ".join(notes)


def _gate(case: TtftCase) -> str:
    errors = [(case.value(n, "gate_error"), case.value(n, "gate_plain_error")) for n in case.names()]
    known = [(e, p) for e, p in errors if e is not None and p is not None]
    if not known:
        return ""
    error, plain = max(known)
    return f"Checked in the same run; largest error of a layer's output against float64: {error:.1e} (plain PyTorch {plain:.1e})."


def notes(frontier: Frontier, runs: Sequence[LoadedRun]) -> list[str]:
    """What limits the numbers."""
    found = [CLOCK]
    if frontier.stress:
        found.insert(0, "Stress rows: random weights and random tokens, so quality was not measured.")
    if frontier.device.startswith("cpu"):
        found.insert(0, "Timed on a CPU: it shows that the command works, and says nothing of any kernel.")
    if any(not p.dense and p.change for points in frontier.points.values() for p in points):
        found.append(
            f"As good as dense: at most {100 * ENOUGH_POINT:g} point below, and the interval ends at {100 * ENOUGH_HIGH:g}. Faster: "
            "in nine rounds of ten. Oracle, previous layer, random and untrained indexers are drawn, never recommended."
        )
    found.append("Attention's share: what the floor, with attention replaced by a copy, would save. Decoding is dense.")
    found += dict.fromkeys(
        f"Linear attention: {text}." for run in runs if (text := run.manifest["config"].get("linear_attention"))
    )
    return found
