"""Which keys each query reads: the value that selectors produce and attention kernels consume."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, Int32
from torch import Tensor

from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.core.tables import block_tables
from topmass.errors import ConfigError

__all__ = ["Support"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Keys that the queries `q_start ... q_start + q_len - 1` of each sequence read; it carries no weights.

    A query reads the sink, its window and its block's key groups; if it sees at most `dense_len` keys it reads them
    all. Rows of `groups` are unique, ascending, and outside sink and window; slots from `counts` on hold -1.

    Attributes:
        groups: Ids of the selected key groups of each query block (group `j` is keys `j * kv_block ...`).
        counts: Valid ids per row of `groups`.
        window_start: First key of each block's window.
        dense_len: Queries of a block that see at most this many keys read all of them.
        granularity: Unit of selection.
        sink: Keys always read at the start, in tokens, a multiple of `kv_block`.
        window: Nominal window in tokens, as configured.
        q_start: Position of the first query.
        q_len: Queries covered.
    """

    groups: Int32[Tensor, "batch share_heads q_blocks slots"]
    counts: Int32[Tensor, "batch share_heads q_blocks"]
    window_start: Int32[Tensor, " q_blocks"]
    dense_len: Int32[Tensor, " q_blocks"]
    granularity: Granularity
    sink: int
    window: int
    q_start: int
    q_len: int

    @classmethod
    def from_groups(
        cls,
        groups: Int[Tensor, "batch share_heads q_blocks slots"],
        counts: Int[Tensor, "batch share_heads q_blocks"],
        *,
        rule: SupportRule,
        q_start: int,
        q_len: int,
    ) -> "Support":
        """Attach the forced keys of `rule` to selected groups."""
        tables = block_tables(rule, q_start, q_len, groups.device)
        return cls(
            groups=groups.int(),
            counts=counts.int(),
            window_start=tables.window_start,
            dense_len=tables.dense_len,
            granularity=rule.granularity,
            sink=rule.sink_tokens,
            window=rule.window,
            q_start=q_start,
            q_len=q_len,
        )

    @classmethod
    def cat(cls, parts: Sequence["Support"]) -> "Support":
        """Join the supports of consecutive chunks of the same sequences.

        Raises:
            ConfigError: A chunk starts inside a query block of the chunk before it (one block, two selections), or the
                granularities differ.
        """
        first = parts[0]
        if len(kinds := {part.granularity for part in parts}) > 1:
            raise ConfigError(
                f"Supports of different granularity ({', '.join(sorted(map(str, kinds)))}) cannot be joined: join their "
                "per_query()."
            )
        end = first.q_start
        for part in parts:
            if part.q_start != end or (end % first.granularity.q_block and part is not first):
                raise ConfigError(
                    f"Supports of chunks that meet at position {part.q_start} cannot be joined: choose chunks that are "
                    f"consecutive and multiples of q_block={first.granularity.q_block}."
                )
            end = part.q_start + part.q_len
        if len(parts) == 1:
            return first
        slots = max(part.groups.shape[-1] for part in parts)
        # even a pad of nothing is a copy
        padded = [
            p.groups if (room := slots - p.groups.shape[-1]) == 0 else F.pad(p.groups, (0, room), value=-1)
            for p in parts
        ]
        return replace(
            first,
            groups=torch.cat(padded, 2),
            counts=torch.cat([p.counts for p in parts], 2),
            window_start=torch.cat([p.window_start for p in parts]),
            dense_len=torch.cat([p.dense_len for p in parts]),
            q_len=end - first.q_start,
        )

    def rows(self, start: int, stop: int) -> "Support":
        """The part for the queries `start ... stop - 1` of this support."""
        if (start, stop) == (0, self.q_len):
            return self
        g = self.granularity.q_block
        lo = (self.q_start + start) // g - self.q_start // g
        hi = -(-(self.q_start + stop) // g) - self.q_start // g
        return replace(
            self,
            groups=self.groups[:, :, lo:hi],
            counts=self.counts[:, :, lo:hi],
            window_start=self.window_start[lo:hi],
            dense_len=self.dense_len[lo:hi],
            q_start=self.q_start + start,
            q_len=stop - start,
        )

    def sequence(self, i: int) -> "Support":
        """The part for one sequence of the batch."""
        return replace(self, groups=self.groups[i : i + 1], counts=self.counts[i : i + 1])

    def per_query(self) -> "Support":
        """The same keys with a row of groups for every query."""
        block = self.block_of(self.positions())
        return replace(
            self,
            groups=self.groups.index_select(2, block),
            counts=self.counts.index_select(2, block),
            window_start=self.window_start[block],
            dense_len=self.dense_len[block],
            granularity=replace(self.granularity, q_block=1),
        )

    def positions(self) -> Int[Tensor, " q_len"]:
        """Position of every query."""
        return torch.arange(self.q_start, self.q_start + self.q_len, device=self.groups.device)

    def block_of(self, positions: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        """Index, along the `q_blocks` axis, of the block that holds each position."""
        g = self.granularity.q_block
        return positions // g - self.q_start // g

    def mask(self, kv_len: int) -> Bool[Tensor, "batch share_heads q_len kv_len"]:
        """Materialise the support: true where a query reads a key. Memory is `q_len x kv_len` per share head."""
        t = self.positions()
        block = self.block_of(t)
        r = self.granularity.kv_block
        n_groups = -(-kv_len // r)
        chosen = self.groups.new_zeros((*self.groups.shape[:3], n_groups + 1), dtype=torch.bool)
        chosen.scatter_(-1, self.groups.long().masked_fill(self.groups < 0, n_groups), True)
        far = chosen[..., :n_groups]
        if r > 1:
            far = far.repeat_interleave(r, -1)[..., :kv_len]
        if self.granularity.q_block > 1:
            far = far.index_select(2, block)
        key = torch.arange(kv_len, device=t.device)
        forced = (key < self.sink) | (key >= self.window_start[block][:, None])
        forced |= (t + 1 <= self.dense_len[block])[:, None]
        return (far | forced) & (key <= t[:, None])

    def keys_read(self) -> Int[Tensor, "batch share_heads q_len"]:
        """Achieved keys of every query."""
        t = self.positions()
        block = self.block_of(t)
        start = self.window_start[block].long()
        near = torch.where(start <= self.sink, t + 1, self.sink + (t + 1 - start))
        near = torch.minimum(near, t + 1)
        far = self.counts.long().index_select(2, block) * self.granularity.kv_block
        return torch.where(t + 1 <= self.dense_len[block], t + 1, near + far)

    def sparse_rows(self) -> Bool[Tensor, " q_len"]:
        """True for queries that the rule does not make dense."""
        t = self.positions()
        return t + 1 > self.dense_len[self.block_of(t)]
