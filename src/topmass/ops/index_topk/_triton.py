"""Triton index_topk: scores of a chunk of rows by tensor cores, then exact selection. The mathematics is in README.md."""

import math
from collections.abc import Iterator
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.core.tables import block_tables
from topmass.ops._triton_common import INTERPRETED, cdiv, half_on_gpu, next_power_of_2, on_device
from topmass.ops.index_topk.reference import FLOAT8
from topmass.ops.topk_support._triton import select_rows

__all__ = ["index_topk_triton", "why_not"]

# scores held at a time
WORKSPACE_BYTES = 256 * 2**20
# products of queries and heads that one query block may have
MOST_ROWS = 256
# keys that one program walks
WALK = 2048
# rows of scores are whole units
UNIT = 64


def why_not(
    iq: Tensor, ik: Tensor, *, rule: SupportRule, reduce: str | None, score_dtype: torch.dtype,
    page_table: Tensor | None = None, **settings: object,
) -> str | None:  # fmt: skip
    """Return why this kernel cannot run the call, or `None`."""
    if reason := half_on_gpu(iq, ik, also=FLOAT8):
        return reason
    if iq.dtype == FLOAT8 and not INTERPRETED and torch.cuda.get_device_capability(iq.device) < (8, 9):
        return "needs a GPU of compute capability 8.9 or newer for float8."
    if page_table is not None and page_table.device != ik.device:
        return f"needs the page table beside the keys, got one on {page_table.device} and keys on {ik.device}."
    if score_dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"rounds scores to float16, bfloat16 or float32, not {score_dtype}."
    if rule.budget is None or rule.budget.mass is not None:
        return "takes a fixed number of groups, not a mass budget or none."
    shared = _together(rule, reduce) * next_power_of_2(iq.shape[2])
    if shared > MOST_ROWS:
        return f"supports up to {MOST_ROWS} query heads in a block, got {shared}."
    return None


def _together(rule: SupportRule, reduce: str | None) -> int:
    """Rows of queries that the kernel reduces to one."""
    return 1 if reduce is None else rule.granularity.q_block


