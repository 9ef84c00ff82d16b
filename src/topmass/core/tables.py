"""A rule's limits for the blocks of one call, as tensors: made once for the layers of a forward."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Int32
from torch import Tensor

from topmass.core.rule import SupportRule

__all__ = ["BlockTables", "block_tables"]

# calls that are remembered: layers with other rules, chunks of a prompt
KEPT = 8


class BlockTables(NamedTuple):
    """What `SupportRule` says of each query block; not to be written to.

    Attributes:
        first: First candidate group of all blocks.
        stops: Their candidates' end.
        wants: Groups that each takes.
        window_start: First key of their windows.
        dense_len: Queries that see at most this many keys read all of them.
        most: The greatest of `stops`, on the host; 0 without blocks.
        wanted: The greatest of `wants`, likewise.
    """

    first: int
    stops: Int32[Tensor, " q_blocks"]
    wants: Int32[Tensor, " q_blocks"]
    window_start: Int32[Tensor, " q_blocks"]
    dense_len: Int32[Tensor, " q_blocks"]
    most: int
    wanted: int


_kept: dict[Any, BlockTables] = {}


def block_tables(rule: SupportRule, q_start: int, q_len: int, device: torch.device | str = "cpu") -> BlockTables:
    """Limits of the blocks that hold the queries `q_start ... q_start + q_len - 1`.

    The layers of a forward ask for the same. Neither the host waits for the device nor the device for the host.

    Example:
        >>> from topmass.core.budget import Budget
        >>> tables = block_tables(SupportRule(budget=Budget(tokens=4), window=2), 3, 3)
        >>> tables.first, tables.stops.tolist(), tables.wants.tolist(), tables.most, tables.wanted
        (0, [2, 3, 4], [2, 2, 2], 4, 2)
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if torch.compiler.is_compiling() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        # a graph keeps what it made, and would not keep these
        return _make(rule, q_start, q_len, device)
    # what one stream has queued is not there yet for another
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    key = rule, q_start, q_len, device, stream, torch.is_inference_mode_enabled()
    found = _kept.get(key)
    if found is None:
        found = _make(rule, q_start, q_len, device)
        # no stand-in of a tracer's
        if type(found.stops) is Tensor:
            if len(_kept) >= KEPT:
                _kept.pop(next(iter(_kept), None), None)
            _kept[key] = found
    return found


def _make(rule: SupportRule, q_start: int, q_len: int, device: torch.device | str) -> BlockTables:
    t0 = rule.block_starts(q_start, q_len, device)
    first, stops = rule.candidate_range(t0)
    wants = torch.minimum(rule.groups_wanted(t0), stops - first)
    last = q_start + q_len - 1
    return BlockTables(
        first=first,
        stops=stops.int(),
        wants=wants.int(),
        window_start=rule.window_start(t0).int(),
        dense_len=rule.dense_len(t0).int(),
        # both grow with the position
        most=rule.candidates_end(last) if q_len else 0,
        wanted=min(rule.groups_wanted_at(last), rule.candidates_end(last) - first) if q_len else 0,
    )
