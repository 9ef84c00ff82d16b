"""Records of benchmark runs as tables of times, with ratios taken round by round."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from topmass.results import LoadedRun
from topmass.results.stats import Spread, spread

__all__ = ["BenchCase", "BenchTable", "crossover"]

Row = dict[str, Any]

ROLES = ("dense", "stage", "part", "total", "ceiling")
# union growth of the line through several lengths, where inputs were made for one
USUAL_GROWTH = 1.5


@dataclass(slots=True, kw_only=True)
class BenchCase:
    """Everything that was timed together.

    Attributes:
        shape: Name of the attention shape.
        heads: The shape in words.
        length: Prompt length, tokens.
        what: Name of the total: layer, oracle or kl.
        config: Short label of budget and granularity.
        q_block: Queries that share one selection.
        kv_block: Keys taken together.
        growth: Union growth that the inputs were made for; `None` for no particular one.
        rows: Its records.
    """

    shape: str
    heads: str
    length: int
    what: str
    config: str
    q_block: int
    kv_block: int
    growth: float | None
    rows: list[Row]

    @property
    def selection(self) -> str:
        """The granularity in words."""
        queries = "per query" if self.q_block == 1 else f"shared by {self.q_block}"
        return queries + ("" if self.kv_block == 1 else f", groups of {self.kv_block}")

    def names(self, *roles: str) -> list[str]:
        """Names of what has a role, in order of the roles and of the rows."""
        found = {row["name"]: row["role"] for row in self.rows if not roles or row["role"] in roles}
        return sorted(found, key=lambda name: ROLES.index(found[name]))

    def role(self, name: str) -> str:
        """What the named thing is."""
        return next(row["role"] for row in self.rows if row["name"] == name)

    def times(self, name: str) -> list[float]:
        """Milliseconds, one a round; empty where it did not run."""
        found = [r for r in self.rows if r["name"] == name and r["metric"] == "time" and r["value"] is not None]
        return [row["value"] for row in sorted(found, key=lambda row: row["round"])]

    def time(self, name: str) -> Spread | None:
        """Median, p10 and p90, ms."""
        values = self.times(name)
        return spread(values) if values else None

    def ratio(self, name: str, over: str) -> Spread | None:
        """Time of `name` over that of `over`, paired by round."""
        pairs = list(zip(self.times(name), self.times(over), strict=False))
        return spread([a / b for a, b in pairs]) if pairs else None

    def value(self, name: str, metric: str) -> float | None:
        """What was measured once."""
        return next((r["value"] for r in self.rows if r["name"] == name and r["metric"] == metric), None)

    def rate(self, name: str, work: str = "flop") -> float | None:
        """Achieved TFLOP/s at the median time, or TB/s of `work="bytes"`."""
        time, done = self.time(name), self.value(name, work)
        return done / time.median / 1e9 if time and done is not None else None

    def reason(self, name: str) -> str:
        """Why it did not run; empty if it did."""
        return next((r["status"] for r in self.rows if r["name"] == name and r["status"] != "ok"), "")


class BenchTable:
    """Records of benchmark runs; of a configuration that was run twice the later run counts.

    Attributes:
        cases: What was timed, by kind and length.
        own: Union growth of a model's own selections, one value a sparse layer, by length.
    """

    def __init__(self, runs: Sequence[LoadedRun]):
        found: dict[tuple[str, int, str, str], BenchCase] = {}
        for run in sorted(runs, key=lambda run: run.manifest["started"]):
            mine: dict[tuple[str, int, str, str], BenchCase] = {}
            for row in run.records:
                key = row["shape"], row["length"], row["what"], row["config"]
                if key not in mine:
                    heads = f"{row['q_heads']}/{row['kv_heads']} heads x {row['head_dim']}"
                    mine[key] = BenchCase(
                        shape=key[0],
                        heads=heads,
                        length=key[1],
                        what=key[2],
                        config=key[3],
                        q_block=row["q_block"],
                        kv_block=row["kv_block"],
                        growth=row["growth"],
                        rows=[],
                    )
                mine[key].rows.append(row)
            found |= mine
        order = list(dict.fromkeys(case.shape for case in found.values()))
        cases = sorted(
            found.values(), key=lambda c: (c.what != "layer", c.what, order.index(c.shape), c.length, c.config)
        )
        self.cases = [case for case in cases if case.what != "growth"]
        self.own = {c.length: [row["value"] for row in c.rows] for c in cases if c.what == "growth"}
        self.own_config = next((f"{c.shape}, {c.config}" for c in cases if c.what == "growth"), "")

    def of(self, what: str) -> list[BenchCase]:
        """Cases of one kind, by shape and length."""
        return [case for case in self.cases if case.what == what]

    def lines(self, what: str) -> list[list[BenchCase]]:
        """One list a shape and selection, by length; of several growths at a length the usual one."""
        found: dict[tuple[str, str], dict[int, BenchCase]] = {}
        for case in self.of(what):
            line = found.setdefault((case.shape, case.selection), {})
            if case.length not in line or _strangeness(case) < _strangeness(line[case.length]):
                line[case.length] = case
        return [list(line.values()) for line in found.values()]


def _strangeness(case: BenchCase) -> float:
    # what was made for no growth comes first
    return -1.0 if case.growth is None else abs(case.growth - USUAL_GROWTH)


def crossover(line: Sequence[BenchCase], dense: str) -> float | None:
    """Length from which on the total is faster than a dense kernel, by the straight line in logarithms between two lengths.

    Returns:
        The shortest length timed if it is always faster, `inf` if it is not at the longest one, `None` if the kernel did not
        run.
    """
    points = [(case.length, ratio.median) for case in line if (ratio := case.ratio(case.what, dense))]
    if not points:
        return None
    slower = [i for i, (_, ratio) in enumerate(points) if ratio >= 1]
    if not slower:
        return float(points[0][0])
    if slower[-1] == len(points) - 1:
        return math.inf
    (a, high), (b, low) = points[slower[-1]], points[slower[-1] + 1]
    share = math.log(high) / (math.log(high) - math.log(low))
    return a * (b / a) ** share
