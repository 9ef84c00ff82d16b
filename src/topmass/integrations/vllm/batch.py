"""Which rows of a batch are prompt or generated, sparse or dense: by position and request, never by the length of a call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from topmass.core.rule import SupportRule

__all__ = ["Batch", "Part", "Step", "first_sparse", "keys_read", "within"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Requests of one forward, in the order of the batch.

    Attributes:
        requests: Their ids.
        prompt_lens: Tokens of each prompt; positions from there on are generated.
    """

    requests: Sequence[str]
    prompt_lens: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Consecutive rows of one request, all of its prompt or all generated.

    Attributes:
        index: Row of the request in the batch's tables.
        request: Its id.
        rows: First row of the queries, and the row after the last.
        start: Position of the first query.
        generated: True from the end of the prompt on.
    """

    index: int
    request: str
    rows: tuple[int, int]
    start: int
    generated: bool

    @property
    def stop(self) -> int:
        """Position after the last query; keys that it sees."""
        return self.start + self.rows[1] - self.rows[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All parts of one forward.

    Attributes:
        parts: In the order of their rows.
        sparse_decode: Generated rows select too.
    """

    parts: tuple[Part, ...]
    sparse_decode: bool = False

    @classmethod
    def plan(
        cls, step: Step, query_start: Sequence[int], seq_lens: Sequence[int], *, sparse_decode: bool = False
    ) -> "Batch":
        """Parts of a batch whose request `i` has the rows `query_start[i] ... query_start[i + 1] - 1`.

        Rows of padding, past the requests of `step`, belong to no part.

        Args:
            seq_lens: Keys that the last query of each request sees.
            sparse_decode: Generated rows select too.

        Example:
            >>> step = Step(requests=["a", "b"], prompt_lens=[100, 8])
            >>> parts = Batch.plan(step, [0, 4, 7], [68, 10]).parts
            >>> [(p.request, p.rows, p.start, p.generated) for p in parts]
            [('a', (0, 4), 64, False), ('b', (4, 5), 7, False), ('b', (5, 7), 8, True)]
        """
        parts = []
        for i, (request, prompt) in enumerate(zip(step.requests, step.prompt_lens, strict=True)):
            lo, hi = query_start[i], query_start[i + 1]
            start = seq_lens[i] - (hi - lo)
            edge = min(max(lo + prompt - start, lo), hi)
            for a, z, generated in ((lo, edge, False), (edge, hi, True)):
                if a < z:
                    parts.append(Part(index=i, request=request, rows=(a, z), start=start + a - lo, generated=generated))
        return cls(parts=tuple(parts), sparse_decode=sparse_decode)

    def selects(self, part: Part, threshold: int | None) -> bool:
        """True if any row of `part` reads a support in a layer whose positions are sparse from `threshold` on."""
        return threshold is not None and part.stop > threshold and (self.sparse_decode or not part.generated)

    def split(self, threshold: int | None) -> tuple[list[Part], list[Part]]:
        """Parts that read every key, and parts with rows that select.

        Args:
            threshold: First position that is sparse, as `first_sparse` gives it. `None` keeps every row dense.
        """
        dense, sparse = [], []
        for part in self.parts:
            (sparse if self.selects(part, threshold) else dense).append(part)
        return dense, sparse


def first_sparse(rule: SupportRule | None) -> int | None:
    """First position that reads a support rather than every key; `None` if there is none.

    With one query a block all positions after it do, too.

    Example:
        >>> from topmass.core.budget import Budget
        >>> first_sparse(SupportRule(budget=Budget(tokens=64), dense_below=100))
        100
    """
    if rule is None or rule.budget is None:
        return None
    low, high = 0, 2**40
    if rule.reads_all(0, high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rule.reads_all(0, middle) else (low, middle)
    return low


def keys_read(rule: SupportRule, start: int, stop: int) -> tuple[int, int, int]:
    """Queries at `start ... stop - 1` that are sparse, those that are dense, and the keys they read.

    For a mass budget the keys are the most that it may read.
    """
    t = torch.arange(start, stop)
    t0 = t // rule.granularity.q_block * rule.granularity.q_block
    seen, near = t + 1, rule.window_start(t0)
    first, last = rule.candidate_range(t0)
    # the sink and the window may overlap
    forced = torch.where(near <= rule.sink_tokens, seen, rule.sink_tokens + seen - near).minimum(seen)
    chosen = (last - first).minimum(rule.groups_wanted(t0)) * rule.granularity.kv_block
    dense = seen <= rule.dense_len(t0)
    keys = torch.where(dense, seen, forced + chosen)
    return int((~dense).sum()), int(dense.sum()), int(keys.sum())


def within(rule: SupportRule) -> str:
    """Why a query of a layer with this rule is dense."""
    return "within the budget" if rule.dense_below == 0 else f"within the budget or dense_below={rule.dense_below}"
