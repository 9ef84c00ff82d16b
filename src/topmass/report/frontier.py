"""Quality and time of the same configurations, joined: the frontier, and what it recommends.

A timed configuration meets its scores by the fingerprint of its selector (kind, budget, granularity, sink, window, dense_below,
indexer), by how generated positions attend, by the kernels that ran, by the length, and by the hash of the weights. Whatever
was timed without such scores stays, with quality marked as not measured.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from topmass.errors import RunError
from topmass.report.aggregate import ENOUGH_HIGH, ENOUGH_POINT, EvalTable, Setting
from topmass.report.ttft import Crossover, TtftCase, TtftTable
from topmass.results import LoadedRun
from topmass.results.stats import Interval, Spread

__all__ = ["DIAGNOSTIC", "Frontier", "Point", "Recommendation", "find_frontier", "recommend", "to_toml"]

# what sees the model's own attention, or nothing: never recommended
DIAGNOSTIC = frozenset({"oracle", "previous_layer", "untrained", "random"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One configuration at one length.

    Attributes:
        name: Its label.
        setting: How keys are chosen.
        fingerprint: Hash of the selector's configuration.
        backend: Kernels that were timed.
        ttft: Time to first token, ms.
        speedup: Best dense kernel's time over this one's, paired by round.
        layer: Time of a full-attention layer, ms.
        change: Score minus dense's on the same samples, a fraction; `None` if it was not measured.
        reason: Why not.
        keys: Achieved keys per query of the timed prompt.
        best: Whether nothing timed is both as good and faster.
        best_layer: The same with the layer's time.
    """

    name: str
    setting: Setting
    fingerprint: str
    backend: str
    ttft: Spread
    speedup: Spread | None
    layer: Spread | None
    change: Interval | None
    reason: str
    keys: float | None
    best: bool = False
    best_layer: bool = False

    @property
    def dense(self) -> bool:
        """Whether this is dense attention."""
        return self.setting.selector == "dense"

    @property
    def diagnostic(self) -> bool:
        """Whether it is there to be compared with, not to be served."""
        return self.setting.selector in DIAGNOSTIC

    @property
    def enough(self) -> bool:
        """Whether it is as good as dense: at most 1 point lost, and the interval ends at 2 points."""
        return self.change is not None and -self.change.point <= ENOUGH_POINT and -self.change.low <= ENOUGH_HIGH

    @property
    def faster(self) -> bool:
        """Whether it is faster than the best dense kernel in nine rounds of ten."""
        return self.speedup is not None and self.speedup.p10 > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """All points of one model on one device.

    Attributes:
        model: Name of the model or shape.
        stress: Whether its weights are random, so that nothing is known of quality.
        device: Device and dtype, in words.
        batch: Prompts computed together.
        chunk: Tokens in one forward; 0 for all.
        points: By length; dense first, then by time.
        table: The times.
    """

    model: str
    stress: bool
    device: str
    batch: int
    chunk: int
    points: dict[int, list[Point]]
    table: TtftTable

    def crossover(self, point: Point) -> Crossover:
        """Where this configuration begins to be faster than dense attention."""
        return self.table.crossover(point.fingerprint, self.batch, self.chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What to serve at one length.

    Attributes:
        length: Prompt length, tokens.
        point: The configuration; dense attention's where that dominates.
        text: The reason, a sentence.
        crossover: Of the configuration, over the lengths that were timed.
        decided: Whether scores stand behind it; without them dense attention is named for want of knowledge.
    """

    length: int
    point: Point
    text: str
    crossover: Crossover
    decided: bool


def find_frontier(runs: Sequence[LoadedRun], *, batch: int | None = None, chunk: int | None = None) -> Frontier:
    """Join evaluation runs and `ttft` runs of one model.

    Args:
        runs: At least one `ttft` run; other kinds than these two are ignored.
        batch: Which of the timed batch sizes; `None` takes the smallest.
        chunk: Which of the timed chunk sizes; `None` takes the one with most lengths.

    Raises:
        RunError: Nothing was timed, runs are of different weights or devices, or the batch was not timed.
    """
    timed = [run for run in runs if run.kind == "ttft"]
    evals = [run for run in runs if run.kind == "eval"]
    if not timed:
        raise RunError(
            "A frontier needs times in transformers: give a run of `topmass bench ttft` beside the evaluations."
        )
    _check_same(timed, evals)
    table = TtftTable(timed)
    lines = [(b, c) for b, c in table.lines if batch in (None, b) and chunk in (None, c)]
    if not lines:
        known = ", ".join(f"batch {b} chunk {c}" for b, c in table.lines)
        raise RunError(
            f"No run timed batch {batch or 'any'} with chunk {'any' if chunk is None else chunk}; timed: {known}."
        )
    b, c = min(lines, key=lambda line: (line[0], -len(table.line(*line)), line[1]))
    rows = _by_fingerprint(evals)
    points = {case.length: _points(case, evals, rows) for case in table.line(b, c)}
    manifest = timed[-1].manifest
    return Frontier(
        model=manifest["model"],
        stress=_stress(timed[-1]),
        device=manifest["device"],
        batch=b,
        chunk=c,
        points={n: found for n, found in points.items() if found},
        table=table,
    )


def _stress(run: LoadedRun) -> bool:
    return run.manifest["config"].get("weights") == "random"


def _check_same(timed: Sequence[LoadedRun], evals: Sequence[LoadedRun]) -> None:
    first = timed[0]
    for run in timed[1:]:
        if run.manifest["device"] != first.manifest["device"]:
            raise RunError(
                f"{first.path} was timed on {first.manifest['device']}, {run.path} on {run.manifest['device']}; compare times "
                "of one device."
            )
    for run in [*timed[1:], *evals]:
        if (
            run.manifest["weights_hash"] != first.manifest["weights_hash"]
            or run.manifest["model"] != first.manifest["model"]
        ):
            raise RunError(
                f"{first.path} is of {_weights(first)}, {run.path} of {_weights(run)}; quality and time belong to one "
                "configuration only with the same weights in the same dtype: run both on that model, with the same --dtype."
            )


def _weights(run: LoadedRun) -> str:
    digest = run.manifest["weights_hash"]
    return f"{run.manifest['model']} ({'random weights' if digest is None else f'weights {digest[:12]}'})"


# -- the join

_Key = tuple[str, str]


def _by_fingerprint(evals: Sequence[LoadedRun]) -> dict[_Key, list[list[dict[str, Any]]]]:
    """Rows of every configuration, one list a run."""
    found: dict[_Key, list[list[dict[str, Any]]]] = {}
    for i, run in enumerate(evals):
        for row in run.records:
            if row["fingerprint"]:
                groups = found.setdefault((row["fingerprint"], row["decode"]), [[] for _ in evals])
                groups[i].append(row)
    return found


def _points(case: TtftCase, evals: Sequence[LoadedRun], rows: dict[_Key, list[list[dict[str, Any]]]]) -> list[Point]:
    best = case.best_dense
    if best is None:
        return []
    names = [best, *(name for name in case.names("sparse") if case.times(name))]
    points = [_point(case, name, best, evals, rows) for name in names]
    ttft = _pareto([(p.ttft.median, p.change) for p in points])
    layer = _pareto([(p.layer.median if p.layer else None, p.change) for p in points])
    points = [replace(p, best=a, best_layer=b) for p, a, b in zip(points, ttft, layer, strict=True)]
    return [points[0], *sorted(points[1:], key=lambda p: p.ttft.median)]


def _point(
    case: TtftCase,
    name: str,
    best: str,
    evals: Sequence[LoadedRun],
    rows: dict[_Key, list[list[dict[str, Any]]]],
) -> Point:
    first, ttft = case.first(name), case.time(name)
    assert ttft is not None
    change, reason = _change(case, first, evals, rows)
    return Point(
        name=f"dense ({best})" if name == best else name,
        setting=case.setting(name),
        fingerprint=first["fingerprint"],
        backend=first["backend"],
        ttft=ttft,
        speedup=case.ratio(best, name),
        layer=case.time(name, "layer"),
        change=change,
        reason=reason,
        keys=case.value(name, "keys_read_mean"),
    )


def _change(
    case: TtftCase,
    first: dict[str, Any],
    evals: Sequence[LoadedRun],
    rows: dict[_Key, list[list[dict[str, Any]]]],
) -> tuple[Interval | None, str]:
    """Score minus dense's, paired; or why there is none."""
    if not evals:
        return None, "not measured: no evaluation was given"
    key = first["fingerprint"], first["decode"]
    dense = [[r for r in run.records if r["selector"] == "dense" and r["length"] == case.length] for run in evals]
    if first["role"] == "dense":
        if not any(dense):
            return None, f"not measured: no evaluation at {case.length} tokens"
        return Interval(point=0.0, low=0.0, high=0.0, clusters=0, samples=0, method="dense by definition"), ""
    mine = [[r for r in group if r["length"] == case.length] for group in rows.get(key, [[] for _ in evals])]
    if not any(mine):
        where = "not evaluated" if key not in rows else f"not evaluated at {case.length} tokens"
        return None, f"not measured: {where}"
    timed = [[r for r in group if r.get("backend") in (None, first["backend"])] for group in mine]
    # the same configuration by plain arithmetic serves the realization gap
    mine = timed if any(timed) else mine
    known = {r.get("backend") for group in mine for r in group} - {None}
    if known - {first["backend"]}:
        return None, f"not measured: evaluated with {'+'.join(sorted(known))}, timed with {first['backend']}"
    parts = [replace(run, records=a + b) for run, a, b in zip(evals, dense, mine, strict=True) if a + b]
    table = EvalTable(parts)
    cell = table.cell(case.length, Setting.of(next(r for group in mine for r in group)))
    if cell is None or cell.loss is None:
        return None, "not measured: not run on every task, or on no sample of dense attention"
    loss = cell.loss
    return replace(
        loss, point=0.0 - loss.point, low=0.0 - loss.high, high=0.0 - loss.low
    ), "" if known else "its kernel was not recorded"


def _pareto(points: Sequence[tuple[float | None, Interval | None]]) -> list[bool]:
    """Which points nothing beats in time and score at once; points without either are on no frontier."""
    known = [(t, c.point) for t, c in points if t is not None and c is not None]
    return [
        t is not None
        and c is not None
        and not any(a <= t and b >= c.point and (a < t or b > c.point) for a, b in known)
        for t, c in points
    ]


# -- the recommendation


def recommend(frontier: Frontier, length: int | None = None) -> Recommendation:
    """The fastest configuration that is as good as dense attention and faster; dense attention if there is none.

    Args:
        length: A timed length; `None` takes the longest with a measured quality, else the longest.

    Raises:
        RunError: The length was not timed, or nothing was.
    """
    if not frontier.points:
        raise RunError("No length has a dense kernel's time to compare with; time it with --dense stock.")
    measured = [n for n, ps in frontier.points.items() if any(p.change is not None and not p.dense for p in ps)]
    length = max(measured or frontier.points) if length is None else length
    if length not in frontier.points:
        raise RunError(f"{length} tokens were not timed; timed: {', '.join(map(str, frontier.points))}.")
    dense, *rest = frontier.points[length]
    served = [p for p in rest if not p.diagnostic]
    good = [p for p in served if p.enough and p.faster]
    if good:
        chosen = min(good, key=lambda p: p.ttft.median)
        text = f"{chosen.name} is the fastest that is as good as dense attention"
    else:
        chosen, text = dense, _why_dense(frontier, served)
    return Recommendation(
        length=length,
        point=chosen,
        text=text,
        crossover=frontier.crossover(chosen),
        decided=any(p.change is not None for p in served),
    )


def _why_dense(frontier: Frontier, served: Sequence[Point]) -> str:
    if frontier.stress:
        return "weights are random and quality is not measured, so nothing is recommended"
    if not served:
        return "nothing but diagnostics was timed beside dense attention"
    if all(p.change is None for p in served):
        return "quality was not measured, so nothing is recommended"
    if not any(p.enough for p in served):
        close = [p for p in served if p.faster and p.change is not None and -p.change.point <= ENOUGH_POINT]
        if close:
            name = min(close, key=lambda p: p.ttft.median).name
            return f"not decided: {name} is faster and may be as good as dense attention, but too few samples say so"
        missing = "nothing was as good" if any(p.faster for p in served) else "nothing was as good, and nothing faster"
        return f"dense attention dominates at this length: {missing}"
    return "dense attention dominates at this length: what was as good was not faster"


def to_toml(found: Recommendation, frontier: Frontier, *, indexers: dict[str, str], runs: Sequence[str]) -> str:
    """The recommended configuration as `topmass.load_selector` reads it.

    Args:
        indexers: Directory of each indexer (or `reference`) by its digest.
        runs: Identifiers of the runs, for the record.

    Raises:
        RunError: The configuration's indexer is in none of the directories.
    """
    p, s = found.point, found.point.setting
    lines = ["version = 1", f"note = {_quote(f'At {found.length} tokens: {found.text}.')}", "", "[selector]"]
    lines += [f"name = {_quote(s.selector)}"]
    if s.selector == "streaming":
        lines += [f"sink = {s.sink}", f"window = {s.window}"]
    elif not p.dense:
        lines += [f"budget = {_quote(s.budget or '')}", f"q_block = {s.q_block}", f"kv_block = {s.kv_block}"]
        lines += [
            f"share = {_quote(s.share)}",
            f"sink = {s.sink}",
            f"window = {s.window}",
            f"dense_below = {s.dense_below}",
        ]
    lines += _indexer_lines(p, indexers)
    lines += ["", "[measured]", f"model = {_quote(frontier.model)}", f"device = {_quote(frontier.device)}"]
    lines += [f"length = {found.length}", f"batch = {frontier.batch}", f"chunk = {frontier.chunk}"]
    lines += [f"fingerprint = {_quote(p.fingerprint)}", f"backend = {_quote(p.backend)}"]
    lines += [f"ttft_ms = {p.ttft.median:.4g}"]
    if p.speedup and not p.dense:
        lines += [f"speedup = {p.speedup.median:.4g}"]
    if p.change and not p.dense:
        lines += [f"score_change = {[round(x, 5) for x in (p.change.point, p.change.low, p.change.high)]}"]
    if found.crossover.dense_below is not None:
        lines += [f"crossover = {found.crossover.dense_below}"]
    return "\n".join([*lines, f"runs = {json.dumps(list(runs))}"]) + "\n"


def _indexer_lines(point: Point, indexers: dict[str, str]) -> list[str]:
    if point.setting.selector not in ("indexer", "untrained"):
        return []
    own = list(indexers) if len(indexers) == 1 else [d for d in indexers if _serves(d, point)]
    if len(own) != 1:
        raise RunError(f"The indexer of {point.name!r} is not among those of the runs; give the runs of one indexer.")
    return [f"indexer = {_quote(indexers[own[0]])}", f"indexer_digest = {_quote(own[0])}"]


def _serves(digest: str, point: Point) -> bool:
    """Whether the fingerprint is that of this setting with this indexer."""
    s = point.setting
    names = ("budget", "q_block", "kv_block", "share", "sink", "window", "dense_below")
    config = {name: getattr(s, name) for name in names} | {"selector": "indexer", "indexer": digest}
    # as topmass.selection.Selector.fingerprint, which needs torch; a row without sharing does not hold how queries would be reduced
    texts = [json.dumps(config | {"reduce": reduce}, sort_keys=True) for reduce in ("max", "max_prob", "mean")]
    return point.fingerprint in {hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts}


def _quote(text: str) -> str:
    # JSON's escapes are TOML's, but TOML forbids a bare DEL
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
