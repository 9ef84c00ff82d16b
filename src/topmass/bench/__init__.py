"""Times beside each other, each with a check that the result is right."""

from topmass.bench.timing import Timings, time_rounds

__all__ = ["Timings", "time_rounds"]
