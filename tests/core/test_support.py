"""Supports: the mask by hand, and what joins, slices and counts of any support must satisfy."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import ConfigError
from topmass.ops.topk_support import topk_support

blocks = st.sampled_from([1, 2, 4, 8])


drawn = st.fixed_dictionaries(
    {
        "g": blocks,
        "r": blocks,
        "sink": st.integers(0, 12),
        "window": st.integers(0, 12),
        "dense_below": st.sampled_from([0, 0, 30, 100]),
        "form": st.sampled_from(["tokens", "share", "mass", "none"]),
        "more": st.integers(0, 20),
        "q_start": st.integers(0, 40),
        "q_len": st.integers(1, 40),
        "batch": st.integers(1, 2),
        "seed": st.integers(0, 2**31),
    }
)


def make(d):
    granularity = Granularity(q_block=d["g"], kv_block=d["r"])
    window = d["window"] if d["g"] == d["r"] == 1 else max(d["window"], 1)
    fields = {"granularity": granularity, "sink": d["sink"], "window": window, "dense_below": d["dense_below"]}
    tokens = SupportRule(budget=None, **fields).smallest_budget + d["more"]
    budget = {"tokens": str(tokens), "share": "40%", "mass": f"mass:0.5<={tokens}", "none": None}[d["form"]]
    rule = SupportRule(budget=Budget.parse(budget) if budget else None, **fields)
    q_blocks, kv_len = len(rule.block_starts(d["q_start"], d["q_len"])), d["q_start"] + d["q_len"]
    shape = (d["batch"], 1, q_blocks, kv_len // granularity.kv_block)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(d["seed"])) / kv_len
    return rule, topk_support(scores, rule=rule, q_start=d["q_start"], q_len=d["q_len"], mass=scores)


def one(groups, counts, *, rule, q_start, q_len):
    return Support.from_groups(
        torch.tensor([[groups]]), torch.tensor([[counts]]), rule=rule, q_start=q_start, q_len=q_len
    )


def test_mask_by_hand():
    # groups of 2, blocks of 4 queries, sink 2, window 3, budget 16; queries 17..21 lie in blocks 16 and 20
    rule = SupportRule(budget=Budget(tokens=16), granularity=Granularity(q_block=4, kv_block=2), sink=2, window=3)
    support = one([[3, 5], [8, -1]], [2, 1], rule=rule, q_start=17, q_len=5)

    rows = [row.nonzero().flatten().tolist() for row in support.mask(22)[0, 0]]

    window = [14, 15, 16, 17]  # 16 - 3 + 1 = 14 begins a group
    assert rows[0] == [0, 1, 6, 7, 10, 11, *window]
    assert rows[1] == [*rows[0], 18]
    assert rows[2] == [*rows[0], 18, 19]
    assert rows[3] == [0, 1, 16, 17, 18, 19, 20]  # 20 - 3 + 1 = 18, and group 8
    assert rows[4] == [*rows[3], 21]
    assert support.keys_read()[0, 0].tolist() == [10, 11, 12, 7, 8]


def test_dense_is_a_rule_per_row():
    rule = SupportRule(budget=Budget(tokens=18), granularity=Granularity(q_block=4))
    support = one([[0]], [1], rule=rule, q_start=16, q_len=4)

    assert support.keys_read()[0, 0].tolist() == [17, 18, 4, 5]
    assert support.sparse_rows().tolist() == [False, False, True, True]
    assert support.mask(20)[0, 0].sum(-1).tolist() == [17, 18, 4, 5]


@given(d=drawn)
def test_invariants(d):
    rule, support = make(d)
    mask, t = support.mask(support.q_start + support.q_len), support.positions()
    r, budget = rule.granularity.kv_block, rule.budget

    assert mask.sum(-1).equal(support.keys_read())
    assert not (mask & (torch.arange(mask.shape[-1]) > t[:, None])).any()
    valid = torch.arange(support.groups.shape[-1]) < support.counts[..., None]
    assert ((support.groups >= 0) == valid).all()
    follows = support.groups[..., 1:] > support.groups[..., :-1]
    assert follows[valid[..., 1:]].all()
    assert (support.groups * r >= support.sink)[valid].all()
    assert ((support.groups + 1) * r <= support.window_start[:, None])[valid].all()
    sparse = t + 1 > max(rule.dense_below, 0)
    if budget is not None and budget.share is None:
        assert (support.keys_read()[..., sparse] <= budget.tokens).all()
    # the sink and the window of every query are always read
    near = (t[:, None] - torch.arange(mask.shape[-1]) < rule.window) | (torch.arange(mask.shape[-1]) < rule.sink)
    assert mask[..., near & (torch.arange(mask.shape[-1]) <= t[:, None])].all()


@given(d=drawn, data=st.data())
def test_rows_are_rows_of_the_mask(d, data):
    _, support = make(d)
    lo = data.draw(st.integers(0, support.q_len - 1))
    hi = data.draw(st.integers(lo + 1, support.q_len))
    kv_len = support.q_start + support.q_len

    part = support.rows(lo, hi)

    assert part.mask(kv_len).equal(support.mask(kv_len)[:, :, lo:hi])
    assert part.keys_read().equal(support.keys_read()[..., lo:hi])
    assert part.positions().equal(support.positions()[lo:hi])


@given(d=drawn, data=st.data())
def test_cat_undoes_rows(d, data):
    rule, support = make(d)
    g = rule.granularity.q_block
    cuts = sorted(data.draw(st.sets(st.integers(support.q_start + 1, support.q_start + support.q_len), max_size=4)))
    cuts = [c // g * g - support.q_start for c in cuts]
    edges = sorted({0, *(c for c in cuts if 0 < c < support.q_len), support.q_len})

    joined = Support.cat([support.rows(lo, hi) for lo, hi in pairwise(edges)])

    assert joined.mask(100).equal(support.mask(100))
    assert (joined.q_start, joined.q_len) == (support.q_start, support.q_len)


@given(d=drawn)
def test_per_query_reads_the_same_keys(d):
    _, support = make(d)

    each = support.per_query()

    assert each.granularity.q_block == 1
    assert each.mask(100).equal(support.mask(100))
    assert each.keys_read().equal(support.keys_read())


def test_cat_of_different_widths():
    rule = SupportRule(budget=Budget(tokens=3))
    parts = [one([[-1]], [0], rule=rule, q_start=0, q_len=1), one([[0, 2]], [2], rule=rule, q_start=1, q_len=1)]

    assert Support.cat(parts).groups.tolist() == [[[[-1, -1], [0, 2]]]]


def test_cat_copies_only_what_it_has_to():
    rule = SupportRule(budget=Budget(tokens=3))
    part = one([[0, 1]], [2], rule=rule, q_start=5, q_len=1)
    assert Support.cat([part]) is part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "pad", None)
        assert Support.cat([part, one([[1, 2]], [2], rule=rule, q_start=6, q_len=1)]).q_len == 2


def test_cat_refuses_a_gap_a_split_block_and_another_granularity():
    rule = SupportRule(budget=Budget(tokens=16), granularity=Granularity(q_block=4))
    head = one([[0]], [1], rule=rule, q_start=16, q_len=2)
    for start in (18, 20):
        with pytest.raises(ConfigError, match="consecutive and multiples of q_block=4"):
            Support.cat([head, one([[0]], [1], rule=rule, q_start=start, q_len=1)])
    whole = one([[0]], [1], rule=rule, q_start=16, q_len=4)
    with pytest.raises(ConfigError, match="granularity"):
        Support.cat([whole, one([[0]], [1], rule=rule.per_query(), q_start=20, q_len=1)])
