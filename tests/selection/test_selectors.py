"""Selectors against the independent oracle, and what every selector promises."""

import itertools

import oracle64
import pytest
import torch

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.core.support import Support
from topmass.errors import ConfigError, DataError
from topmass.ops import sparse_prefill
from topmass.selection import (
    AttentionInputs,
    DenseSelector,
    ExternalSelector,
    OracleSelector,
    PooledSelector,
    PreviousLayerSelector,
    RandomSelector,
    StreamingSelector,
)

BLOCKS = (1, 2, 4, 8, 16)


def tensors(n, *, h=4, hk=2, d=6, batch=1, seed=0, q_start=0, sharp=1.5):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n, h, d, generator=draw, dtype=torch.float64) * sharp
    k = torch.randn(batch, n, hk, d, generator=draw, dtype=torch.float64) * sharp
    return q[:, q_start:], k


def per_head(support: Support, q, k):
    mask = support.mask(k.shape[1])
    return mask.repeat_interleave(q.shape[2] // mask.shape[1], 1)


def check(q, k, rule: oracle64.Rule, **extras):
    """The oracle's support equals the independent one."""
    selector = OracleSelector(
        budget=rule.budget,
        granularity=Granularity(q_block=rule.q_block, kv_block=rule.kv_block, share=rule.share),
        sink=rule.sink,
        window=rule.window,
        pool=rule.pool,
        dense_below=rule.dense_below,
    )
    support = selector.select(AttentionInputs(q=q, k=k, **extras))
    expected = oracle64.support(q, k, rule, **extras)
    assert per_head(support, q, k).equal(expected)
    assert support.keys_read().repeat_interleave(q.shape[2] // support.groups.shape[1], 1).equal(expected.sum(-1))
    return support, expected


@pytest.mark.parametrize("pool", ["sum", "max"])
@pytest.mark.parametrize("share", ["layer", "kv_head", "q_head"])
@pytest.mark.parametrize(("g", "r"), list(itertools.product(BLOCKS, BLOCKS)))
def test_oracle_is_the_rule(g, r, share, pool):
    n = 57 if g + r < 20 else 75
    for start, more in ((0, 0), (0, 9), (g + 5, 4)):
        fields = {"q_block": g, "kv_block": r, "share": share, "pool": pool}
        smallest = oracle64.Rule(budget=1, **fields).smallest_budget()
        q, k = tensors(n, seed=g * 100 + r, q_start=start)
        check(q, k, oracle64.Rule(budget=smallest + more, **fields))


@pytest.mark.parametrize(
    "budget", [14, 25, "1%", "30%", "100%", "mass:0.3<=20", "mass:0.9<=14", "mass:0.9<=60", "mass:0.01<=14"]
)
@pytest.mark.parametrize(
    ("g", "r", "sink", "window"),
    [
        (1, 1, 0, 0),
        (1, 1, 0, 1),
        (1, 1, 3, 2),
        (1, 1, 5, 7),
        (1, 1, 3, 0),
        (1, 1, 12, 1),  # at early positions the sink covers the window
        (2, 1, 1, 3),
        (1, 2, 3, 5),
        (2, 2, 1, 4),
        (4, 2, 2, 3),
        (2, 4, 1, 1),
    ],
)  # fmt: skip
def test_budgets_sinks_and_windows(budget, g, r, sink, window):
    for share, pool, below in (("layer", "sum", 0), ("kv_head", "max", 0), ("layer", "max", 33)):
        fields = {"q_block": g, "kv_block": r, "sink": sink, "window": window, "dense_below": below}
        rule = oracle64.Rule(budget=budget, share=share, pool=pool, **fields)
        assert rule.smallest_budget() <= 14
        q, k = tensors(45, seed=sink * 10 + window)
        check(q, k, rule)


@pytest.mark.parametrize("window", [40, 100])
def test_window_beyond_the_prompt_reads_everything(window):
    q, k = tensors(40)
    support, _ = check(q, k, oracle64.Rule(budget=window + 1, window=window))
    assert support.keys_read().tolist() == [[list(range(1, 41))]]


@pytest.mark.parametrize("n", [1, 2, 8, 9, 10, 31, 32, 33])
@pytest.mark.parametrize(("g", "r"), [(1, 1), (2, 1), (1, 2), (4, 4)])
def test_odd_lengths(n, g, r):
    q, k = tensors(n, seed=n)
    for budget in (oracle64.Rule(budget=1, q_block=g, kv_block=r).smallest_budget() + 1, "20%", "mass:0.8<=20"):
        check(q, k, oracle64.Rule(budget=budget, q_block=g, kv_block=r))


@pytest.mark.parametrize(("h", "hk"), [(3, 3), (4, 1), (6, 2), (1, 1)])
@pytest.mark.parametrize("share", ["layer", "kv_head", "q_head"])
def test_heads(h, hk, share):
    q, k = tensors(33, h=h, hk=hk, batch=2)
    check(q, k, oracle64.Rule(budget=9, share=share, kv_block=2, q_block=2))


@pytest.mark.parametrize("pool", ["sum", "max"])
@pytest.mark.parametrize("budget", [9, "mass:0.7<=20"])
def test_softcap_and_learned_sinks(pool, budget):
    q, k = tensors(33)
    sinks = torch.tensor([0.5, 3.0, -1.0, 6.0], dtype=torch.float64)
    for extras in ({"softcap": 0.8}, {"sinks": sinks}, {"softcap": 0.8, "sinks": sinks}, {"scale": 0.9}):
        check(q, k, oracle64.Rule(budget=budget, pool=pool, kv_block=2), **extras)


@pytest.mark.parametrize(("g", "r"), [(1, 1), (4, 1), (1, 4), (16, 1), (8, 8)])
@pytest.mark.parametrize("pool", ["sum", "max"])
def test_ties_take_the_lower_group(g, r, pool):
    # equal keys, or queries of zero: every key has the same score
    for n in (31, 33, 64, 77):
        q, k = tensors(n)
        smallest = oracle64.Rule(budget=1, q_block=g, kv_block=r).smallest_budget()
        zero = torch.zeros_like(q)
        support, _ = check(zero, k, oracle64.Rule(budget=smallest + 2 * r, q_block=g, kv_block=r, pool=pool))
        blocks, counts = support.groups[0, 0], support.counts[0, 0].tolist()
        assert all(row[:count].tolist() == list(range(count)) for row, count in zip(blocks, counts, strict=True))
        check(-zero, k, oracle64.Rule(budget=smallest + 2 * r, q_block=g, kv_block=r, pool=pool))


def test_repeated_tokens_take_the_lower_copy():
    # without positions a repeated token has a repeated key: three copies of 11 tokens. Whole numbers, for which the
    # order of a sum does not matter: a matrix product need not give equal columns equal bits
    q, k = (x.round().repeat(1, 3, 1, 1) for x in tensors(11, seed=3))
    for budget in (3, 5, 6, 12):
        check(q, k, oracle64.Rule(budget=budget), scale=0.25)
        check(q, k, oracle64.Rule(budget=budget, share="q_head", window=2), scale=0.25)


def test_two_valued_scores():
    q, k = torch.ones(1, 41, 1, 1, dtype=torch.float64), torch.zeros(1, 41, 1, 1, dtype=torch.float64)
    k[:, 1::3] = 2.0
    for budget in (3, 8, 14, 15, 20):
        check(q, k, oracle64.Rule(budget=budget))


@pytest.mark.parametrize("g", [1, 4])
def test_chunks_select_as_one(g):
    q, k = tensors(41)
    for selector in (
        OracleSelector(budget=12, granularity=Granularity(q_block=g, kv_block=2), sink=1),
        OracleSelector(budget="30%", granularity=Granularity(q_block=g)),
        OracleSelector(budget="mass:0.6<=14", granularity=Granularity(q_block=g)),
        RandomSelector(budget=12, granularity=Granularity(q_block=g, kv_block=2, share="kv_head"), seed=5),
        PooledSelector(budget=24, granularity=Granularity(q_block=g, kv_block=4)),
        StreamingSelector(sink=2, window=5),
    ):
        whole = selector.select(AttentionInputs(q=q, k=k))
        for step in (1, 7, 16, 40) if g == 1 else (4, 16, 40):
            parts = [
                selector.select(AttentionInputs(q=q[:, lo : lo + step], k=k[:, : lo + step], q_start=lo))
                for lo in range(0, 41, step)
            ]
            joined = Support.cat(parts)
            assert joined.mask(41).equal(whole.mask(41)), (selector, step)
            assert joined.counts.equal(whole.counts)


def test_a_batch_selects_as_each_alone():
    q, k = tensors(37, batch=3)
    for selector in (OracleSelector(budget=9), PooledSelector(budget=24, granularity=Granularity(kv_block=4)), RandomSelector(budget=9)):  # fmt: skip
        whole = selector.select(AttentionInputs(q=q, k=k)).mask(37)
        for i in range(3):
            assert selector.select(AttentionInputs(q=q[i : i + 1], k=k[i : i + 1])).mask(37).equal(whole[i : i + 1])


@pytest.mark.parametrize("cls", [OracleSelector, PooledSelector, RandomSelector, PreviousLayerSelector])
@pytest.mark.parametrize("budget", [37, 64, "100%"])
def test_a_budget_of_the_length_reads_everything(cls, budget):
    q, k = tensors(37)
    support = cls(budget=budget, granularity=Granularity(q_block=4, kv_block=2)).select(AttentionInputs(q=q, k=k))

    assert support.keys_read()[0, 0].tolist() == list(range(1, 38))
    expected = oracle64.attend(q, k, k, oracle64.probabilities(q, k) > 0)
    torch.testing.assert_close(sparse_prefill(q, k, k, support)[0], expected, rtol=1e-12, atol=1e-13)


def test_plan_gives_each_layer_its_budget():
    selector = OracleSelector(budget=Plan(layers={1: Budget(tokens=4), 2: None}, default=Budget.parse("mass:0.5<=9")))
    q, k = tensors(33)

    for layer, budget in ((1, 4), (7, "mass:0.5<=9")):
        support = selector.select(AttentionInputs(q=q, k=k, layer=layer))
        assert per_head(support, q, k).equal(oracle64.support(q, k, oracle64.Rule(budget=budget)))
    assert selector.rule(2) is None


def test_pooled_scores_queries_against_mean_keys():
    q, k = tensors(45)
    for g, r, share in ((1, 4, "layer"), (4, 4, "kv_head"), (2, 8, "q_head"), (1, 1, "layer")):
        fields = {"q_block": g, "kv_block": r, "share": share}
        budget = oracle64.Rule(budget=1, **fields).smallest_budget() + r
        pooled = k[:, : 45 // r * r].unflatten(1, (-1, r)).mean(2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, pooled.repeat_interleave(2, 2)) * 6**-0.5
        # as token scores that are equal within a group, made positive and small: the order is all that counts
        scores = (logits - logits.amin() + 1).repeat_interleave(r, -1) * 1e-6
        scores = torch.nn.functional.pad(scores, (0, 45 - scores.shape[-1]))

        support = PooledSelector(budget=budget, granularity=Granularity(**fields)).select(AttentionInputs(q=q, k=k))

        expected = oracle64.support(q, k, oracle64.Rule(budget=budget, **fields), p=scores)
        assert per_head(support, q, k).equal(expected)


def test_streaming_reads_sink_and_window():
    q, k = tensors(30)
    support = StreamingSelector(sink=3, window=5).select(AttentionInputs(q=q, k=k))

    rows = [row.nonzero().flatten().tolist() for row in support.mask(30)[0, 0]]
    assert rows == [sorted({*range(min(3, t + 1)), *range(max(t - 4, 0), t + 1)}) for t in range(30)]
    assert StreamingSelector(sink=0, window=1).select(AttentionInputs(q=q, k=k)).keys_read().unique().tolist() == [1]


class TestRandom:
    """The random selector."""

    def support(self, n=64, *, layer=0, **fields):
        q, k = tensors(n)
        return RandomSelector(**{"budget": 9, **fields}).select(AttentionInputs(q=q, k=k, layer=layer)).mask(n)

    def test_is_seeded(self):
        assert self.support(seed=1).equal(self.support(seed=1))
        for other in ({"seed": 2}, {"layer": 1}, {"seed": -1}, {"seed": 2**62}):
            assert not self.support(**{"seed": 1, **other}).equal(self.support(seed=1))

    def test_does_not_look_at_the_tensors(self):
        selector = RandomSelector(budget=9)
        one, two = (selector.select(AttentionInputs(q=q, k=k)) for q, k in (tensors(40, seed=1), tensors(40, seed=2)))
        assert one.groups.equal(two.groups)

    def test_heads_and_positions_draw_apart(self):
        mask = self.support(granularity=Granularity(share="q_head"))
        assert not mask[0, 0].equal(mask[0, 1])
        q, k = tensors(64)
        rows = RandomSelector(budget=9).select(AttentionInputs(q=q, k=k)).groups[0, 0, 40:, :8]
        assert len({tuple(row.tolist()) for row in rows}) == 24

    def test_is_uniform(self):
        # every key below 40 as often as another in rows 40..63: 24 rows x 200 seeds, chi-square of 40 keys
        q, k = tensors(64)
        taken = torch.zeros(40)
        for seed in range(200):
            support = RandomSelector(budget=9, seed=seed).select(AttentionInputs(q=q[:, 40:], k=k, q_start=40))
            taken += support.mask(64)[0, 0, :, :40].sum(0)
        assert ((taken - taken.mean()) ** 2 / taken.mean()).sum() < 80  # 99.99 % of 39 degrees: 79
        pairs = (taken.view(-1, 2).sum(0) / taken.sum() - 0.5).abs().max()
        assert pairs < 0.01


class TestPreviousLayer:
    """The support of the layer before."""

    def test_each_layer_reads_what_the_one_before_found(self):
        selector, own, carry = PreviousLayerSelector(budget=6), OracleSelector(budget=6), {}
        layers = [tensors(30, seed=i) for i in range(3)]
        found = [selector.select(AttentionInputs(q=q, k=k, layer=i, carry=carry)) for i, (q, k) in enumerate(layers)]
        alone = [own.select(AttentionInputs(q=q, k=k)) for q, k in layers]

        assert found[0].groups.equal(alone[0].groups)
        assert found[1].groups.equal(alone[0].groups)
        assert found[2].groups.equal(alone[1].groups)
        assert not alone[1].groups.equal(alone[0].groups)

    def test_needs_one_budget_for_all_layers(self):
        # a layer's support would be read under the next one's budget, or not found where the layer stays dense
        with pytest.raises(ConfigError, match="one budget for all layers"):
            PreviousLayerSelector(budget=Plan(layers={1: Budget(tokens=4)}, default=Budget(tokens=8)))


class TestExternal:
    """Supports from elsewhere."""

    def test_hands_out_the_rows_asked_for(self):
        q, k = tensors(30)
        whole = OracleSelector(budget=6, granularity=Granularity(q_block=4)).select(AttentionInputs(q=q, k=k))
        selector = ExternalSelector(supports={3: whole})

        part = selector.select(AttentionInputs(q=q[:, 8:20], k=k[:, :20], layer=3))

        assert part.mask(20).equal(whole.mask(30)[:, :, 8:20, :20])
        assert selector.rule(0) is None

    def test_positions_it_does_not_cover(self):
        q, k = tensors(30)
        support = OracleSelector(budget=6).select(AttentionInputs(q=q[:, 10:20], k=k[:, :20]))
        selector = ExternalSelector(supports={0: support})
        for lo, hi in ((9, 12), (19, 21), (0, 30)):
            with pytest.raises(ConfigError, match=rf"layer 0 covers positions 10..19, but {lo}..{hi - 1} are read"):
                selector.select(AttentionInputs(q=q[:, lo:hi], k=k[:, :hi]))

    def test_fingerprint_tells_supports_apart(self):
        q, k = tensors(30)
        a, b = (OracleSelector(budget=n).select(AttentionInputs(q=q, k=k)) for n in (6, 7))
        prints = [ExternalSelector(supports={0: s}).fingerprint for s in (a, b, a)]
        assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize("cls", [RandomSelector, PooledSelector])
def test_without_mass_no_mass_budget(cls):
    q, k = tensors(20)
    with pytest.raises(ConfigError, match="knows no attention mass; give it a budget in tokens or per cent"):
        cls(budget="mass:0.9<=40").select(AttentionInputs(q=q, k=k))


def test_dense_selects_nothing():
    q, k = tensors(3)
    assert DenseSelector().rule(0) is None
    with pytest.raises(ConfigError, match="dense"):
        DenseSelector().select(AttentionInputs(q=q, k=k))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["q", "k"])
def test_nan_is_bad_data(value, which):
    q, k = tensors(20)
    (q if which == "q" else k)[0, 7, 1, 2] = value
    with pytest.raises(DataError, match="layer 5 is not a distribution"):
        OracleSelector(budget=4).select(AttentionInputs(q=q, k=k, layer=5))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"budget": 8, "sink": 4, "window": 8}, "the smallest that works is 13"),
        ({"budget": "mass:0.9<=8", "sink": 4, "window": 8}, "the smallest that works is 13"),
        ({"budget": 40, "granularity": Granularity(q_block=16, kv_block=16)}, "the smallest that works is 47"),
        ({"budget": 8, "window": 0, "granularity": Granularity(q_block=2)}, "use window >= 1"),
        ({"budget": 8, "sink": -1}, "sink must not be negative"),
        ({"budget": "8 keys"}, "write tokens"),
    ],
)
def test_what_cannot_work_fails_when_it_is_made(fields, words):
    for cls in (OracleSelector, RandomSelector):
        with pytest.raises(ConfigError, match=words):
            cls(**fields)
    with pytest.raises(ConfigError, match="negative"):
        StreamingSelector(window=-1)


