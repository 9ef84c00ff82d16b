"""Records of runs of kind `ttft` as tables: times, ratios round by round, shares against the floor, crossovers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from topmass.report.aggregate import Setting
from topmass.results import LoadedRun
from topmass.results.stats import Spread, spread

__all__ = ["Crossover", "TtftCase", "TtftTable"]

Row = dict[str, Any]

ROLES = ("dense", "sparse", "floor")


@dataclass(frozen=True, slots=True, kw_only=True)
class TtftCase:
    """Every way to attend to prompts of one shape.

    Attributes:
        length: Prompt length, tokens.
        batch: Prompts computed together.
        chunk: Tokens in one forward; 0 for all.
        rows: Records by name.
    """

    length: int
    batch: int
    chunk: int
    rows: dict[str, list[Row]]

    def names(self, *roles: str) -> list[str]:
        """Names with one of these roles, all without any; in order of the roles."""
        found = [name for name, rows in self.rows.items() if not roles or rows[0]["role"] in roles]
        return sorted(found, key=lambda name: ROLES.index(self.rows[name][0]["role"]))

    def first(self, name: str) -> Row:
        """A record of the name, for what all of them share."""
        return self.rows[name][0]

    def setting(self, name: str) -> Setting:
        """How its keys are chosen."""
        return Setting.of(self.first(name))

    def reason(self, name: str) -> str:
        """Why it did not run; empty if it did."""
        status = self.first(name)["status"]
        return "" if status == "ok" else status

    def times(self, name: str, metric: str = "ttft") -> list[float]:
        """Values of every round, in their order."""
        found = [
            r for r in self.rows.get(name, ()) if r["metric"] == metric and r["round"] >= 0 and r["value"] is not None
        ]
        return [row["value"] for row in sorted(found, key=lambda row: row["round"])]

    def time(self, name: str, metric: str = "ttft") -> Spread | None:
        """Median, p10 and p90."""
        return _spread(self.times(name, metric))

    def value(self, name: str, metric: str) -> float | None:
        """What was measured once."""
        return next((r["value"] for r in self.rows[name] if r["metric"] == metric and r["round"] < 0), None)

    def ratio(self, name: str, over: str, metric: str = "ttft") -> Spread | None:
        """Time of `name` over that of `over`, paired by round."""
        return self._paired(metric, lambda a, b: a / b, name, over)

    @property
    def floor(self) -> str | None:
        """Name of the floor, if it ran."""
        return next((name for name in self.names("floor") if self.times(name)), None)

    @property
    def best_dense(self) -> str | None:
        """The dense kernel with the smallest median."""
        found = [(t.median, name) for name in self.names("dense") if (t := self.time(name))]
        return min(found)[1] if found else None

    def share(self, name: str) -> Spread | None:
        """Attention's share of the time: what the floor would save."""
        return self._paired("ttft", lambda a, b: 1 - b / a, name, self.floor)

    def attained(self, name: str) -> Spread | None:
        """Saving over the best dense kernel, as a share of what the floor would save."""
        return self._paired("ttft", lambda a, dense, floor: (dense - a) / (dense - floor) if dense > floor else float("nan"),
                            name, self.best_dense, self.floor)  # fmt: skip

    def attention(self, name: str) -> Spread | None:
        """Milliseconds that attention adds to a full-attention layer: its module beyond the floor's."""
        return self._paired("layer", lambda a, b: a - b, name, self.floor)

    def _paired(self, metric: str, of: Callable[..., float], *names: str | None) -> Spread | None:
        if None in names:
            return None
        rounds = [self.times(name, metric) for name in names if name is not None]
        return _spread([of(*values) for values in zip(*rounds, strict=False)])


def _spread(values: Sequence[float]) -> Spread | None:
    known = [v for v in values if v == v]
    return spread(known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossover:
    """From which length on a configuration is faster than every dense kernel.

    Attributes:
        wins: Shortest timed length from which on it is faster in nine rounds of ten; `None` if not at the longest.
        dense_below: Longest timed length at which it is not: what `dense_below` should be. `None` if it was faster at
            every length, or at none that matters.
    """

    wins: int | None
    dense_below: int | None


class TtftTable:
    """Records of `ttft` runs of one model; of a prompt shape that was run twice, later rows of a name count."""

    def __init__(self, runs: Sequence[LoadedRun]):
        found: dict[tuple[int, int, int], dict[str, list[Row]]] = {}
        for run in sorted(runs, key=lambda run: run.manifest["started"]):
            mine: dict[tuple[int, int, int], dict[str, list[Row]]] = {}
            for row in run.records:
                case = mine.setdefault((row["length"], row["batch"], row["chunk"]), {})
                case.setdefault(row["name"], []).append(row)
            # ratios need rows of one run: a later run replaces the whole case
            found |= mine
        self.cases = [
            TtftCase(length=n, batch=b, chunk=c, rows=rows) for (n, b, c), rows in sorted(found.items(), key=_order)
        ]

    def at(self, length: int, batch: int, chunk: int) -> TtftCase | None:
        """The case of one prompt shape."""
        return next((c for c in self.cases if (c.length, c.batch, c.chunk) == (length, batch, chunk)), None)

    @property
    def lines(self) -> list[tuple[int, int]]:
        """Batch and chunk of every series of lengths."""
        return list(dict.fromkeys((c.batch, c.chunk) for c in self.cases))

    def line(self, batch: int, chunk: int) -> list[TtftCase]:
        """Cases of one series, by length."""
        return [c for c in self.cases if (c.batch, c.chunk) == (batch, chunk)]

    def crossover(self, fingerprint: str, batch: int, chunk: int) -> Crossover:
        """Where a configuration begins to be faster than the best dense kernel of the same rounds."""
        cases = [
            (c, n)
            for c in self.line(batch, chunk)
            for n in c.names("sparse")
            if c.first(n)["fingerprint"] == fingerprint
        ]
        wins = [(c.length, _faster(c, name)) for c, name in cases if c.times(name)]
        if not wins or not wins[-1][1]:
            return Crossover(wins=None, dense_below=None)
        lost = max((i for i, (_, won) in enumerate(wins) if not won), default=None)
        if lost is None:
            return Crossover(wins=wins[0][0], dense_below=None)
        return Crossover(wins=wins[lost + 1][0], dense_below=wins[lost][0])


def _faster(case: TtftCase, name: str) -> bool:
    best = case.best_dense
    ratio = case.ratio(name, best) if best else None
    return ratio is not None and ratio.p90 < 1


def _order(entry: tuple[tuple[int, int, int], object]) -> tuple[int, int, int]:
    n, b, c = entry[0]
    return b, c, n
