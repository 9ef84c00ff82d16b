"""Triton attention over a support: a tile of queries gathers the union of its selections, then reads sink and window."""

import math
from typing import NamedTuple, cast, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.core.granularity import Granularity, Share
from topmass.core.support import Support
from topmass.ops._triton_common import cdiv, half_on_gpu, next_power_of_2, on_device
from topmass.ops.tile_union import tile_union
from topmass.ops.tile_union.reference import capacity

__all__ = ["Tile", "attend", "sparse_prefill_op", "sparse_prefill_triton", "support_elsewhere", "tile_for", "why_not"]

# of unions and their words; longer prompts are done in chunks of tiles
UNION_BYTES = 256 * 2**20
# keys, warps, stages of a tile, fastest of recipes/kernels/sweep.py: 128 rows by padded head dimension, and all others
WIDE = {64: (64, 4, 3), 128: (32, 4, 4), 256: (32, 8, 4)}
NARROW = (64, 4, 2)


class Tile(NamedTuple):
    """What one program computes: `tokens` x `heads` rows, `keys` of them a step."""

    tokens: int
    heads: int
    keys: int
    warps: int
    stages: int


def why_not(q: Tensor, k: Tensor, v: Tensor, support: Support, **settings: object) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    return half_on_gpu(q, k, v) or support_elsewhere(q, support)


def support_elsewhere(q: Tensor, support: Support) -> str | None:
    """Return why a kernel cannot read the support beside `q`, or `None`."""
    if support.groups.device != q.device:
        return f"needs the support beside the queries, got queries on {q.device} and a support on {support.groups.device}."
    return None


