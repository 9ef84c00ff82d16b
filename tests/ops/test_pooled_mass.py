"""Attention mass at the granularity of a selection: every backend against the pooled float64 mass."""

import inspect
from contextlib import nullcontext

import pytest
import torch

from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.errors import ConfigError
from topmass.ops import _dispatch, _logits, attention_mass, dense_lse, pooled_mass
from topmass.ops._triton_common import INTERPRETED
from topmass.ops.topk_support import pool_scores
from topmass.selection import AttentionInputs, OracleSelector

# Triton 3.6's interpreter calls int() on arrays of one element
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = [b for b in _dispatch.available("attention_mass") if b != "reference"] if INTERPRETED or ON_GPU else []
BACKENDS = ["reference", *KERNELS]
SETTINGS = [
    (1, 1, "layer", "sum"),
    (4, 1, "kv_head", "max"),
    (1, 8, "q_head", "max"),
    (16, 4, "layer", "max"),
    (16, 4, "kv_head", "sum"),
    (2, 32, "layer", "sum"),
    (64, 128, "kv_head", "max"),  # larger than a tile
    (128, 64, "layer", "sum"),
]


def make(*, q_len=37, kv_len=101, h=4, hk=2, d=24, dtype=torch.float16, sinks=False):
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, q_len, h, d, generator=gen), torch.randn(2, kv_len, hk, d, generator=gen)
    learned = torch.randn(h, generator=gen).to(DEVICE, dtype) if sinks else None
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), learned


def exact(q, k, *, granularity, pool, q_start, sinks, **settings):
    sinks = None if sinks is None else sinks.double()
    mass = attention_mass(q.double(), k.double(), q_start=q_start, sinks=sinks, share=granularity.share, **settings)
    rule = SupportRule(budget=None, granularity=granularity)
    return pool_scores(mass, rule=rule, q_start=q_start, pool=pool), mass.sum(-1)


