"""Records of benchmark runs as tables of times, with ratios taken round by round."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from topmass.results import LoadedRun
from topmass.results.stats import Spread, spread

__all__ = ["BenchCase", "BenchTable"]

Row = dict[str, Any]

ROLES = ("dense", "stage", "part", "total", "ceiling")


@dataclass(slots=True, kw_only=True)
class BenchCase:
    """Everything that was timed together.

    Attributes:
        shape: Name of the attention shape.
        heads: The shape in words.
        length: Prompt length, tokens.
        what: Name of the total: layer, oracle or kl.
        config: Short label of budget and granularity.
        growth: Union growth that the inputs were made for; `None` for no particular one.
        rows: Its records.
    """

    shape: str
    heads: str
    length: int
    what: str
    config: str
    growth: float | None
    rows: list[Row]

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

    def rate(self, name: str) -> float | None:
        """Achieved TFLOP/s at the median time; of a copy TB/s."""
        time = self.time(name)
        work = self.value(name, "bytes" if name == "copy" else "flop")
        return work / time.median / 1e9 if time and work is not None else None

    def reason(self, name: str) -> str:
        """Why it did not run; empty if it did."""
        return next((r["status"] for r in self.rows if r["name"] == name and r["status"] != "ok"), "")


class BenchTable:
    """Records of benchmark runs; of a configuration that was run twice the later run counts."""

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
                        growth=row["growth"],
                        rows=[],
                    )
                mine[key].rows.append(row)
            found |= mine
        self.cases = sorted(found.values(), key=lambda c: (c.what != "layer", c.what, c.length, c.config))

    def of(self, what: str) -> list[BenchCase]:
        """Cases of one kind, by length."""
        return [case for case in self.cases if case.what == what]
