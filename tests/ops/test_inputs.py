"""What every op takes as it comes (views, no sequences, long lists, another GPU) and what it refuses by name."""

from dataclasses import replace

import jaxtyping
import pytest
import torch

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import BackendUnavailableError, ConfigError
from topmass.ops import (
    _dispatch,
    attention_mass,
    dense_lse,
    index_topk,
    kl_rows,
    pooled_mass,
    sparse_prefill,
    tile_union,
    topk_support,
)
from topmass.ops._triton_common import INTERPRETED, on_device
from topmass.testing import random_support

# Triton 3.6's interpreter calls int() on arrays of one element
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
GPUS = torch.cuda.device_count()


def backends(op: str) -> list[str]:
    return [b for b in _dispatch.available(op) if b == "reference" or INTERPRETED or ON_GPU]


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, two places apart."""
    return torch.stack([x, x.flip(0)], -1)[..., 0]


def make(*, batch=1, q_len=20, start=0, share_heads=1, device=DEVICE):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(batch, q_len, 4, 16, generator=gen).to(device).half()
    k, v = (torch.randn(batch, start + q_len, 2, 16, generator=gen).to(device).half() for _ in range(2))
    share = {1: "layer", 2: "kv_head"}[share_heads]
    rule = SupportRule(budget=Budget(tokens=6), granularity=Granularity(share=share))
    support = random_support(
        rule,
        q_len=q_len,
        q_start=start,
        batch=batch,
        share_heads=share_heads,
        growth=2.0,
        tile=16,
        span=8,
        device=device,
    )
    return q, k, v, support


@pytest.mark.parametrize("backend", backends("sparse_prefill"))
def test_sparse_prefill_takes_sinks_and_pages_that_are_views(backend):
    q, k, v, support = make(q_len=24)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1)).to(DEVICE).half()
    expected = sparse_prefill(q, k, v, support, sinks=sinks, backend="reference")

    torch.testing.assert_close(
        sparse_prefill(q, k, v, support, sinks=spread(sinks), backend=backend), expected, rtol=2e-2, atol=2e-3
    )
    if backend != "masked":
        pool = [x.view(3, 8, 2, 16) for x in (k, v)]
        table = spread(torch.tensor([2, 0, 1], device=DEVICE))[None]
        pool = [x[torch.tensor([1, 2, 0], device=DEVICE)] for x in pool]
        found = sparse_prefill(q, *pool, support, sinks=sinks, page_table=table, backend=backend)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("backend", backends("attention_mass"))
def test_mass_takes_positions_that_are_views(backend):
    q, k, _, _ = make(q_len=20)
    positions = torch.randperm(20, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    expected = attention_mass(q, k, scale=0.3, positions=positions, backend="reference")

    found = attention_mass(q, k, scale=0.3, positions=spread(positions), backend=backend)

    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", backends("sparse_prefill"))
@pytest.mark.parametrize("empty", [(0, 9), (1, 0)], ids=str)
def test_sparse_prefill_of_nothing(empty, backend):
    b, n = empty
    q, k, v = (torch.zeros(b, *shape, device=DEVICE).half() for shape in ((n, 4, 16), (9, 2, 16), (9, 2, 16)))
    rule = SupportRule(budget=Budget(tokens=6))
    support = topk_support(
        torch.zeros(b, 1, n, 9, device=DEVICE), rule=rule, q_start=9 - n, q_len=n, backend="reference"
    )

    out, lse = sparse_prefill(q, k, v, support, backend=backend)

    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]


@pytest.mark.parametrize("backend", backends("index_topk"))
def test_index_topk_of_no_sequence(backend):
    iq, ik = (torch.zeros(0, *shape, device=DEVICE, dtype=torch.float16) for shape in ((9, 2, 16), (9, 16)))

    support = index_topk(iq, ik, budget=4, granularity=Granularity(), backend=backend)

    assert support.groups.shape[:3] == (0, 1, 9)
    assert support.keys_read().shape == (0, 1, 9)


def test_mass_and_dense_attention_of_no_sequence():
    q, k, v = (x[:0] for x in make()[:3])
    for backend in backends("attention_mass"):
        mass, total = pooled_mass(q, k, scale=1.0, granularity=Granularity(kv_block=4), backend=backend)
        assert mass.shape == (0, 1, 20, 5)
        assert total.shape == (0, 1, 20)
    out, lse = dense_lse(q, k, v, scale=1.0, backend="reference")
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_long_lists_of_blocks_that_are_all_selected(dtype):
    # 32768 neighbours above the threshold fill a block of a program; more are wanted than it keeps in registers
    scores = torch.rand(1, 1, 1, 65537, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    scores[..., :36000] = 2
    rule = SupportRule(budget=Budget(tokens=40001))
    for backend in backends("topk_support"):
        support = topk_support(scores, rule=rule, q_start=65536, q_len=1, backend=backend)
        groups = support.groups[0, 0, 0]
        assert support.counts.item() == 40000
        assert torch.equal(groups[:36000], torch.arange(36000, device=DEVICE, dtype=torch.int32))
        best = scores[0, 0, 0, 36000:-1].topk(4000).values
        assert torch.equal(scores[0, 0, 0, groups[36000:].long()].sort(descending=True).values, best)


@pytest.mark.skipif("triton" not in backends("tile_union"), reason="no triton backend can run here")
def test_union_never_marks_past_its_words():
    # the only block ends at 31, the prompt at 19: group 25 lies among the words of the second sequence
    rule = SupportRule(budget=Budget(tokens=40), granularity=Granularity(q_block=32))
    groups = torch.tensor([25, -1], device=DEVICE, dtype=torch.int32).view(2, 1, 1, 1)
    support = Support.from_groups(groups, torch.ones_like(groups)[..., 0], rule=rule, q_start=0, q_len=20)
    support = replace(support, dense_len=torch.zeros_like(support.dense_len))

    union = tile_union(support, tile=32, backend="triton")

    assert union.counts.flatten().tolist() == [0, 0]


@pytest.fixture
def unchecked(monkeypatch):
    """Without the shape checks that only tests have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused():
    q, k, v, support = make()
    with pytest.raises(ConfigError, match="one head dimension, got 16 and 8"):
        sparse_prefill(q, k[..., :8], v, support)
    with pytest.raises(ConfigError, match=r"Keys and values must agree.*\(1, 20, 2\) and \(1, 19, 2\)"):
        sparse_prefill(q, k, v[:, 1:], support)
    with pytest.raises(ConfigError, match="one sink per query head: 4, got 3"):
        sparse_prefill(q, k, v, support, sinks=torch.zeros(3, device=DEVICE))
    with pytest.raises(ConfigError, match="one head dimension, got 16 and 8"):
        pooled_mass(q, k[..., :8], scale=1.0, granularity=Granularity())
    with pytest.raises(ConfigError, match="1 sequences of queries, 2 of keys"):
        pooled_mass(q, k.expand(2, -1, -1, -1), scale=1.0, granularity=Granularity())
    with pytest.raises(ConfigError, match=r"lse must be \(1, 20, 4\), got \(1, 4, 20\)"):
        pooled_mass(q, k, torch.zeros(1, 4, 20, device=DEVICE), scale=1.0, granularity=Granularity())
    with pytest.raises(ConfigError, match="20 queries, but 19 positions"):
        pooled_mass(q, k, scale=1.0, granularity=Granularity(), positions=torch.arange(19, device=DEVICE))
    with pytest.raises(ConfigError, match="one sink per query head: 4, got 3"):
        pooled_mass(q, k, scale=1.0, granularity=Granularity(), sinks=torch.zeros(3, device=DEVICE))
    iq, ik = torch.zeros(2, 9, 1, 16, device=DEVICE), torch.zeros(2, 9, 16, device=DEVICE)
    with pytest.raises(ConfigError, match=r"\(2, 16\) and \(2, 8\)"):
        index_topk(iq, ik[..., :8], budget=4, granularity=Granularity())
    with pytest.raises(ConfigError, match=r"\(2, 16\) and \(1, 16\)"):
        index_topk(iq, ik[:1], budget=4, granularity=Granularity())
    with pytest.raises(ConfigError, match=r"\(by the page table\).*\(2, 16\) and \(1, 16\)"):
        index_topk(iq, ik, budget=4, granularity=Granularity(), page_table=torch.zeros(1, 9, device=DEVICE).int())