def test_fingerprints_follow_the_configuration():
    base = {"budget": 64}
    variants = [
        {},
        {"budget": 65},
        {"budget": "5%"},
        {"granularity": Granularity(q_block=2)},
        {"granularity": Granularity(kv_block=2)},
        {"granularity": Granularity(share="q_head")},
        {"sink": 1},
        {"window": 2},
        {"pool": "max"},
        {"dense_below": 100},
    ]
    selectors = [
        cls(**{**base, **v})
        for v in variants
        for cls in (OracleSelector, RandomSelector, PreviousLayerSelector)
        if cls is not RandomSelector or "pool" not in v
    ]
    selectors += [RandomSelector(budget=64, seed=1), StreamingSelector(), StreamingSelector(sink=0), DenseSelector()]
    assert len({s.fingerprint for s in selectors}) == len(selectors)
    assert OracleSelector(budget="64").fingerprint == OracleSelector(budget=Budget(tokens=64)).fingerprint


@pytest.mark.parametrize("selector", [RandomSelector, PooledSelector])
def test_a_pool_without_effect_is_refused(selector):
    with pytest.raises(ConfigError, match="pool has no effect"):
        selector(budget=64, pool="max")


def test_per_query_keeps_the_rest():
    selector = OracleSelector(budget=64, granularity=Granularity(q_block=8, kv_block=4), sink=3)
    assert selector.per_query() == OracleSelector(budget=64, granularity=Granularity(kv_block=4), sink=3)
