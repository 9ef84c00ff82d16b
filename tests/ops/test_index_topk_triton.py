"""The Triton index_topk and the selection it shares, against the reference: shapes, ties, ranges, chunks, long rows."""

import pytest
import torch

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.errors import BackendUnavailableError
from topmass.ops import index_topk, topk_support
from topmass.ops._triton_common import INTERPRETED

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"

pytestmark = [
    # Triton 3.6's interpreter calls int() on arrays of one element
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton"),
    # as it warns of scores that are to saturate
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning:triton"),
    pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="needs triton's interpreter or a GPU"),
]

if INTERPRETED or ON_GPU:
    from topmass.ops.index_topk import _triton as index_kernels
    from topmass.ops.topk_support import _triton as select_kernels


def make(*, q_len, kv_len, heads=1, dim=16, r=1, batch=1, dtype=torch.float16, size=3):
    """Small integers: every product and sum is exact in any order, so that only the rounding decides."""
    gen = torch.Generator().manual_seed(11)
    iq = torch.randint(-size, size + 1, (batch, q_len, heads, dim), generator=gen)
    ik = torch.randint(-size, size + 1, (batch, kv_len // r, dim), generator=gen)
    return iq.to(DEVICE, dtype), ik.to(DEVICE, dtype)


def both(iq, ik, **kwargs):
    return (index_topk(iq, ik, backend=name, **kwargs) for name in ("triton", "reference"))


def assert_same(support, expected):
    assert torch.equal(support.groups, expected.groups)
    assert torch.equal(support.counts, expected.counts)
    assert torch.equal(support.keys_read(), expected.keys_read())


# q_len, kv_len, heads, dim, q_block, reduce, kv_block, sink, window, budget
CASES = [
    (23, 23, 1, 24, 1, "mean", 1, 0, 1, 9),
    (5, 150, 4, 16, 1, "mean", 4, 5, 3, 40),
    (9, 167, 3, 64, 1, "mean", 1, 2, 0, 33),
    (67, 201, 1, 128, 32, "mean", 1, 4, 8, 64),
    (70, 201, 4, 16, 8, "mean", 1, 1, 5, "30%"),
    (64, 64, 1, 17, 16, "max", 1, 0, 1, 31),
    (99, 260, 2, 16, 8, "max", 4, 3, 7, 80),
    (64, 64, 1, 17, 16, "max_prob", 1, 0, 1, 31),
    (75, 205, 1, 16, 32, "max_prob", 1, 4, 8, 64),
    (99, 260, 2, 16, 8, "max_prob", 4, 3, 7, 80),
    (9, 9, 1, 16, 4, "max_prob", 1, 6, 20, 40),
    (5, 150, 1, 16, 1, "max_prob", 4, 5, 3, 40),
    (40, 330, 1, 16, 64, "mean", 16, 0, 1, 128),
    (17, 17, 1, 16, 1, "mean", 1, 0, 1, 18),
    (1, 1, 1, 16, 1, "mean", 1, 0, 1, 2),
    (9, 9, 1, 16, 4, "mean", 1, 6, 20, 40),
    (600, 640, 1, 16, 512, "mean", 1, 0, 1, 1024),
]


@pytest.mark.parametrize(("q_len", "kv_len", "heads", "dim", "g", "reduce", "r", "sink", "window", "budget"), CASES)
def test_equals_reference(q_len, kv_len, heads, dim, g, reduce, r, sink, window, budget):
    if window == 0:
        assert g == r == 1
    iq, ik = make(q_len=q_len, kv_len=kv_len, heads=heads, dim=dim, r=r, batch=2)

    support, expected = both(
        iq, ik, budget=budget, granularity=Granularity(q_block=g, kv_block=r), sink=sink, window=window,
        q_start=kv_len - q_len, reduce=reduce,
    )  # fmt: skip

    assert_same(support, expected)


# the interpreter truncates to bfloat16
@pytest.mark.parametrize("score_dtype", [torch.float16, torch.float32] + ON_GPU * [torch.bfloat16], ids=str)
def test_rounding_makes_the_reference_s_ties(score_dtype):
    # scores near 288 in steps of 1/8, which neither half-precision dtype can hold apart
    gen = torch.Generator().manual_seed(5)
    iq, ik = (torch.randint(5, 8, shape, generator=gen).to(DEVICE).half() for shape in ((1, 9, 1, 64), (1, 40, 64)))
    settings = {"budget": 12, "granularity": Granularity(), "q_start": 31}

    support, expected = both(iq, ik, score_dtype=score_dtype, **settings)

    assert_same(support, expected)
    exact = index_topk(iq.double(), ik.double(), **settings)
    assert torch.equal(support.groups, exact.groups) == (score_dtype == torch.float32)


def test_dense_below_and_short_rows_agree():
    iq, ik = make(q_len=20, kv_len=20)
    support, expected = both(iq, ik, budget=6, granularity=Granularity(), dense_below=11)

    assert_same(support, expected)
    assert torch.equal(support.mask(20), expected.mask(20))


def test_real_scores_select_exactly_the_best():
    gen = torch.Generator().manual_seed(2)
    iq, ik = (torch.randn(shape, generator=gen).to(DEVICE).half() for shape in ((1, 6, 1, 32), (1, 300, 32)))
    support = index_topk(iq, ik, budget=41, granularity=Granularity(), q_start=294, backend="triton")

    scores = torch.einsum("td,nd->tn", iq[0, :, 0].double(), ik[0].double()) / 32**0.5
    for t, row in enumerate(scores):
        row = row[: 294 + t]
        chosen = support.groups[0, 0, t].long()
        assert (chosen.diff() > 0).all()
        assert support.counts[0, 0, t] == 40
        rest = torch.ones_like(row, dtype=torch.bool)
        rest[chosen] = False
        # a rounding to float16 apart
        assert row[chosen].min() >= row[rest].max() - 2e-3 * row.abs().max()


def test_saturated_scores_tie():
    iq = torch.full((1, 1, 1, 16), 200.0, device=DEVICE).half()
    ik = torch.zeros(1, 6, 16, device=DEVICE).half()
    # rounded scores: lowest, 0, highest, highest, highest
    for group, value in enumerate((-5000.0, 0.0, 4000.0, 60000.0, 5000.0)):
        ik[0, group] = value
    support, expected = both(iq, ik, budget=3, granularity=Granularity(), q_start=5)

    assert_same(support, expected)
    assert support.groups.flatten().tolist() == [2, 3]


@pytest.mark.parametrize("heads", [1, 4])
def test_nan_is_never_preferred(heads):
    iq, ik = make(q_len=1, kv_len=40, heads=heads, size=0)
    iq += 1
    ik += torch.arange(1, 41, device=DEVICE)[:, None] / 8
    ik[0, 7] = float("nan")
    support = index_topk(iq, ik, budget=39, granularity=Granularity(), q_start=39, backend="triton")

    assert support.groups.flatten().tolist() == [j for j in range(39) if j != 7]


def test_keys_past_the_causal_edge_have_no_say():
    iq, ik = make(q_len=16, kv_len=96)
    settings = {"budget": 20, "granularity": Granularity(q_block=8), "q_start": 64, "backend": "triton"}
    support = index_topk(iq, ik, **settings)
    poisoned = ik.clone()
    poisoned[:, 80:] = float("nan")

    assert torch.equal(index_topk(iq, poisoned, **settings).groups, support.groups)


@pytest.mark.parametrize(("g", "r", "cuts"), [(1, 1, [1]), (1, 4, [13]), (8, 1, [16])])
def test_prompt_chunks_change_nothing(g, r, cuts):
    gen = torch.Generator().manual_seed(3)
    iq, ik = (torch.randn(shape, generator=gen).to(DEVICE).half() for shape in ((1, 31, 1, 16), (1, 31 // r, 16)))
    settings = {"budget": 20, "granularity": Granularity(q_block=g, kv_block=r), "backend": "triton"}
    whole = index_topk(iq, ik, **settings)

    for start, end in zip([0, *cuts], [*cuts, 31], strict=True):
        part = index_topk(iq[:, start:end], ik[:, : end // r], q_start=start, **settings)
        assert torch.equal(part.mask(31), whole.mask(31)[:, :, start:end])


@pytest.mark.parametrize(("g", "heads"), [(1, 1), (8, 4), (8, 1)])
def test_workspace_changes_nothing(g, heads, monkeypatch):
    gen = torch.Generator().manual_seed(4)
    iq, ik = (torch.randn(shape, generator=gen).to(DEVICE).half() for shape in ((2, 12, heads, 16), (2, 90, 16)))
    settings = {"budget": 30, "granularity": Granularity(q_block=g), "q_start": 78, "backend": "triton"}
    whole = index_topk(iq, ik, **settings)
    chunks = []
    score = index_kernels._score
    monkeypatch.setattr(index_kernels, "_score", lambda *a, **k: (chunks.append(a[3].shape), score(*a, **k)))
    rows = 4 * g * heads if heads > 1 else 4
    for name in ("PLAIN", "REDUCED"):
        monkeypatch.setattr(index_kernels, name, getattr(index_kernels, name)._replace(rows=rows))
    monkeypatch.setattr(index_kernels, "WORKSPACE_BYTES", 3000 if g == 1 else 600)

    support = index_topk(iq, ik, **settings)

    assert len(chunks) > 1
    assert torch.equal(support.groups, whole.groups)
    assert torch.equal(support.counts, whole.counts)


def test_strided_inputs():
    iq, ik = make(q_len=12, kv_len=60, heads=2, dim=32)
    wide = torch.full((1, 60, 96), float("nan"), device=DEVICE, dtype=torch.float16)
    wide[..., 32:64] = ik
    settings = {"budget": 14, "granularity": Granularity(), "q_start": 48, "backend": "triton"}

    support = index_topk(iq.transpose(1, 2).contiguous().transpose(1, 2), wide[..., 32:64], **settings)

    assert_same(support, index_topk(iq, ik, **settings))


@pytest.mark.parametrize(("g", "reduce"), [(1, "mean"), (8, "mean"), (8, "max")])
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (4, 24)])
def test_float8_equals_reference(heads, dim, g, reduce):
    gen = torch.Generator().manual_seed(7)
    iq, ik = (torch.randint(-2, 3, shape, generator=gen) for shape in ((1, 11, heads, dim), (1, 78, dim)))
    iq[0, 3], ik[0, 5] = 240, -16
    iq, ik = (x.to(DEVICE, torch.float8_e4m3fn) for x in (iq, ik))
    settings = {"granularity": Granularity(q_block=g), "q_start": 67, "reduce": reduce}
    support, expected = both(iq, ik, budget=24, **settings)

    assert_same(support, expected)
    assert_same(support, index_topk(iq.half(), ik.half(), budget=24, backend="triton", **settings))


@pytest.mark.parametrize(
    ("g", "r", "heads", "size", "dtype", "table_dtype"),
    [
        (1, 1, 1, 16, torch.float16, torch.int32),
        (8, 1, 1, 24, torch.float8_e4m3fn, torch.int64),
        (1, 4, 3, 5, torch.float8_e4m3fn, torch.int32),
        (8, 1, 2, 1, torch.float16, torch.int64),
    ],
    ids=str,
)
def test_pages_equal_one_piece(g, r, heads, size, dtype, table_dtype, monkeypatch):
    gen = torch.Generator().manual_seed(5)
    iq, ik = (torch.randn(shape, generator=gen) for shape in ((2, 5, heads, 16), (2, 80 // r, 16)))
    iq, ik = iq.to(DEVICE, dtype), ik.to(DEVICE, dtype)
    pages = -(-ik.shape[1] // size)
    # scattered, wider than the keys, with NaN where nothing may be read
    table = torch.randperm(2 * pages + 2, generator=gen)[: 2 * pages].view(2, pages)
    pool = torch.full((2 * pages + 2, size, 40), float("nan"), device=DEVICE).to(dtype)
    rows = torch.arange(ik.shape[1])
    pool[table[:, rows // size].to(DEVICE), (rows % size).to(DEVICE), 8:24] = ik
    # the columns that no query needs yet lead nowhere
    table = torch.cat([table, torch.full((2, 2), 2**30)], 1).to(DEVICE, table_dtype)
    settings = {"budget": 30, "granularity": Granularity(q_block=g, kv_block=r), "q_start": 75, "backend": "triton"}
    whole = index_topk(iq, ik, **settings)

    assert_same(index_topk(iq, pool[..., 8:24], page_table=table, **settings), whole)
    # one sequence at a time, and the table a view
    monkeypatch.setattr(index_kernels, "WORKSPACE_BYTES", 300)
    table = torch.stack([table, table * 0], -1)[..., 0]
    assert_same(index_topk(iq, pool[..., 8:24], page_table=table, **settings), whole)


def test_a_nan_query_spoils_its_block_alone():
    iq, ik = make(q_len=16, kv_len=64)
    settings = {"budget": 13, "granularity": Granularity(q_block=8), "reduce": "mean", "q_start": 48}
    expected = index_topk(iq, ik, backend="triton", **settings).groups[0, 0]
    iq[0, 11] = float("nan")

    groups = index_topk(iq, ik, backend="triton", **settings).groups[0, 0]

    assert torch.equal(groups[0], expected[0])
    assert groups[1].tolist() == [0, 1, 2, 3, 4]


def test_a_nan_query_is_no_maximum():
    iq, ik = make(q_len=16, kv_len=64)
    settings = {"budget": 13, "granularity": Granularity(q_block=8), "reduce": "max", "q_start": 48}
    # an equal query changes no maximum
    iq[0, 11] = iq[0, 10]
    expected = index_topk(iq, ik, backend="triton", **settings)
    iq[0, 11] = float("nan")

    assert_same(index_topk(iq, ik, backend="triton", **settings), expected)


ROWS = {
    "real": lambda x: x,
    "equal": lambda x: x * -0.0,
    "two": lambda x: (x > 1).float(),
    "mostly zero": lambda x: torch.where(x.abs() > 2, x, 0.0),
    "ascending": lambda x: x.sort(-1).values,
    "descending": lambda x: x.sort(-1, descending=True).values,
    "best where few are sampled": lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) < 100, 100.0 + x, x),
    "infinities": lambda x: torch.where(x > 2, torch.inf, torch.where(x < 0, -torch.inf, x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + ON_GPU * [torch.bfloat16], ids=str)
@pytest.mark.parametrize("values", ROWS)
def test_long_rows_are_selected_exactly(values, dtype, monkeypatch):
    # small tiles, so that rows take every path: sampled, too few kept, too many kept, more wanted than can be kept
    monkeypatch.setattr(select_kernels, "MOST_KEPT", 1024)
    gen = torch.Generator().manual_seed(6)
    for n, budget in ((1601, 40), (1600, "20%"), (1601, 1500)):
        scores = ROWS[values](torch.randn(1, 1, 1, n, generator=gen).to(DEVICE)).to(dtype)
        rule = SupportRule(budget=Budget.parse(budget), sink=3, window=5)
        settings = {"rule": rule, "q_start": n - 1, "q_len": 1}

        support = topk_support(scores, backend="triton", **settings)

        assert_same(support, topk_support(scores, backend="reference", **settings))


def test_unlucky_samples_are_made_good(monkeypatch):
    # every candidate of the sample is low: nothing else may be lost
    n = 3000
    scores = torch.zeros(1, 1, 1, n, device=DEVICE)
    step = -(-(n - 1) // 1024)
    i = torch.arange(1024, device=DEVICE)
    sampled = i * step + ((((i * 40503) & 65535) * step) >> 16)
    low = torch.ones(n, dtype=torch.bool, device=DEVICE)
    low[sampled[sampled < n]] = False
    scores[..., low] = torch.arange(int(low.sum()), device=DEVICE).float() + 1
    for sign in (1.0, -1.0):
        rule = SupportRule(budget=Budget(tokens=33))
        settings = {"rule": rule, "q_start": n - 1, "q_len": 1}
        support = topk_support(sign * scores, backend="triton", **settings)

        assert_same(support, topk_support(sign * scores, backend="reference", **settings))


@pytest.mark.parametrize("candidates", [1000, 5000, 32_000, 131_072, 1_000_000])
@pytest.mark.parametrize("wanted", [1, 512, 2048, 8192, 30_000])
def test_sizes_hold_what_is_wanted(candidates, wanted):
    kept, sample = select_kernels._sizes(candidates, wanted)

    assert kept & (kept - 1) == sample & (sample - 1) == 0
    assert 1024 <= kept <= select_kernels.MOST_KEPT
    assert kept > min(wanted, candidates) or kept == select_kernels.MOST_KEPT


def test_why_not():
    iq, ik = make(q_len=8, kv_len=8)
    settings = {"granularity": Granularity(), "backend": "triton"}

    with pytest.raises(BackendUnavailableError, match=r"float16 and bfloat16 and float8_e4m3fn, got torch\.float32"):
        index_topk(iq.float(), ik.float(), budget=4, **settings)
    with pytest.raises(BackendUnavailableError, match="not a mass budget"):
        index_topk(iq, ik, budget="mass:0.9<=4", **settings)
    with pytest.raises(BackendUnavailableError, match=r"not torch\.float64"):
        index_topk(iq, ik, budget=4, score_dtype=torch.float64, **settings)
    with pytest.raises(BackendUnavailableError, match="up to 256 query heads in a block, got 512"):
        index_topk(iq, ik, budget=1024, granularity=Granularity(q_block=512), reduce="max", backend="triton")
    if not ON_GPU:
        with pytest.raises(BackendUnavailableError, match="needs the page table beside the keys, got one on meta"):
            index_topk(iq, ik, budget=4, page_table=torch.zeros(1, 1, device="meta").int(), **settings)
    with pytest.raises(BackendUnavailableError, match="up to 256, got 272"):
        index_topk(*make(q_len=8, kv_len=8, dim=272), budget=4, **settings)


def test_empty_calls():
    iq, ik = make(q_len=3, kv_len=3)
    for backend in ("triton", "reference"):
        none = index_topk(iq[:, :0], ik, budget=4, granularity=Granularity(), backend=backend)
        assert none.groups.shape == (1, 1, 0, 0)
        alone = index_topk(iq[:, :1], ik[:, :0], budget=4, granularity=Granularity(), backend=backend)
        assert alone.keys_read().tolist() == [[[1]]]
        in_a_block = index_topk(iq[:, :0], ik, budget=8, granularity=Granularity(q_block=4), q_start=6, backend=backend)
        assert in_a_block.groups.shape == (1, 1, 1, 0)
    no_batch = index_topk(iq[:0], ik[:0], budget=2, granularity=Granularity(), backend="triton")
    assert no_batch.counts.shape == (0, 1, 3)