def tile_for(group: int, head_dim: int, v_dim: int, q_block: int, *, device: torch.device | None = None) -> Tile:
    """Tile for `group` query heads that share K, V and selection: 128 rows where one word of membership allows."""
    heads = next_power_of_2(group) if group % 4 or group <= 4 else min(group & -group, 16)
    tokens = max(min(128 // heads, 32 * q_block), cdiv(16, heads))
    bd = max(next_power_of_2(max(head_dim, v_dim)), 16)
    keys, warps, stages = WIDE[bd] if tokens * heads >= 128 and bd in WIDE else NARROW
    tile = Tile(tokens=tokens, heads=heads, keys=keys, warps=warps, stages=stages)
    if device is not None and device.type == "cuda":
        room = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        while tile.keys > 16 and 2 * bd * (tile.tokens * tile.heads + 2 * tile.stages * tile.keys) > room:
            tile = tile._replace(keys=tile.keys // 2)
    return tile


@triton.jit
@no_type_check
def _rows(p_t, o_k, sk_b, sk_t, sv_b, sv_t, PAGE: tl.constexpr):
    """Where the rows of keys and values begin, by position."""
    if PAGE:
        o_page = tl.load(p_t + o_k // PAGE).to(tl.int64)
        return o_page * sk_b + (o_k % PAGE) * sk_t, o_page * sv_b + (o_k % PAGE) * sv_t
    else:  # noqa: RET505, both are compile-time
        return o_k.to(tl.int64) * sk_t, o_k.to(tl.int64) * sv_t


@triton.jit
@no_type_check
def _attend(
    b_q, b_o, b_max, b_sum, p_k, p_v, o_kr, o_vr, m_mk, o_d, o_v, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    p_k += o_kr[:, None] + o_d[None, :]
    p_v += o_vr[:, None] + o_v[None, :]
    # [BN, BD], as values: gathered rows in the layout that they lie in; rows are whole, so only padding of the head dimension
    # needs a mask
    b_k = tl.load(p_k) if D == BD else tl.load(p_k, mask=o_d[None, :] < D, other=0.0)
    # [BM, BN], in units of log 2
    if CAP:
        b_s = tl.dot(b_q, tl.trans(b_k)) * (scale / softcap)
        b_s = (2.0 * tl.sigmoid(2.0 * b_s) - 1.0) * (softcap * 1.4426950408889634)
    else:
        b_s = tl.dot(b_q, tl.trans(b_k)) * (scale * 1.4426950408889634)
    b_s = tl.where(m_mk, b_s, -1e30)
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_a = tl.exp2(b_max - b_new)
    # where a row has no key yet this is 1 for hidden keys: the first key's b_a = 0 wipes it
    b_p = tl.exp2(b_s - b_new[:, None])
    b_sum = b_sum * b_a + tl.sum(b_p, 1)
    b_v = tl.load(p_v) if DV == BDV else tl.load(p_v, mask=o_v[None, :] < DV, other=0.0)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_a[:, None])
    return b_o, b_new, b_sum


# what depends on the prompt, the chunk or the budget may not compile the kernel again
@triton.jit(
    do_not_specialize=["TQ", "Q_START", "SINK", "sl_b", "sl_t", "si_b", "si_s", "si_t", "sc_b", "sc_s", "sc_t", "sp_b"],
    do_not_specialize_on_alignment=["lse", "pages", "ids", "words", "counts", "window_start", "dense_len"],
)
@no_type_check
def _sparse_kernel(
    q, k, v, out, lse, ids, words, counts, window_start, dense_len, sinks, pages, scale, softcap,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, so_b, so_t, so_h, sl_b, sl_t,
    si_b, si_s, si_t, sc_b, sc_s, sc_t, sp_b, unit, TQ, Q_START, SINK,
    HQ: tl.constexpr, HK: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, QB: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    MEMBER: tl.constexpr, CAP: tl.constexpr, SINKS: tl.constexpr, PAGE: tl.constexpr, FAR_PAGE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = HQ // HK
    CHUNKS: tl.constexpr = (G + BH - 1) // BH
    # late tiles, which may read more, first; the heads that gather the same keys side by side
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = Q_START // BT + pid // (HK * CHUNKS)
    i_h = (pid % (HK * CHUNKS)).to(tl.int64)
    i_k, i_g = i_h // CHUNKS, (i_h % CHUNKS) * BH
    i_b = tl.program_id(1).to(tl.int64)
    o_m, o_n, o_d, o_v = tl.arange(0, BT * BH), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    # [BM]; positions, rows, heads
    pos = tile * BT + o_m // BH
    row, head = (pos - Q_START).to(tl.int64), i_g + o_m % BH
    m_t = (row >= 0) & (row < TQ)
    m_m = m_t & (head < G)
    head += i_k * G
    b_q = tl.load(
        q + i_b * sq_b + row[:, None] * sq_t + head[:, None] * sq_h + o_d[None, :],
        mask=m_m[:, None] & (o_d[None, :] < D), other=0.0,
    )  # fmt: skip
    block = tl.where(m_t, pos // QB - Q_START // QB, 0)
    b_ws = tl.load(window_start + block, mask=m_t, other=2147483647)
    m_dense = m_t & (pos < tl.load(dense_len + block, mask=m_t, other=0))
    m_far = m_t & (m_dense == 0)
    if SINKS:
        b_max = tl.load(sinks + head, mask=m_m, other=0.0).to(tl.float32) * 1.4426950408889634
        b_sum = tl.full([BT * BH], 1.0, tl.float32)
    else:
        b_max = tl.full([BT * BH], -1e30, tl.float32)
        b_sum = tl.zeros([BT * BH], tl.float32)
    b_o = tl.zeros([BT * BH, BDV], tl.float32)
    p_k, p_v, p_t = k + i_k * sk_h, v + i_k * sv_h, pages + i_b * sp_b
    if PAGE == 0:
        p_k, p_v = p_k + i_b * sk_b, p_v + i_b * sv_b

    # near: the sink, then from the first window on; all keys where a row reads all
    stop = tl.minimum((tile + 1) * BT, Q_START + TQ)
    start = tl.where(tl.max(m_dense.to(tl.int32), 0) > 0, 0, tl.minimum(tl.min(b_ws, 0), stop))
    n_sink = tl.minimum(SINK, start)
    n_near = n_sink + stop - start
    for n in tl.range(0, n_near, BN, num_stages=STAGES):
        o_p = n + o_n
        o_k = tl.where(o_p < n_sink, o_p, start + o_p - n_sink)
        m_mk = (o_k[None, :] < SINK) | (o_k[None, :] >= b_ws[:, None]) | m_dense[:, None]
        m_mk = m_mk & (o_k[None, :] <= pos[:, None]) & (o_p[None, :] < n_near)
        o_kr, o_vr = _rows(p_t, tl.where(o_p < n_near, o_k, 0), sk_b, sk_t, sv_b, sv_t, PAGE)
        b_o, b_max, b_sum = _attend(
            b_q, b_o, b_max, b_sum, p_k, p_v, o_kr, o_vr, m_mk, o_d, o_v, scale, softcap, D, DV, BD, BDV, CAP
        )

    # far: the groups that the tile's blocks selected
    LB: tl.constexpr = max(QB, BT)
    i_l = (tile * BT // LB - Q_START // LB).to(tl.int64)
    i_s = (i_k * G + i_g) // (HQ // S)
    p_i = i_b * si_b + i_s * si_s + i_l * si_t
    count = tl.load(counts + i_b * sc_b + i_s * sc_s + i_l * sc_t) * R
    count = tl.where(tl.max(m_far.to(tl.int32), 0) > 0, count, 0)
    # the row's bit of a word; none for a row that reads all keys
    b_bit = m_far.to(tl.int32) << pos // QB % (LB // QB)
    # ids are read a step ahead: copies of keys and values that waited for a load of their own step could not run ahead of it
    # behind the last key some key of the sequence is read, whose weight is 0: what lies elsewhere in a pool may be NaN
    o_none = 0
    PLACED: tl.constexpr = PAGE != FAR_PAGE
    if PLACED:
        o_none = tl.load(ids + p_i, mask=count > 0, other=0)
    # where a step holds whole groups, its places in them are those of the step before
    WHOLE: tl.constexpr = BN % R == 0
    o_i, o_r = o_n // R, o_n % R
    b_id = tl.load(ids + p_i + o_i, mask=o_n < count, other=o_none)
    if MEMBER:
        b_w = tl.load(words + p_i + o_i, mask=o_n < count, other=0)
    for n in tl.range(0, count, BN, num_stages=STAGES):
        o_p = n + o_n
        m_n = o_p < count
        o_in = o_r if WHOLE else o_p % R
        if PLACED:
            o_kr = b_id.to(tl.int64) * unit + o_in * sk_t
            o_vr = o_kr
        else:
            # never outside the keys, whatever the support holds; places were looked after before
            o_k = tl.maximum(tl.minimum(b_id * R + o_in, stop - 1), 0)
            o_kr, o_vr = _rows(p_t, o_k, sk_b, sk_t, sv_b, sv_t, FAR_PAGE)
        o_i = o_i + BN // R if WHOLE else (o_p + BN) // R
        b_id = tl.load(ids + p_i + o_i, mask=o_p + BN < count, other=o_none)
        if MEMBER:
            m_mk = (b_w[None, :] & b_bit[:, None]) != 0
            b_w = tl.load(words + p_i + o_i, mask=o_p + BN < count, other=0)
        else:
            m_mk = m_n[None, :] & m_far[:, None]
        b_o, b_max, b_sum = _attend(
            b_q, b_o, b_max, b_sum, p_k, p_v, o_kr, o_vr, m_mk, o_d, o_v, scale, softcap, D, DV, BD, BDV, CAP
        )

    empty = b_max < -1e29
    b_sum = tl.where(empty, 1.0, b_sum)
    b_o = tl.where(empty[:, None], 0.0, b_o / b_sum[:, None])
    b_lse = tl.where(empty, float("-inf"), (b_max + tl.log2(b_sum)) * 0.6931471805599453)
    p_o = out + i_b * so_b + row[:, None] * so_t + head[:, None] * so_h + o_v[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_m[:, None] & (o_v[None, :] < DV))
    tl.store(lse + i_b * sl_b + row * sl_t + head, b_lse, mask=m_m)


# what depends on the prompt, the chunk or the budget may not compile the kernel again
@triton.jit(
    do_not_specialize=["si_b", "si_s", "si_t", "sc_b", "sc_s", "sc_t", "sp_b", "LAST", "APART", "GROUP"],
    do_not_specialize_on_alignment=["ids", "counts", "pages"],
)
@no_type_check
def _place_kernel(
    ids, counts, pages, si_b, si_s, si_t, sc_b, sc_s, sc_t, sp_b, LAST, APART, GROUP,
    S: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_t, i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) // S, tl.program_id(1).to(tl.int64) % S
    count = tl.load(counts + i_b * sc_b + i_s * sc_s + i_t * sc_t)
    for n in range(0, count, BLOCK):
        o_n = n + tl.arange(0, BLOCK)
        m_n = o_n < count
        p_n = ids + i_b * si_b + i_s * si_s + i_t * si_t + o_n
        b_id = tl.load(p_n, mask=m_n, other=0)
        # never outside the keys, whatever the support holds
        b_id = tl.maximum(tl.minimum(b_id, LAST), 0)
        b_page = tl.load(pages + i_b * sp_b + b_id // PER, mask=m_n, other=0).to(tl.int32)
        tl.store(p_n, b_page * APART + b_id % PER * GROUP, mask=m_n)


def place_unit(k: Tensor, v: Tensor, kv_block: int) -> int:
    """Elements that divide the way from one page, and from one key group, to the next; 0 where ids cannot say where rows lie."""
    pages, size = k.shape[:2]
    unit = math.gcd(k.stride(0), k.stride(1) * kv_block)
    # the rows of values lie as those of keys do, and a place has 31 bits
    alike = k.stride()[:2] == v.stride()[:2]
    return unit if size % kv_block == 0 and alike and unit and pages * k.stride(0) // unit < 2**31 else 0


def place(ids: Tensor, counts: Tensor, pages: Tensor, k: Tensor, *, kv_block: int, unit: int, last: int) -> Tensor:
    """Write over ids of key groups the places of their rows in the pool `k`: once a list, rather than once a head in its loop.

    Args:
        unit: Elements that a place counts, as `place_unit` gives them.
        last: The last group that there is.
    """
    B, S, lists, _ = ids.shape
    per, apart, group = k.shape[1] // kv_block, k.stride(0) // unit, k.stride(1) * kv_block // unit
    _place_kernel[(lists, B * S)](
        ids, counts, pages, *ids.stride()[:3], *counts.stride(), pages.stride(0), last, apart, group,
        S=S, PER=per, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return ids


def sparse_prefill_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    support: Support,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    page_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel; same contract as `sparse_prefill_reference`. For whatever traces, `torch.ops.topmass.sparse_prefill`."""
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(q) is not Tensor
    if not (watched or torch.is_grad_enabled()):
        # the operator's dispatch costs the host more than the launch
        return attend(q, k, v, support, scale=scale, softcap=softcap, sinks=sinks, page_table=page_table)
    unit = support.granularity
    return sparse_prefill_op(
        q, k, v, support.groups, support.counts, support.window_start, support.dense_len, sinks, page_table,
        unit.q_block, unit.kv_block, unit.share, support.sink, support.window, support.q_start, scale, softcap,
    )  # fmt: skip


@torch.library.custom_op("topmass::sparse_prefill", mutates_args=())
def sparse_prefill_op(
    q: Tensor, k: Tensor, v: Tensor, groups: Tensor, counts: Tensor, window_start: Tensor, dense_len: Tensor,
    sinks: Tensor | None, page_table: Tensor | None, q_block: int, kv_block: int, share: str, sink: int, window: int, q_start: int,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel as an operator of PyTorch: one node of a compiled graph, without host synchronisation."""
    support = Support(
        groups=groups, counts=counts, window_start=window_start, dense_len=dense_len,
        granularity=Granularity(q_block=q_block, kv_block=kv_block, share=cast(Share, share)),
        sink=sink, window=window, q_start=q_start, q_len=q.shape[1],
    )  # fmt: skip
    return attend(q, k, v, support, scale=scale, softcap=softcap, sinks=sinks, page_table=page_table)


@sparse_prefill_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@on_device
def attend(
    q: Tensor, k: Tensor, v: Tensor, support: Support, *,
    scale: float, softcap: float | None = None, sinks: Tensor | None = None, page_table: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the kernel for chunks of tiles, of the given size if there is one."""
    B, TQ, HQ, _ = q.shape
    sinks, page_table = (x if x is None else x.contiguous() for x in (sinks, page_table))
    out = torch.empty(B, TQ, HQ, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(B, TQ, HQ, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    g = support.granularity.q_block
    group = HQ // max(k.shape[2], support.groups.shape[1])
    tile = tile or tile_for(group, q.shape[-1], v.shape[-1], g, device=q.device)
    step = TQ
    if tile.tokens > g:
        tile_bytes = 8 * B * support.groups.shape[1] * capacity(support, tile.tokens)
        step = max(UNION_BYTES // max(tile_bytes, 1), 1) * tile.tokens
    first, end = support.q_start // tile.tokens * tile.tokens, support.q_start + TQ
    for lo in range(first, end, step):
        a, z = max(lo, support.q_start) - support.q_start, min(lo + step, end) - support.q_start
        _launch(q[:, a:z], k, v, support.rows(a, z), out[:, a:z], lse[:, a:z], scale, softcap, sinks, page_table, tile)
    return out, lse


def _launch(
    q: Tensor, k: Tensor, v: Tensor, support: Support, out: Tensor, lse: Tensor,
    scale: float, softcap: float | None, sinks: Tensor | None, page_table: Tensor | None, tile: Tile,
) -> None:  # fmt: skip
    B, TQ, HQ, D = q.shape
    HK, DV = k.shape[2], v.shape[-1]
    g = support.granularity.q_block
    if tile.tokens > g:
        union = tile_union(support, tile=tile.tokens, backend="triton")
        ids, words, counts = union.ids, union.words, union.counts
    else:
        ids = support.groups if support.groups.stride(-1) == 1 else support.groups.contiguous()
        words, counts = ids, support.counts
    paged = 0 if page_table is None else k.shape[1]
    r = support.granularity.kv_block
    unit = 0 if page_table is None else place_unit(k, v, r)
    if page_table is not None and unit and ids.shape[-1]:
        # a union is ours to write over, a support is not
        ids = ids.clone() if words is ids else ids
        ids = place(ids, counts, page_table, k, kv_block=r, unit=unit, last=(support.q_start + TQ - 1) // r)
    tiles = cdiv(support.q_start + TQ, tile.tokens) - support.q_start // tile.tokens
    bd, bdv = (max(next_power_of_2(d), 16) for d in (D, DV))
    _sparse_kernel[(tiles * HK * cdiv(HQ // HK, tile.heads), B)](
        q, k, v, out, lse, ids, words, counts, support.window_start, support.dense_len, q if sinks is None else sinks,
        ids if page_table is None else page_table, scale, 1.0 if softcap is None else softcap,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *lse.stride()[:2],
        *ids.stride()[:3], *counts.stride(), 0 if page_table is None else page_table.stride(0),
        unit, TQ, support.q_start, support.sink,
        HQ=HQ, HK=HK, S=support.groups.shape[1], D=D, DV=DV, BD=bd, BDV=bdv, QB=g, R=r,
        BT=tile.tokens, BH=tile.heads, BN=tile.keys, MEMBER=tile.tokens > g, CAP=softcap is not None,
        SINKS=sinks is not None, PAGE=paged, FAR_PAGE=0 if unit else paged, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
