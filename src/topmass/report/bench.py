"""What a report says of benchmark runs: times beside each other, their ratios round by round, work against ceilings."""

from topmass.report.figures import tokens
from topmass.report.timings import BenchCase, BenchTable
from topmass.results.stats import Spread

__all__ = ["answers", "header", "line", "notes", "tables"]

NAMES = {"fa2": "FlashAttention-2", "cudnn": "cuDNN", "fa3": "FlashAttention-3", "sdpa": "SDPA on CPU"}


def answers(table: BenchTable) -> list[str]:
    """A sentence for the total of every case at the greatest length of its configuration."""
    last = {(case.what, case.config): case for case in table.cases}
    return [_answer(case) + _crossover(table, case) for case in last.values()]


def _crossover(table: BenchTable, last: BenchCase) -> str:
    """From which of the measured lengths on the layer is faster than every dense kernel."""
    if last.what != "layer":
        return ""
    cases = [case for case in table.of("layer") if case.config == last.config]
    wins = [all(r.p90 < 1 for name in c.names("dense") if (r := c.ratio("layer", name))) for c in cases]
    since = next((c for i, c in enumerate(cases) if all(wins[i:])), None)
    if since is None or not since.names("dense"):
        return " No length was timed at which it is faster than every dense kernel."
    return (
        f" It is faster than every dense kernel that ran from {tokens(since.length)} tokens on, of the lengths timed."
    )


def _answer(case: BenchCase) -> str:
    time = case.time(case.what)
    assert time is not None
    faster = [
        f"{_times(ratio)} {NAMES.get(name, name)}'s time"
        for name in case.names("dense")
        if (ratio := case.ratio(case.what, name))
    ]
    missing = [NAMES.get(name, name) for name in case.names("dense") if case.reason(name)]
    text = (
        f"{_what(case)} at {tokens(case.length)} tokens ({case.config}): {time.median:.3g} ms (p10-p90 {time.p10:.3g} to "
        f"{time.p90:.3g}), {', '.join(faster) or 'beside no dense kernel'}."
    )
    return text + (f" Not there to compare: {', '.join(missing)}." if missing else "")


def _what(case: BenchCase) -> str:
    return {"layer": "A sparse layer", "oracle": "An oracle layer", "kl": "The indexer's loss and gradient"}[case.what]


def _times(ratio: Spread) -> str:
    return f"1/{1 / ratio.median:.3g} of" if ratio.median < 1 else f"{ratio.median:.3g} times"


def header(case: BenchCase) -> list[str]:
    """Column titles of `line`."""
    dense = [f"{name} / this" for name in case.names("dense") if case.times(name)]
    return ["what", "kernel", "ms", "p10-p90", "TFLOP/s", *dense, "note"]


def line(case: BenchCase, name: str) -> list[str]:
    """One row of the table of a case."""
    time, rate = case.time(name), case.rate(name)
    backend = next(row["backend"] for row in case.rows if row["name"] == name)
    ratios = [case.ratio(dense, name) for dense in case.names("dense") if case.times(dense)]
    compared = case.role(name) in ("dense", "total")
    return [
        NAMES.get(name, name),
        backend,
        f"{time.median:.4g}" if time else "-",
        f"{time.p10:.3g}-{time.p90:.3g}" if time else "",
        "" if rate is None else f"{rate:.3g} TB/s" if name == "copy" else f"{rate:.3g}",
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
