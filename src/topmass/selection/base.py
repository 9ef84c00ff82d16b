"""What a selector sees, and what every selector has in common."""

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from topmass.core.budget import Budget, BudgetLike
from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.ops.attention_mass import pooled_mass
from topmass.ops.attention_mass.reference import average_heads, pool_mass
from topmass.ops.topk_support import topk_support
from topmass.ops.topk_support.interface import Pool

__all__ = ["AttentionInputs", "RankedSelector", "Selector"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """One full-attention layer's view of a chunk of queries; sequences of a batch have equal length and no padding.

    Attributes:
        q: Queries after norm and RoPE.
        k: Keys of positions `0 ... kv_len - 1`, after norm and RoPE.
        layer: Index of the layer in the model.
        scale: Multiplies the logits. `None` means `head_dim ** -0.5`.
        q_start: Position of the first query. `None` means the queries are the last ones.
        softcap: Soft-cap of the logits, if the model has one.
        sinks: Learned sink logit per query head, if the model has them.
        p: Attention probabilities of every head, if somebody computed them already.
        iq: Queries of the layer's indexer, one for each of `q`, after norm and RoPE, if an indexer selects.
        ik: Keys of the layer's indexer, one for each complete key group, after pooling, norm and RoPE.
        carry: Scratch that a selector may use to pass something to the next full-attention layer of the same forward.
        backend: Kernel backend of every op that selects and has one of this name; it never falls back. Ops without one
            take `"auto"`, as all do under that name.
    """

    q: Float[Tensor, "batch q_len q_heads head_dim"]
    k: Float[Tensor, "batch kv_len kv_heads head_dim"]
    layer: int = 0
    scale: float | None = None
    q_start: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " q_heads"] | None = None
    p: Float[Tensor, "batch q_heads q_len kv_len"] | None = None
    iq: Float[Tensor, "batch q_len heads dim"] | None = None
    ik: Float[Tensor, "batch groups dim"] | None = None
    carry: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"

    @property
    def start(self) -> int:
        """Position of the first query."""
        return self.k.shape[1] - self.q.shape[1] if self.q_start is None else self.q_start

    @property
    def logit_scale(self) -> float:
        """What multiplies the logits."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def mass(
        self, granularity: Granularity, pool: Pool = "sum"
    ) -> tuple[Float[Tensor, "batch share_heads q_blocks groups"], Float[Tensor, "batch share_heads q_len"]]:
        """Attention mass of the dense attention at a granularity, and what each query's row of it sums to."""
        if self.p is not None:
            mass = average_heads(self.p, share=granularity.share, kv_heads=self.k.shape[2])
            return pool_mass(mass, granularity=granularity, q_start=self.start, pool=pool), mass.sum(-1)
        return pooled_mass(
            self.q,
            self.k,
            scale=self.logit_scale,
            granularity=granularity,
            pool=pool,
            q_start=self.start,
            softcap=self.softcap,
            sinks=self.sinks,
            backend=self.backend_of("attention_mass"),
        )

    def backend_of(self, op: str) -> str:
        """The name to ask `op` for."""
        return _dispatch.known_or_auto(op, self.backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector(ABC):
    """Yields a support for every full-attention layer. Immutable: one selector may serve many models."""

    name: ClassVar[str]

    @abstractmethod
    def rule(self, layer: int) -> SupportRule | None:
        """The support rule of `layer`, or `None` if the layer stays dense."""

    @abstractmethod
    def select(self, inputs: AttentionInputs) -> Support:
        """Support of the given queries."""

    def score_heads(self, q_heads: int, kv_heads: int) -> int:
        """Rows of `kv_len` scores that selecting for one query keeps on a GPU, beside what ops cap on their own.

        Chunks of queries are sized by it; 0 if scores are nowhere kept.
        """
        return q_heads

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Everything that decides the selection, as JSON values."""

    def per_query(self) -> "Selector":
        """The same selector with one selection per query, as generated positions use it."""
        return self

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that identify the configuration."""
        text = json.dumps(self.config(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __str__(self) -> str:
        settings = {k: v for k, v in self.config().items() if k != "selector"}
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in settings.items())})"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedSelector(Selector):
    """A selector that scores key groups and takes the best by the support rule.

    Attributes:
        budget: Keys per query: tokens, `"5%"`, `"mass:0.95<=4096"`, a `Budget`, or a `Plan` with one per layer.
        granularity: Unit of selection.
        sink: Keys always kept at the start, in tokens, inside the budget.
        window: Keys always kept up to and including the query's own, in tokens, inside the budget.
        pool: Score of a key group: the sum or the maximum of its tokens' scores.
        dense_below: Queries that see at most this many keys read them all.

    Raises:
        ConfigError: A budget cannot be read, or cannot hold sink, window and one key group.
    """

    budget: BudgetLike | Plan
    granularity: Granularity = Granularity()
    sink: int = 0
    window: int = 1
    pool: Pool = "sum"
    dense_below: int = 0

    def __post_init__(self) -> None:
        if self.pool not in ("sum", "max"):
            raise ConfigError(f"pool must be 'sum' or 'max', got {self.pool!r}.")
        if isinstance(self.budget, Plan):
            # -1 is no layer: it has the plan's default
            for layer in (*self.budget.layers, -1):
                self.rule(layer)
        else:
            object.__setattr__(self, "budget", Budget.parse(self.budget))
            self.rule(0)

    def rule(self, layer: int) -> SupportRule | None:
        budget = self.budget.budget(layer) if isinstance(self.budget, Plan) else Budget.parse(self.budget)
        if budget is None:
            return None
        return SupportRule(
            budget=budget,
            granularity=self.granularity,
            sink=self.sink,
            window=self.window,
            dense_below=self.dense_below,
        )

    @abstractmethod
    def group_scores(
        self, inputs: AttentionInputs, rule: SupportRule
    ) -> tuple[
        Float[Tensor, "batch share_heads q_blocks groups"], Float[Tensor, "batch share_heads q_blocks groups"] | None
    ]:
        """Pooled scores, and pooled mass if the rule's budget needs it."""

    def select(self, inputs: AttentionInputs) -> Support:
        rule = self.rule(inputs.layer)
        assert rule is not None, "dense layers are never selected for"
        scores, mass = self.group_scores(inputs, rule)
        return topk_support(
            scores,
            rule=rule,
            q_start=inputs.start,
            q_len=inputs.q.shape[1],
            mass=mass,
            backend=inputs.backend_of("topk_support"),
        )

    def per_query(self) -> "Selector":
        return replace(self, granularity=replace(self.granularity, q_block=1))

    def config(self) -> dict[str, Any]:
        return {
            "selector": self.name,
            "budget": str(self.budget),
            "q_block": self.granularity.q_block,
            "kv_block": self.granularity.kv_block,
            "share": self.granularity.share,
            "sink": self.sink,
            "window": self.window,
            "pool": self.pool,
            "dense_below": self.dense_below,
        }
