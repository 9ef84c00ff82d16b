"""An indexer's scores and selection against loops: rounding, ties, reductions, masses, chunks."""

import math

import pytest
import torch

from topmass.core.granularity import Granularity
from topmass.errors import BackendUnavailableError, ConfigError, DataError
from topmass.ops import _dispatch, _logits, index_topk
from topmass.ops.index_topk.interface import check_index
from topmass.ops.index_topk.reference import mean_queries

# kernels take half precision only: test_index_topk_triton.py compares them with the reference
BACKENDS = ["auto", *(name for name in _dispatch.available("index_topk") if name != "triton")]
KV_LEN = 37


def make(*, heads=1, r=1, q_start=0, dim=16, dtype=torch.float32, batch=2, size=3, kv_len=KV_LEN, offset=0):
    """Small integers: every product and sum is exact in any order, so that only the rounding decides."""
    gen = torch.Generator().manual_seed(5)
    iq = torch.randint(-size, size + 1, (batch, kv_len - q_start, heads, dim), generator=gen).add(offset).to(dtype)
    ik = torch.randint(-size, size + 1, (batch, kv_len // r, dim), generator=gen).add(offset).to(dtype)
    return iq, ik


def mean(iq):
    """Mean of some queries, rounded once to their dtype."""
    return iq.double().mean(0).float().to(iq.dtype)


def score(iq, ik, score_dtype):
    """Score of one query and group, rounded once."""
    dots = [sum(a * b for a, b in zip(head, ik.tolist(), strict=True)) / math.sqrt(len(head)) for head in iq.tolist()]
    total = dots[0] if len(dots) == 1 else sum(max(dot, 0.0) for dot in dots)
    return torch.tensor(total, dtype=torch.float64).to(score_dtype).item()


def naive(iq, ik, *, wanted, g, r, q_start, sink, window, reduce, score_dtype, share_of_softmax=None):
    """Groups of every block, `[batch][block]`, by the support rule."""
    out = []
    for b in range(iq.shape[0]):
        out.append([])
        for t0 in range(q_start // g * g, q_start + iq.shape[1], g):
            queries = [t - q_start for t in range(t0, t0 + g) if q_start <= t < q_start + iq.shape[1]]
            start = t0 + 1 if window == 0 else max(t0 - window + 1, 0) // r * r
            candidates = [j for j in range(ik.shape[1]) if j * r >= -(-sink // r) * r and (j + 1) * r <= start]
            pooled = {}
            norms = [
                math.log(sum(math.exp(score(iq[b, i], ik[b, j], torch.float64)) for j in candidates))
                if candidates
                else 0.0
                for i in queries
            ]
            for j in candidates:
                rows = [iq[b, i] for i in queries]
                if reduce == "mean" and iq.shape[2] == 1:
                    rows = [mean(torch.stack(rows))]
                rounded = [score(row, ik[b, j], score_dtype) for row in rows]
                if reduce == "max_prob" and g > 1:
                    logs = [score(row, ik[b, j], torch.float64) - norm for row, norm in zip(rows, norms, strict=True)]
                    rounded = [torch.tensor(x, dtype=torch.float64).to(score_dtype).item() for x in logs]
                pooled[j] = sum(rounded) / len(rounded) if reduce == "mean" else max(rounded)
            best = sorted(candidates, key=lambda j, pooled=pooled: (-pooled[j], j))[:wanted]
            if share_of_softmax is not None and candidates:
                top = max(pooled.values())
                total = sum(math.exp(s - top) for s in pooled.values())
                held, taken = 0.0, 0
                while taken < len(best) and held < share_of_softmax:
                    held += math.exp(pooled[best[taken]] - top) / total
                    taken += 1
                best = best[:taken]
            out[-1].append(sorted(best))
    return out


def chosen(support):
    assert support.groups.shape[1] == 1
    rows = zip(support.groups[:, 0].tolist(), support.counts[:, 0].tolist(), strict=True)
    return [[group[:n] for group, n in zip(groups, counts, strict=True)] for groups, counts in rows]


def paged(ik, size, *, unused=3):
    """The same keys in scattered pages of a wider pool, and the table that finds them; its last column is for later."""
    b, n, dim = ik.shape
    pages = -(-n // size)
    order = torch.randperm(b * pages + unused, generator=torch.Generator().manual_seed(1))[: b * pages].view(b, pages)
    pool = torch.full((b * pages + unused, size, dim + 8), float("nan")).to(ik.device, ik.dtype)
    whole = torch.cat([ik, ik[:, :1].expand(-1, pages * size - n, -1)], 1)
    pool[order.flatten().to(ik.device), :, :dim] = whole.unflatten(1, (pages, size)).flatten(0, 1)
    table = torch.cat([order, torch.full((b, 1), 10**6)], 1).int().to(ik.device)
    return pool[..., :dim], table


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("g", "reduce"), [(1, "mean"), (4, "mean"), (4, "max"), (4, "max_prob"), (1, "max_prob")])
@pytest.mark.parametrize(("r", "wanted"), [(1, 5), (4, 2)])
@pytest.mark.parametrize("q_start", [0, 6])
@pytest.mark.parametrize("heads", [1, 4])
def test_support_equals_loops(heads, q_start, r, wanted, g, reduce, backend):
    iq, ik = make(heads=heads, r=r, q_start=q_start)
    sink, window = 1, 3
    budget = -(-sink // r) * r + (window + g - 1) + (r - 1) + wanted * r

    support = index_topk(
        iq, ik, budget=budget, granularity=Granularity(q_block=g, kv_block=r), sink=sink, window=window,
        q_start=q_start, reduce=reduce, backend=backend,
    )  # fmt: skip

    expected = naive(
        iq, ik, wanted=wanted, g=g, r=r, q_start=q_start, sink=sink, window=window, reduce=reduce,
        score_dtype=torch.float16,
    )  # fmt: skip
    assert chosen(support) == expected
    assert (support.q_start, support.q_len) == (q_start, iq.shape[1])
    assert (support.keys_read() <= budget).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score_dtype", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rounding_makes_ties_that_go_to_the_lower_group(dtype, score_dtype, backend):
    # scores near 288 in steps of 1/8, which neither half-precision dtype can hold apart
    iq, ik = make(dtype=dtype, dim=64, size=1, offset=6, kv_len=25)
    rounds_to = score_dtype or (torch.float64 if dtype == torch.float64 else torch.float16)

    support = index_topk(iq, ik, budget=7, granularity=Granularity(), score_dtype=score_dtype, backend=backend)

    def loops(score_dtype):
        settings = {"wanted": 6, "g": 1, "r": 1, "q_start": 0, "sink": 0, "window": 1, "reduce": "mean"}
        return naive(iq, ik, score_dtype=score_dtype, **settings)

    assert chosen(support) == loops(rounds_to)
    if rounds_to in (torch.float16, torch.bfloat16):
        assert loops(rounds_to) != loops(torch.float64)


def test_a_tie_made_by_float16():
    iq = torch.ones(1, 1, 1, 1)
    ik = torch.tensor([2048.0, 2049.0, 2048.0, 0.0])[None, :, None]

    def best(score_dtype, iq=iq, ik=ik):
        support = index_topk(iq, ik, budget=2, granularity=Granularity(), q_start=3, score_dtype=score_dtype)
        return support.groups.flatten().tolist()

    assert best(None) == [0]
    assert best(torch.float32) == [1]
    assert best(None, iq.double(), ik.double()) == [1]
    assert best(torch.float16, iq.double(), ik.double()) == [0]


def test_scores_saturate_and_stay_ordered():
    iq = torch.ones(1, 1, 1, 1)
    ik = torch.tensor([-1e6, 0.0, 1e6, 2e6, 0.0])[None, :, None]

    support = index_topk(iq, ik, budget=2, granularity=Granularity(), q_start=4)

    assert support.groups.flatten().tolist() == [2]


def test_reductions_of_a_block_differ():
    # one query is sure of group 0, all four lean to group 1
    iq = torch.tensor([[9.0, 1.0], [0.0, 4.0], [0.0, 4.0], [0.0, 4.0]])[None, :, None]
    ik = torch.zeros(1, 8, 2)
    ik[0, 0, 0] = ik[0, 1, 1] = 1.0
    g4 = Granularity(q_block=4)

    assert index_topk(iq, ik, budget=5, granularity=g4, q_start=8, reduce="mean").groups.flatten().tolist() == [1]
    assert index_topk(iq, ik, budget=5, granularity=g4, q_start=8, reduce="max").groups.flatten().tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_different_queries_are_compared_as_probabilities(backend):
    # the first query scores every key high and wants none; the second scores them low and is sure of group 2
    iq = torch.tensor([[8.0, 0.0], [-8.0, 4.0]])[None, :, None]
    ik = torch.zeros(1, 8, 2)
    ik[..., 0] = 1.0
    ik[0, 1, 0], ik[0, 2, 1] = 1.1, 2.0
    settings = {"budget": 3, "granularity": Granularity(q_block=2), "q_start": 8, "backend": backend}

    assert index_topk(iq, ik, **settings, reduce="max").groups.flatten().tolist() == [1]
    assert index_topk(iq, ik, **settings, reduce="max_prob").groups.flatten().tolist() == [2]
    # what a query adds to all of its scores has no say
    iq[0, 0, 0, 0] += 100.0
    ik[..., 0] = 1.0
    assert index_topk(iq, ik, **settings, reduce="max_prob").groups.flatten().tolist() == [2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_do_not_depend_on_chunks(backend):
    gen = torch.Generator().manual_seed(4)
    iq, ik = torch.randn(1, 40, 1, 16, generator=gen), torch.randn(1, 64, 16, generator=gen)
    settings = {"budget": 24, "granularity": Granularity(q_block=8), "reduce": "max_prob", "backend": backend}

    whole = index_topk(iq, ik, q_start=24, **settings)
    parts = [index_topk(iq[:, lo : lo + 16], ik[:, : 40 + lo], q_start=24 + lo, **settings) for lo in (0, 16)]

    assert chosen(whole)[0][:4] == chosen(parts[0])[0] + chosen(parts[1])[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("g", "q_start", "q_len"), [(2, 0, 12), (32, 0, 64), (8, 5, 20), (8, 13, 2), (4, 6, 0), (64, 70, 200)]
)
def test_mean_queries_is_the_rounded_mean(g, q_start, q_len, dtype):
    iq = torch.randn(2, q_len, 1, 5, generator=torch.Generator().manual_seed(3)).to(dtype)

    found = mean_queries(iq, q_block=g, q_start=q_start)

    blocks = range(q_start // g, -(-(q_start + q_len) // g))
    assert found.shape == (2, len(blocks), 1, 5)
    assert found.dtype == dtype
    for i, block in enumerate(blocks if q_len else ()):
        rows = iq[:, max(block * g - q_start, 0) : (block + 1) * g - q_start]
        exact = rows.double().mean(1)
        # half a place of the dtype, and what summing in float32 loses
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(torch.float32).eps * rows.double().abs().amax(
            1
        ) * (dtype != torch.float64)
        assert ((found[:, i].double() - exact).abs() <= allowed + 1e-15).all()
        # the same bits alone, and from the block's own queries only
        alone = mean_queries(rows[1:], q_block=g, q_start=max(block * g, q_start))
        assert torch.equal(alone, found[1:, i : i + 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_head_scores_by_the_mean_query(dtype, backend):
    gen = torch.Generator().manual_seed(8)
    iq, ik = torch.randn(1, 31, 1, 16, generator=gen).to(dtype), torch.randn(1, 37, 16, generator=gen).to(dtype)
    settings = {"budget": 15, "q_start": 6, "backend": backend, "reduce": "mean"}

    support = index_topk(iq, ik, granularity=Granularity(q_block=8), **settings)

    # a mean of equal queries is that query
    means = mean_queries(iq, q_block=8, q_start=6).repeat_interleave(8, 1)[:, 6:37]
    assert chosen(index_topk(means, ik, granularity=Granularity(q_block=8), **settings)) == chosen(support)
    # and selects as a query alone: at the block's first position, with as many groups wanted
    alone = index_topk(means, ik, granularity=Granularity(), **{**settings, "budget": 8})
    assert [chosen(alone)[0][t - 6] for t in (8, 16, 24, 32)] == chosen(support)[0][1:]


def test_the_mean_is_rounded_to_the_dtype_of_the_queries():
    # the mean 128.25 has no place in bfloat16, where both groups score 128
    iq = torch.tensor([[256.0, 1.0], [0.5, 1.0]])[None, :, None]
    ik = torch.zeros(1, 9, 2)
    ik[0, 0], ik[0, 1] = torch.tensor([0.5, 64.0]), torch.tensor([1.0, 0.0])

    def best(dtype):
        settings = {"budget": 3, "granularity": Granularity(q_block=2), "q_start": 8, "score_dtype": torch.float32}
        settings["reduce"] = "mean"
        return index_topk(iq.to(dtype), ik.to(dtype), **settings).groups.flatten().tolist()

    assert best(torch.float32) == [1]
    assert best(torch.bfloat16) == [0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("g", "reduce"), [(1, "mean"), (4, "mean"), (4, "max")])
@pytest.mark.parametrize("heads", [1, 4])
def test_float8_is_read_exactly(heads, g, reduce, backend):
    gen = torch.Generator().manual_seed(9)
    iq, ik = (torch.randn(shape, generator=gen) for shape in ((2, 31, heads, 16), (2, 37, 16)))
    iq[0, 0], ik[0, 0], ik[0, 1] = 2.0**-9, 448.0, -(2.0**-8)
    iq, ik = iq.to(torch.float8_e4m3fn), ik.to(torch.float8_e4m3fn)
    settings = {"budget": 12, "granularity": Granularity(q_block=g), "q_start": 6, "reduce": reduce}

    support = index_topk(iq, ik, backend=backend, **settings)

    assert chosen(support) == chosen(index_topk(iq.half(), ik.half(), **settings, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", [14, "30%", "mass:0.6<=14"])
@pytest.mark.parametrize(("g", "r", "size"), [(1, 1, 8), (4, 2, 5), (1, 4, 16)])
def test_pages_equal_one_piece(g, r, size, budget, backend):
    iq, ik = make(r=r, q_start=6)
    settings = {"budget": budget, "granularity": Granularity(q_block=g, kv_block=r), "q_start": 6, "backend": backend}
    pool, table = paged(ik, size)

    support = index_topk(iq, pool, page_table=table, **settings)

    whole = index_topk(iq, ik, **settings)
    assert chosen(support) == chosen(whole)
    assert torch.equal(support.groups, whole.groups)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("g", "reduce"), [(1, "mean"), (4, "mean"), (4, "max")])
@pytest.mark.parametrize("r", [1, 2])
@pytest.mark.parametrize(("heads", "share"), [(1, 0.5), (4, 0.9)])
def test_mass_is_the_softmax_of_the_reduced_score(heads, share, r, g, reduce, backend):
    iq, ik = make(heads=heads, r=r, q_start=6, size=1)
    support = index_topk(
        iq, ik, budget=f"mass:{share}<=24", granularity=Granularity(q_block=g, kv_block=r), sink=2, window=2, q_start=6,
        reduce=reduce, backend=backend,
    )  # fmt: skip

    wanted = (24 - 2 - (2 + g - 1) - (r - 1)) // r
    expected = naive(
        iq, ik, wanted=wanted, g=g, r=r, q_start=6, sink=2, window=2, reduce=reduce, score_dtype=torch.float16,
        share_of_softmax=share,
    )  # fmt: skip
    assert chosen(support) == expected
    assert len({len(groups) for rows in expected for groups in rows}) > 2


def test_fractions_and_dense_below_follow_the_rule():
    iq, ik = make()
    support = index_topk(iq, ik, budget="25%", granularity=Granularity(), dense_below=9)
    t = torch.arange(KV_LEN)

    assert torch.equal(support.keys_read()[0, 0], torch.where(t < 9, t + 1, (t + 4) // 4))


@pytest.mark.parametrize("workspace", [1, 20_000])
@pytest.mark.parametrize("budget", [9, "30%", "mass:0.6<=12"])
@pytest.mark.parametrize(("g", "r", "q_start"), [(1, 1, 0), (4, 2, 6), (4, 1, 0)])
def test_workspace_changes_nothing(monkeypatch, g, r, q_start, budget, workspace):
    iq, ik = make(heads=4, r=r, q_start=q_start, size=1)
    settings = {"granularity": Granularity(q_block=g, kv_block=r), "q_start": q_start, "reduce": "max"}
    one = index_topk(iq, ik, budget=budget, **settings)

    monkeypatch.setattr(_logits, "WORKSPACE_BYTES", workspace)
    many = index_topk(iq, ik, budget=budget, **settings)

    assert chosen(many) == chosen(one)
    assert torch.equal(many.mask(KV_LEN), one.mask(KV_LEN))


@pytest.mark.parametrize("cuts", [[1], [7, 8, 20], [36]])
@pytest.mark.parametrize("r", [1, 4])
def test_prompt_chunks_change_nothing(r, cuts):
    iq, ik = make(r=r)
    settings = {"budget": 12, "granularity": Granularity(kv_block=r)}
    whole = index_topk(iq, ik, **settings).mask(KV_LEN)

    for start, end in zip([0, *cuts], [*cuts, KV_LEN], strict=True):
        # only the groups complete by then exist
        part = index_topk(iq[:, start:end], ik[:, : end // r], q_start=start, **settings)
        assert torch.equal(part.mask(KV_LEN), whole[:, :, start:end])


def test_window_0_lets_the_own_key_compete():
    iq, ik = make()
    support = index_topk(iq, ik, budget=3, granularity=Granularity(), window=0)

    assert chosen(support) == naive(
        iq, ik, wanted=3, g=1, r=1, q_start=0, sink=0, window=0, reduce="mean", score_dtype=torch.float16
    )


def test_short_prompts_need_no_index_key():
    iq, ik = make(r=4)
    support = index_topk(iq[:, :3], ik[:, :0], budget=16, granularity=Granularity(kv_block=4), sink=4)

    assert support.keys_read().tolist() == [[[1, 2, 3]]] * 2


def test_autocast_has_no_say():
    # 257 needs nine bits, bfloat16 has eight
    iq, ik = torch.ones(1, 1, 1, 1), torch.tensor([256.0, 257.0, 0.0])[None, :, None]
    with torch.autocast("cpu", torch.bfloat16):
        support = index_topk(iq, ik, budget=2, granularity=Granularity(), q_start=2)

    assert support.groups.flatten().tolist() == [1]


def test_misuse_is_named():
    iq, ik = make(r=4)
    settings = {"budget": 16, "granularity": Granularity(kv_block=4)}

    with pytest.raises(ConfigError, match="may read 9 key groups, but ik holds 8"):
        index_topk(iq, ik[:, :-1], **settings)
    with pytest.raises(ConfigError, match="reduce must be one of mean, max"):
        check_index(iq, ik, granularity=Granularity(), reduce="sum")
    with pytest.raises(ConfigError, match="share must be 'layer'"):
        index_topk(iq, ik, budget=16, granularity=Granularity(share="q_head"))
    with pytest.raises(ConfigError, match="smallest that works is 8"):
        index_topk(iq, ik, budget=7, granularity=Granularity(kv_block=4))
    with pytest.raises(ConfigError, match="one dtype"):
        index_topk(iq, ik.half(), **settings)
    with pytest.raises(ConfigError, match=r"in 8 bits must be torch\.float8_e4m3fn, got torch\.float8_e5m2"):
        index_topk(iq.to(torch.float8_e5m2), ik.to(torch.float8_e5m2), **settings)
    with pytest.raises(ConfigError, match="floating-point"):
        index_topk(iq, ik, score_dtype=torch.int32, **settings)
    pool, table = paged(ik, 4)
    with pytest.raises(ConfigError, match="may read 9 key groups, but ik holds 8"):
        index_topk(iq, pool, page_table=table[:, :2], **settings)
    with pytest.raises(DataError, match="NaN"):
        index_topk(iq * float("nan"), ik, **settings)
    with pytest.raises(BackendUnavailableError, match="Unknown backend 'fast'"):
        index_topk(iq, ik, backend="fast", **settings)