@pytest.mark.usefixtures("unchecked")
def test_scores_that_do_not_cover_the_candidates_are_refused():
    rule = SupportRule(budget=Budget(tokens=4))
    with pytest.raises(ConfigError, match="5 query blocks need scores, got 4"):
        topk_support(torch.zeros(1, 1, 4, 9), rule=rule, q_start=4, q_len=5)
    with pytest.raises(ConfigError, match="8 key groups are candidates, but there are scores of 7"):
        topk_support(torch.zeros(1, 1, 5, 7), rule=rule, q_start=4, q_len=5)


@pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="no triton backend can run here")
@pytest.mark.parametrize("backend", ["triton", "masked"])
def test_tensors_on_other_devices_are_refused(backend):
    q, k, v, support = make()
    elsewhere = "cpu" if ON_GPU else "meta"
    with pytest.raises(BackendUnavailableError, match=f"needs the support beside .* a support on {elsewhere}"):
        sparse_prefill(q, k, v, replace(support, groups=support.groups.to(elsewhere)), backend=backend)
    if not ON_GPU:
        with pytest.raises(BackendUnavailableError, match="needs all inputs on one device, got cpu, meta, cpu"):
            sparse_prefill(q, k.to("meta"), v, support, backend=backend)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: seen.append(x) or torch.no_grad())
    tensor = torch.zeros(1)

    assert on_device(lambda x, *, y: (x, y))(tensor, y=3) == (tensor, 3)
    assert seen == [tensor]


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_kernels_run_beside_the_current_device():
    far = f"cuda:{GPUS - 1}"
    q, k, v, support = make(device=far)
    expected = sparse_prefill(q, k, v, support, backend="reference")[0]
    torch.testing.assert_close(sparse_prefill(q, k, v, support, backend="triton")[0], expected, rtol=2e-2, atol=2e-3)
    mass = attention_mass(q, k, scale=0.3, backend="triton")
    torch.testing.assert_close(mass, attention_mass(q, k, scale=0.3, backend="reference"), rtol=1e-3, atol=1e-5)
    rule = SupportRule(budget=Budget(tokens=6))
    chosen = (topk_support(mass, rule=rule, q_start=0, q_len=20, backend=b).groups for b in ("triton", "reference"))
    assert torch.equal(*chosen)
    stop = torch.arange(1, 21)
    loss, _ = kl_rows(mass[:, 0].clone(), mass[:, 0], first=0, stop=stop, backend="triton")
    assert loss.isfinite().all()
    iq, ik = q[:, :, :1], k[:, :, 0]
    chosen = (
        index_topk(iq, ik, budget=6, granularity=Granularity(), backend=b).counts for b in ("triton", "reference")
    )
    assert torch.equal(*chosen)
