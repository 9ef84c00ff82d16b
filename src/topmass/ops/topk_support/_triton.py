"""Triton selection: exact top-k of rows of any length, ids emitted in order. The mathematics is in README.md."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from topmass.core.rule import SupportRule
from topmass.ops._triton_common import INTERPRETED, on_device

__all__ = ["select_rows", "topk_groups_triton", "why_not"]

# programs that share the work of a launch, each with its own scratch row
PROGRAMS = 8 if INTERPRETED else 1024
SCRATCH_BYTES = 64 * 2**20
# from so many kept keys on: 16-byte reads of scores that a thread makes at a time, kept keys per warp
READS = {1024: (1, 256), 4096: (4, 512)}
# the longest list of candidates that a program sorts out in registers; longer ones are read again for every bit
MOST_KEPT = 32768
# below every key: -(2**31 - 1) is the lowest
NO_KEY = tl.constexpr(-2147483648)


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
    # signed integers in the order of the scores; sign and magnitude to two's complement, so that -0 is 0
    low = bits & -LOWEST
    return tl.where(m_n, tl.where(bits < 0, -low, low), NO_KEY)


@triton.jit
@no_type_check
def _bits(b_x):
    return b_x.to(tl.int32, bitcast=True) if b_x.dtype == tl.float32 else b_x.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
@no_type_check
def _nth_bits(p_row, w_0, w_1, o_n, j: tl.constexpr, stop, UNIT: tl.constexpr, SPAN: tl.constexpr):
    """Bits of score `j` of the SPAN scores from each of `o_n` on: out of two words, or loaded where rows are not aligned."""
    if UNIT == 1:
        bits = _bits(tl.load(p_row + o_n + j, mask=o_n + j < stop, other=0.0))
    else:
        WIDTH: tl.constexpr = 128 // SPAN
        SHIFT: tl.constexpr = j % (SPAN // 2) * WIDTH
        word = w_0 if j < SPAN // 2 else w_1
        bits = ((word << (64 - WIDTH - SHIFT)) >> (64 - WIDTH)).to(tl.int32)
    return bits


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
def _threshold(key, lo, hi, want):
    """The largest value in lo..hi that at least `want` keys reach, or lo."""
    while lo < hi:
        mid = _middle(lo, hi)
        enough = tl.sum((key >= mid).to(tl.int32), 0) >= want
        lo = tl.where(enough, mid, lo)
        hi = tl.where(enough, hi, mid - 1)
    return lo


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
def _bracket(p_row, first, stop, want, lowest, SAMPLE: tl.constexpr, LOWEST: tl.constexpr):
    """A value that almost surely at least `want` keys reach, and not many more: a high rank of an even sample."""
    step = tl.cdiv(stop - first, SAMPLE)
    i = tl.arange(0, SAMPLE)
    # one key of every step, at a scattered place
    o_n = first + i * step + ((((i * 40503) & 65535) * step) >> 16)
    m_n = o_n < stop
    key = _ordered(_bits(tl.load(p_row + o_n, mask=m_n, other=0.0)), m_n, LOWEST)
    expected = want.to(tl.float32) / step.to(tl.float32)
    rank = (expected + 3.0 * tl.sqrt(expected) + 4.0).to(tl.int32)
    return _threshold(key, lowest, tl.max(key, 0), rank)


@triton.jit
@no_type_check
def _collect(
    p_row, p_kept, value, first, stop, UNIT: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr
):  # fmt: skip
    """Store (bits, id) of the keys that are at least `value`, in order, while there is room; returns how many there are."""
    # the same comparison on unordered bits, of positive and of negative scores
    at_least = tl.maximum(value, 0)
    below = (LOWEST - 1 + tl.maximum(1 - value.to(tl.int64), 0)).to(tl.int32)
    kept = 0
    for n in range(first // 16 * 16, stop, BLOCK):
        if (n < first) | (n + BLOCK > stop):
            kept = _collect_block(p_row, p_kept, at_least, below, kept, n, first, stop, UNIT, KEPT, BLOCK, LOWEST, True)
        else:
            kept = _collect_block(p_row, p_kept, at_least, below, kept, n, first, stop, UNIT, KEPT, BLOCK, LOWEST, False)
    return kept


@triton.jit
@no_type_check
def _collect_block(
    p_row, p_kept, at_least, below, kept, n, first, stop,
    UNIT: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    # SPAN neighbours, 16 bytes of scores, share one entry of the scan, which is what costs
    SPAN: tl.constexpr = 8 if LOWEST == -0x7FFF else 4
    o_n = n + tl.arange(0, BLOCK // SPAN) * SPAN
    w_0, w_1 = o_n.to(tl.int64), o_n.to(tl.int64)
    if UNIT > 1:
        p_words = p_row.to(tl.pointer_type(tl.int64), bitcast=True) + o_n // (SPAN // 2)
        m_w = o_n < tl.cdiv(stop, UNIT) * UNIT
        w_0, w_1 = tl.load(p_words, mask=m_w, other=0), tl.load(p_words + 1, mask=m_w, other=0)
    b_sum = tl.zeros([BLOCK // SPAN], tl.int32)
    for j in tl.static_range(SPAN):
        bits = _nth_bits(p_row, w_0, w_1, o_n, j, stop, UNIT, SPAN)
        keep = (bits >= at_least) | (bits < below)
        if EDGE:
            keep &= (o_n + j >= first) & (o_n + j < stop)
        b_sum += keep.to(tl.int32)
    slot = kept + tl.cumsum(b_sum, 0) - b_sum
    kept += tl.sum(b_sum, 0)
    if kept <= KEPT:
        for j in tl.static_range(SPAN):
            bits = _nth_bits(p_row, w_0, w_1, o_n, j, stop, UNIT, SPAN)
            keep = (bits >= at_least) | (bits < below)
            if EDGE:
                keep &= (o_n + j >= first) & (o_n + j < stop)
            tl.store(p_kept + slot, (bits.to(tl.int64) << 32) | (o_n + j).to(tl.int64), mask=keep)
            slot += keep.to(tl.int32)
    return kept


@triton.jit(do_not_specialize=["ROWS", "CHUNK", "NB", "BLOCK0", "UNITS", "FIRST", "SLOTS"])
@no_type_check
def _select_kernel(
    scores, stops, wants, groups, counts, scratch,
    ROWS, CHUNK, NB, BLOCK0, UNITS, FIRST, SLOTS,
    UNIT: tl.constexpr, SAMPLE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    o_k, o_b = tl.arange(0, KEPT), tl.arange(0, BLOCK)
    lowest = tl.full([], LOWEST, tl.int32)
    p_kept = scratch + tl.program_id(0).to(tl.int64) * KEPT
    start = FIRST // UNIT * UNIT
    for row in range(tl.program_id(0), ROWS, tl.num_programs(0)):
        i_row = tl.full([], 0, tl.int64) + row
        i_nb = BLOCK0 + i_row % CHUNK
        o_row = i_row // CHUNK * NB + i_nb
        stop, want = tl.load(stops + i_nb), tl.load(wants + i_nb)
        p_row = scores + i_row * UNITS * UNIT
        p_out = groups + o_row * SLOTS
        if want >= stop - FIRST:
            for n in range(FIRST, stop, BLOCK):
                tl.store(p_out + n + o_b - FIRST, n + o_b, mask=n + o_b < stop)
        else:
            short = stop - start <= KEPT
            bracket = lowest
            kept = want
            if not short:
                bracket = _bracket(p_row, FIRST, stop, want, lowest, SAMPLE, LOWEST)
                kept = _collect(p_row, p_kept, bracket, FIRST, stop, UNIT, KEPT, BLOCK, LOWEST)
                tl.debug_barrier()
            if (kept >= want) & (kept <= KEPT):
                if short:
                    ids = start + o_k
                    key = _keys(p_row, ids, FIRST, stop, UNIT, LOWEST)
                else:
                    pair = tl.load(p_kept + o_k, mask=o_k < kept, other=0)
                    ids = (pair & 2147483647).to(tl.int32)
                    key = _ordered((pair >> 32).to(tl.int32), o_k < kept, LOWEST)
                threshold = _threshold(key, bracket, tl.max(key, 0), want)
                room = want - tl.sum((key > threshold).to(tl.int32), 0)
                _emit(p_out, key, ids, threshold, room, 0, 0)
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
                for n in range(start, stop, BLOCK):
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
    spans, keys_per_warp = next(shape for least, shape in reversed(READS.items()) if kept >= least)
    warps = 32 if kept > 16384 else min(max(kept // keys_per_warp, 4), 16)
    programs = min(B * rows, PROGRAMS, max(SCRATCH_BYTES // (8 * kept), 1))
    scratch = torch.empty(programs, kept, dtype=torch.int64, device=scores.device)
    _select_kernel[(programs,)](
        scores, stops, wants, groups, counts, scratch,
        B * rows, rows, groups.shape[1], block, stride // unit, first, groups.shape[2],
        UNIT=unit, SAMPLE=sample, KEPT=kept, BLOCK=spans * 32 * warps * 16 // scores.itemsize,
        LOWEST=-0x7FFFFFFF if scores.dtype == torch.float32 else -0x7FFF, num_warps=warps,
    )  # fmt: skip


def _sizes(candidates: int, wanted: int) -> tuple[int, int]:
    """Keys kept and keys sampled, powers of two: few are kept needlessly, and hardly ever too few or too many."""
    kept = min(max(triton.next_power_of_2(2 * wanted), 1024), MOST_KEPT)
    # 16 of the sample are expected among the wanted, if it may be that large
    sample = min(max(triton.next_power_of_2(16 * candidates // wanted + 1), 1024), 4096)
    step = triton.cdiv(candidates, sample)
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
    first, stops, wants, most, wanted = candidates(rule, q_start, q_len, scores.device)
    groups = torch.empty(B, S, NB, wanted, dtype=torch.int32, device=scores.device)
    counts = torch.zeros(B, S, NB, dtype=torch.int32, device=scores.device)
    if wanted and B:
        select_rows(
            scores.contiguous().view(B * S, NB, N), stops, wants, groups.view(B * S, NB, -1), counts.view(B * S, NB),
            first=first, most=most, wanted=wanted,
        )  # fmt: skip
    return groups, counts


def candidates(
    rule: SupportRule, q_start: int, q_len: int, device: torch.device
) -> tuple[int, Tensor, Tensor, int, int]:
    """First candidate, per block on the device their end and the ids to take, and the largest of both on the host.

    Neither the host waits for the device nor the device for the host.
    """
    t0 = rule.block_starts(q_start, q_len, device)
    first, stop = rule.candidate_range(t0)
    wants = torch.minimum(rule.groups_wanted(t0), stop - first)
    # both grow with the position
    last = rule.block_starts(q_start, q_len)[-1:]
    most = rule.candidate_range(last)[1]
    wanted = torch.minimum(rule.groups_wanted(last), most - first)
    return first, stop.int(), wants.int(), int(most.max()) if q_len else 0, int(wanted.max()) if q_len else 0