def assert_near(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("g", "r", "share", "pool"), SETTINGS)
def test_equals_the_pooled_mass(g, r, share, pool, backend):
    q, k, sinks = make(sinks=True)
    settings = {"granularity": Granularity(q_block=g, kv_block=r, share=share), "pool": pool, "q_start": 61}
    settings |= {"scale": 0.4, "softcap": 2.0, "sinks": sinks}

    found = pooled_mass(q, k, backend=backend, **settings)

    assert_near(found, exact(q, k, **settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("q_len", "q_start", "kv_len"), [(1, 0, 1), (31, 0, 31), (33, 0, 33), (1, 64, 65), (70, 3, 90), (40, 130, 170)]
)
def test_odd_shapes(q_len, q_start, kv_len, backend):
    q, k, _ = make(q_len=q_len, kv_len=kv_len, h=4, hk=1, d=40)
    for g, r in [(1, 1), (8, 4)]:
        settings = {"granularity": Granularity(q_block=g, kv_block=r), "pool": "sum", "q_start": q_start, "scale": 0.3}
        assert_near(pooled_mass(q, k, backend=backend, **settings), exact(q, k, sinks=None, **settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("r", [1, 4])
def test_scattered_queries(r, given, backend):
    q, k, sinks = make(q_len=101, sinks=True)
    lse = dense_lse(q.double(), k.double(), k.double(), scale=0.4, sinks=sinks.double())[1].float()
    settings = {"granularity": Granularity(kv_block=r), "pool": "sum", "scale": 0.4, "sinks": sinks}
    whole = exact(q, k, q_start=0, **settings)
    rows = torch.tensor([100, 3, 0, 64, 31, 99, 5], device=DEVICE)

    found = pooled_mass(q[:, rows], k, lse[:, rows] if given else None, positions=rows, backend=backend, **settings)

    assert_near(found, [x[:, :, rows] for x in whole])


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_cannot_overflow_into_a_row(backend):
    q, k, _ = make(kv_len=61)
    lse = dense_lse(q, k[:, :37], k[:, :37], scale=0.4)[1]
    k[:, 37:] = 6e4
    q = q.abs()

    with pytest.warns(RuntimeWarning, match="overflow") if INTERPRETED and backend != "reference" else nullcontext():
        mass = attention_mass(q, k, lse, scale=0.4, backend=backend)

    assert mass[..., :37].isfinite().all()
    assert (mass[..., 37:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("g", "r"), [(1, 1), (8, 4)])
def test_chunks_equal_one_shot(g, r, backend, monkeypatch):
    q, k, _ = make(q_len=75, kv_len=75, dtype=torch.float16 if backend != "reference" else torch.float64)
    settings = {"granularity": Granularity(q_block=g, kv_block=r), "scale": 0.4, "backend": backend}
    mass, total = pooled_mass(q, k, **settings)

    for lo, hi in [(0, 24), (24, 56), (56, 75)]:
        part, sums = pooled_mass(q[:, lo:hi], k[:, :hi], q_start=lo, **settings)
        tolerance = {"rtol": 0, "atol": 0} if backend != "reference" else {"rtol": 1e-12, "atol": 1e-15}
        torch.testing.assert_close(part, mass[:, :, lo // g : -(-hi // g), : hi // r], **tolerance)
        torch.testing.assert_close(sums, total[:, :, lo:hi], rtol=1e-6, atol=1e-6)

    monkeypatch.setattr(_logits, "WORKSPACE_BYTES", 8 * 2 * 4 * 75 * 5)  # five rows at a time
    few, sums = pooled_mass(q, k, **settings)
    torch.testing.assert_close(few, mass, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(sums, total, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_kernel_gives_the_same_bits_every_time(backend):
    q, k, _ = make()
    settings = {"granularity": Granularity(q_block=4), "scale": 0.4, "q_start": 64, "backend": backend}
    mass, total = pooled_mass(q, k, **settings)

    for _ in range(20 if ON_GPU else 2):
        again, sums = pooled_mass(q, k, **settings)
        assert again.equal(mass)
        assert sums.equal(total)


@pytest.mark.parametrize("backend", KERNELS)
def test_one_head_alone_and_strided_inputs(backend):
    q, k, _ = make()
    wide = torch.cat([k, k + 1], -1)  # extra columns, as in a cache that holds K and V side by side
    settings = {"granularity": Granularity(kv_block=2), "scale": 0.4, "q_start": 64, "backend": backend}

    mass, total = pooled_mass(q.transpose(1, 2).contiguous().transpose(1, 2), wide[..., :24], **settings)

    for ours, theirs in zip((mass, total), pooled_mass(q, k, **settings), strict=True):
        assert ours.equal(theirs)
    alone, _ = pooled_mass(q[1:], k[1:], **settings)
    assert alone.equal(mass[1:])


def test_the_oracle_takes_probabilities_or_computes_them():
    q, k, _ = make(dtype=torch.float64)
    p = attention_mass(q, k, scale=0.2, q_start=64, share="q_head")
    for pool, budget in [("sum", 24), ("max", 24), ("max", "mass:0.8<=48")]:
        oracle = OracleSelector(
            budget=budget, pool=pool, granularity=Granularity(q_block=4, kv_block=2, share="kv_head")
        )
        by_p = oracle.select(AttentionInputs(q=q, k=k, scale=0.2, p=p))
        assert oracle.select(AttentionInputs(q=q, k=k, scale=0.2)).groups.equal(by_p.groups)


def test_misuse_is_named():
    q, k, _ = make()
    rows = torch.arange(37, device=DEVICE)
    by_query = Granularity()
    with pytest.raises(ConfigError, match="pool must be one of sum, max"):
        inspect.unwrap(pooled_mass)(q, k, scale=1.0, granularity=by_query, pool="mean")
    with pytest.raises(ConfigError, match="neither q_start nor q_block > 1"):
        pooled_mass(q, k, scale=1.0, granularity=Granularity(q_block=2), positions=rows)
    with pytest.raises(ConfigError, match="neither q_start nor q_block > 1"):
        pooled_mass(q, k, scale=1.0, granularity=by_query, positions=rows, q_start=3)
    with pytest.raises(ConfigError, match="reach past the 101 keys"):
        pooled_mass(q, k, scale=1.0, granularity=by_query, q_start=65)
