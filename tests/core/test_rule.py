"""The support rule in numbers worked out by hand, and its properties."""

from fractions import Fraction

import oracle64
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.tables import block_tables
from topmass.errors import ConfigError

blocks = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def settings(draw):
    g, r = draw(blocks), draw(blocks)
    window = draw(st.integers(0 if g == r == 1 else 1, 40))
    return {"granularity": Granularity(q_block=g, kv_block=r), "sink": draw(st.integers(0, 40)), "window": window}


def plain(budget, granularity, **rest):
    return oracle64.Rule(budget=budget, q_block=granularity.q_block, kv_block=granularity.kv_block, **rest)


@pytest.mark.parametrize(
    ("fields", "t0", "window_start", "groups", "first", "stop"),
    [
        # per query, per token: everything but the own key competes
        ({"budget": "8"}, 20, 20, 7, 0, 20),
        ({"budget": "8", "window": 0}, 20, 21, 8, 0, 21),
        ({"budget": "8", "sink": 2, "window": 3}, 20, 18, 3, 2, 18),
        # groups of 4: window 3 from position 18 on begins its group at 16; 1 of 12 - 3 - 3 keys left over
        ({"budget": "12", "r": 4, "window": 3}, 20, 16, 1, 0, 4),
        ({"budget": "12", "r": 4, "window": 2}, 21, 20, 1, 0, 5),
        # a sink of 5 is two groups of 4
        ({"budget": "24", "r": 4, "sink": 5}, 40, 40, 3, 2, 10),
        # blocks of 8 queries: the window is measured from the block's first query
        ({"budget": "24", "g": 8, "window": 4}, 40, 37, 13, 0, 37),
        ({"budget": "24", "g": 8, "r": 2, "window": 4}, 40, 36, 6, 0, 18),
        # before the window fills nothing competes
        ({"budget": "9", "window": 8}, 5, 0, 1, 0, 0),
        # shares: ceil(20% of 40 + 8), and never less than what works
        ({"budget": "20%", "g": 8, "window": 1}, 40, 40, 2, 0, 40),
        ({"budget": "1%", "g": 8, "window": 1}, 40, 40, 1, 0, 40),
        ({"budget": "mass:0.5<=8"}, 20, 20, 7, 0, 20),
    ],
)
def test_by_hand(fields, t0, window_start, groups, first, stop):
    granularity = Granularity(q_block=fields.pop("g", 1), kv_block=fields.pop("r", 1))
    rule = SupportRule(budget=Budget.parse(fields.pop("budget")), granularity=granularity, **fields)
    start = torch.tensor([t0])

    assert rule.window_start(start).tolist() == [window_start]
    assert rule.groups_wanted(start).tolist() == [groups]
    low, high = rule.candidate_range(start)
    assert (low, high.tolist()) == (first, [stop])


@given(settings())
def test_smallest_budget_is_exactly_the_smallest(fields):
    smallest = SupportRule(budget=None, **fields).smallest_budget

    assert smallest == plain(1, **fields).smallest_budget()
    rule = SupportRule(budget=Budget(tokens=smallest), **fields)
    assert rule.groups_wanted(torch.tensor([1000])).item() == 1
    for form in (Budget(tokens=smallest - 1) if smallest > 1 else None, Budget(mass=Fraction(1, 2), tokens=smallest - 1) if smallest > 1 else None):  # fmt: skip
        if form is not None:
            with pytest.raises(ConfigError, match=f"the smallest that works is {smallest}"):
                SupportRule(budget=form, **fields)


@given(settings(), st.integers(0, 200), st.integers(1, 10**6))
def test_shares_round_up_and_stay_workable(fields, block, millionths):
    rule = SupportRule(budget=Budget(share=Fraction(millionths, 10**6)), **fields)
    t0 = block * rule.granularity.q_block
    expected = plain(f"{Fraction(millionths, 10**4)}%", **fields)

    assert rule.budget_tokens(torch.tensor([t0])).tolist() == [expected.tokens(t0)]
    assert rule.groups_wanted(torch.tensor([t0])).tolist() == [expected.groups_taken(expected.tokens(t0))]


