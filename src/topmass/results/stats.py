"""Intervals for scores and paired differences, clustered by haystack. NumPy only.

Samples that share a haystack are not independent, so whole haystacks are resampled: the percentile bootstrap, widened by
sqrt(C / (C - 1)) for C haystacks, without which it is too narrow when they are few. Where every haystack has the same
value the bootstrap gives a point, which is no interval; then the bound is Wilson's, with one trial per haystack:

- all scores equal to s: Wilson for a proportion s of C;
- all differences zero: no discordant haystack among C, so at most u = z² / (C + z²) of them are discordant (two-sided 95 %:
  3.84 / (C + 3.84); the rule of three says 3 / C), and the difference lies within ±u.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Interval", "Spread", "macro_mean", "mean", "paired_difference", "spread", "wilson"]

RESAMPLES = 10_000

# weights per block of resamples: 32 MB
_BLOCK = 4_000_000
# kinds of clusters up to which drawing them together is faster
_FEW = 16

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its confidence interval, in the unit of the values.

    Attributes:
        point: The mean.
        low: Lower end; nan if one cluster of unbounded values leaves nothing to estimate it from.
        high: Upper end.
        clusters: Independent units (haystacks, texts).
        samples: Values.
        method: How the interval was made.
    """

    point: float
    low: float
    high: float
    clusters: int
    samples: int
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median with 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    samples: int


