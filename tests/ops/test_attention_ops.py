"""Dense mass, dense attention and sparse attention against plain float64 loops, at odd shapes."""

import oracle64
import pytest
import torch

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.errors import BackendUnavailableError, ConfigError
from topmass.ops import _dispatch, _logits, attention_mass, dense_prefill, sparse_prefill, topk_support
from topmass.selection import AttentionInputs, OracleSelector, StreamingSelector

HEADS = {"mha": (3, 3), "gqa": (4, 2), "mqa": (4, 1), "one": (1, 1)}


def tensors(heads="gqa", *, q_len=13, kv_len=29, d=6, dv=6, batch=2, dtype=torch.float64, seed=0):
    h, hk = HEADS[heads]
    draw = torch.Generator().manual_seed(seed)

    def make(length, n, dim):
        return torch.randn(batch, length, n, dim, generator=draw, dtype=torch.float64).to(dtype)

    return make(q_len, h, d) * 2, make(kv_len, hk, d), make(kv_len, hk, dv)


def extras(h, softcap, sinks):
    draw = torch.Generator().manual_seed(7)
    return {"softcap": softcap, "sinks": torch.randn(h, generator=draw, dtype=torch.float64) if sinks else None}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (1.5, False), (None, True), (1.5, True)])
@pytest.mark.parametrize("share", ["layer", "kv_head", "q_head"])
def test_attention_mass(heads, softcap, sinks, share):
    q, k, _ = tensors(heads)
    more = extras(q.shape[2], softcap, sinks)
    p = oracle64.probabilities(q, k, scale=0.3, **more)
    teams = {"layer": 1, "kv_head": k.shape[2], "q_head": q.shape[2]}[share]

    mass = attention_mass(q, k, scale=0.3, q_start=16, share=share, **more)

    torch.testing.assert_close(mass, p.unflatten(1, (teams, -1)).mean(2), rtol=1e-12, atol=1e-15)


def test_attention_mass_takes_a_normaliser():
    q, k, _ = tensors()
    whole = attention_mass(q, k, scale=0.3, q_start=16)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) * 0.3
    logits.masked_fill_(torch.arange(29) > torch.arange(16, 29)[:, None], -torch.inf)

    given = attention_mass(q, k, logits.logsumexp(-1).transpose(1, 2), scale=0.3, q_start=16)

    torch.testing.assert_close(given, whole)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (1.5, False), (None, True), (1.5, True)])
@pytest.mark.parametrize("q_len", [1, 13, 29])
def test_dense_prefill(heads, softcap, sinks, q_len, monkeypatch):
    q, k, v = tensors(heads, q_len=q_len, dv=5)
    more = extras(q.shape[2], softcap, sinks)
    mask = oracle64.probabilities(q, k) > 0
    expected = oracle64.attend(q, k, v, mask, scale=0.3, **more)

    torch.testing.assert_close(dense_prefill(q, k, v, scale=0.3, **more), expected, rtol=1e-12, atol=1e-13)
    monkeypatch.setattr(_logits, "WORKSPACE_BYTES", 8 * q.shape[0] * q.shape[2] * 29 * 4)  # four rows at a time
    torch.testing.assert_close(dense_prefill(q, k, v, scale=0.3, **more), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (1.5, False), (None, True), (1.5, True)])
@pytest.mark.parametrize(
    "granularity", [Granularity(), Granularity(q_block=4, kv_block=2), Granularity(share="kv_head"), Granularity(q_block=2, share="q_head")], ids=str
)  # fmt: skip
def test_sparse_prefill(backend, heads, softcap, sinks, granularity, monkeypatch):
    q, k, v = tensors(heads, dv=5)
    more = extras(q.shape[2], softcap, sinks)
    selector = OracleSelector(budget=12, granularity=granularity, sink=1, window=2)
    support = selector.select(AttentionInputs(q=q, k=k, scale=0.3, **more))
    mask = support.mask(29)
    mask = mask.repeat_interleave(q.shape[2] // mask.shape[1], 1)
    assert not mask.all()
    expected = oracle64.attend(q, k, v, mask, scale=0.3, **more)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)) * 0.3
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    lse = logits.masked_fill(~mask, -torch.inf).logsumexp(-1)
    if sinks:
        lse = torch.logaddexp(lse, more["sinks"][:, None].expand_as(lse))

    for rows in (None, 3):  # whole, and three rows at a time
        if rows:
            monkeypatch.setattr(_logits, "WORKSPACE_BYTES", 8 * q.shape[0] * q.shape[2] * 29 * rows)
        out, norm = sparse_prefill(q, k, v, support, scale=0.3, backend=backend, **more)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(norm, lse.transpose(1, 2), rtol=1e-12, atol=1e-13)


