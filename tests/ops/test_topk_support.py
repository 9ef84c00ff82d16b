"""Selection from given scores by the reference: ties, signs of zero, odd lengths, masses."""

from fractions import Fraction

import pytest
import torch

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.errors import BackendUnavailableError, ConfigError
from topmass.ops.topk_support import pool_scores, topk_support

backends = pytest.mark.parametrize("backend", ["reference"])  # test_backends.py compares the others with it


def chosen(scores, budget, *, backend="auto", q_start=None, mass=None, has_rest=True, **fields):
    """Groups chosen for one block that ends with the scores."""
    rule = SupportRule(budget=Budget.parse(budget), **fields)
    scores = torch.as_tensor(scores)[None, None, None]
    mass = mass if mass is None else torch.as_tensor(mass)[None, None, None]
    start = scores.shape[-1] * rule.granularity.kv_block - 1 if q_start is None else q_start
    found = topk_support(scores, rule=rule, q_start=start, q_len=1, mass=mass, has_rest=has_rest, backend=backend)
    assert (found.groups[found.groups >= 0]).numel() == found.counts.item()
    return found.groups[0, 0, 0, : found.counts.item()].tolist()


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [5, 31, 32, 33, 64, 65, 257])
@pytest.mark.parametrize("k", [1, 2, 4, 31, 32, 33])
def test_all_equal_takes_the_lowest(backend, dtype, n, k):
    for value in (0.0, -0.0, 1 / 3, -7.0, 6e-8):
        scores = torch.full((n,), value, dtype=dtype)
        assert chosen(scores, k + 1, backend=backend) == list(range(min(k, n - 1)))


@backends
def test_negative_zero_ties_with_zero(backend):
    assert chosen([-0.0, 0.0, -0.0, 0.0, 9.0], 3, backend=backend) == [0, 1]
    assert chosen([0.0, -0.0, 1.0, -0.0, 9.0], 3, backend=backend) == [0, 2]
    assert chosen([-0.0, 0.0, -0.0, 0.0, 9.0], "mass:1<=3", backend=backend, mass=[0.1, 0.2, 0.3, 0.1, 0.3]) == [0, 1]


@backends
def test_two_values(backend):
    assert chosen([1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 5.0], 5, backend=backend) == [0, 1, 3, 5]
    assert chosen([2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 5.0], 3, backend=backend) == [0, 2]


@backends
def test_only_candidates_compete(backend):
    # sink 2, window 3 of 10 keys: candidates are 2..6
    scores = [9.0, 9.0, 1.0, 5.0, 4.0, 3.0, 2.0, 9.0, 9.0, 9.0]
    assert chosen(scores, 7, backend=backend, sink=2, window=3) == [3, 4]
    assert chosen(scores, 6, backend=backend, sink=2, window=3) == [3]


@backends
def test_negative_and_infinitely_low_scores(backend):
    low = float("-inf")
    assert chosen([-5.0, -1.0, -9.0, -2.0, 0.0], 3, backend=backend) == [1, 3]
    assert chosen([low, -1.0, low, low, 0.0], 4, backend=backend) == [0, 1, 2]
    assert chosen([low, low, low, low, 0.0], 3, backend=backend) == [0, 1]


@backends
@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_candidates_than_wanted(backend, n):
    rule = SupportRule(budget=Budget(tokens=9), sink=1, window=1)
    found = topk_support(torch.ones(1, 1, 1, n), rule=rule, q_start=n - 1, q_len=1, backend=backend)

    assert found.counts.item() == max(n - 2, 0)
    assert found.mask(n).all()


@backends
def test_no_key_group_at_all(backend):
    rule = SupportRule(budget=Budget(tokens=64), granularity=Granularity(kv_block=16))
    found = topk_support(torch.ones(2, 1, 3, 0), rule=rule, q_start=0, q_len=3, backend=backend)

    assert found.groups.shape == (2, 1, 3, 0)
    assert found.keys_read().tolist() == [[[1, 2, 3]]] * 2