def wilson(proportion: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion of `n` independent trials.

    Example:
        >>> low, high = wilson(1.0, 100)
        >>> round(low, 4), high
        (0.963, 1.0)
    """
    z2 = _z(level) ** 2
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * proportion * (1 - proportion) / n + z2 * z2 / (4 * n * n)) / (1 + z2 / n)
    low, high = float(max(0.0, centre - half)), float(min(1.0, centre + half))
    # exact ends, where rounding would leave 1e-17
    return (0.0 if proportion == 0 else low), (1.0 if proportion == 1 else high)


def spread(values: ArrayLike) -> Spread:
    """Median with p10 and p90: what timings and skewed values are summarised by."""
    array = np.asarray(values, dtype=np.float64)
    p10, median, p90 = np.percentile(array, [10, 50, 90])
    return Spread(median=float(median), p10=float(p10), p90=float(p90), samples=array.size)


def mean(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of samples that come in clusters.

    Args:
        values: One per sample.
        clusters: The cluster of each sample.
        bounds: Range of a value: `(0, 1)` for scores, `(-1, 1)` for their differences, `None` where there is none.
        level: Confidence level.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Example:
        >>> mean([1.0, 1.0, 0.0, 1.0], ["a", "a", "b", "c"]).point
        0.75
    """
    return macro_mean({"": (values, clusters)}, bounds=bounds, level=level, resamples=resamples, seed=seed)


def paired_difference(
    reference: ArrayLike, other: ArrayLike, clusters: Sequence[Hashable], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean of `reference - other` on the same samples: what is lost by going from one to the other.

    Args:
        reference: Scores between 0 and 1.
        other: Scores of the same samples in the same order.
        clusters: The haystack of each sample.
    """
    difference = np.asarray(reference, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return mean(difference, clusters, bounds=(-1.0, 1.0), seed=seed, resamples=resamples)


def macro_mean(
    strata: Mapping[str, tuple[ArrayLike, Sequence[Hashable]]],
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Unweighted mean over tasks of the mean of each; haystacks are resampled within their task.

    Tasks whose haystacks all agree are bounded together by Wilson's interval on the sum of their haystacks (for
    unequal numbers, as many times the harmonic mean), and that bound is added in quadrature to the bootstrap's.

    Args:
        strata: Values and clusters of each task; for a paired difference the values are differences.

    Raises:
        ValueError: A task has no value.
    """
    tables = [_cluster_table(np.asarray(v, dtype=np.float64), c) for v, c in strata.values()]
    means = [float(sums.sum() / counts.sum()) for sums, counts in tables]
    point = float(np.mean(means))
    agree = [i for i, (sums, counts) in enumerate(tables) if _all_equal(sums / counts)]
    vary = [i for i in range(len(tables)) if i not in agree]
    bound = "all equal" if bounds is None else "Wilson bound"
    low = high = 0.0
    if vary:
        draws = sum(_draws(*tables[i], resamples=resamples, seed=(seed, i)) - means[i] for i in vary) / len(tables)
        low, high = (float(x) for x in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
    if agree:
        below, above = _agreement_bound([(means[i], tables[i][0].size) for i in agree], bounds, level)
        share = len(agree) / len(tables)
        low, high = -float(np.hypot(low, share * below)), float(np.hypot(high, share * above))
    low, high = point + low, point + high
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Interval(
        point=point,
        low=low,
        high=high,
        clusters=sum(sums.size for sums, _ in tables),
        samples=int(sum(counts.sum() for _, counts in tables)),
        method=" + ".join(["cluster bootstrap"] * bool(vary) + [bound] * bool(agree)),
    )


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _all_equal(x: Floats) -> bool:
    return bool(np.ptp(x) <= 1e-12 * max(1.0, float(np.abs(x).max())))


def _cluster_table(values: Floats, clusters: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """Sum and number of the values of each cluster."""
    if values.size == 0 or values.size != len(clusters):
        raise ValueError(f"Need one cluster for each of at least one value, got {len(clusters)} for {values.size}.")
    index: dict[Hashable, int] = {}
    ids = np.array([index.setdefault(c, len(index)) for c in clusters])
    return np.bincount(ids, weights=values).astype(np.float64), np.bincount(ids).astype(np.float64)


def _draws(sums: Floats, counts: Floats, *, resamples: int, seed: tuple[int, int]) -> Floats:
    """Bootstrap means, widened about the mean of the sample."""
    n = sums.size
    rng = np.random.default_rng(seed)
    # scores repeat: equal clusters are drawn together, which is the same distribution and much less work
    kinds, many = np.unique(np.stack([sums, counts], 1), axis=0, return_counts=True)
    drawn = [_weights(rng, many, rows) for rows in _blocks(resamples, many.size)]
    draws = np.concatenate([(w @ kinds[:, 0]) / (w @ kinds[:, 1]) for w in drawn])
    point = sums.sum() / counts.sum()
    return point + (draws - point) * np.sqrt(n / (n - 1))


def _weights(rng: np.random.Generator, many: NDArray[np.int64], rows: int) -> Floats:
    """How often each kind of cluster is drawn, for `rows` resamples."""
    n, kinds = int(many.sum()), many.size
    if kinds <= _FEW:
        return rng.multinomial(n, many / n, size=rows).astype(np.float64)
    kind = np.repeat(np.arange(kinds), many)[rng.integers(0, n, (rows, n))]
    flat = kind + np.arange(rows)[:, None] * kinds
    return np.bincount(flat.ravel(), minlength=rows * kinds).reshape(rows, kinds).astype(np.float64)


def _blocks(resamples: int, kinds: int) -> list[int]:
    """Numbers of resamples whose weights fit in memory together."""
    rows = max(1, _BLOCK // kinds)
    return [min(rows, resamples - i) for i in range(0, resamples, rows)]


def _agreement_bound(
    groups: Sequence[tuple[float, int]], bounds: tuple[float, float] | None, level: float
) -> tuple[float, float]:
    """Distances below and above the mean of groups (common value, clusters) within each of which all clusters agree."""
    if bounds is None:
        unknown = any(n < 2 for _, n in groups)
        return (float("nan"), float("nan")) if unknown else (0.0, 0.0)
    n = round(len(groups) ** 2 / sum(1 / n for _, n in groups))
    value = float(np.mean([v for v, _ in groups]))
    if bounds[0] < 0 and value == 0:
        u = wilson(0.0, n, level=level)[1]
        return u, u
    size = abs(value)
    low, high = wilson(min(size, 1.0), n, level=level)
    return (size - low, high - size) if value >= 0 else (high - size, size - low)
