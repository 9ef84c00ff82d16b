"""Several callables timed beside each other, round by round, once a check has passed."""

import time
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from topmass.errors import ConfigError
from topmass.results.stats import Spread, spread

__all__ = ["FLUSH_BYTES", "Timings", "now", "rotation", "time_rounds"]

# more than the last-level cache of any GPU
FLUSH_BYTES = 256 * 2**20

Name = TypeVar("Name", bound=Hashable)
Report = TypeVar("Report")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings(Generic[Name, Report]):
    """Milliseconds of every name, one a round, and what the check returned.

    Example:
        >>> timings = Timings(milliseconds={"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 4.0]}, gate=None)
        >>> timings.spread("a").median, timings.ratio("b", "a").median
        (2.0, 2.0)
    """

    milliseconds: dict[Name, list[float]]
    gate: Report

    def spread(self, name: Name) -> Spread:
        """Median, p10 and p90 over the rounds, ms."""
        return spread(self.milliseconds[name])

    def ratio(self, name: Name, over: Name) -> Spread:
        """Time of `name` over that of `over` in the same round: what drifts between rounds cancels."""
        pairs = zip(self.milliseconds[name], self.milliseconds[over], strict=True)
        return spread([a / b for a, b in pairs])


def time_rounds(
    fns: Mapping[Name, Callable[[], object]],
    *,
    gate: Callable[[], Report],
    rounds: int = 7,
    warmup: int = 1,
    warm: Collection[Name] = (),
    device: torch.device | str = "cuda",
    flush_bytes: int = FLUSH_BYTES,
) -> Timings[Name, Report]:
    """Time callables in interleaved rounds.

    Every round runs each callable once. The order rotates from round to round, and runs backwards in every other one, so
    that clock, temperature and neighbour are the same for all. On CUDA the time is between two events on the stream: a
    callable that launches more slowly than it computes is timed as slow as it is.

    Args:
        fns: What to time, by name.
        gate: Runs first; raises if a result is wrong. Without a check there is no timing.
        rounds: Times that each callable is timed.
        warmup: Untimed calls of each beforehand, for compilation and autotuning.
        warm: Names that were run before and need no warm-up.
        device: Where the callables run.
        flush_bytes: Bytes written before each timed call so that no input is in the cache; 0 leaves it warm. CUDA only.

    Raises:
        ConfigError: There is nothing to time, or no round to time it in.
        AssertionError: The check failed.
    """
    if not fns or rounds < 1 or warmup < 0:
        raise ConfigError(
            f"Timing needs callables and at least 1 round, got {len(fns)} and {rounds} (warmup {warmup})."
        )
    report = gate()
    for name, fn in fns.items():
        for _ in range(0 if name in warm else warmup):
            fn()
    clock = _clock(torch.device(device), flush_bytes)
    found: dict[Name, list[float]] = {name: [] for name in fns}
    for i in range(rounds):
        for name in rotation(list(fns), i):
            found[name].append(clock(fns[name]))
    return Timings(milliseconds=found, gate=report)


def now(device: torch.device) -> float:
    """Milliseconds, once the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() * 1e3


def rotation(names: list[Name], i: int) -> list[Name]:
    """Order of round `i`: turned by one every round, and backwards in every other one.

    Example:
        >>> [rotation(["a", "b", "c"], i) for i in range(2)]
        [['a', 'b', 'c'], ['a', 'c', 'b']]
    """
    shift = i % len(names)
    turned = names[shift:] + names[:shift]
    return turned[::-1] if i % 2 else turned


def _clock(device: torch.device, flush_bytes: int) -> Callable[[Callable[[], object]], float]:
    if device.type != "cuda":
        return _wall_clock
    flush = torch.zeros(flush_bytes, dtype=torch.uint8, device=device)

    def clock(fn: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return clock


def _wall_clock(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3
