"""What a report says of benchmark runs: times beside each other, their ratios round by round, work against ceilings."""

from topmass.report.figures import tokens
from topmass.report.timings import BenchCase, BenchTable, crossover
from topmass.results.stats import Spread

__all__ = ["answers", "header", "line", "notes", "summaries", "tables"]

NAMES = {"fa2": "FlashAttention-2", "cudnn": "cuDNN", "fa3": "FlashAttention-3", "sdpa": "SDPA on CPU"}


def answers(table: BenchTable) -> list[str]:
    """A sentence for the total of every shape and selection at its greatest length."""
    lines = [line for what in dict.fromkeys(case.what for case in table.cases) for line in table.lines(what)]
    several = len({case.shape for case in table.cases}) > 1
    return [_answer(line[-1], named=several) + _crossover(line) for line in lines]


def _crossover(line: list[BenchCase]) -> str:
    """From which of the measured lengths on the layer is faster than every dense kernel."""
    if line[-1].what != "layer":
        return ""
    wins = [all(r.p90 < 1 for name in c.names("dense") if (r := c.ratio("layer", name))) for c in line]
    since = next((c for i, c in enumerate(line) if all(wins[i:])), None)
    if since is None or not since.names("dense"):
        return " No length was timed at which it is faster than every dense kernel."
    return (
        f" It is faster than every dense kernel that ran from {tokens(since.length)} tokens on, of the lengths timed."
    )


def _answer(case: BenchCase, *, named: bool) -> str:
    time = case.time(case.what)
    assert time is not None
    faster = [
        f"{_times(ratio)} {NAMES.get(name, name)}'s time"
        for name in case.names("dense")
        if (ratio := case.ratio(case.what, name))
    ]
    missing = [NAMES.get(name, name) for name in case.names("dense") if case.reason(name)]
    shape = f" of {case.shape}" if named else ""
    text = (
        f"{_what(case)}{shape} at {tokens(case.length)} tokens ({case.config}): {_ms(time.median)} ms (p10-p90 {_ms(time.p10)} to "
        f"{_ms(time.p90)}), {', '.join(faster) or 'beside no dense kernel'}."
    )
    return text + (f" Not there to compare: {', '.join(missing)}." if missing else "")


def _what(case: BenchCase) -> str:
    return {"layer": "A sparse layer", "oracle": "An oracle layer", "kl": "The indexer's loss and gradient"}[case.what]


def _times(ratio: Spread) -> str:
    return f"1/{1 / ratio.median:.3g} of" if ratio.median < 1 else f"{ratio.median:.3g} times"