def test_share_of_a_long_context_is_exact():
    rule = SupportRule(budget=Budget.parse("33.3333333333%"))

    t = 8_000_000
    assert rule.budget_tokens(torch.tensor([t - 1])).item() == -(-333333333333 * t // 10**12)


@pytest.mark.parametrize(
    ("budget", "below", "expected"), [("8", 0, 8), ("8", 20, 20), ("25%", 0, 10), ("mass:0.9<=8", 0, 0), ("mass:0.9<=8", 20, 20), (None, 0, 0), (None, 20, 20)]
)  # fmt: skip
def test_dense_len(budget, below, expected):
    rule = SupportRule(budget=Budget.parse(budget) if budget else None, dense_below=below)

    assert rule.dense_len(torch.tensor([39])).tolist() == [expected]


@given(
    settings(),
    st.sampled_from(["150", "200", "7%", "33.3%", "99%", "100%", "mass:0.9<=200", None]),
    st.integers(0, 120),
    st.integers(0, 300),
    st.integers(1, 300),
)
def test_what_reads_all_is_counted_without_tensors(fields, budget, below, start, length):
    rule = SupportRule(budget=Budget.parse(budget) if budget else None, dense_below=below, **fields)
    t = torch.arange(start, start + length)
    g = rule.granularity.q_block

    sparse = t + 1 > rule.dense_len(t // g * g)
    assert rule.sparse_queries(start, length) == int(sparse.sum())
    assert rule.reads_all(start, length) == (not bool(sparse.any()))


@given(st.integers(0, 100), st.integers(1, 60), blocks)
def test_blocks_are_aligned_to_absolute_positions(start, length, g):
    rule = SupportRule(budget=None, granularity=Granularity(q_block=g))

    expected = sorted({t // g * g for t in range(start, start + length)})
    assert rule.block_starts(start, length).tolist() == expected


@pytest.mark.parametrize("field", ["sink", "window", "dense_below"])
def test_negative_settings(field):
    with pytest.raises(ConfigError, match=f"{field} must not be negative, got -1"):
        SupportRule(budget=Budget(tokens=64), **{field: -1})


@pytest.mark.parametrize("granularity", [Granularity(q_block=2), Granularity(kv_block=2)])
def test_window_zero_needs_token_granularity(granularity):
    with pytest.raises(ConfigError, match="use window >= 1"):
        SupportRule(budget=Budget(tokens=64), granularity=granularity, window=0)


def test_per_query_keeps_everything_else():
    rule = SupportRule(budget=Budget(tokens=64), granularity=Granularity(q_block=8, kv_block=4, share="q_head"), sink=3)

    one = rule.per_query()

    assert one.granularity == Granularity(kv_block=4, share="q_head")
    assert (one.budget, one.sink, one.window) == (rule.budget, 3, 1)


@st.composite
def rules(draw):
    fields = draw(settings())
    least = SupportRule(budget=None, **fields).smallest_budget
    tokens = draw(st.integers(least, least + 90))
    budget = draw(
        st.sampled_from([None, Budget(tokens=tokens), Budget.parse("20%"), Budget.parse(f"mass:0.9<={tokens}")])
    )
    return SupportRule(budget=budget, dense_below=draw(st.integers(0, 60)), **fields)


@given(rules())
def test_limits_of_one_block_are_those_of_many(rule) -> None:
    t0 = rule.block_starts(0, 300)
    _, stops = rule.candidate_range(t0)
    assert [rule.candidates_end(t) for t in t0.tolist()] == stops.tolist()
    assert [rule.groups_wanted_at(t) for t in t0.tolist()] == rule.groups_wanted(t0).tolist()
    assert [rule._dense_len_at(t) for t in t0.tolist()] == rule.dense_len(t0).tolist()


@given(rules(), st.integers(0, 99), st.integers(0, 70))
def test_tables_are_those_of_the_rule_and_made_once(rule, start, length) -> None:
    tables = block_tables(rule, start, length)
    t0 = rule.block_starts(start, length)
    first, stops = rule.candidate_range(t0)
    wants = torch.minimum(rule.groups_wanted(t0), stops - first)
    assert tables.first == first
    for found, expected in (
        (tables.stops, stops),
        (tables.wants, wants),
        (tables.window_start, rule.window_start(t0)),
        (tables.dense_len, rule.dense_len(t0)),
    ):
        assert found.dtype == torch.int32
        assert found.tolist() == expected.tolist()
    assert (tables.most, tables.wanted) == ((int(stops.max()), int(wants.max())) if length else (0, 0))
    assert block_tables(rule, start, length) is tables
    with torch.inference_mode():
        # tensors of inference mode may not reach what is differentiated
        assert block_tables(rule, start, length) is not tables
