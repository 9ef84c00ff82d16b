"""Intervals against closed forms."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from topmass.results.stats import macro_mean, mean, paired_difference, spread, wilson


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 11), (299, 300), (300, 300)])
def test_wilson(k: int, n: int) -> None:
    expected = scipy_stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_mean_of_independent_samples_is_the_normal_interval() -> None:
    x = np.random.default_rng(1).normal(size=401)
    interval = mean(x, range(401), bounds=None)
    half = 1.959964 * x.std(ddof=1) / np.sqrt(401)
    assert interval.point == pytest.approx(x.mean())
    assert (interval.low, interval.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.03 * half)
    assert (interval.clusters, interval.samples, interval.method) == (401, 401, "cluster bootstrap")


def test_few_clusters_are_not_too_narrow() -> None:
    x = np.random.default_rng(1).normal(size=(2000, 6))
    width = np.mean([(lambda i: i.high - i.low)(mean(row, range(6), bounds=None, resamples=500)) for row in x])
    uncorrected = 2 * 1.96 * np.mean(x.std(axis=1)) / np.sqrt(6)
    assert width > uncorrected


def test_repeated_samples_of_a_cluster_add_no_information() -> None:
    x = np.random.default_rng(2).random(50)
    once = mean(x, range(50))
    often = mean(np.repeat(x, 8), np.repeat(np.arange(50), 8).tolist())
    assert (often.point, often.low, often.high) == pytest.approx((once.point, once.low, once.high))
    assert (often.clusters, often.samples) == (50, 400)


def test_clusters_of_unequal_size_weigh_by_their_samples() -> None:
    assert mean([1, 1, 1, 0], ["a", "a", "a", "b"]).point == 0.75


def test_pairing_removes_what_samples_share() -> None:
    rng = np.random.default_rng(3)
    hard = rng.random(200)
    dense, sparse = hard, hard - 0.01 * (rng.random(200) < 0.5)
    interval = paired_difference(dense, sparse, range(200))
    assert interval.high - interval.low < 0.003
    assert interval.low < 0.005 < interval.high


def test_equal_scores_fall_back_to_wilson() -> None:
    assert (mean([1.0] * 40, range(40)).low, mean([1.0] * 40, range(40)).high) == pytest.approx(wilson(1.0, 40))
    zero = mean([0.0] * 40, range(40))
    assert (zero.low, zero.high) == pytest.approx(wilson(0.0, 40))
    assert zero.method == "Wilson bound"


def test_zero_differences_are_bounded_by_the_discordant_pairs_that_may_exist() -> None:
    interval = paired_difference([1.0] * 300, [1.0] * 300, range(300))
    assert (interval.low, interval.high) == pytest.approx((-3.8415 / 303.8415, 3.8415 / 303.8415), rel=1e-4)


def test_complete_loss_is_not_certain_either() -> None:
    interval = paired_difference([1.0] * 30, [0.0] * 30, range(30))
    assert (interval.low, interval.high) == pytest.approx(wilson(1.0, 30))


def test_equal_values_without_bounds() -> None:
    assert mean([2.0, 2.0], [0, 1], bounds=None).low == 2.0
    alone = mean([2.0], [0], bounds=None)
    assert alone.point == 2.0
    assert np.isnan(alone.low)


def test_macro_mean_weighs_tasks_equally_and_adds_their_variances() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.5, 0.1, 100), rng.normal(0.3, 0.1, 400)
    interval = macro_mean({"a": (a, range(100)), "b": (b, range(400))})
    half = 1.96 * 0.5 * np.sqrt(a.var(ddof=1) / 100 + b.var(ddof=1) / 400)
    assert interval.point == pytest.approx((a.mean() + b.mean()) / 2)
    assert interval.high - interval.point == pytest.approx(half, rel=0.04)


def test_macro_mean_of_tasks_that_agree_pools_their_haystacks() -> None:
    strata = {str(i): ([0.0] * 50, range(50)) for i in range(6)}
    assert macro_mean(strata, bounds=(-1.0, 1.0)).high == pytest.approx(wilson(0.0, 300)[1])


def test_macro_mean_adds_the_bound_of_tasks_that_agree() -> None:
    x = np.random.default_rng(5).choice([0.0, 0.5], 80) - 0.25
    varied = mean(x, range(80), bounds=(-1.0, 1.0))
    both = macro_mean({"a": (x, range(80)), "b": ([0.0] * 80, range(80))}, bounds=(-1.0, 1.0))
    expected = np.hypot((varied.high - varied.point) / 2, wilson(0.0, 80)[1] / 2)
    assert both.high - both.point == pytest.approx(expected)
    assert both.method == "cluster bootstrap + Wilson bound"


def test_scores_keep_their_bounds() -> None:
    interval = mean([1.0] * 9 + [0.0], range(10))
    assert 0 <= interval.low <= interval.high <= 1


def test_seeded() -> None:
    x = np.random.default_rng(6).random(30)
    assert mean(x, range(30)) == mean(x, range(30))
    assert mean(x, range(30)).low != mean(x, range(30), seed=1).low


def test_many_clusters_need_little_memory() -> None:
    x = np.random.default_rng(7).random(20_000)
    interval = mean(x, range(20_000), resamples=1000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * x.std() / np.sqrt(20_000), rel=0.1)


def test_spread() -> None:
    result = spread(np.arange(101.0))
    assert (result.p10, result.median, result.p90) == (10, 50, 90)


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        mean([], [])
