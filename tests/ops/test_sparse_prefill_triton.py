"""The gathering kernel against the reference, on odd shapes and adversarial rows."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import topmass
from topmass.core.support import Support
from topmass.errors import BackendUnavailableError, ConfigError
from topmass.ops import sparse_prefill
from topmass.ops._triton_common import INTERPRETED
from topmass.ops.sparse_prefill import _triton
from topmass.testing import assert_as_accurate_as, random_support

pytestmark = [
    # Triton 3.6's interpreter calls int() on arrays of one element
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton"),
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="no triton backend can run here"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter's bfloat16 is emulated element by element
DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)


class Case(NamedTuple):
    """A problem: the selection, where it starts, and the heads."""

    q_block: int = 1
    kv_block: int = 1
    share: str = "layer"
    start: int = 0
    q_len: int = 37
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    budget: int | str = 12
    sink: int = 0
    window: int = 1
    batch: int = 1

    def __str__(self) -> str:
        return "-".join(str(x).replace(" ", "") for x in self)

    def rule(self) -> topmass.SupportRule:
        return topmass.SupportRule(
            budget=topmass.Budget.parse(self.budget),
            granularity=topmass.Granularity(q_block=self.q_block, kv_block=self.kv_block, share=self.share),
            sink=self.sink,
            window=self.window,
        )

    def support(self, **changes: Any) -> Support:
        rule = replace(self.rule(), **changes)
        return random_support(
            rule,
            q_len=self.q_len,
            q_start=self.start,
            batch=self.batch,
            share_heads=rule.granularity.share_heads(*self.heads),
            growth=2.0,
            tile=max(16, self.q_block),
            span=24,
            device=DEVICE,
        )

    def tensors(self, dtype: torch.dtype, extra: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        gen = torch.Generator().manual_seed(0)
        (h, hk), (d, dv) = self.heads, self.dims
        kv = self.start + self.q_len + extra
        shapes = ((self.q_len, h, d), (kv, hk, d), (kv, hk, dv))
        q, k, v = (torch.randn(self.batch, *shape, generator=gen).to(DEVICE, dtype) for shape in shapes)
        return q, k, v


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    support: Support,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in the dtype of the inputs: what a kernel may be at most twice as wrong as."""
    group = q.shape[2] // k.shape[2]
    qt, kt, vt = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    logits = (qt @ kt.mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    mask = support.mask(k.shape[1])
    logits = logits.masked_fill(~mask.repeat_interleave(q.shape[2] // mask.shape[1], 1), float("-inf"))
    extra = (
        logits
        if sinks is None
        else torch.cat([logits, sinks.to(logits)[:, None, None].expand(*logits.shape[:3], 1)], -1)
    )
    lse = extra.logsumexp(-1)
    return ((logits - lse[..., None]).exp().nan_to_num(0.0) @ vt).transpose(1, 2), lse.transpose(1, 2).float()


def check(q: Tensor, k: Tensor, v: Tensor, support: Support, **settings: Any) -> tuple[Tensor, Tensor]:
    """Run the kernel, hold it to the gate, return what it computed."""
    settings = {"scale": 0.4, "softcap": None, "sinks": None} | settings
    double = {n: x.double() if isinstance(x, Tensor) else x for n, x in settings.items()}
    exact, exact_lse = sparse_prefill(q.double(), k.double(), v.double(), support, backend="reference", **double)
    baseline, baseline_lse = plain(q, k, v, support, **settings)

    out, lse = sparse_prefill(q, k, v, support, backend="triton", **settings)

    assert_as_accurate_as(out, exact=exact, baseline=baseline)
    assert_as_accurate_as(lse, exact=exact_lse, baseline=baseline_lse, name="lse")
    return out, lse


CASES = [
    # per query: the union is walked
    Case(q_len=41, start=30, budget=20, window=5, sink=3, batch=2),
    Case(kv_block=4, q_len=45, start=61, budget=40, window=3, sink=2, heads=(8, 2), dims=(24, 40)),
    Case(kv_block=128, q_len=9, start=600, budget=520, window=4, heads=(2, 1)),
    Case(kv_block=16, share="kv_head", q_len=35, start=130, budget=70, heads=(6, 3), dims=(16, 48)),
    Case(share="q_head", q_len=33, start=20, budget=9, heads=(4, 2)),
    # shared by a block smaller than the tile: the union of two to four selections
    Case(q_block=8, kv_block=2, q_len=50, start=101, budget=40, sink=1, window=3, heads=(4, 1), dims=(64, 64)),
    Case(q_block=16, kv_block=32, q_len=40, start=250, budget=144, share="kv_head", heads=(8, 2)),
    # shared by the whole tile: its own list
    Case(q_block=32, q_len=70, start=90, budget=60, window=2, heads=(4, 1), dims=(96, 32)),
    Case(q_block=64, kv_block=4, q_len=67, start=61, budget=120, sink=4, heads=(12, 1)),
    Case(q_block=128, q_len=150, start=7, budget=140, heads=(1, 1)),
    # groups that are no power of two, and large ones
    Case(q_len=21, start=40, heads=(6, 1), budget=17),
    Case(q_len=19, start=40, heads=(7, 1), budget=17, sink=2),
    Case(q_len=17, start=40, heads=(24, 2), budget=17, window=4),
    Case(q_len=9, start=40, heads=(16, 1), budget=17),
    # budgets that grow with the position, so that rows inside a block are dense by turns
    Case(q_block=4, q_len=60, budget="50%", window=2),
    Case(q_block=32, q_len=75, start=3, budget="60%", heads=(4, 1)),
    # the smallest problems
    Case(q_len=1, budget=2),
    Case(q_len=1, start=31, budget=3),
    Case(q_len=31, budget=4),
    Case(q_len=33, budget=34),
    Case(q_len=65, start=64, budget=110, window=100, sink=7),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case, dtype: torch.dtype) -> None:
    check(*case.tensors(dtype), case.support())


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
@pytest.mark.parametrize("options", ["softcap", "sinks", "both"])
def test_softcap_and_learned_sinks(case: Case, options: str) -> None:
    settings: dict[str, Any] = {}
    if options != "sinks":
        settings["softcap"] = 1.5
    if options != "softcap":
        settings["sinks"] = torch.randn(case.heads[0], generator=torch.Generator().manual_seed(3)).to(DEVICE)
    q, k, v = case.tensors(DTYPES[0])

    check(q, k, v, case.support(), **settings)


@pytest.mark.parametrize(
    "case", [Case(q_len=70, heads=(4, 1)), Case(q_block=32, q_len=70, start=5, heads=(4, 1), budget=40)], ids=str
)
@pytest.mark.parametrize("dense_below", [20, 50, 500])
def test_dense_rows_read_everything(case: Case, dense_below: int) -> None:
    # groups of dense rows are to be ignored, whatever they hold
    check(*case.tensors(DTYPES[0]), case.support(dense_below=dense_below))


def test_budget_over_length_equals_dense() -> None:
    case = Case(q_len=45, start=20, budget=65, heads=(4, 1))
    q, k, v = case.tensors(DTYPES[0])

    out, _ = sparse_prefill(q, k, v, case.support(), backend="triton")

    dense = topmass.ops.dense_prefill(q.double(), k.double(), v.double(), scale=case.dims[0] ** -0.5)
    torch.testing.assert_close(out.double(), dense, rtol=2e-3, atol=2e-3)


def test_each_key_counts_once_where_window_and_candidates_mix() -> None:
    # within one tile a key is the window of one query and a choice of the next
    for kv_block in (1, 4):
        case = Case(q_len=32, start=64, kv_block=kv_block, budget=96, heads=(2, 1))
        rule = case.rule()
        t0 = rule.block_starts(64, 32, DEVICE)
        first, stop = rule.candidate_range(t0)
        ids = torch.arange(first, int(stop.max()), device=DEVICE).expand(32, -1)
        groups = ids.masked_fill(ids >= stop[:, None], -1)[None, None].int()
        support = Support.from_groups(groups, (groups >= 0).sum(-1), rule=rule, q_start=64, q_len=32)
        support = replace(support, dense_len=torch.zeros_like(support.dense_len))
        q, k, v = case.tensors(DTYPES[0])

        out, _ = check(q, k, v, support)

        assert support.mask(96)[0, 0].sum(-1).tolist() == list(range(65, 97))
        dense = topmass.ops.dense_prefill(q.double(), k.double(), v.double(), scale=0.4)
        torch.testing.assert_close(out.double(), dense, rtol=2e-3, atol=2e-3)


def test_rows_without_keys() -> None:
    rule = topmass.SupportRule(budget=None, window=0)
    case = Case(q_len=40)
    support = random_support(rule, q_len=40, device=DEVICE)
    q, k, v = case.tensors(DTYPES[0])

    out, lse = sparse_prefill(q, k, v, support, backend="triton")

    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_streaming_support_has_no_far_keys() -> None:
    case = Case(q_len=50, start=13)
    rule = topmass.SupportRule(budget=None, sink=4, window=6)

    check(*case.tensors(DTYPES[0]), random_support(rule, q_len=50, q_start=13, device=DEVICE))


def test_window_zero_reads_choices_only() -> None:
    case = Case(q_len=40, window=0, budget=6, start=11)

    check(*case.tensors(DTYPES[0]), case.support())


def test_hidden_keys_neither_overflow_nor_leak() -> None:
    case = Case(q_len=33, start=31, budget=9, heads=(2, 1))
    q, k, v = case.tensors(DTYPES[0], extra=5)
    read = case.support().mask(69)[0, 0].any(0)
    k[:, ~read], v[:, ~read] = float("inf"), 6e4
    k[:, 64:], v[:, 64:] = float("nan"), float("nan")
    support = case.support()

    out, lse = sparse_prefill(q, k, v, support, backend="triton")

    exact, exact_lse = sparse_prefill(q.double(), k[:, :64].double().nan_to_num(0, 0, 0), v[:, :64].double(), support)
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


def test_large_and_equal_logits() -> None:
    case = Case(q_len=35, start=30, budget=16)
    q, k, v = case.tensors(DTYPES[0])
    support = case.support()

    check(q * 30, k * 10, v, support)
    check(torch.zeros_like(q), k, v, support)


def test_strided_pages() -> None:
    """Rows of K and V inside wider rows that also hold something else."""
    case = Case(q_len=39, start=30, budget=14, heads=(4, 2), batch=2)
    q, k, v = case.tensors(DTYPES[0])
    page = torch.full((2, 69, 2, 40), float("nan"), dtype=q.dtype, device=DEVICE)
    page[..., :16], page[..., 16:32] = k, v
    wide_q = torch.randn(2, 4, 39, 24, device=DEVICE).to(q.dtype).transpose(1, 2)[..., :16]
    support = case.support()

    out, lse = check(wide_q, page[..., :16], page[..., 16:32], support)

    expected, expected_lse = sparse_prefill(wide_q.contiguous(), k, v, support, scale=0.4, backend="triton")
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize(
    "case", [CASES[0]._replace(batch=1, q_len=70), Case(q_block=8, q_len=70, start=7, heads=(4, 1), budget=30)], ids=str
)
def test_chunks_equal_one_pass(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = case.tensors(DTYPES[0])
    support = case.support()
    out, lse = sparse_prefill(q, k, v, support, backend="triton")
    # the prompt cut where neither tiles nor blocks end
    parts = [sparse_prefill(q[:, a:z], k, v, support.rows(a, z), backend="triton") for a, z in ((0, 13), (13, 70))]
    # the union cut to one tile at a time
    monkeypatch.setattr(_triton, "UNION_BYTES", 1)

    tiles = sparse_prefill(q, k, v, support, backend="triton")

    assert torch.equal(tiles[0], out)
    assert torch.equal(tiles[1], lse)
    for i, whole in enumerate((out, lse)):
        torch.testing.assert_close(torch.cat([p[i] for p in parts], 1), whole, rtol=2e-3, atol=2e-3)


def test_batched_equals_alone() -> None:
    case = Case(q_len=35, start=30, budget=16, batch=3, share="kv_head")
    q, k, v = case.tensors(DTYPES[0])
    support = case.support()
    out, lse = sparse_prefill(q, k, v, support, backend="triton")

    for i in range(3):
        one = slice(i, i + 1)
        alone = sparse_prefill(q[one], k[one], v[one], support.sequence(i), backend="triton")
        assert torch.equal(alone[0], out[one])
        assert torch.equal(alone[1], lse[one])


@pytest.mark.parametrize("tile", [(16, 2, 16, 4, 1), (32, 4, 32, 4, 3), (8, 4, 128, 4, 2), (2, 8, 16, 4, 2)], ids=str)
def test_any_tile_gives_the_same(tile: tuple[int, int, int, int, int]) -> None:
    case = Case(q_len=37, start=40, budget=20, kv_block=2, heads=(4, 1))
    q, k, v = case.tensors(DTYPES[0])
    support = case.support()
    expected = sparse_prefill(q, k, v, support, scale=0.4, backend="triton")

    actual = _triton.attend(q, k, v, support, scale=0.4, tile=_triton.Tile(*tile))

    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("q_block", [1, 8, 64])
def test_tiles_hold_every_head_once(group: int, q_block: int) -> None:
    tile = _triton.tile_for(group, 256, 256, q_block)

    assert 16 <= tile.tokens * tile.heads <= 128
    assert tile.tokens <= max(32 * q_block, 16)
    assert tile.heads & (tile.heads - 1) == 0
    padded = -(-group // tile.heads) * tile.heads
    assert group <= padded < 2 * group


def test_empty_batch() -> None:
    case = Case()
    q, k, v = case.tensors(DTYPES[0])
    support = case.support()
    empty = replace(support, groups=support.groups[:0], counts=support.counts[:0])

    out, lse = sparse_prefill(q[:0], k[:0], v[:0], empty, backend="triton")

    assert out.shape == (0, 37, 4, 16)
    assert lse.shape == (0, 37, 4)


@pytest.mark.parametrize("q_block", [1, 32])
def test_operator_is_sound(q_block: int) -> None:
    case = Case(q_block=q_block, q_len=35, start=30, budget=50, heads=(4, 1))
    q, k, v = case.tensors(DTYPES[0])
    s = case.support()
    tensors = (q, k, v, s.groups, s.counts, s.window_start, s.dense_len, None, None)

    torch.library.opcheck(_triton.sparse_prefill_op, (*tensors, q_block, 1, "layer", 0, 1, 30, 0.4, None))


def test_whatever_watches_sees_the_operator() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    case, seen = Case(), []
    q, k, v = case.tensors(DTYPES[0])
    support = case.support()
    with torch.no_grad():
        plain = sparse_prefill(q, k, v, support, backend="triton")
        with Watch():
            watched = sparse_prefill(q, k, v, support, backend="triton")
    assert "topmass.sparse_prefill.default" in seen
    for one, other in zip(plain, watched, strict=True):
        assert torch.equal(one, other)


def test_compiles_without_graph_breaks() -> None:
    # in a process of its own: the tests' type checks cannot be traced
    code = """
        import torch, topmass
        from topmass.ops import sparse_prefill
        from topmass.testing import random_support
        support = random_support(topmass.SupportRule(budget=topmass.Budget(tokens=9)), q_len=5, q_start=30, device=DEVICE)
        q, k = (torch.randn(1, n, 2, 16, device=DEVICE).half() for n in (5, 35))
        def attention(q, k, support):
            return sparse_prefill(q * 2, k, k, support, backend="triton")[0] + 1
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, support), attention(q, k, support))
    """
    code = textwrap.dedent(code).replace("DEVICE", repr(DEVICE))

    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(
    ("q_block", "kv_block", "page_size", "placed"),
    # groups that straddle pages cannot be placed ahead
    [(1, 1, 16, True), (1, 4, 24, True), (32, 1, 5, True), (32, 8, 16, True), (32, 4, 7, False), (8, 16, 24, False)],
)
def test_pages_equal_one_piece(
    q_block: int, kv_block: int, page_size: int, placed: bool, heads_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        q_block=q_block, kv_block=kv_block, q_len=41, start=60, budget=75, sink=2, window=5, heads=(4, 2), batch=2
    )
    q, k, v = case.tensors(DTYPES[0])
    support = case.support()
    used = -(-101 // page_size)
    # pages in any order, among others, in rows that also hold something else, with or without a gap behind each page
    drawn = torch.randperm(2 * used + 4, generator=torch.Generator().manual_seed(2))[: 2 * used]
    # the first page is nobody's
    order = drawn.add(1).view(2, used).to(DEVICE)
    count, gap = 2 * used + 5, 24 if heads_first else 0
    flat = torch.full((count, 2 * page_size * 40 + gap), float("nan"), dtype=q.dtype, device=DEVICE)
    flat = flat[:, : 2 * page_size * 40]
    pool = flat.view(count, 2, page_size, 40).transpose(1, 2) if heads_first else flat.view(count, page_size, 2, 40)
    for x, part in ((k, slice(0, 16)), (v, slice(16, 32))):
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, used * page_size - 101))
        pool[order, ..., part] = padded.unflatten(1, (used, page_size))
    # entries past the last key are not to be followed
    table = torch.nn.functional.pad(order, (0, 3), value=-(2**30)).int()
    paged = (q, pool[..., :16], pool[..., 16:32], support)
    calls, place = [], _triton.place
    monkeypatch.setattr(_triton, "place", lambda *a, **k: calls.append(1) or place(*a, **k))
    groups = support.groups.clone()

    out, lse = sparse_prefill(*paged, scale=0.4, page_table=table, backend="triton")

    assert bool(calls) == placed
    assert torch.equal(support.groups, groups)
    expected = sparse_prefill(q, k, v, support, scale=0.4, backend="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    reference = sparse_prefill(*paged, scale=0.4, page_table=table, backend="reference")
    torch.testing.assert_close(reference, sparse_prefill(q, k, v, support, scale=0.4, backend="reference"))


def test_pages_are_checked() -> None:
    case = Case(q_len=41)
    q, k, v = case.tensors(DTYPES[0])
    support = case.support()
    pool_k, pool_v = (x.view(41, 1, 2, 16) for x in (k, v))
    table = torch.arange(41, device=DEVICE)[None].int()

    with pytest.raises(ConfigError, match="past the 40 keys given"):
        sparse_prefill(q, pool_k, pool_v, support, page_table=table[:, 1:])
    with pytest.raises(ConfigError, match="q holds 1 sequences, the keys 2"):
        sparse_prefill(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), support)
    with pytest.raises(BackendUnavailableError, match="masked reads keys that lie in one piece"):
        sparse_prefill(q, pool_k, pool_v, support, page_table=table, backend="masked")


def test_supports_that_break_the_rule_stay_in_bounds() -> None:
    case = Case(q_len=33, budget=9)
    q, k, v = case.tensors(DTYPES[0])
    support = case.support()
    support = replace(support, groups=support.groups * 10**6 - 7)

    for part in (support, replace(support, granularity=replace(support.granularity, q_block=32))):
        out, _ = sparse_prefill(q, k, v, part, backend="triton")
        assert out.isfinite().all()