@backends
def test_rows_differ_in_what_they_may_take(backend):
    rule = SupportRule(budget=Budget.parse("50%"))
    scores = torch.arange(12.0).expand(1, 1, 12, 12)
    found = topk_support(scores, rule=rule, q_start=0, q_len=12, backend=backend)

    # position t reads ceil((t + 1) / 2) keys: its own and the highest before it
    for t in range(1, 12):
        wanted = -(-(t + 1) // 2) - 1
        wanted = max(wanted, 1)
        assert found.groups[0, 0, t, : found.counts[0, 0, t]].tolist() == list(range(max(t - wanted, 0), t))


@backends
@pytest.mark.parametrize(
    ("target", "cap", "expected"),
    [
        ("0.05", 8, []),  # the own key holds 1/8
        ("0.125", 8, []),
        ("0.3", 8, [1]),
        ("0.5", 8, [1]),
        ("0.51", 8, [1, 3]),
        ("0.8125", 8, [1, 3]),
        ("0.82", 8, [0, 1, 3]),
        ("1", 8, [0, 1, 2, 3]),
        ("1", 3, [1, 3]),
        ("0.3", 2, [1]),
    ],
)
def test_mass_by_hand(backend, target, cap, expected):
    mass = torch.tensor([2 / 16, 6 / 16, 1 / 16, 5 / 16, 2 / 16], dtype=torch.float64)
    assert chosen(mass, f"mass:{target}<={cap}", backend=backend, mass=mass) == expected


@backends
def test_mass_is_counted_in_order_of_score_and_summed(backend):
    # score and mass disagree, as they do under pool="max"
    scores, mass = [3.0, 1.0, 2.0, 0.0, 9.0], torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1]).double()
    assert chosen(scores, "mass:0.35<=8", backend=backend, mass=mass) == [0, 2]
    assert chosen(scores, "mass:0.45<=8", backend=backend, mass=mass) == [0, 1, 2]


@backends
def test_mass_of_a_distribution_over_candidates(backend):
    mass = torch.tensor([0.1, 0.5, 0.4, 0.0], dtype=torch.float64)
    assert chosen(mass, "mass:0.5<=4", backend=backend, mass=mass, has_rest=False) == [1]
    assert chosen(mass, "mass:0.6<=4", backend=backend, mass=mass, has_rest=False) == [1, 2]


def test_mass_budget_needs_mass():
    with pytest.raises(ConfigError, match="pass mass="):
        chosen([1.0, 2.0, 3.0], Budget(mass=Fraction(1, 2), tokens=2))


def test_unknown_backend_names_the_known():
    with pytest.raises(BackendUnavailableError, match=r"Unknown backend 'fast' of 'topk_support'; known: .*reference"):
        chosen([1.0, 2.0, 3.0], 2, backend="fast")


@pytest.mark.parametrize("pool", ["sum", "max"])
@pytest.mark.parametrize("q_start", [0, 3, 4, 9])
@pytest.mark.parametrize(("g", "r"), [(1, 1), (4, 1), (1, 4), (4, 2), (2, 8), (16, 4)])
def test_pooling_averages_queries_first(pool, q_start, g, r):
    q_len, kv_len = 11, q_start + 11
    scores = torch.rand(2, 3, q_len, kv_len, dtype=torch.float64)
    rule = SupportRule(budget=None, granularity=Granularity(q_block=g, kv_block=r))

    pooled = pool_scores(scores, rule=rule, q_start=q_start, pool=pool)

    for row, t0 in enumerate(range(q_start // g * g, kv_len, g)):
        queries = [t - q_start for t in range(t0, t0 + g) if q_start <= t < kv_len]
        mean = torch.stack([scores[:, :, i] for i in queries]).mean(0)
        for j in range(kv_len // r):
            tokens = mean[..., j * r : (j + 1) * r]
            expected = tokens.sum(-1) if pool == "sum" else tokens.amax(-1)
            torch.testing.assert_close(pooled[:, :, row, j], expected, rtol=1e-12, atol=0)
    assert pooled.shape == (2, 3, row + 1, kv_len // r)