def _ms(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def header(case: BenchCase) -> list[str]:
    """Column titles of `line`."""
    dense = [f"{name} / this" for name in case.names("dense") if case.times(name)]
    return ["what", "kernel", "ms", "p10-p90", "TFLOP/s", "TB/s", *dense, "note"]


def line(case: BenchCase, name: str) -> list[str]:
    """One row of the table of a case."""
    time, rate, moved = case.time(name), case.rate(name), case.rate(name, "bytes")
    backend = next(row["backend"] for row in case.rows if row["name"] == name)
    ratios = [case.ratio(dense, name) for dense in case.names("dense") if case.times(dense)]
    compared = case.role(name) in ("dense", "total")
    return [
        NAMES.get(name, name),
        backend,
        _ms(time.median, 4) if time else "-",
        f"{_ms(time.p10)}-{_ms(time.p90)}" if time else "",
        "" if rate is None else f"{rate:.3g}",
        "" if moved is None else f"{moved:.3g}",
        *(f"{ratio.median:.3g}x" if ratio and compared else "" for ratio in ratios),
        _note(case, name),
    ]


def _note(case: BenchCase, name: str) -> str:
    if reason := case.reason(name):
        return reason
    if case.role(name) in ("ceiling", "part"):
        return {"ceiling": "ceiling", "part": "inside the others"}[case.role(name)]
    facts = [("keys_read_mean", "{:,.0f} keys/query"), ("union_growth", "U/K {:.2f}"), ("peak_memory", "{:.2g} GiB")]
    return ", ".join(text.format(v) for metric, text in facts if (v := case.value(name, metric)) is not None)


def summaries(table: BenchTable, what: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """All lengths of a kind in one table, the crossovers, and the model's own growth."""
    cases = [case for line in table.lines(what) for case in line]
    cases += [case for case in table.of(what) if case not in cases]
    dense = list(dict.fromkeys(name for case in cases for name in case.names("dense")))
    stages = list(dict.fromkeys(name for case in cases for name in case.names("stage", "part")))
    if len(cases) < 2:
        return []
    header = [
        "shape",
        "selection",
        "tokens",
        "ms",
        "p10-p90",
        *(f"{name} / this" for name in dense),
        *(f"{s} ms" for s in stages),
    ]
    rows = [_summary(case, dense, stages) for case in cases]
    found = [("All of it at a glance; `union` is inside `attend`.", header, rows)]
    if what == "layer":
        found += _crossovers(table, dense)
        own = [[tokens(n), ", ".join(f"{v:.2f}" for v in values)] for n, values in sorted(table.own.items())]
        caption = f"Union growth U/K of a model's own selections ({table.own_config}), one value a sparse layer."
        found += [(caption, ["tokens", "U/K"], own)] if own else []
    return found


def _summary(case: BenchCase, dense: list[str], stages: list[str]) -> list[str]:
    growth = case.value(case.what, "union_growth")
    at = "" if growth is None or case.q_block >= 32 else f", U/K {growth:.2f}"
    time = case.time(case.what)
    ratios = [case.ratio(name, case.what) for name in dense]
    parts = [case.time(name) for name in stages]
    return [
        case.shape, case.selection + at, tokens(case.length), _ms(time.median, 4) if time else "-",
        f"{_ms(time.p10)}-{_ms(time.p90)}" if time else "", *("-" if r is None else f"{r.median:.3g}x" for r in ratios),
        *("" if part is None else _ms(part.median) for part in parts),
    ]  # fmt: skip


def _crossovers(table: BenchTable, dense: list[str]) -> list[tuple[str, list[str], list[list[str]]]]:
    lines = [line for line in table.lines("layer") if len(line) > 1]
    rows = [[line[0].shape, line[0].selection, *(_since(line, name) for name in dense)] for line in lines]
    caption = (
        "Crossover, tokens: from there on the layer is faster than the dense kernel, by the straight line in logarithms between "
        "the two lengths around it."
    )
    return [(caption, ["shape", "selection", *(NAMES.get(name, name) for name in dense)], rows)] if rows else []


def _since(line: list[BenchCase], dense: str) -> str:
    found = crossover(line, dense)
    if found is None:
        return "-"
    if found == line[0].length:
        return f"below {tokens(found)}"
    return "not reached" if found == float("inf") else f"{found:,.0f}"


def tables(table: BenchTable, what: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """Caption, header and rows of every case of a kind."""
    return [
        (
            f"{case.shape} ({case.heads}), {tokens(case.length)} tokens, {case.config}: median and p10-p90 of "
            f"{len(case.times(case.what))} interleaved rounds. {_gate(case)}",
            header(case),
            [line(case, name) for name in case.names()],
        )
        for case in table.of(what)
    ]


def _gate(case: BenchCase) -> str:
    found = [(name, case.value(name, "gate_error"), case.value(name, "gate_plain_error")) for name in case.names()]
    text = [f"{name} {e:.1e}" + ("" if p is None else f" (plain {p:.1e})") for name, e, p in found if e is not None]
    ties = [(case.value(n, "gate_near_ties"), case.value(n, "gate_rows")) for n in case.names()]
    text += [f"selections swapped at near ties in {t:.0f} of {r:.0f} rows" for t, r in ties if t is not None and r]
    return f"Checked in the same run; largest error against float64: {'; '.join(text)}." if text else ""


def notes(table: BenchTable) -> list[str]:
    """What limits the numbers."""
    found = [
        "Everything in one table was timed in interleaved rounds of one process, after its results were checked.",
        "Sparse times start at q, k, v and the finished queries and keys of the indexer; inputs are random.",
        "TFLOP/s counts what the result needs (causal pairs; keys read), not what a kernel spends.",
    ]
    if any("sdpa" in case.names("dense") for case in table.cases):
        found.insert(0, "Plain PyTorch on a CPU: it shows that the command works, and says nothing of any kernel.")
    return found
