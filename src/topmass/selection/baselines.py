"""Baselines that an oracle and an indexer must beat, and supports that come from outside."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topmass.core.granularity import Granularity
from topmass.core.plan import Plan
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import ConfigError
from topmass.ops._logits import causal_logits
from topmass.ops.attention_mass.reference import average_heads
from topmass.ops.topk_support import pool_scores
from topmass.selection.base import AttentionInputs, RankedSelector, Selector
from topmass.selection.oracle import OracleSelector

__all__ = [
    "DenseSelector",
    "ExternalSelector",
    "PooledSelector",
    "PreviousLayerSelector",
    "RandomSelector",
    "StreamingSelector",
]

_Scores = tuple[
    Float[Tensor, "batch share_heads q_blocks groups"], Float[Tensor, "batch share_heads q_blocks groups"] | None
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSelector(Selector):
    """Every query reads every key: the unchanged model."""

    name: ClassVar[str] = "dense"

    def rule(self, layer: int) -> SupportRule | None:
        return None

    def select(self, inputs: AttentionInputs) -> Support:
        raise ConfigError("A dense selector selects nothing; its layers run dense attention.")

    def config(self) -> dict[str, Any]:
        return {"selector": self.name}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingSelector(Selector):
    """Sink and window only (StreamingLLM, arXiv 2309.17453).

    Attributes:
        sink: Keys always kept at the start, in tokens.
        window: Keys kept up to and including the query's own, in tokens.
    """

    name: ClassVar[str] = "streaming"
    sink: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        self.rule(0)

    def rule(self, layer: int) -> SupportRule | None:
        return SupportRule(budget=None, sink=self.sink, window=self.window)

    def select(self, inputs: AttentionInputs) -> Support:
        rule = self.rule(inputs.layer)
        assert rule is not None
        b, q_len = inputs.q.shape[:2]
        none = inputs.q.new_zeros(b, 1, q_len, dtype=torch.int32)
        return Support.from_groups(none[..., None][..., :0], none, rule=rule, q_start=inputs.start, q_len=q_len)

    def score_heads(self, q_heads: int, kv_heads: int) -> int:
        return 0

    def config(self) -> dict[str, Any]:
        return {"selector": self.name, "sink": self.sink, "window": self.window}


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSelector(RankedSelector):
    """Uniformly random key groups, by a counter on (seed, layer, head, block, group): any chunking draws the same.

    Attributes:
        seed: Seed of the draw.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        RankedSelector.__post_init__(self)
        _refuse_pool(self)

    def group_scores(self, inputs: AttentionInputs, rule: SupportRule) -> _Scores:
        _refuse_mass(self.name, rule)
        b, q_len, h, _ = inputs.q.shape
        device = inputs.q.device
        heads = torch.arange(self.granularity.share_heads(h, inputs.k.shape[2]), device=device)
        t0 = rule.block_starts(inputs.start, q_len, device)
        group = torch.arange((inputs.start + q_len) // self.granularity.kv_block, device=device)
        row = _mix(_mix(heads[:, None] + _mix(torch.tensor(self.seed, device=device)) + inputs.layer * 7919) + t0)
        draw = _mix(row[..., None] + group) & (2**24 - 1)
        return draw.float().expand(b, -1, -1, -1), None

    def config(self) -> dict[str, Any]:
        return {**RankedSelector.config(self), "seed": self.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledSelector(RankedSelector):
    """Training-free: the model's own queries against mean-pooled keys, logits averaged over the sharing heads."""

    name: ClassVar[str] = "pooled"
    granularity: Granularity = Granularity(kv_block=16)

    def __post_init__(self) -> None:
        RankedSelector.__post_init__(self)
        _refuse_pool(self)

    def group_scores(self, inputs: AttentionInputs, rule: SupportRule) -> _Scores:
        _refuse_mass(self.name, rule)
        r = self.granularity.kv_block
        k = inputs.k[:, : (inputs.start + inputs.q.shape[1]) // r * r]
        pooled = k.unflatten(1, (-1, r)).to(torch.promote_types(k.dtype, torch.float32)).mean(2).to(k.dtype)
        # past every group: candidates are complete before the block begins
        logits = causal_logits(inputs.q, pooled, scale=inputs.logit_scale, q_start=pooled.shape[1])
        shared = average_heads(logits, share=self.granularity.share, kv_heads=inputs.k.shape[2])
        by_query = replace(rule, granularity=replace(self.granularity, kv_block=1), budget=None)
        return pool_scores(shared, rule=by_query, q_start=inputs.start), None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousLayerSelector(OracleSelector):
    """Each layer reads the keys that the oracle found for the full-attention layer before it; the first its own.

    Raises:
        ConfigError: The budget is a plan: a support found under one layer's budget is not another's.
    """

    name: ClassVar[str] = "previous_layer"

    def __post_init__(self) -> None:
        if isinstance(self.budget, Plan):
            raise ConfigError("The previous_layer selector needs one budget for all layers, not a plan.")
        OracleSelector.__post_init__(self)

    def select(self, inputs: AttentionInputs) -> Support:
        own = OracleSelector.select(self, inputs)
        previous = inputs.carry.get("previous_support")
        inputs.carry["previous_support"] = own
        return own if previous is None else previous


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalSelector(Selector):
    """Supports computed elsewhere, by layer; layers without one stay dense.

    Attributes:
        supports: One support per layer that covers every query it will be asked for.
    """

    name: ClassVar[str] = "external"
    supports: Mapping[int, Support]

    def rule(self, layer: int) -> SupportRule | None:
        support = self.supports.get(layer)
        if support is None:
            return None
        return SupportRule(budget=None, granularity=support.granularity, sink=support.sink, window=support.window)

    def select(self, inputs: AttentionInputs) -> Support:
        support = self.supports[inputs.layer]
        start = inputs.start - support.q_start
        stop = start + inputs.q.shape[1]
        if start < 0 or stop > support.q_len:
            raise ConfigError(
                f"The support given for layer {inputs.layer} covers positions {support.q_start}.."
                f"{support.q_start + support.q_len - 1}, but {inputs.start}..{inputs.start + inputs.q.shape[1] - 1} are read."
            )
        return support.rows(start, stop)

    def score_heads(self, q_heads: int, kv_heads: int) -> int:
        return 0

    def config(self) -> dict[str, Any]:
        return {"selector": self.name, "supports": {i: _digest(s) for i, s in sorted(self.supports.items())}}


def _digest(support: Support) -> str:
    digest = hashlib.sha256(f"{support.granularity} {support.sink} {support.q_start} {support.q_len}".encode())
    for part in (support.groups, support.counts, support.window_start, support.dense_len):
        digest.update(repr(tuple(part.shape)).encode() + part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _refuse_mass(name: str, rule: SupportRule) -> None:
    if rule.budget is not None and rule.budget.mass is not None:
        raise ConfigError(f"The {name} selector knows no attention mass; give it a budget in tokens or per cent.")


def _refuse_pool(selector: RankedSelector) -> None:
    if selector.pool != "sum":
        raise ConfigError(
            f"pool has no effect on the {selector.name} selector, which scores whole groups; leave it out."
        )


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    # splitmix64's finaliser on wrapping int64; the mask makes the shift logical
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))