def test_default_scale_is_that_of_the_head_dim():
    q, k, v = tensors(d=9)
    support = StreamingSelector(sink=1, window=3).select(AttentionInputs(q=q, k=k))

    torch.testing.assert_close(sparse_prefill(q, k, v, support), sparse_prefill(q, k, v, support, scale=1 / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_near_and_keeps_its_dtype(dtype):
    q, k, v = tensors(dtype=dtype)
    support = OracleSelector(budget=8).select(AttentionInputs(q=q.double(), k=k.double()))
    expected = oracle64.attend(q, k, v, support.mask(29).expand(-1, 4, -1, -1))

    out, lse = sparse_prefill(q, k, v, support, backend="reference")

    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["reference"])
def test_a_query_without_any_key_is_zero(backend):
    q, k, v = tensors()
    rule = SupportRule(budget=Budget.parse("mass:0.5<=4"), window=0)
    nothing = topk_support(
        torch.zeros(2, 1, 13, 29).double(), rule=rule, q_start=16, q_len=13, mass=torch.zeros(2, 1, 13, 29).double()
    )
    assert nothing.keys_read().sum() == 0

    out, lse = sparse_prefill(q, k, v, nothing, backend=backend)

    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    sunk, lse = sparse_prefill(q, k, v, nothing, sinks=torch.full((4,), 2.0).double(), backend=backend)
    assert (sunk == 0).all()
    assert (lse == 2.0).all()


def test_non_contiguous_inputs():
    q, k, v = tensors()
    support = OracleSelector(budget=8).select(AttentionInputs(q=q, k=k))
    qt, kt, vt = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert not qt.is_contiguous()

    torch.testing.assert_close(
        sparse_prefill(qt, kt, vt, support), sparse_prefill(q, k, v, support), rtol=1e-12, atol=1e-13
    )


def test_inputs_are_left_alone():
    q, k, v = tensors()
    before = [x.clone() for x in (q, k, v)]
    support = OracleSelector(budget=8, pool="max", granularity=Granularity(kv_block=2)).select(
        AttentionInputs(q=q, k=k)
    )
    sparse_prefill(q, k, v, support)
    dense_prefill(q, k, v, scale=1.0)

    assert all(a.equal(b) for a, b in zip(before, (q, k, v), strict=True))


def test_what_does_not_fit_is_said():
    q, k, v = tensors()
    support = OracleSelector(budget=8).select(AttentionInputs(q=q, k=k))
    with pytest.raises(ConfigError, match="multiple of kv_heads, got 3 and 2"):
        sparse_prefill(q[:, :, :3], k, v, support)
    with pytest.raises(ConfigError, match="covers 2 x 13 queries, but q has 2 x 12"):
        sparse_prefill(q[:, 1:], k, v, support)
    with pytest.raises(ConfigError, match="covers 2 x 13 queries, but q has 1 x 13"):
        sparse_prefill(q[:1], k[:1], v[:1], support)
    with pytest.raises(ConfigError, match="past the 28 keys"):
        sparse_prefill(q, k[:, 1:], v[:, 1:], support)
    per_head = OracleSelector(budget=8, granularity=Granularity(share="kv_head")).select(AttentionInputs(q=q, k=k))
    with pytest.raises(ConfigError, match="share='kv_head' needs 1 selections, the support has 2"):
        sparse_prefill(q, k[:, :, :1], v[:, :, :1], per_head)
    with pytest.raises(ConfigError, match=r"Queries 17..29 reach past the 29 keys"):
        attention_mass(q, k, scale=1.0, q_start=17)
    with pytest.raises(ConfigError, match="multiple of kv_heads"):
        attention_mass(q[:, :, :3], k, scale=1.0, q_start=16)
    with pytest.raises(BackendUnavailableError, match="Unknown backend 'cudnn' of 'sparse_prefill'; known: "):
        sparse_prefill(q, k, v, support, backend="cudnn")


def test_auto_says_why_nothing_can_run():
    _dispatch.register("nothing", _dispatch.KernelBackend(name="gpu", fn=print, why_not=lambda: "needs a GPU."))
    try:
        for name in ("auto", "gpu"):
            with pytest.raises(
                BackendUnavailableError, match=r"No backend of 'nothing' can run this call: gpu needs a GPU\."
            ):
                _dispatch.resolve("nothing", name)
        with pytest.raises(ValueError, match="already registered"):
            _dispatch.register("nothing", _dispatch.KernelBackend(name="gpu", fn=print))
    finally:
        del _dispatch._BACKENDS["nothing"]
