"""Triton attention mass: log-sum-exp of the dense attention, then probabilities averaged over heads, pooled, and their sums."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.core.granularity import Granularity
from topmass.ops._triton_common import INTERPRETED, cdiv, half_on_gpu, next_power_of_2, on_device
from topmass.ops.attention_mass.reference import pool_mass

__all__ = ["TILES", "attention_mass_triton", "launch_lse", "why_not"]

LOG2E = 1.4426950408889634

# fastest of recipes/kernels/sweep.py, by padded head dimension: [queries, keys] of a tile, query heads per load of the keys, warps, pipeline stages
TILES = {
    "mass": {
        64: {"BM": 64, "BN": 128, "INNER": 0, "num_warps": 4, "num_stages": 3},
        128: {"BM": 64, "BN": 128, "INNER": 0, "num_warps": 4, "num_stages": 2},
        256: {"BM": 128, "BN": 128, "INNER": 0, "num_warps": 8, "num_stages": 2},
    },
    "lse": {
        64: {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 3},
        128: {"BM": 128, "BN": 128, "num_warps": 8, "num_stages": 2},
        256: {"BM": 128, "BN": 64, "num_warps": 8, "num_stages": 3},
    },
}
SMALL = {"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 1}


def why_not(q: Tensor, k: Tensor, lse: Tensor | None, **settings: object) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    return half_on_gpu(q, k)


def _tile(kernel: str, q: Tensor) -> dict[str, int]:
    if INTERPRETED:
        return SMALL | ({"INNER": 0} if kernel == "mass" else {})
    BD = max(next_power_of_2(q.shape[-1]), 64)
    tile = dict(TILES[kernel][BD])
    # AMD devices do not say
    room = getattr(torch.cuda.get_device_properties(q.device), "shared_memory_per_block_optin", 65536)
    # one operand stays while the other, in as many copies as there are stages, streams past
    kept, streamed = ("BN", "BM") if kernel == "mass" else ("BM", "BN")
    while tile["BM"] > 32 and 2 * BD * (tile[kept] + tile["num_stages"] * tile[streamed]) > room:
        tile["BM"] //= 2
        tile["BN"] = min(tile["BN"], 64)
    return tile


@triton.jit
@no_type_check
def _log2_logits(b_qk, scale, softcap, CAP: tl.constexpr):
    # scale and soft-cap come in units of log 2
    b_s = scale * b_qk
    if CAP:
        b_s = softcap * (2.0 * tl.sigmoid(2.0 * b_s / softcap) - 1.0)
    return b_s


@triton.jit
@no_type_check
def _positions(positions, o_m, m_m, Q_START, SCATTERED: tl.constexpr):
    o_t = Q_START + o_m
    if SCATTERED:
        o_t = tl.load(positions + o_m, mask=m_m, other=0).to(tl.int64)
    return o_t


@triton.jit(do_not_specialize=["TQ", "Q_START"])
@no_type_check
def _lse_kernel(
    q, k, positions, lse, scale, softcap,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h,
    TQ, Q_START,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CAP: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    # the longest rows first
    i_m = (tl.num_programs(1) - 1 - tl.program_id(1)).to(tl.int64)
    i_b, i_h = tl.program_id(0).to(tl.int64) // HQ, tl.program_id(0).to(tl.int64) % HQ
    o_m, o_n, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    m_m, m_d = o_m < TQ, o_d < D
    o_t = _positions(positions, o_m, m_m, Q_START, SCATTERED)
    stop = tl.max(tl.where(m_m, o_t, 0), 0) + 1
    # keys that every query of the tile sees
    common = (tl.min(tl.where(m_m, o_t, stop), 0) + 1) // BN * BN
    # [BM, BD]
    b_q = tl.load(q + i_b * sq_b + i_h * sq_h + o_m[:, None] * sq_t + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    p_k = k + i_b * sk_b + (i_h // G) * sk_h + o_d[:, None]
    for n in range(0, common, BN):
        o_k = (n + o_n).to(tl.int64)
        # [BD, BN]
        b_k = tl.load(p_k + o_k[None, :] * sk_t, mask=m_d[:, None], other=0.0)
        b_s = _log2_logits(tl.dot(b_q, b_k), scale, softcap, CAP)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_max = b_new
    for n in range(common, stop, BN):
        o_k = (n + o_n).to(tl.int64)
        b_k = tl.load(p_k + o_k[None, :] * sk_t, mask=(o_k[None, :] < stop) & m_d[:, None], other=0.0)
        b_s = _log2_logits(tl.dot(b_q, b_k), scale, softcap, CAP)
        b_s = tl.where(o_k[None, :] <= o_t[:, None], b_s, -1e30)
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_max = b_new
    tl.store(lse + (i_b * TQ + o_m) * HQ + i_h, (b_max + tl.log2(b_sum)) * 0.6931471805599453, mask=m_m)


@triton.jit(do_not_specialize=["TQ", "TK", "Q_START", "ORIGIN", "NB", "NG", "TILES_M", "TILES_N"])
@no_type_check
def _mass_kernel(
    q, k, positions, lse, mass, totals, scale, softcap,
    sq_b, sq_t, sq_h, sk_b, sk_t, sk_h,
    TQ, TK, Q_START, ORIGIN, NB, NG, TILES_M, TILES_N,
    HQ: tl.constexpr, G: tl.constexpr, S: tl.constexpr, INNER: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr, MAX: tl.constexpr,
    CAP: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    # S heads share one row of mass
    i_z = tl.program_id(1).to(tl.int64)
    i_b, i_s = i_z // (HQ // S), i_z % (HQ // S)
    # eight rows of tiles walk the keys together: their queries stay in the cache
    band = tl.program_id(0) // (8 * TILES_N) * 8
    height = tl.minimum(TILES_M - band, 8)
    i_m = (band + tl.program_id(0) % (8 * TILES_N) % height).to(tl.int64)
    i_n = (tl.program_id(0) % (8 * TILES_N) // height).to(tl.int64)
    # ORIGIN <= 0 aligns the tile to absolute positions
    o_i, o_j, o_d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    o_m, o_n = ORIGIN + i_m * BM + o_i, i_n * BN + o_j
    m_m, m_n, m_d = (o_m >= 0) & (o_m < TQ), o_n < TK, o_d < D
    o_t = _positions(positions, o_m, m_m, Q_START, SCATTERED)
    b_mass = tl.zeros([BM, BN], tl.float32)
    if i_n * BN <= tl.max(tl.where(m_m, o_t, -1), 0):
        # 64 bits up to the tile, 32 inside it
        p_q, p_k = q + i_b * sq_b + (ORIGIN + i_m * BM) * sq_t, k + i_b * sk_b + i_n * BN * sk_t
        o_q, o_k = o_i[:, None] * sq_t + o_d[None, :], o_j[None, :] * sk_t + o_d[:, None]
        p_l = lse + (i_b * TQ + o_m) * HQ
        for i in range(S // INNER):
            # [BD, BN], for INNER query heads
            b_k = tl.load(p_k + (i_s * S + i * INNER) // G * sk_h + o_k, mask=m_n[None, :] & m_d[:, None], other=0.0)
            for j in range(INNER):
                i_h = i_s * S + i * INNER + j
                # [BM, BD]
                b_q = tl.load(p_q + i_h * sq_h + o_q, mask=m_m[:, None] & m_d[None, :], other=0.0)
                b_l = tl.load(p_l + i_h, mask=m_m, other=0.0) * 1.4426950408889634
                b_mass += tl.exp2(_log2_logits(tl.dot(b_q, b_k), scale, softcap, CAP) - b_l[:, None])
        # a hidden key may have overflowed
        b_mass = tl.where((o_n[None, :] <= o_t[:, None]) & m_m[:, None] & m_n[None, :], b_mass / S, 0.0)
    row = i_z * TQ + o_m
    tl.store(totals + i_n * (tl.num_programs(1).to(tl.int64) * TQ) + row, tl.sum(b_mass, 1), mask=m_m)
    o_r, o_g = o_m, o_n
    if QB > 1:
        # [BM // QB, BN]: the mean over the queries that exist
        existing = tl.sum(tl.reshape(m_m.to(tl.float32), [BM // QB, QB]), 1)
        b_mass = tl.sum(tl.reshape(b_mass, [BM // QB, QB, BN]), 1) / tl.maximum(existing, 1.0)[:, None]
        o_r = i_m * (BM // QB) + tl.arange(0, BM // QB) + (ORIGIN + Q_START) // QB - Q_START // QB
    if KB > 1:
        # [BM // QB, BN // KB]
        b_mass = tl.reshape(b_mass, [BM // QB, BN // KB, KB])
        b_mass = tl.max(b_mass, 2) if MAX else tl.sum(b_mass, 2)
        o_g = i_n * (BN // KB) + tl.arange(0, BN // KB)
    m_r = (o_r >= 0) & (o_r < NB)
    tl.store(mass + ((i_z * NB + o_r) * NG)[:, None] + o_g[None, :], b_mass, mask=m_r[:, None] & (o_g < NG)[None, :])


@on_device
def launch_lse(
    q: Tensor, k: Tensor, *, scale: float, q_start: int, positions: Tensor | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:  # fmt: skip
    """Natural-log normaliser `[batch, q_len, q_heads]` of the dense attention, learned sinks included."""
    B, TQ, HQ, D = q.shape
    lse = torch.empty(B, TQ, HQ, dtype=torch.float32, device=q.device)
    tile = _tile("lse", q)
    if lse.numel():
        _lse_kernel[(B * HQ, cdiv(TQ, tile["BM"]))](
            q, k, q if positions is None else positions.contiguous(), lse, *_in_log2(scale, softcap), *q.stride()[:3], *k.stride()[:3],
            TQ, q_start, HQ=HQ, G=HQ // k.shape[2], D=D, BD=max(next_power_of_2(D), 16), CAP=softcap is not None,
            SCATTERED=positions is not None, **tile,
        )  # fmt: skip
    return lse if sinks is None else torch.logaddexp(lse, sinks.float().expand_as(lse))


@on_device
def attention_mass_triton(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    *,
    scale: float,
    q_start: int,
    positions: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    granularity: Granularity,
    pool: str,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; same contract as `attention_mass_reference`."""
    B, TQ, HQ, D = q.shape
    TK, HK = k.shape[1], k.shape[2]
    g, r = granularity.q_block, granularity.kv_block
    tile = _tile("mass", q)
    if g > tile["BM"] or r > tile["BN"]:
        # larger than a tile: pooled afterwards
        by_token = Granularity(share=granularity.share)
        mass, totals = attention_mass_triton(
            q, k, lse, scale=scale, q_start=q_start, positions=positions, softcap=softcap, sinks=sinks,
            granularity=by_token, pool=pool,
        )  # fmt: skip
        return pool_mass(mass, granularity=granularity, q_start=q_start, pool=pool), totals
    if lse is None:
        lse = launch_lse(q, k, scale=scale, q_start=q_start, positions=positions, softcap=softcap, sinks=sinks)
    shared = granularity.share_heads(HQ, HK)
    S, G = HQ // shared, HQ // HK
    origin = 0 if positions is not None else -(q_start % tile["BM"])
    blocks, groups = -(-(q_start + TQ) // g) - q_start // g if positions is None else TQ, TK // r
    tiles_m, tiles_n = cdiv(TQ - origin, tile["BM"]), cdiv(TK, tile["BN"])
    mass = torch.empty(B, shared, blocks, groups, dtype=torch.float32, device=q.device)
    totals = torch.empty(tiles_n, B, shared, TQ, dtype=torch.float32, device=q.device)
    if totals.numel():
        _mass_kernel[(tiles_m * tiles_n, B * shared)](
            q, k, q if positions is None else positions.contiguous(), lse.float().contiguous(), mass, totals,
            *_in_log2(scale, softcap), *q.stride()[:3], *k.stride()[:3],
            TQ, TK, q_start, origin, blocks, groups, tiles_m, tiles_n,
            HQ=HQ, G=G, S=S, D=D, BD=max(next_power_of_2(D), 16), QB=g, KB=r, MAX=pool == "max",
            CAP=softcap is not None, SCATTERED=positions is not None, **tile | {"INNER": tile["INNER"] or min(S, G)},
        )  # fmt: skip
    return mass, totals.sum(0)


def _in_log2(scale: float, softcap: float | None) -> tuple[float, float]:
    return scale * LOG2E, 1.0 if softcap is None else softcap * LOG2E
