"""Every backend of the KL of score rows against autograd in float64."""

import inspect

import pytest
import torch

from topmass.core.granularity import Granularity
from topmass.distill import indexer_kl
from topmass.errors import BackendUnavailableError, ConfigError
from topmass.ops import _dispatch, dense_lse, kl_rows
from topmass.ops._triton_common import INTERPRETED

# Triton 3.6's interpreter calls int() on arrays of one element
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS = [b for b in _dispatch.available("indexer_kl") if b != "reference"] if INTERPRETED or ON_GPU else []


def make(batch, rows, n, *, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    mass = torch.rand(batch, rows, n, generator=gen).pow(8).to(DEVICE, dtype)
    scores = (torch.randn(batch, rows, n, generator=gen) * 4).to(DEVICE, dtype)
    stop = torch.randint(0, n + 1, (rows,), generator=gen)
    stop[-1] = n
    return mass, scores, stop


def naive(mass, scores, first, stop):
    mass, scores = mass.double(), scores.double().requires_grad_()
    losses = torch.zeros(mass.shape[:2], dtype=torch.float64, device=mass.device)
    for b in range(mass.shape[0]):
        for i, end in enumerate(stop.tolist()):
            p = mass[b, i, first:end]
            if p.sum() > 0:
                target = p / p.sum()
                losses[b, i] = torch.nn.functional.kl_div(
                    scores[b, i, first:end].log_softmax(-1), target, reduction="sum"
                )
    if not losses.requires_grad:
        return losses, torch.zeros_like(mass)
    return losses.detach(), torch.autograd.grad(losses.sum(), scores)[0]


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize(
    ("batch", "rows", "n", "first"), [(2, 5, 150, 0), (1, 3, 70, 67), (2, 4, 65, 3), (1, 1, 1, 0), (1, 2, 64, 64)]
)
def test_equals_autograd(batch, rows, n, first, backend):
    mass, scores, stop = make(batch, rows, n)
    mass[:, 0] = 0  # a row whose target holds no mass
    scores[..., -1] += 300
    mass[..., 1::7] = 0
    expected = naive(mass, scores, first, stop)

    loss, slope = kl_rows(mass.clone(), scores, first=first, stop=stop, backend=backend)
    alone, nothing = kl_rows(mass.clone(), scores, first=first, stop=stop, wants_slope=False, backend=backend)

    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(slope.double(), expected[1], rtol=1e-4, atol=1e-6)
    assert nothing is None
    assert alone.equal(loss)


@pytest.mark.parametrize("backend", KERNELS)
def test_hidden_columns_and_strides(backend):
    mass, scores, stop = make(2, 5, 150)
    expected = kl_rows(mass.clone(), scores, first=2, stop=stop, backend=backend)
    wide = [torch.full((2, 6, 157), float("nan"), device=DEVICE) for _ in range(2)]
    for whole, x in zip(wide, (mass, scores), strict=True):
        whole[:, 1:, :150] = x
        for i, end in enumerate(stop.tolist()):
            whole[:, 1 + i, end:150] = float("nan")  # past the row's groups
        whole[:, 1:, :2] = float("inf")

    before = wide[1].clone()
    found = kl_rows(wide[0][:, 1:, :150], wide[1][:, 1:, :150], first=2, stop=stop, backend=backend)

    for ours, theirs in zip(found, expected, strict=True):
        assert ours.equal(theirs)
    assert before.equal(wide[1]) or before.nan_to_num(7.0).equal(wide[1].nan_to_num(7.0))
    assert wide[0][:, 0].isnan().all()
    assert wide[0][..., 150:].isnan().all()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_nan_scores_give_a_nan_loss(backend):
    mass, scores, stop = make(1, 3, 80)
    scores[0, 2, 5] = float("nan")

    loss, _ = kl_rows(mass, scores, first=0, stop=stop, backend=backend)

    assert loss.isnan().tolist() == [[False, False, True]]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("heads", "g", "r", "forced", "rows"),
    [(1, 1, 1, False, None), (1, 1, 1, True, [60, 3, 33]), (4, 1, 4, True, None), (1, 4, 4, False, [0, 15, 8])],
)
def test_the_whole_loss_on_kernels(heads, g, r, forced, rows, backend, monkeypatch):
    gen = torch.Generator().manual_seed(0)
    shapes = ((2, 61, 4, 16), (2, 61, 2, 16), (2, 61, heads, 16), (2, 61 // r, 16))
    q, k, iq, ik = (torch.randn(s, generator=gen).to(DEVICE, torch.float16) for s in shapes)
    options = {"granularity": Granularity(q_block=g, kv_block=r), "mask_forced": forced, "sink": 3, "window": 5}
    options |= {"scale": 0.3, "rows": None if rows is None else torch.tensor(rows), "chunk": 24}

    def gradients(*inputs):
        q, k, iq, ik = inputs
        iq, ik = iq.detach().requires_grad_(), ik.detach().requires_grad_()
        lse = dense_lse(q, k, k, scale=0.3, backend="reference")[1]
        loss = indexer_kl(q, k, lse, iq, ik, **options)
        return [loss.detach(), *torch.autograd.grad(loss, (iq, ik))]

    expected = gradients(*(x.double() for x in (q, k, iq, ik)))
    monkeypatch.setattr(_dispatch, "available", lambda op: (backend,))
    found = gradients(q, k, iq, ik)

    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-5
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-6)


def test_what_does_not_fit_is_said():
    mass, scores, stop = make(1, 3, 8)
    with pytest.raises(ConfigError, match="must agree"):
        inspect.unwrap(kl_rows)(mass[..., 1:], scores, first=0, stop=stop)
    with pytest.raises(ConfigError, match="must agree"):
        inspect.unwrap(kl_rows)(mass, scores, first=0, stop=stop[1:])


@pytest.mark.skipif(not KERNELS, reason="no kernel can run here")
def test_kernels_say_why_not():
    mass, scores, stop = make(1, 3, 8, dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match="supports float32"):
        kl_rows(mass, scores, first=0, stop=stop, backend="triton")
    mass, scores, stop = make(1, 8, 8)
    with pytest.raises(BackendUnavailableError, match="rows that are contiguous"):
        kl_rows(mass.mT, scores, first=0, stop=stop, backend="triton")
