"""Triton selection: exact top-k of rows of any length, ids emitted in order. The mathematics is in README.md."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.core.rule import SupportRule
from topmass.core.tables import block_tables
from topmass.ops._triton_common import INTERPRETED, cdiv, next_power_of_2, on_device

__all__ = ["select_rows", "topk_groups_triton", "why_not"]

# warps of the programs that share the work of a launch, each program with its own scratch row
WARPS = 8 if INTERPRETED else 4096
# words of 32 scores that a warp marks at a time, one for each thread
LANES = 128 if INTERPRETED else 32
SCRATCH_BYTES = 64 * 2**20
# kept keys that a warp holds in registers; registers of a thread, so that 16 warps fit
KEYS_PER_WARP, REGISTERS = 1024, 128
# long rows keep up to 4 warps busy however few are kept
CANDIDATES_PER_WARP = 8192
# the longest list of candidates that a program sorts out in registers; longer ones are read again for every bit
MOST_KEPT = 32768


def why_not(scores: Tensor, mass: Tensor | None, *, rule: SupportRule, **settings: object) -> str | None:
    """Return why this kernel cannot run the call, or `None`."""
    if not (scores.is_cuda or INTERPRETED):
        return "needs CUDA tensors, or TRITON_INTERPRET=1 set before import."
    if scores.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"supports float32, float16 and bfloat16 scores, got {scores.dtype}."
    if rule.budget is None or rule.budget.mass is not None:
        return "takes a fixed number of groups, not a mass budget or none."
    return None


@triton.jit
@no_type_check
def _ordered(bits, m_n, LOWEST: tl.constexpr):
    # signed integers in the order of the scores; sign and magnitude to two's complement, so that -0 is 0; less than all: masked
    low = bits & -LOWEST
    return tl.where(m_n, tl.where(bits < 0, -low, low), LOWEST - 1)


@triton.jit
@no_type_check
def _bits(b_x):
    return b_x.to(tl.int32, bitcast=True) if b_x.dtype == tl.float32 else b_x.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
@no_type_check
def _keys(p_row, o_n, first, stop, UNIT: tl.constexpr, LOWEST: tl.constexpr):
    # whole units, so that loads are wide; what lies between stop and its unit's end is masked afterwards
    b_x = tl.load(p_row + o_n, mask=o_n < tl.cdiv(stop, UNIT) * UNIT, other=0.0)
    return _ordered(_bits(b_x), (o_n >= first) & (o_n < stop), LOWEST)


@triton.jit
@no_type_check
def _middle(lo, hi):
    # of the two middles the upper, without overflow
    return (lo | hi) - ((lo ^ hi) >> 1)


@triton.jit
@no_type_check
def _threshold(key, lo, hi, want, LOWEST: tl.constexpr):
    """The largest value in lo..hi that at least `want` keys reach, or lo; and how many lie above it, if none lies above hi."""
    above = 0
    while lo < hi:
        mid = _middle(lo, hi)
        # the sign of a difference, where it fits, takes fewer instructions than a comparison
        b_m = (mid - 1 - key) >> 31 if LOWEST == -0x7FFF else -(key >= mid).to(tl.int32)
        reaching = -tl.sum(b_m, 0)
        enough = reaching >= want
        lo = tl.where(enough, mid, lo)
        hi = tl.where(enough, hi, mid - 1)
        above = tl.where(enough, above, reaching)
    return lo, above


@triton.jit
@no_type_check
def _reaching(p_row, value, first, stop, UNIT: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr):
    """Keys of a row that are at least `value`."""
    b_sum = tl.zeros([BLOCK], tl.int32)
    for n in range(first // UNIT * UNIT, stop, BLOCK):
        key = _keys(p_row, n + tl.arange(0, BLOCK), first, stop, UNIT, LOWEST)
        b_sum += (key >= value).to(tl.int32)
    return tl.sum(b_sum, 0)


@triton.jit
@no_type_check
def _emit(p_out, key, ids, threshold, room, slot, ties):
    """Store ids above the threshold and ties while there is room; returns what was stored and met so far."""
    above, tied = key > threshold, key == threshold
    # one scan for both: above in the upper half, ties in the lower
    both = tl.cumsum(above.to(tl.int32) * 65536 + tied.to(tl.int32), 0)
    # 32768 above, which a block of a long list may hold, set the sign
    n_above, n_tied = (both >> 16) & 65535, (both & 65535) + ties
    taken = above | (tied & (n_tied <= room))
    tl.store(p_out + slot + n_above + tl.minimum(n_tied, room) - tl.minimum(ties, room) - 1, ids, mask=taken)
    ties_here = tl.sum(tied.to(tl.int32), 0)
    slot += tl.sum(taken.to(tl.int32), 0)
    return slot, ties + ties_here


@triton.jit
@no_type_check
def _bracket(
    p_row, p_keys, first, stop, want, lowest, SAMPLE: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr
):  # fmt: skip
    """A value that almost surely at least `want` keys reach, and not many more: a high rank of an even sample."""
    step = tl.cdiv(stop - first, SAMPLE)
    for m in range(0, SAMPLE, BLOCK):
        i = m + tl.arange(0, BLOCK)
        # one key of every step, at a scattered place
        o_n = first + i * step + ((((i * 40503) & 65535) * step) >> 16)
        m_n = o_n < stop
        key = _ordered(_bits(tl.load(p_row + o_n, mask=m_n, other=0.0)), m_n, LOWEST)
        tl.store(p_keys + i, key, mask=i < SAMPLE)
    tl.debug_barrier()
    sample = tl.load(p_keys + tl.arange(0, SAMPLE))
    expected = want.to(tl.float32) / step.to(tl.float32)
    rank = (expected + 3.0 * tl.sqrt(expected) + 4.0).to(tl.int32)
    bracket, _ = _threshold(sample, lowest, tl.max(sample, 0), rank, LOWEST)
    return bracket


@triton.jit
@no_type_check
def _ones(x):
    # the form that compilers turn into one instruction
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32, bitcast=True)


@triton.jit
@no_type_check
def _interleaved(x):
    # the halves' bits in turn, the lower half's first
    t = (x ^ (x >> 8)) & 0x0000FF00
    x = x ^ t ^ (t << 8)
    t = (x ^ (x >> 4)) & 0x00F000F0
    x = x ^ t ^ (t << 4)
    t = (x ^ (x >> 2)) & 0x0C0C0C0C
    x = x ^ t ^ (t << 2)
    t = (x ^ (x >> 1)) & 0x22222222
    return x ^ t ^ (t << 1)


@triton.jit
@no_type_check
def _part(p_row, o_w, i: tl.constexpr, stop, UNIT: tl.constexpr, SIZE: tl.constexpr):
    """The i-th 16 bytes of every word's 32 scores, two 16-bit scores in an integer where rows are aligned."""
    if UNIT == 1:
        o_n = o_w[:, None] * 32 + i * (16 // SIZE) + tl.arange(0, 16 // SIZE)[None, :]
        x = _bits(tl.load(p_row + o_n, mask=o_n < stop, other=0.0))
    else:
        o_n = o_w[:, None] * (8 * SIZE) + 4 * i + tl.arange(0, 4)[None, :]
        p_int = p_row.to(tl.pointer_type(tl.int32), bitcast=True)
        x = tl.load(p_int + o_n, mask=o_n < tl.cdiv(stop, UNIT) * (UNIT * SIZE // 4), other=0)
    return x


@triton.jit
@no_type_check
def _mark(x, i: tl.constexpr, at_least, below, flip, PAIRS: tl.constexpr):
    """A bit of a word for every score of its i-th part that reaches the value; of pairs, the first ones' in the lower half."""
    o = x.shape[1] * i + tl.arange(0, x.shape[1])[None, :]
    if PAIRS:
        # bits 15 and 31 set beforehand, so that no half borrows
        reaches = ((x | -2147450880) - at_least) & (x ^ flip)
        b_m = (reaches >> (15 - o)) & (65537 << o)
    else:
        b_m = tl.where((x >= at_least) | (x < below), 1 << o, 0)
    return tl.xor_sum(b_m, 1)


@triton.jit
@no_type_check
def _collect(
    p_row, p_ids, value, first, stop, UNIT: tl.constexpr, KEPT: tl.constexpr, WORDS: tl.constexpr, LOWEST: tl.constexpr
):  # fmt: skip
    """Store the ids of the keys that are at least `value`, in order, while there is room; returns how many there are.

    A thread marks 32 neighbours in a word, so that the scan, which is what costs, has few entries.
    """
    SIZE: tl.constexpr = 2 if LOWEST == -0x7FFF else 4
    PAIRS: tl.constexpr = SIZE == 2 and UNIT > 1
    # the same comparison on unordered bits, of positive and of negative scores
    at_least = tl.maximum(value, 0)
    below = (LOWEST - 1 + tl.maximum(1 - value.to(tl.int64), 0)).to(tl.int32)
    up = value > 0
    flip = tl.where(up, -1, 0)
    if PAIRS:
        # on magnitudes of both halves: then those without a sign are taken, or those with a sign left out
        at_least = tl.where(up, value, 1 - value)
        at_least = (at_least << 16) | at_least
    kept = 0
    for w in range(first // 32, tl.cdiv(stop, 32), WORDS):
        o_w = w + tl.arange(0, WORDS)
        word = tl.zeros([WORDS], tl.int32)
        for i in tl.static_range(0, 2 * SIZE, 4):
            # all loads before their use
            x_0, x_1 = _part(p_row, o_w, i, stop, UNIT, SIZE), _part(p_row, o_w, i + 1, stop, UNIT, SIZE)
            x_2, x_3 = _part(p_row, o_w, i + 2, stop, UNIT, SIZE), _part(p_row, o_w, i + 3, stop, UNIT, SIZE)
            word ^= _mark(x_0, i, at_least, below, flip, PAIRS) ^ _mark(x_1, i + 1, at_least, below, flip, PAIRS)
            word ^= _mark(x_2, i + 2, at_least, below, flip, PAIRS) ^ _mark(x_3, i + 3, at_least, below, flip, PAIRS)
        if PAIRS:
            word = _interleaved(tl.where(up, word, ~word))
        # no bits before the first candidate and behind the last
        low, high = first - o_w * 32, stop - o_w * 32
        word = tl.where(low > 0, word & (-1 << tl.minimum(tl.maximum(low, 0), 31)), word)
        word = tl.where(high < 32, word & ((1 << tl.minimum(tl.maximum(high, 0), 31)) - 1), word)
        ones = _ones(word)
        slot = kept + tl.cumsum(ones, 0) - ones
        kept += tl.sum(ones, 0)
        if kept <= KEPT:
            for _ in range(tl.max(ones, 0)):
                others = word & (word - 1)
                tl.store(p_ids + slot, o_w * 32 + _ones((word ^ others) - 1), mask=word != 0)
                slot += 1
                word = others
    return kept


@triton.jit(do_not_specialize=["ROWS", "CHUNK", "NB", "BLOCK0", "UNITS", "FIRST", "SLOTS"])
@no_type_check
def _select_kernel(
    scores, stops, wants, groups, counts, scratch,
    ROWS, CHUNK, NB, BLOCK0, UNITS, FIRST, SLOTS,
    UNIT: tl.constexpr, SAMPLE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    o_k, o_b = tl.arange(0, KEPT), tl.arange(0, BLOCK)
    lowest = tl.full([], LOWEST, tl.int32)
    p_ids = scratch + tl.program_id(0).to(tl.int64) * (KEPT + max(KEPT, SAMPLE))
    p_keys = p_ids + KEPT
    for row in range(tl.program_id(0), ROWS, tl.num_programs(0)):
        i_row = tl.full([], 0, tl.int64) + row
        i_nb = BLOCK0 + i_row % CHUNK
        o_row = i_row // CHUNK * NB + i_nb
        stop, want = tl.load(stops + i_nb), tl.load(wants + i_nb)
        p_row = scores + i_row * UNITS * UNIT
        p_out = groups + o_row * SLOTS
        # other threads may still read what the row before left in the scratch row
        tl.debug_barrier()
        if want >= stop - FIRST:
            for n in range(FIRST, stop, BLOCK):
                tl.store(p_out + n + o_b - FIRST, n + o_b, mask=n + o_b < stop)
        else:
            bracket = lowest
            if stop - FIRST > KEPT:
                bracket = _bracket(p_row, p_keys, FIRST, stop, want, lowest, SAMPLE, BLOCK, LOWEST)
            kept = _collect(p_row, p_ids, bracket, FIRST, stop, UNIT, KEPT, WORDS, LOWEST)
            tl.debug_barrier()
            if (kept >= want) & (kept <= KEPT):
                # loops over few keys at a time: code without them outgrows the instruction cache
                for m in range(0, kept, BLOCK):
                    m_b = m + o_b < kept
                    b_ids = tl.load(p_ids + m + o_b, mask=m_b, other=0)
                    b_key = _ordered(_bits(tl.load(p_row + b_ids, mask=m_b, other=0.0)), m_b, LOWEST)
                    tl.store(p_keys + m + o_b, b_key, mask=m_b)
                tl.debug_barrier()
                key = tl.load(p_keys + o_k, mask=o_k < kept, other=LOWEST - 1)
                threshold, above = _threshold(key, bracket, tl.max(key, 0), want, LOWEST)
                slot = 0
                ties = 0
                for m in range(0, kept, BLOCK):
                    m_b = m + o_b < kept
                    b_ids = tl.load(p_ids + m + o_b, mask=m_b, other=0)
                    b_key = tl.load(p_keys + m + o_b, mask=m_b, other=LOWEST - 1)
                    slot, ties = _emit(p_out, b_key, b_ids, threshold, want - above, slot, ties)
            else:
                # rare: too few or too many reach the bracket, as when most keys are equal
                lo = tl.where(kept >= want, bracket, lowest)
                hi = tl.where(kept >= want, -lowest, bracket - 1)
                above = _reaching(p_row, lo + 1, FIRST, stop, UNIT, BLOCK, LOWEST)
                hi = tl.where(above < want, lo, hi)
                while lo < hi:
                    mid = _middle(lo, hi)
                    reaching = _reaching(p_row, mid, FIRST, stop, UNIT, BLOCK, LOWEST)
                    lo = tl.where(reaching >= want, mid, lo)
                    hi = tl.where(reaching >= want, hi, mid - 1)
                room = want - _reaching(p_row, lo + 1, FIRST, stop, UNIT, BLOCK, LOWEST)
                slot = 0
                ties = 0
                for n in range(FIRST // UNIT * UNIT, stop, BLOCK):
                    key = _keys(p_row, n + o_b, FIRST, stop, UNIT, LOWEST)
                    slot, ties = _emit(p_out, key, n + o_b, lo, room, slot, ties)
        for n in range(want, SLOTS, BLOCK):
            tl.store(p_out + n + o_b, tl.full([BLOCK], -1, tl.int32), mask=n + o_b < SLOTS)
        tl.store(counts + o_row, want)


def select_rows(
    scores: Tensor,
    stops: Tensor,
    wants: Tensor,
    groups: Tensor,
    counts: Tensor,
    *,
    first: int,
    block: int = 0,
    most: int,
    wanted: int,
) -> None:
    """Write the ids of the best candidates of each row of `scores`, `[sequences, rows, groups]`, in ascending order.

    Args:
        stops: End of the candidates of every block, int32, ascending.
        wants: Ids to take per block, int32, never more than its candidates.
        groups: Output, `[sequences, blocks, slots]`, contiguous; unused slots become -1.
        counts: Output, `[sequences, blocks]`, contiguous.
        first: First candidate.
        block: Block of the first row of `scores`.
        most: The largest of the rows' `stops`, known to the host.
        wanted: The largest of their `wants`, likewise.
    """
    B, rows, stride = scores.shape
    unit = 16 if stride % 16 == 0 and scores.data_ptr() % 16 == 0 else 1
    kept, sample = _sizes(max(most - first, 1), wanted)
    warps = max(max(kept, sample) // KEYS_PER_WARP, min((most - first) // CANDIDATES_PER_WARP, 4), 1)
    warps = min(next_power_of_2(warps), 16)
    width = kept + max(kept, sample)
    programs = min(B * rows, max(WARPS // warps, 1), max(SCRATCH_BYTES // (4 * width), 1))
    scratch = torch.empty(programs, width, dtype=torch.int32, device=scores.device)
    _select_kernel[(programs,)](
        scores, stops, wants, groups, counts, scratch,
        B * rows, rows, groups.shape[1], block, stride // unit, first, groups.shape[2],
        UNIT=unit, SAMPLE=sample, KEPT=kept, BLOCK=8 * LANES * warps, WORDS=LANES * warps,
        LOWEST=-0x7FFFFFFF if scores.dtype == torch.float32 else -0x7FFF, num_warps=warps, maxnreg=REGISTERS,
    )  # fmt: skip


def _sizes(candidates: int, wanted: int) -> tuple[int, int]:
    """Keys kept and keys sampled, powers of two: few are kept needlessly, and hardly ever too few or too many."""
    kept = min(max(next_power_of_2(2 * wanted), 1024), MOST_KEPT)
    # 12 of the sample or more are expected among the wanted, if it may be that large
    sample = min(max(next_power_of_2(12 * candidates // wanted + 1), 1024), 4096)
    step = cdiv(candidates, sample)
    expected = wanted / step
    reach = expected + 3 * expected**0.5 + 4
    while kept < MOST_KEPT and (reach + 4 * reach**0.5) * step > kept:
        kept *= 2
    return kept, sample


@on_device
def topk_groups_triton(
    scores: Tensor, mass: Tensor | None, *, rule: SupportRule, q_start: int, q_len: int, has_rest: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; same contract as `topk_groups_reference`."""
    B, S, NB, N = scores.shape
    first, stops, wants, *_, most, wanted = block_tables(rule, q_start, q_len, scores.device)
    groups = torch.empty(B, S, NB, wanted, dtype=torch.int32, device=scores.device)
    counts = torch.zeros(B, S, NB, dtype=torch.int32, device=scores.device)
    if wanted and B:
        select_rows(
            scores.contiguous().view(B * S, NB, N), stops, wants, groups.view(B * S, NB, -1), counts.view(B * S, NB),
            first=first, most=most, wanted=wanted,
        )  # fmt: skip
    return groups, counts
