"""Where quality is lost between dense attention and a served selection, step by step, on the same samples.

The steps are those of docs/concepts/gaps.md. Oracle and indexer are compared at the same budget and key groups, where they
read the same number of keys. A shared selection leaves room in its budget for the block's own queries and reads fewer; its sharing gap is taken
at equal achieved keys: the per-query indexer's score of every sample is interpolated, linearly in the logarithm of the achieved keys,
between the two budgets around them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from topmass.report.aggregate import EvalTable, Setting, budget_order
from topmass.results.stats import Interval

__all__ = ["Gap", "find_gaps"]

# achieved keys this near are equal
NEAR = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """One step of one served setting.

    Attributes:
        name: `oracle`, `indexer`, `sharing`, `realization` or `total`.
        served: The setting whose quality is explained.
        interval: What the step loses, a fraction of the full score; `None` if it was not measured.
        reason: Why it was not measured, or at which keys the two sides meet.
    """

    name: str
    served: Setting
    interval: Interval | None
    reason: str = ""


def find_gaps(table: EvalTable, lengths: Sequence[int]) -> list[Gap]:
    """Gaps of every indexer setting, over tasks and the given lengths together; none without an indexer beside dense."""
    dense = table.dense()
    served = [s for s in table.settings if s.selector == "indexer" and _ran(table, lengths, s)]
    served.sort(key=lambda s: (budget_order(s.budget), s.q_block))
    return [gap for s in served for gap in _steps(table, lengths, dense, s)] if dense else []


def _steps(table: EvalTable, lengths: Sequence[int], dense: Setting, served: Setting) -> list[Gap]:
    alone = served.alone()
    oracle = alone.oracle()
    steps = [
        _gap(table, "oracle", served, {n: {dense: 1.0, oracle: -1.0} for n in lengths}),
        _gap(table, "indexer", served, {n: {oracle: 1.0, alone: -1.0} for n in lengths}),
    ]
    if served.q_block > 1:
        steps = [_sharing(table, lengths, served)]
    found = table.realization(lengths, served)
    reason = "" if found else "only one kernel ran on these supports"
    steps.append(Gap(name="realization", served=served, interval=found, reason=reason))
    return [*steps, _gap(table, "total", served, {n: {dense: 1.0, served: -1.0} for n in lengths})]


def _gap(table: EvalTable, name: str, served: Setting, terms: Mapping[int, Mapping[Setting, float]]) -> Gap:
    found = table.contrast(terms)
    missing = [s for weights in terms.values() for s in weights if not _ran(table, list(terms), s)]
    reason = "" if found else f"{missing[0].selector} was not run at this setting" if missing else "no common samples"
    return Gap(name=name, served=served, interval=found, reason=reason)


def _sharing(table: EvalTable, lengths: Sequence[int], served: Setting) -> Gap:
    terms: dict[int, dict[Setting, float]] = {}
    keys = []
    for n in lengths:
        cell = table.cell(n, served)
        assert cell is not None
        weights = _interpolated(table, n, served, cell.keys)
        if weights is None:
            reason = f"no budgets per query around the {cell.keys:,.0f} keys that it reads"
            return Gap(name="sharing", served=served, interval=None, reason=reason)
        keys.append(cell.keys)
        terms[n] = {**weights, served: -1.0}
    found = table.contrast(terms)
    at = " to ".join(f"{k:,.0f}" for k in sorted({min(keys), max(keys)}))
    return Gap(name="sharing", served=served, interval=found, reason=f"at {at} achieved keys")


def _interpolated(table: EvalTable, length: int, served: Setting, keys: float) -> dict[Setting, float] | None:
    """Weights of the per-query settings around `keys` achieved keys."""
    cells = table.cells(lambda s: replace(s, budget=None) == replace(served.alone(), budget=None))
    cells = [c for c in cells if c.length == length]
    near = min(cells, key=lambda c: abs(c.keys - keys), default=None)
    if near is None:
        return None
    if abs(near.keys - keys) <= NEAR * keys:
        return {near.setting: 1.0}
    below, above = [c for c in cells if c.keys < keys], [c for c in cells if c.keys > keys]
    if not below or not above:
        return None
    low, high = below[-1], above[0]
    share = math.log(keys / low.keys) / math.log(high.keys / low.keys)
    return {low.setting: 1.0 - share, high.setting: share}


def _ran(table: EvalTable, lengths: Sequence[int], setting: Setting) -> bool:
    cells = [table.cell(n, setting) for n in lengths]
    return all(c is not None and c.score is not None for c in cells)
