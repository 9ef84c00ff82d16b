"""The closed-form KL gradient against autograd on a materialised float64 loss, for every option."""

import itertools

import oracle64
import pytest
import torch

from topmass.core.granularity import Granularity
from topmass.distill import indexer_kl
from topmass.errors import ConfigError, DataError
from topmass.ops import _dispatch
from topmass.ops._triton_common import INTERPRETED

KV_LEN, SCALE = 19, 0.7


def make(*, heads=1, r=1, q_start=0, dtype=torch.float64, softcap=None, sinks=False, batch=2):
    """A layer of 4/2 heads, its normaliser, an indexer's queries and keys, and the model's exact probabilities."""
    gen = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    q, k = randn(batch, KV_LEN - q_start, 4, 6), randn(batch, KV_LEN, 2, 6)
    iq, ik = randn(batch, KV_LEN - q_start, heads, 5), randn(batch, KV_LEN // r, 5)
    learned = randn(4) if sinks else None
    p = oracle64.probabilities(q, k, scale=SCALE, softcap=softcap, sinks=learned)
    # the key that every query sees gives the normaliser away
    first = torch.einsum("bthd,bhd->bth", q.double(), k[:, 0].double().repeat_interleave(2, 1)) * SCALE
    first = first if softcap is None else softcap * torch.tanh(first / softcap)
    lse = first - p[..., 0].transpose(1, 2).log()
    lse = lse if dtype == torch.float64 else lse.float()
    settings = {"scale": SCALE, "q_start": q_start, "softcap": softcap, "sinks": learned}
    return q, k, lse, iq.requires_grad_(), ik.requires_grad_(), p, settings


def naive(iq, ik, p, *, g, r, q_start, pool, reduce, sink, window, mask_forced, rows=None):
    """The definition in loops, differentiable by autograd."""
    batch, q_len, heads, dim = iq.shape
    blocks = list(range(q_start // g * g, q_start + q_len, g))
    rows = range(len(blocks)) if rows is None else rows
    losses = []
    for b, row in itertools.product(range(batch), rows):
        t0 = blocks[row]
        queries = [t - q_start for t in range(t0, t0 + g) if q_start <= t < q_start + q_len]
        token = torch.stack([p[b, :, i].mean(0) for i in queries]).mean(0)
        if mask_forced:
            low, high = -(-sink // r) * r, max(t0 - window + 1, 0) // r * r
        else:
            low, high = 0, t0 + 1
        seen = [j for j in range(ik.shape[1]) if low <= j * r and (j + 1) * r <= high]
        if not seen:
            losses.append(ik.sum() * 0)
            continue
        tokens = [token[j * r : (j + 1) * r] for j in seen]
        target = torch.stack([x.sum() if pool == "sum" else x.max() for x in tokens])
        target = target / target.sum()
        logits = torch.einsum("ihd,jd->ihj", iq[b, queries], ik[b, seen]) / dim**0.5
        scores = logits[:, 0] if heads == 1 else logits.relu().sum(1)
        scores = scores.mean(0) if reduce == "mean" else scores.amax(0)
        losses.append((target * (target.log() - scores.log_softmax(0))).sum())
    return torch.stack(losses).mean()


def assert_exact(options, *, heads, r, g, q_start, rows=None, chunk=None, softcap=None, sinks=False):
    q, k, lse, iq, ik, p, settings = make(heads=heads, r=r, q_start=q_start, softcap=softcap, sinks=sinks)
    expected = naive(iq, ik, p, g=g, r=r, q_start=q_start, rows=rows, **options)
    exact = torch.autograd.grad(expected, (iq, ik))
    rows = None if rows is None else torch.tensor(rows)

    loss = indexer_kl(
        q, k, lse, iq, ik, granularity=Granularity(q_block=g, kv_block=r), rows=rows, chunk=chunk, **settings, **options
    )
    found = torch.autograd.grad(loss, (iq, ik))

    assert expected > 1e-4
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    for ours, theirs in zip(found, exact, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("q_start", [0, 6])
@pytest.mark.parametrize("mask_forced", [False, True])
@pytest.mark.parametrize(("g", "reduce"), [(1, "mean"), (4, "mean"), (4, "max")])
@pytest.mark.parametrize(("r", "pool"), [(1, "sum"), (4, "sum"), (4, "max")])
@pytest.mark.parametrize("heads", [1, 4])
def test_gradient_is_that_of_the_materialised_loss(heads, r, pool, g, reduce, mask_forced, q_start):
    options = {"pool": pool, "reduce": reduce, "sink": 1, "window": 3, "mask_forced": mask_forced}
    assert_exact(options, heads=heads, r=r, g=g, q_start=q_start)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("g", "r"), [(1, 1), (4, 4)])
@pytest.mark.parametrize("mask_forced", [False, True])
@pytest.mark.parametrize(("softcap", "sinks"), [(2.0, False), (None, True), (2.0, True)])
def test_target_is_the_models_own_probability(softcap, sinks, mask_forced, g, r, heads):
    options = {"pool": "sum", "reduce": "mean", "sink": 0, "window": 1, "mask_forced": mask_forced}
    assert_exact(options, heads=heads, r=r, g=g, q_start=3, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize(("g", "r", "rows"), [(1, 1, [12, 2, 9]), (1, 4, [0, 11]), (4, 1, [3, 1]), (4, 4, [0, 2, 3])])
@pytest.mark.parametrize("heads", [1, 4])
def test_subsampled_rows(heads, g, r, rows, chunk):
    options = {"pool": "max", "reduce": "max", "sink": 0, "window": 2, "mask_forced": True}
    assert_exact(options, heads=heads, r=r, g=g, q_start=6, rows=rows, chunk=chunk)


def test_subsampling_is_unbiased():
    q, k, lse, iq, ik, _, settings = make(heads=4)

    def gradients(rows):
        loss = indexer_kl(
            q, k, lse, iq, ik, granularity=Granularity(q_block=4), rows=rows, mask_forced=True, **settings
        )
        return [loss.detach(), *torch.autograd.grad(loss, (iq, ik))]

    pairs = [gradients(torch.tensor(pair)) for pair in itertools.combinations(range(5), 2)]

    for drawn, every in zip(zip(*pairs, strict=True), gradients(None), strict=True):
        torch.testing.assert_close(torch.stack(drawn).mean(0), every, rtol=0, atol=1e-12)


@pytest.mark.parametrize("q_start", [0, 6])
@pytest.mark.parametrize(("g", "reduce"), [(1, "mean"), (4, "mean"), (4, "max")])
@pytest.mark.parametrize("heads", [1, 4])
def test_chunk_size_changes_nothing(heads, g, reduce, q_start):
    q, k, lse, iq, ik, _, settings = make(heads=heads, q_start=q_start, sinks=True)

    def gradients(chunk):
        loss = indexer_kl(q, k, lse, iq, ik, granularity=Granularity(q_block=g), reduce=reduce, chunk=chunk, **settings)
        return [loss.detach(), *torch.autograd.grad(loss, (iq, ik))]

    for chunk, one in itertools.product((1, 3, 8), [gradients(None)]):
        for ours, theirs in zip(gradients(chunk), one, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 4])
def test_narrow_inputs_accumulate_in_float32(heads, dtype):
    q, k, lse, iq, ik, p, settings = make(heads=heads, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (iq, ik)]
    options = {"pool": "sum", "reduce": "mean", "sink": 0, "window": 1, "mask_forced": False}
    expected = naive(*wide, p, g=1, r=1, q_start=0, **options)
    exact = torch.autograd.grad(expected, wide)

    with torch.autocast("cpu", torch.bfloat16):  # has no say here
        loss = indexer_kl(q, k, lse, iq, ik, granularity=Granularity(), **settings)
    found = torch.autograd.grad(loss, (iq, ik))

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_gradient_scales_with_what_comes_after():
    q, k, lse, iq, ik, _, settings = make()
    loss = indexer_kl(q, k, lse, iq, ik, granularity=Granularity(), **settings)
    plain = torch.autograd.grad(loss, (iq, ik), retain_graph=True)

    for once, thrice in zip(plain, torch.autograd.grad(3 * loss, (iq, ik)), strict=True):
        torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no kernel of the mass can run here")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's; meant here
@pytest.mark.parametrize("backend", [name for name in _dispatch.available("attention_mass") if name != "reference"])
def test_kernels_of_the_mass_take_scattered_rows(monkeypatch, backend):
    q, k, lse, iq, ik, _, settings = make(dtype=torch.float16, sinks=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings["sinks"] = settings["sinks"].to(device)
    # a key that only the last query sees, far above what earlier ones know: their probability of it overflows
    k[:, -1] *= 60
    lse[:, -1] = torch.logsumexp(
        torch.cat([exact_logits(q, k)[:, -1], settings["sinks"].cpu().double().expand(2, 1, 4).mT], -1), -1
    )
    inputs = [x.detach().to(device) for x in (q, k, lse, iq, ik)]
    rows = torch.tensor([18, 2, 9, 0])

    def gradients():
        for x in inputs[3:]:
            x.requires_grad_()
        loss = indexer_kl(*inputs, granularity=Granularity(), rows=rows, **settings)
        return [loss.detach(), *torch.autograd.grad(loss, inputs[3:])]

    expected = gradients()
    monkeypatch.setattr(_dispatch, "available", lambda op: (backend,))
    found = gradients()

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


def exact_logits(q, k):
    return torch.einsum("bthd,bshd->bths", q.double(), k.double().repeat_interleave(2, 2)) * SCALE


def test_gradients_are_scaled_before_they_are_narrowed():
    q, k, lse, iq, ik, _, settings = make(dtype=torch.float16)
    # keys this small give gradients under float16's smallest number until a loss scaler lifts them
    iq, ik = iq.detach().requires_grad_(), (ik.detach() * 0 + 1e-7).requires_grad_()
    loss = indexer_kl(q, k, lse, iq, ik, granularity=Granularity(), **settings)

    (lifted,) = torch.autograd.grad(loss * 2.0**12, iq)

    wide = [x.detach().float().requires_grad_() for x in (iq, ik)]
    loss = indexer_kl(q, k, lse, *wide, granularity=Granularity(), **settings)
    (exact,) = torch.autograd.grad(loss, wide[0])
    torch.testing.assert_close(lifted.float(), exact * 2.0**12, rtol=1e-3, atol=1e-7)


def test_a_second_derivative_is_refused():
    q, k, lse, iq, ik, _, settings = make()
    loss = indexer_kl(q, k, lse, iq, ik, granularity=Granularity(), **settings)
    (first,) = torch.autograd.grad(loss**2, iq, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_perfect_indexer_has_no_loss_and_no_gradient():
    q, k, lse, iq, ik, _, settings = make()
    # one model head with the indexer's own vectors
    q, k = iq.detach(), ik.detach()[:, :, None]
    logits = torch.einsum("btd,bsd->bts", q[:, :, 0], k[:, :, 0]) / 5**0.5
    lse = logits.masked_fill(torch.ones(KV_LEN, KV_LEN).triu(1).bool(), float("-inf")).logsumexp(-1)[..., None]
    settings |= {"scale": 5**-0.5}

    for mask_forced in (False, True):
        loss = indexer_kl(q, k, lse, iq, ik, granularity=Granularity(), sink=2, mask_forced=mask_forced, **settings)

        assert abs(loss.item()) < 1e-12
        assert max(g.abs().max() for g in torch.autograd.grad(loss, (iq, ik))) < 1e-12


@pytest.mark.parametrize(("sink", "window"), [(40, 1), (0, 40)])
def test_rows_that_may_score_nothing_have_no_loss(sink, window):
    q, k, lse, iq, ik, _, settings = make(r=4)
    loss = indexer_kl(
        q, k, lse, iq, ik, granularity=Granularity(kv_block=4), sink=sink, window=window, mask_forced=True, **settings
    )

    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (iq, ik)))


def test_the_models_attention_is_a_constant():
    q, k, lse, iq, ik, _, settings = make()
    q.requires_grad_()
    indexer_kl(q, k, lse, iq, ik, granularity=Granularity(), **settings).backward()

    assert q.grad is None
    assert not indexer_kl(q, k, lse, iq.detach(), ik.detach(), granularity=Granularity(), **settings).requires_grad


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 0.8},
        {"softcap": 1.0},
        {"sinks": torch.zeros(4, dtype=torch.float64)},
        {"lse": 1e-2},
        {"lse": float("nan")},
    ],
    ids=str,
)
def test_rows_that_are_no_distribution_are_refused(change):
    q, k, lse, iq, ik, _, settings = make()
    change = dict(change)
    lse[1, 7] += change.pop("lse", 0.0)
    with pytest.raises(DataError, match="not a distribution"):
        indexer_kl(q, k, lse, iq, ik, granularity=Granularity(), **settings | change)


def test_nan_scores_are_refused():
    q, k, lse, iq, ik, _, settings = make()
    with pytest.raises(DataError, match="scores hold NaN"):
        indexer_kl(q, k, lse, iq.detach() * float("nan"), ik, granularity=Granularity(), **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granularity": Granularity(share="kv_head")}, "share must be 'layer'"),
        ({"rows": torch.tensor([3, 3])}, "different indices"),
        ({"rows": torch.tensor([-1])}, "different indices"),
        ({"rows": torch.tensor([KV_LEN])}, "different indices"),
        ({"rows": torch.tensor([], dtype=torch.long)}, "rows is empty"),
        ({"chunk": 0}, "chunk must be"),
        ({"reduce": "max_prob", "granularity": Granularity(q_block=4)}, "no gradient for a block"),
        ({"window": 0, "granularity": Granularity(q_block=4), "mask_forced": True}, "window=0"),
    ],
)
def test_misuse_is_named(change, message):
    q, k, lse, iq, ik, _, settings = make()
    with pytest.raises(ConfigError, match=message):
        indexer_kl(q, k, lse, iq, ik, **{"granularity": Granularity()} | settings | change)


def test_missing_index_keys_are_named():
    q, k, lse, iq, ik, _, settings = make()
    with pytest.raises(ConfigError, match="may score 19 key groups, but ik holds 18"):
        indexer_kl(q, k, lse, iq, ik[:, :-1], granularity=Granularity(), **settings)
