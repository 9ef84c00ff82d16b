"""Every kernel backend against the reference of its op; a new backend is covered by being registered."""

from typing import NamedTuple

import pytest
import torch

import topmass
from topmass.ops import _dispatch, attention_mass, sparse_prefill, topk_support
from topmass.ops._triton_common import INTERPRETED
from topmass.selection import AttentionInputs
from topmass.testing import assert_as_accurate_as

# Triton 3.6's interpreter calls int() on arrays of one element
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CAN_RUN = INTERPRETED or ON_GPU
# the interpreter's bfloat16 is emulated element by element
DTYPES = (torch.float16, torch.bfloat16) if ON_GPU else (torch.float16,)


def backends(op: str) -> list[str]:
    return [b for b in _dispatch.available(op) if b != "reference"] if CAN_RUN else []


class Case(NamedTuple):
    """A problem; sizes that are not multiples of a block come first."""

    q_len: int
    kv_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        return f"Tq{self.q_len}-Tk{self.kv_len}-H{self.q_heads}x{self.kv_heads}-D{self.head_dim}x{self.v_dim}-{self.softcap}-{self.sinks}"


CASES = [
    Case(37, 37, 6, 2, 24, 24),
    Case(33, 150, 4, 1, 32, 16),
    Case(70, 70, 2, 2, 16, 16, softcap=2.0),
    Case(65, 97, 4, 2, 16, 32, sinks=True),
    Case(1, 1, 2, 1, 16, 16),
]


def make(case: Case, dtype: torch.dtype):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(2, case.q_len, case.q_heads, case.head_dim, generator=gen)
    k = torch.randn(2, case.kv_len, case.kv_heads, case.head_dim, generator=gen)
    v = torch.randn(2, case.kv_len, case.kv_heads, case.v_dim, generator=gen)
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    sinks = torch.randn(case.q_heads, generator=gen).to(DEVICE, dtype) if case.sinks else None
    return q, k, v, {"scale": 0.4, "softcap": case.softcap, "sinks": sinks}


def double(settings: dict) -> dict:
    return {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in settings.items()}


@pytest.mark.parametrize("backend", backends("attention_mass"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", ["layer", "kv_head", "q_head"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mass_matches_reference(case: Case, share: str, dtype: torch.dtype, backend: str) -> None:
    q, k, _, settings = make(case, dtype)
    start = case.kv_len - case.q_len
    exact = attention_mass(q.double(), k.double(), q_start=start, share=share, **double(settings))

    mass = attention_mass(q, k, q_start=start, share=share, backend=backend, **settings)

    torch.testing.assert_close(mass.double(), exact, rtol=1e-4, atol=1e-6)
    rest = 0.0 if case.sinks else 1.0
    assert (mass.sum(-1) <= 1 + 1e-4).all()
    assert (mass.sum(-1) >= rest - 1e-4).all()


@pytest.mark.parametrize("backend", backends("sparse_prefill"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [(1, 1, "layer"), (4, 2, "kv_head"), (1, 4, "q_head")], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_prefill_matches_reference(case: Case, granularity, dtype: torch.dtype, backend: str) -> None:
    q, k, v, settings = make(case, dtype)
    g, r, share = granularity
    oracle = topmass.OracleSelector(
        budget=24, granularity=topmass.Granularity(q_block=g, kv_block=r, share=share), sink=2, window=3
    )
    support = oracle.select(AttentionInputs(q=q.double(), k=k.double(), **double(settings)))
    exact, exact_lse = sparse_prefill(q.double(), k.double(), v.double(), support, **double(settings))
    baseline, baseline_lse = plain(q, k, v, support, **settings)

    out, lse = sparse_prefill(q, k, v, support, backend=backend, **settings)

    assert_as_accurate_as(out, exact=exact, baseline=baseline)
    assert_as_accurate_as(lse, exact=exact_lse, baseline=baseline_lse, name="lse")


def plain(q, k, v, support, *, scale, softcap, sinks):
    """Plain PyTorch in the dtype of the inputs: what a kernel may be at most twice as wrong as."""
    group = q.shape[2] // k.shape[2]
    qt, kt, vt = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    logits = (qt @ kt.mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = support.mask(k.shape[1])
    logits = logits.masked_fill(~mask.repeat_interleave(q.shape[2] // mask.shape[1], 1), float("-inf"))
    extra = logits if sinks is None else torch.cat([logits, sinks[:, None, None].expand(*logits.shape[:3], 1)], -1)
    lse = extra.logsumexp(-1)
    return ((logits - lse[..., None]).exp() @ vt).transpose(1, 2), lse.transpose(1, 2).float()


# the interpreter takes some 10 ms a row
TOPK_BATCH = (2, 3) if ON_GPU else (1, 2)
TOPK_SIZES = (
    [(1, 0), (31, 10), (32, 0), (33, 0), (150, 100)] if ON_GPU else [(5, 0), (1, 0), (31, 28), (33, 31), (150, 148)]
)


@pytest.mark.parametrize("backend", backends("topk_support"))
@pytest.mark.parametrize("values", ["real", "integers", "two", "equal", "signed zeros", "infinities"])
@pytest.mark.parametrize(("n", "start"), TOPK_SIZES)
def test_topk_equals_reference(n: int, start: int, values: str, backend: str) -> None:
    gen = torch.Generator().manual_seed(1)
    shape = (*TOPK_BATCH, n - start, n)
    scores = {
        "real": lambda: torch.randn(shape, generator=gen),
        "integers": lambda: torch.randint(-3, 4, shape, generator=gen).float(),
        "two": lambda: torch.randint(0, 2, shape, generator=gen).float(),
        "equal": lambda: torch.full(shape, 0.25),
        "signed zeros": lambda: torch.randint(0, 2, shape, generator=gen).float().sub(1).mul(0.0),
        "infinities": lambda: torch.tensor([-torch.inf, 0.0, torch.inf])[torch.randint(0, 3, shape, generator=gen)],
    }[values]().to(DEVICE)
    for budget, sink, window in ((5, 0, 1), (9, 2, 3), (1, 0, 0), ("20%", 1, 2), (200, 0, 1)):
        rule = topmass.SupportRule(budget=topmass.Budget.parse(budget), sink=sink, window=window)
        expected = topk_support(scores, rule=rule, q_start=start, q_len=n - start, backend="reference")

        support = topk_support(scores, rule=rule, q_start=start, q_len=n - start, backend=backend)

        assert torch.equal(support.groups, expected.groups), (budget, sink, window)
        assert torch.equal(support.counts, expected.counts)


@pytest.mark.skipif(not CAN_RUN, reason="no triton backend can run here")
def test_kernels_say_why_not() -> None:
    q, k, v, _ = make(CASES[0], torch.float32)
    support = topmass.StreamingSelector(sink=1, window=2).select(AttentionInputs(q=q, k=k))
    with pytest.raises(topmass.errors.BackendUnavailableError, match="supports float16 and bfloat16"):
        sparse_prefill(q, k, v, support, backend="masked")
    with pytest.raises(topmass.errors.BackendUnavailableError, match="Unknown backend 'mask'"):
        sparse_prefill(q, k, v, support, backend="mask")
