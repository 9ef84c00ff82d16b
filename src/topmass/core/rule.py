"""The support rule: which keys are forced, which compete, and how many are taken, for every query position."""

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from jaxtyping import Int
from torch import Tensor

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.errors import ConfigError

__all__ = ["SupportRule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportRule:
    """The support rule of docs/concepts/support-rule.md for one layer.

    Blocks are aligned to absolute positions: block `i` holds queries `i * q_block ... (i + 1) * q_block - 1`, whatever
    chunk of the prompt is being computed.

    Attributes:
        budget: Keys per query. `None` takes no candidate at all: sink and window only.
        granularity: Unit of selection.
        sink: Keys always kept at the start, in tokens; rounded up to whole key groups.
        window: Keys always kept up to and including the query's own, in tokens. 0 only at token granularity.
        dense_below: Queries that see at most this many keys read them all.

    Raises:
        ConfigError: The budget cannot hold sink, window and one key group; the message names the smallest that can.

    Example:
        >>> rule = SupportRule(budget=Budget(tokens=8), granularity=Granularity(kv_block=2), window=3)
        >>> (
        ...     rule.smallest_budget,
        ...     rule.groups_wanted(torch.tensor([20])).item(),
        ...     rule.window_start(torch.tensor([20])).item(),
        ... )
        (6, 2, 18)
    """

    budget: Budget | None
    granularity: Granularity = Granularity()
    sink: int = 0
    window: int = 1
    dense_below: int = 0

    def __post_init__(self) -> None:
        for name in ("sink", "window", "dense_below"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.window == 0 and (self.granularity.q_block > 1 or self.granularity.kv_block > 1):
            raise ConfigError("window=0 works only with q_block=1 and kv_block=1; use window >= 1.")
        tokens = self.budget.tokens if self.budget else None
        if tokens is not None and tokens < self.smallest_budget:
            raise ConfigError(
                f"A budget of {tokens} keys cannot hold sink {self.sink_tokens}, window {self.window} and one key group "
                f"at granularity ({self.granularity}); the smallest that works is {self.smallest_budget}."
            )

    @property
    def sink_tokens(self) -> int:
        """Keys in the sink, a whole number of key groups."""
        r = self.granularity.kv_block
        return -(-self.sink // r) * r

    @property
    def smallest_budget(self) -> int:
        """Smallest budget, in tokens, that leaves room for one key group. Window 0 needs no room for itself."""
        g, r = self.granularity.q_block, self.granularity.kv_block
        return self.sink_tokens + max(self.window + g - 1, 0) + (r - 1) + r

    def per_query(self) -> "SupportRule":
        """The same rule with one selection per query, as generated positions use it."""
        return replace(self, granularity=replace(self.granularity, q_block=1))

    def block_starts(self, q_start: int, q_len: int, device: torch.device | str = "cpu") -> Int[Tensor, " q_blocks"]:
        """First position of every block that holds a query of `q_start ... q_start + q_len - 1`."""
        g = self.granularity.q_block
        return torch.arange(q_start // g, -(-(q_start + q_len) // g), device=device) * g

    def window_start(self, t0: Int[Tensor, " q_blocks"]) -> Int[Tensor, " q_blocks"]:
        """First key of the window of each block; candidates end before it."""
        if self.window == 0:
            return t0 + 1
        r = self.granularity.kv_block
        return (t0 - self.window + 1).clamp_min(0).div(r, rounding_mode="floor") * r

    def budget_tokens(self, t0: Int[Tensor, " q_blocks"]) -> Int[Tensor, " q_blocks"]:
        """Budget of each block in tokens; the cap for a mass budget, 0 without candidates."""
        if self.budget is None:
            return torch.zeros_like(t0)
        if self.budget.share is None:
            assert self.budget.tokens is not None
            return torch.full_like(t0, self.budget.tokens)
        share: Fraction = self.budget.share
        visible = (t0 + self.granularity.q_block) * share.numerator
        return (-(-visible).div(share.denominator, rounding_mode="floor")).clamp_min(self.smallest_budget)

    def groups_wanted(self, t0: Int[Tensor, " q_blocks"]) -> Int[Tensor, " q_blocks"]:
        """Key groups that each block takes if it has as many candidates; an upper limit for a mass budget."""
        if self.budget is None:
            return torch.zeros_like(t0)
        room = self.budget_tokens(t0) - (self.smallest_budget - self.granularity.kv_block)
        return room.div(self.granularity.kv_block, rounding_mode="floor")

    def dense_len(self, t0: Int[Tensor, " q_blocks"]) -> Int[Tensor, " q_blocks"]:
        """Queries of a block that see at most this many keys read all of them."""
        if self.budget is None or self.budget.mass is not None:
            return torch.full_like(t0, self.dense_below)
        return self.budget_tokens(t0).clamp_min(self.dense_below)

    def reads_all(self, q_start: int, q_len: int) -> bool:
        """Whether each of the queries `q_start ... q_start + q_len - 1` reads every key that it sees."""
        g, last = self.granularity.q_block, q_start + q_len - 1
        # a budget never grows faster than the keys: the end of the last whole block, or of what follows it, is the first short
        ends = {last, last // g * g - 1}
        return all(t + 1 <= self._dense_len_at(t // g * g) for t in ends if t >= q_start)

    def sparse_queries(self, q_start: int, q_len: int) -> int:
        """How many of the queries `q_start ... q_start + q_len - 1` read a support."""
        if self.budget is None or self.budget.share is None:
            return min(max(q_start + q_len - self._dense_len_at(0), 0), q_len)
        g = self.granularity.q_block
        t = torch.arange(q_start, q_start + q_len)
        return int((t + 1 > self.dense_len(t // g * g)).sum())

    # the same of the block of one query, without tensors: they are asked in every call of every layer

    def groups_wanted_at(self, position: int) -> int:
        """`groups_wanted` of the block that holds a query."""
        if self.budget is None:
            return 0
        room = self._budget_tokens_at(self._block_start(position)) - (self.smallest_budget - self.granularity.kv_block)
        return room // self.granularity.kv_block

    def candidates_end(self, position: int) -> int:
        """End of `candidate_range` of the block that holds a query."""
        r, t0 = self.granularity.kv_block, self._block_start(position)
        window_start = t0 + 1 if self.window == 0 else max(t0 - self.window + 1, 0)
        return max(window_start // r, self.sink_tokens // r)

    def _block_start(self, position: int) -> int:
        return position // self.granularity.q_block * self.granularity.q_block

    def _dense_len_at(self, t0: int) -> int:
        if self.budget is None or self.budget.mass is not None:
            return self.dense_below
        return max(self._budget_tokens_at(t0), self.dense_below)

    def _budget_tokens_at(self, t0: int) -> int:
        assert self.budget is not None
        if self.budget.share is None:
            assert self.budget.tokens is not None
            return self.budget.tokens
        share: Fraction = self.budget.share
        visible = (t0 + self.granularity.q_block) * share.numerator
        return max(-(-visible // share.denominator), self.smallest_budget)

    def candidate_range(self, t0: Int[Tensor, " q_blocks"]) -> tuple[int, Int[Tensor, " q_blocks"]]:
        """Ids of the candidate groups of each block, as `first` (common) and `stop` (exclusive)."""
        r = self.granularity.kv_block
        first = self.sink_tokens // r
        return first, self.window_start(t0).div(r, rounding_mode="floor").clamp_min(first)