@triton.jit(
    do_not_specialize=["sp_b", "sn_b", "TQ", "CHUNK", "BLOCK0", "T0", "FIRST", "UNITS"],
    do_not_specialize_on_alignment=["pages"],
)
@no_type_check
def _scores_kernel(
    iq, ik, stops, pages, norms, scores, scale,
    sq_b, sq_t, sq_h, sk_b, sk_n, sp_b, sn_b,
    TQ, CHUNK, BLOCK0, T0, FIRST, UNITS,
    H: tl.constexpr, HP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, MAX: tl.constexpr, ROUND: tl.constexpr, LARGEST: tl.constexpr,
    UNIT: tl.constexpr, PAGE: tl.constexpr, PROB: tl.constexpr,
):  # fmt: skip
    # BM rows of queries and heads, heads innermost; BQ queries; BB whole query blocks
    BQ: tl.constexpr = BM // HP
    BB: tl.constexpr = BQ // G
    # the maximum over queries of a single head
    GREATEST: tl.constexpr = MAX and HP == 1 and G > 1
    i_n, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # the last block sees most
    stop = tl.load(stops + BLOCK0 + tl.minimum((i_m + 1) * BB, CHUNK) - 1)
    begin = FIRST // BN * BN + i_n * TILES * BN
    end = tl.minimum(begin + TILES * BN, stop)
    if begin < end:
        o_r, o_d, o_bn = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BN)
        o_bb = i_m * BB + tl.arange(0, BB)
        t0 = T0 + i_m * BQ
        o_t, o_h = (t0 + o_r // HP).to(tl.int64), o_r % HP
        m_r = (o_t >= 0) & (o_t < TQ) & (o_h < H)
        if GREATEST:
            # an absent query stands in for the nearest of its block, which changes no maximum
            o_t = tl.minimum(tl.maximum(o_t, 0), TQ - 1)
            m_r = o_h < H
        # [BM, BD]
        b_q = tl.load(iq + i_b * sq_b + (o_t * sq_t + o_h * sq_h)[:, None] + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
        p_s = scores + (i_b * CHUNK + o_bb) * UNITS * UNIT
        if PROB:
            # [BQ]
            b_norm = tl.load(norms + i_b * sn_b + i_m * BQ + tl.arange(0, BQ))
        for n in range(begin, end, BN):
            o_n = n + o_bn
            o_k = _places(pages, i_b, o_n, o_n < stop, sk_b, sk_n, sp_b, PAGE)
            # [BN, BD]; no query of the tile may read past `stop`
            b_k = tl.load(ik + o_k[:, None] + o_d[None, :], mask=(o_n < stop)[:, None] & (o_d < D)[None, :], other=0.0).to(b_q.dtype)
            m_n = o_n < UNITS * UNIT
            if G * HP == 1:
                # [BM, BN]
                # 0: tensor cores add few products of float8 before float32 takes over
                b_s = _rounded(tl.dot(b_q, tl.trans(b_k), max_num_imprecise_acc=0) * scale, ROUND, LARGEST)
                tl.store(p_s[:, None] + o_n[None, :], b_s, mask=(o_bb < CHUNK)[:, None] & m_n[None, :])
            elif GREATEST:
                # rounding and a positive scale keep the order: only the greatest is scaled and rounded
                b_s = tl.dot(b_k, tl.trans(b_q), max_num_imprecise_acc=0)
                if PROB:
                    b_s = _rounded(tl.max(tl.reshape(b_s * scale - b_norm[None, :], [BN, BB, G]), 2), ROUND, LARGEST)
                else:
                    b_s = _rounded(tl.max(tl.reshape(b_s, [BN, BB, G]), 2) * scale, ROUND, LARGEST)
                tl.store(p_s[None, :] + o_n[:, None], b_s, mask=(o_bb < CHUNK)[None, :] & m_n[:, None])
            else:
                # [BN, BM]: what is summed lies beside each other
                b_s = tl.dot(b_k, tl.trans(b_q), max_num_imprecise_acc=0) * scale
                if HP > 1:
                    b_s = tl.sum(tl.reshape(tl.where(b_s > 0, b_s, 0.0), [BN, BQ, HP]), 2)
                if PROB:
                    b_s = b_s - b_norm[None, :]
                b_s = _rounded(b_s, ROUND, LARGEST)
                if G > 1:
                    b_s = tl.reshape(b_s.to(tl.float32), [BN, BB, G])
                    o_q = t0 + tl.reshape(tl.arange(0, BQ), [BB, G])
                    m_q = (o_q >= 0) & (o_q < TQ)
                    if MAX:
                        b_s = tl.max(tl.where(m_q[None, :, :], b_s, float("-inf")), 2).to(ROUND)
                    else:
                        # absent queries score 0
                        existing = tl.maximum(tl.sum(m_q.to(tl.float32), 1), 1.0)
                        b_s = tl.div_rn(tl.sum(b_s, 2), tl.broadcast_to(existing[None, :], [BN, BB]))
                tl.store(p_s[None, :] + o_n[:, None], b_s, mask=(o_bb < CHUNK)[None, :] & m_n[:, None])


@triton.jit(
    do_not_specialize=["sp_b", "TQ", "CHUNK", "BLOCK0", "T0", "FIRST", "ROWS"],
    do_not_specialize_on_alignment=["pages"],
)
@no_type_check
def _norms_kernel(
    iq, ik, stops, pages, norms, scale,
    sq_b, sq_t, sq_h, sk_b, sk_n, sp_b,
    TQ, CHUNK, BLOCK0, T0, FIRST, ROWS,
    H: tl.constexpr, HP: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    # logarithm of the sum of a query's exponentiated scores over the part of its block's candidates that this program walks
    BQ: tl.constexpr = BM // HP
    i_n, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_q = i_m * BQ + tl.arange(0, BQ)
    # [BQ]
    b_stop = tl.load(stops + BLOCK0 + tl.minimum(o_q // G, CHUNK - 1))
    begin = FIRST // BN * BN + i_n * TILES * BN
    end = tl.minimum(begin + TILES * BN, tl.max(b_stop, 0))
    if begin < end:
        o_r, o_d = tl.arange(0, BM), tl.arange(0, BD)
        # an absent query stands in for the nearest of its block
        o_t = tl.minimum(tl.maximum((T0 + i_m * BQ + o_r // HP).to(tl.int64), 0), TQ - 1)
        o_h = o_r % HP
        b_q = tl.load(iq + i_b * sq_b + (o_t * sq_t + o_h * sq_h)[:, None] + o_d[None, :], mask=(o_h < H)[:, None] & (o_d < D)[None, :], other=0.0)
        # finite, so that a query without a candidate yet subtracts a number
        b_max = tl.full([BQ], -1e38, tl.float32)
        b_sum = tl.zeros([BQ], tl.float32)
        # tiles that are candidates of every query have no masks
        full = tl.minimum(tl.where(begin < FIRST, begin + BN, begin), end)
        last = tl.maximum(tl.minimum(tl.min(b_stop, 0), end) // BN * BN, full)
        b_max, b_sum = _summed(b_max, b_sum, b_q, ik, pages, i_b, b_stop, begin, full, end, scale, sk_b, sk_n, sp_b, FIRST, HP, D, BD, BN, PAGE, True)
        b_max, b_sum = _summed(b_max, b_sum, b_q, ik, pages, i_b, b_stop, full, last, end, scale, sk_b, sk_n, sp_b, FIRST, HP, D, BD, BN, PAGE, False)
        b_max, b_sum = _summed(b_max, b_sum, b_q, ik, pages, i_b, b_stop, last, end, end, scale, sk_b, sk_n, sp_b, FIRST, HP, D, BD, BN, PAGE, True)
        b_norm = tl.where(b_sum > 0, b_max + tl.log2(tl.maximum(b_sum, 1e-30)), float("-inf")) * 0.6931471805599453
        tl.store(norms + (i_b * tl.num_programs(0) + i_n) * ROWS + o_q, b_norm)


@triton.jit
@no_type_check
def _summed(
    b_max, b_sum, b_q, ik, pages, i_b, b_stop, begin, stop, end, scale, sk_b, sk_n, sp_b, FIRST,
    HP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    # the running maximum, in powers of two, and the sum over keys `begin` to `stop`
    o_bn, o_d = tl.arange(0, BN), tl.arange(0, BD)
    per_two = scale * 1.4426950408889634
    for n in range(begin, stop, BN):
        o_n = n + o_bn
        o_k = _places(pages, i_b, o_n, o_n < end, sk_b, sk_n, sp_b, PAGE)
        b_k = tl.load(ik + o_k[:, None] + o_d[None, :], mask=(o_n < end)[:, None] & (o_d < D)[None, :], other=0.0).to(b_q.dtype)
        if HP == 1:
            # [BQ, BN]; a row is summed by neighbouring threads
            b_s = tl.dot(b_q, tl.trans(b_k), max_num_imprecise_acc=0)
        else:
            # [BN, BM]
            b_s = tl.dot(b_k, tl.trans(b_q), max_num_imprecise_acc=0)
            b_s = tl.trans(tl.sum(tl.reshape(tl.where(b_s > 0, b_s, 0.0), [BN, b_q.shape[0] // HP, HP]), 2))
        # NaN counts for nothing, and so leaves the other scores of its query alone
        b_s = tl.maximum(b_s, float("-inf"))
        if MASKED:
            b_s = tl.where((o_n >= FIRST)[None, :] & (o_n[None, :] < b_stop[:, None]), b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * per_two)
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s * per_two - b_new[:, None]), 1)
        b_max = b_new
    return b_max, b_sum


@triton.jit
@no_type_check
def _places(pages, i_b, o_n, m_n, sk_b, sk_n, sp_b, PAGE: tl.constexpr):
    # [BN]; where the keys lie
    if PAGE:
        o_page = tl.load(pages + i_b * sp_b + o_n // PAGE, mask=m_n, other=0).to(tl.int64)
        o_k = o_page * sk_b + (o_n % PAGE).to(tl.int64) * sk_n
    else:
        o_k = i_b * sk_b + o_n.to(tl.int64) * sk_n
    return o_k


@triton.jit
@no_type_check
def _rounded(b_s, ROUND: tl.constexpr, LARGEST: tl.constexpr):
    # float16 first: what is out of range becomes infinite, and two scores are clamped at a time
    b_s = b_s.to(ROUND) if tl.float16 == ROUND else b_s
    largest = tl.full(b_s.shape, LARGEST, b_s.dtype)
    # a NaN fails the comparison and is the lowest score
    return tl.minimum(tl.where(b_s > -largest, b_s, -largest), largest).to(ROUND)


@on_device
def index_topk_triton(
    iq: Tensor, ik: Tensor, *, rule: SupportRule, q_start: int, q_len: int, reduce: str | None, score_dtype: torch.dtype,
    page_table: Tensor | None = None,
) -> Support:  # fmt: skip
    """Launch the kernels; same contract as `index_topk_reference`, but a NaN score ranks lowest and raises nothing."""
    B, H = iq.shape[0], iq.shape[2]
    page_table = page_table if page_table is None else page_table.contiguous()
    first, stops, wants, *_, wanted = block_tables(rule, q_start, q_len, iq.device)
    groups = torch.empty(B, stops.numel(), wanted, dtype=torch.int32, device=iq.device)
    counts = torch.zeros(B, stops.numel(), dtype=torch.int32, device=iq.device)
    if wanted and B:
        pooled = torch.float32 if reduce == "mean" else score_dtype
        tile = _tile(rule, H, iq.shape[3], reduce).rows
        per_block = next_power_of_2(H) * _together(rule, reduce)
        chunks = list(_chunks(rule, q_start, q_len, B, tile=tile // per_block, size=pooled.itemsize))
        # one for all: a chunk's own would be held until the next one's is there
        shapes = [(b.stop - b.start, rows, cdiv(stop, UNIT) * UNIT) for b, _, rows, stop in chunks]
        workspace = torch.empty(max(map(math.prod, shapes), default=0), dtype=pooled, device=iq.device)
        for (b, block, _, stop), shape in zip(chunks, shapes, strict=True):
            scores = workspace[: math.prod(shape)].view(shape)
            keys, pages = (ik[b], None) if page_table is None else (ik, page_table[b])
            _score(iq[b], keys, stops, scores, rule=rule, q_start=q_start, block=block, stop=stop, reduce=reduce,
                   score_dtype=score_dtype, pages=pages)  # fmt: skip
            select_rows(scores, stops, wants, groups[b], counts[b], first=first, block=block, most=stop, wanted=wanted)
    return Support.from_groups(groups[:, None], counts[:, None], rule=rule, q_start=q_start, q_len=q_len)


def _chunks(
    rule: SupportRule, q_start: int, q_len: int, batch: int, *, tile: int, size: int
) -> Iterator[tuple[slice, int, int, int]]:
    """Sequences, first block, blocks, and the end of their candidates: as much as the workspace holds of scores.

    Args:
        tile: Blocks of a tile.
        size: Bytes of a score.
    """
    g = rule.granularity.q_block
    blocks = -(-(q_start + q_len) // g) - q_start // g

    def end_of(block: int) -> int:
        return max(rule.candidates_end((q_start // g + block) * g), rule.sink_tokens // rule.granularity.kv_block + 1)

    def fit(groups: int) -> int:
        return WORKSPACE_BYTES // (cdiv(groups, UNIT) * UNIT * size)

    together = min(max(fit(end_of(blocks - 1)) // tile, 1), batch)
    for b in range(0, batch, together):
        b = slice(b, min(b + together, batch))
        end = blocks
        # from the end: later rows are longer
        while end > 0:
            stop = end_of(end - 1)
            # a launch has at most 65535 tiles of rows
            rows = min(max(fit(stop) // together, tile), 65535 * tile, end)
            end -= rows
            yield b, end, rows, stop


class _Tile(NamedTuple):
    """What one program computes at a time: `rows` products of queries and heads x `keys`."""

    rows: int
    keys: int
    warps: int
    stages: int


# fastest of recipes/kernels/sweep.py: tiles that are stored as they are, whose rows are reduced first, and that are only
# reduced to maxima, by padded head dimension
PLAIN, REDUCED = _Tile(128, 64, 4, 3), _Tile(128, 64, 8, 2)
GREATEST = {32: _Tile(256, 64, 4, 3), 64: _Tile(256, 64, 4, 3), 128: _Tile(256, 64, 8, 3)}
# the same with a logarithm taken off: four warps would spill
PROBABLE = _Tile(256, 64, 8, 3)
# of the logarithms themselves
NORMS = _Tile(128, 64, 8, 3)


def _tile(rule: SupportRule, heads: int, dim: int, reduce: str | None) -> _Tile:
    """At least the rows of one query block, and no more keys than shared memory holds."""
    together = _together(rule, reduce)
    bd = max(next_power_of_2(dim), 32)
    if reduce != "mean" and heads == 1 < together and bd in GREATEST:
        return PROBABLE if reduce == "max_prob" else GREATEST[bd]
    rows = together * next_power_of_2(heads)
    tile = PLAIN if rows == 1 else REDUCED
    return tile._replace(rows=max(rows, tile.rows), keys=tile.keys if bd <= 128 else tile.keys // 2)


def _norms_tile(heads: int, dim: int) -> _Tile:
    """At least the heads of one query, and no more keys than shared memory holds."""
    return NORMS._replace(
        rows=max(next_power_of_2(heads), NORMS.rows), keys=NORMS.keys if dim <= 128 else NORMS.keys // 2
    )


def _score(
    iq: Tensor, ik: Tensor, stops: Tensor, scores: Tensor, *, rule: SupportRule, q_start: int, block: int, stop: int,
    reduce: str | None, score_dtype: torch.dtype, pages: Tensor | None,
) -> None:  # fmt: skip
    B, TQ, H, D = iq.shape
    g = _together(rule, reduce)
    hp = next_power_of_2(H)
    first = rule.sink_tokens // rule.granularity.kv_block
    strides = *iq.stride()[:3], *ik.stride()[:2], 0 if pages is None else pages.stride(0)
    where = TQ, scores.shape[1], block, block * g - q_start % g, first
    shape = {"H": H, "HP": hp, "G": g, "D": D, "BD": max(next_power_of_2(D), 32), "PAGE": 0 if pages is None else ik.shape[1]}

    def launch(tile: _Tile) -> tuple[tuple[int, int, int], dict[str, int]]:
        rows, keys, warps, stages = tile
        grid = cdiv(stop - first // keys * keys, WALK), cdiv(scores.shape[1] * g * hp, rows), B
        return grid, {"BM": rows, "BN": keys, "TILES": WALK // keys, "num_warps": warps, "num_stages": stages}

    table, norms = stops if pages is None else pages, scores
    grid, tile = launch(_tile(rule, H, D, reduce))
    if probable := reduce == "max_prob" and g > 1:
        own_grid, own = launch(_norms_tile(H, D))
        queries = max(grid[1] * tile["BM"], own_grid[1] * own["BM"]) // hp
        parts = torch.full((B, own_grid[0], queries), float("-inf"), dtype=torch.float32, device=iq.device)
        _norms_kernel[own_grid](iq, ik, stops, table, parts, D**-0.5, *strides, *where, queries, **shape, **own)
        norms = parts.logsumexp(1)
    _scores_kernel[grid](
        iq, ik, stops, table, norms, scores, D**-0.5, *strides, norms.stride(0), *where, scores.shape[2] // UNIT,
        **shape, **tile, MAX=reduce != "mean", ROUND=getattr(tl, str(score_dtype).removeprefix("torch.")),
        LARGEST=min(torch.finfo(score_dtype).max, torch.finfo(torch.float32).max), UNIT=UNIT, PROB=probable,
    )  # fmt: skip
