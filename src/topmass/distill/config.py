"""What a distillation does; everything has a default."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from topmass.core.budget import Budget
from topmass.core.granularity import Granularity
from topmass.core.rule import SupportRule
from topmass.errors import ConfigError
from topmass.ops.index_topk.interface import Reduce
from topmass.ops.topk_support.interface import Pool
from topmass.selection.indexer import ScoreDtype

__all__ = ["DistillConfig", "Features"]

Features = Literal["hidden", "qk"]

LENGTH = {"cpu": 2048, "gpu": 16384}
# what one step, and one forward, take
STEP_TOKENS = {"cpu": 8192, "gpu": 65536}
FORWARD_TOKENS = {"cpu": 8192, "gpu": 32768}
ROWS = 8192  # of a longer sequence, these many are drawn for the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """How an indexer is distilled. `None` is worked out from the model and the device, see `resolve`.

    Attributes:
        length: Tokens of a training sequence. `None`: 16384 on a GPU, 2048 on a CPU, at most the model's positions.
        steps: Optimiser steps at most.
        batch: Sequences per step, over all processes. `None`: 65536 tokens on a GPU, 8192 on a CPU.
        micro_batch: Sequences per forward. `None`: 32768 tokens on a GPU, 8192 on a CPU.
        rows_fraction: Share of the rows (query blocks) of a sequence that enter the loss, drawn anew at every step; the
            estimate of loss and gradient stays unbiased. `None`: as many as 8192 queries.
        dim: Width of an index query or key.
        heads: Query heads of an indexer.
        features: What the projections read: the layer's attention input, or its own queries and keys.
        q_block: Queries that will share one selection.
        kv_block: Keys pooled into one index key.
        reduce: Score of a query block from its queries, as it will be served. `None`: `max_prob`, which is for indexers that
            are trained query by query, or `max` where `q_block` is above 1.
        pool: Target of a key group from its tokens.
        sink: Keys that will always be read at the start.
        window: Keys that will always be read up to and including the query's own.
        mask_forced: Leave sink and window out of target and student; they are read whatever the indexer says.
        score_dtype: Dtype that served scores are rounded to.
        budget: Keys per query at which held-out recall is measured and which is recommended. `None`: 1/16 of `length`.
        lr: Peak learning rate.
        warmup: Share of the steps in which the learning rate rises.
        lr_end: Learning rate of the last step, as a share of the peak.
        weight_decay: Of the projections.
        clip: Largest gradient norm of a layer.
        held_out: Sequences that are measured and not trained on.
        evaluate_every: Steps between measurements. `None`: a tenth of `steps`.
        patience: Measurements without a better held-out recall after which training stops; 0 never stops early.
        checkpoint_minutes: Minutes between checkpoints; 0 writes one after every step.
        workers: Processes that prepare sequences. `None`: none on a CPU, up to 8 on a GPU.
        seed: Seed of weights, data and rows.

    Raises:
        ConfigError: A value is out of range.
    """

    length: int | None = None
    steps: int = 600
    batch: int | None = None
    micro_batch: int | None = None
    rows_fraction: float | None = None
    dim: int = 64
    heads: int = 1
    features: Features = "hidden"
    q_block: int = 1
    kv_block: int = 1
    reduce: Reduce | None = None
    pool: Pool = "sum"
    sink: int = 0
    window: int = 1
    mask_forced: bool = True
    score_dtype: ScoreDtype = "float16"
    budget: int | None = None
    lr: float = 1e-3
    warmup: float = 0.05
    lr_end: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    held_out: int = 8
    evaluate_every: int | None = None
    patience: int = 4
    checkpoint_minutes: float = 5.0
    workers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "steps", "batch", "micro_batch", "dim", "heads", "budget", "held_out", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)!r}.")
        for name in ("weight_decay", "checkpoint_minutes", "patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)!r}.")
        for name in ("warmup", "lr_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, got {getattr(self, name)!r}.")
        if self.rows_fraction is not None and not 0 < self.rows_fraction <= 1:
            raise ConfigError(f"rows_fraction must be above 0 and at most 1, got {self.rows_fraction!r}.")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers must not be negative, got {self.workers}.")
        for name, choices in (("reduce", Reduce), ("pool", Pool), ("features", Features), ("score_dtype", ScoreDtype)):
            if getattr(self, name) not in (*get_args(choices), *([None] if name == "reduce" else [])):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, got {getattr(self, name)!r}.")
        if self.reduce == "max_prob" and self.q_block > 1:
            raise ConfigError(
                "reduce='max_prob' is for serving: an indexer is trained for it query by query; leave q_block at 1."
            )
        # complains about granularity, sink and window
        SupportRule(budget=None, granularity=self.granularity, sink=self.sink, window=self.window)

    @property
    def reducing(self) -> Reduce:
        """Score of a query block, decided."""
        return self.reduce or ("max" if self.q_block > 1 else "max_prob")

    @property
    def granularity(self) -> Granularity:
        """Unit of selection that will be served."""
        return Granularity(q_block=self.q_block, kv_block=self.kv_block)

    @property
    def rule(self) -> SupportRule:
        """Support rule at the budget that is measured; of a resolved configuration."""
        assert self.budget is not None
        return SupportRule(
            budget=Budget(tokens=self.budget), granularity=self.granularity, sink=self.sink, window=self.window
        )

    def resolve(self, *, positions: int | None, gpu: bool) -> "DistillConfig":
        """The same with every `None` replaced.

        Args:
            positions: The model's positions, if it has a limit.
            gpu: Whether the model is on one.

        Raises:
            ConfigError: The length is beyond the model's positions, or too short for sink, window and budget.
        """
        kind = "gpu" if gpu else "cpu"
        length = min(LENGTH[kind], positions or LENGTH[kind]) if self.length is None else self.length
        if positions is not None and length > positions:
            raise ConfigError(f"A length of {length} tokens is beyond the model's {positions} positions; take less.")
        forced = SupportRule(budget=None, granularity=self.granularity, sink=self.sink, window=self.window)
        least = forced.smallest_budget
        budget = max(length // 16, least) if self.budget is None else self.budget
        if length <= max(least, budget):
            raise ConfigError(
                f"Sequences of {length} tokens leave nothing to select: sink, window and one key group take {least} keys and "
                f"the budget is {budget}; take a larger length, or a smaller window or budget."
            )
        batch = max(1, STEP_TOKENS[kind] // length) if self.batch is None else self.batch
        found = replace(
            self,
            length=length,
            budget=budget,
            batch=batch,
            micro_batch=min(batch, self.micro_batch or max(1, FORWARD_TOKENS[kind] // length)),
            rows_fraction=min(1.0, ROWS / length) if self.rows_fraction is None else self.rows_fraction,
            reduce=self.reducing,
            evaluate_every=self.evaluate_every or max(1, self.steps // 10),
            workers=(8 if gpu else 0) if self.workers is None else self.workers,
        )
        _ = found.rule  # complains about a budget that is too small
        return found

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, from 0: a linear rise, then half a cosine."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - 1 - rise)
        return self.lr * (self.lr_end + (1 - self.lr_end) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
