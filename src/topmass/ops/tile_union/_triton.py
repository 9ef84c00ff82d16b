"""Triton tile union: selections set bits in a word per key group, then the words that are not zero are packed in order."""

from dataclasses import replace
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.core.support import Support
from topmass.ops._triton_common import INTERPRETED, cdiv, on_device
from topmass.ops.tile_union.reference import capacity
from topmass.ops.tile_union.value import TileUnion

__all__ = ["tile_union_triton", "why_not"]

# of words; longer prompts are done in chunks of tiles
WORD_BYTES = 128 * 2**20


def why_not(support: Support, *, tile: int) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    if not (support.groups.is_cuda or INTERPRETED):
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before import."
    return None


# what depends on the prompt, the chunk or the budget may not compile a kernel again
@triton.jit(
    do_not_specialize=["sg_b", "sg_s", "sg_t", "sc_b", "sc_s", "sc_t", "TILES", "N", "Q_START", "Q_END"],
    do_not_specialize_on_alignment=["groups", "counts", "dense_len"],
)
@no_type_check
def _mark_kernel(
    groups, counts, dense_len, words, sg_b, sg_s, sg_t, sc_b, sc_s, sc_t, TILES, N, Q_START, Q_END,
    S: tl.constexpr, QB: tl.constexpr, TILE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    i_b, i_s = tl.program_id(1).to(tl.int64) // S, tl.program_id(1).to(tl.int64) % S
    block = Q_START // QB + i_t
    count = tl.load(counts + i_b * sc_b + i_s * sc_s + i_t * sc_t)
    # a block whose queries all read every key needs no list
    count = tl.where(tl.minimum((block + 1) * QB, Q_END) <= tl.load(dense_len + i_t), 0, count)
    i_tile = block * QB // TILE - Q_START // TILE
    bit = tl.full([BLOCK], 1, tl.int32) << (block % (TILE // QB)).to(tl.int32)
    p_w = words + (tl.program_id(1).to(tl.int64) * TILES + i_tile) * N
    for n in range(0, count, BLOCK):
        o_n = n + tl.arange(0, BLOCK)
        b_id = tl.load(groups + i_b * sg_b + i_s * sg_s + i_t * sg_t + o_n, mask=o_n < count, other=-1)
        # never outside the words, whatever the support holds
        m_n = (b_id >= 0) & (b_id < N) & (b_id.to(tl.int64) * R < (block + 1) * QB)
        tl.atomic_or(p_w + b_id, bit, mask=m_n, sem="relaxed")


@triton.jit(
    do_not_specialize=["N", "CAP", "FIRST", "TILES", "STRIDE"],
    do_not_specialize_on_alignment=["words", "ids", "out", "counts"],
)
@no_type_check
def _pack_kernel(
    words, ids, out, counts, N, CAP, FIRST, TILES, STRIDE, TILE: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    i_t, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    # groups that begin no later than the tile's last query
    stop = tl.minimum(N, ((FIRST + i_t + 1) * TILE + R - 1) // R)
    p_w = words + (i_s * TILES + i_t) * N
    row = i_s * STRIDE + i_t
    found = tl.zeros([], tl.int32)
    for n in range(0, stop, BLOCK):
        o_n = n + tl.arange(0, BLOCK)
        b_w = tl.load(p_w + o_n, mask=o_n < stop, other=0)
        m_w = b_w != 0
        slot = found + tl.cumsum(m_w.to(tl.int32), 0) - 1
        tl.store(ids + row * CAP + slot, o_n, mask=m_w)
        tl.store(out + row * CAP + slot, b_w, mask=m_w)
        # left clean for the next chunk
        tl.store(p_w + o_n, tl.zeros_like(b_w), mask=m_w)
        found += tl.sum(m_w.to(tl.int32), 0)
    tl.store(counts + row, found)


def tile_union_triton(support: Support, *, tile: int) -> TileUnion:
    """Launch the kernels for chunks of tiles; same contract as `tile_union_reference`."""
    return _union(support.groups, support, tile)


@on_device
def _union(groups: Tensor, support: Support, tile: int) -> TileUnion:
    g, r = support.granularity.q_block, support.granularity.kv_block
    groups = groups if groups.stride(-1) == 1 else groups.contiguous()
    B, S, _, slots = groups.shape
    first, end = support.q_start // tile, support.q_start + support.q_len
    tiles, N, room = cdiv(end, tile) - first, cdiv(end, r), capacity(support, tile)
    device = groups.device
    ids, out = (torch.empty(B, S, tiles, room, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.zeros(B, S, tiles, dtype=torch.int32, device=device)
    if 0 in (B * S, tiles, slots):
        return TileUnion(ids=ids, words=out, counts=counts, tile=tile)
    step = min(max(WORD_BYTES // (4 * B * S * N), 1), tiles)
    words = torch.zeros(B * S, step, N, dtype=torch.int32, device=device)
    support = replace(support, groups=groups)
    for lo in range(0, tiles, step):
        part = support.rows(
            max((first + lo) * tile - support.q_start, 0), min((first + lo + step) * tile, end) - support.q_start
        )
        blocks, n_tiles = part.groups.shape[2], min(step, tiles - lo)
        _mark_kernel[(blocks, B * S)](
            part.groups, part.counts, part.dense_len, words, *part.groups.stride()[:3], *part.counts.stride(),
            step, N, part.q_start, part.q_start + part.q_len,
            S=S, QB=g, TILE=tile, R=r, BLOCK=512, num_warps=4,
        )  # fmt: skip
        _pack_kernel[(n_tiles, B * S)](
            words, ids[:, :, lo:], out[:, :, lo:], counts[:, :, lo:], N, room, first + lo, step, tiles,
            TILE=tile, R=r, BLOCK=2048, num_warps=4,
        )  # fmt: skip
    return TileUnion(ids=ids, words=out, counts=counts, tile=tile)
