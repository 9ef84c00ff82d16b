"""`sparsify`: run an unmodified transformers model with sparse prefill, and say what really ran."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from topmass.core.granularity import split_queries
from topmass.core.rule import SupportRule
from topmass.core.support import Support
from topmass.errors import ConfigError
from topmass.integrations.transformers._session import LayerCall, Session
from topmass.integrations.transformers.index_features import check_indexer
from topmass.integrations.transformers.index_keys import IndexKeys
from topmass.ops import _dispatch
from topmass.ops._logits import workspace
from topmass.ops.dense_prefill import dense_prefill
from topmass.ops.sparse_prefill import sparse_prefill
from topmass.selection.base import AttentionInputs, Selector
from topmass.selection.indexer import IndexerSelector

__all__ = ["Decode", "LayerReceipt", "Receipt", "Run", "sparsify"]

Decode = Literal["dense", "sparse"]
Observe = Callable[[AttentionInputs, Support, SupportRule], None]


@dataclass(slots=True, kw_only=True)
class LayerReceipt:
    """What one full-attention layer did since the block began.

    Attributes:
        layer: Layer index.
        backends: Kernel backends of the attention that ran, with the number of calls; `dense` is the model's own, or PyTorch's.
        selection: What chose the keys, `op=backend`, with the number of calls; a selector without ops leaves it empty.
        sparse_queries: Queries that read a support.
        dense_queries: Prompt queries that read every key, by reason.
        decode_queries: Generated queries, which read every key unless `decode="sparse"`.
    """

    layer: int
    backends: dict[str, int] = field(default_factory=dict)
    selection: dict[str, int] = field(default_factory=dict)
    sparse_queries: int = 0
    dense_queries: dict[str, int] = field(default_factory=dict)
    decode_queries: int = 0
    _keys: Any = 0.0

    @property
    def mode(self) -> str:
        """`"sparse"` if any query read a support, `"dense"` if none did, `"unused"` if the layer never ran."""
        if self.sparse_queries:
            return "sparse"
        return "dense" if self.dense_queries or self.decode_queries else "unused"

    @property
    def backend(self) -> str:
        """Names of the backends that ran."""
        return "+".join(self.backends) or "none"

    @property
    def selected_by(self) -> str:
        """Ops and backends that chose the keys; empty if none did."""
        return ", ".join(self.selection)

    @property
    def reason(self) -> str:
        """Why queries ran dense; empty if none did."""
        return "; ".join(f"{count} queries: {reason}" for reason, count in self.dense_queries.items())

    @property
    def keys_read_mean(self) -> float:
        """Keys read per prompt query (generated ones only count with `decode="sparse"`)."""
        queries = self.sparse_queries + sum(self.dense_queries.values())
        return float(self._keys) / queries if queries else float("nan")

    def count(
        self,
        backend: str,
        *,
        sparse: int = 0,
        dense: int = 0,
        decode: int = 0,
        reason: str = "",
        keys: Any = 0.0,
        selection: Mapping[str, str] | None = None,
        calls: int = 1,
    ) -> None:
        """Add calls, with what all of them together did."""
        for op, name in (selection or {}).items():
            self.selection[f"{op}={name}"] = self.selection.get(f"{op}={name}", 0) + 1
        self.backends[backend] = self.backends.get(backend, 0) + calls
        self.sparse_queries += sparse
        self.decode_queries += decode
        if dense:
            self.dense_queries[reason] = self.dense_queries.get(reason, 0) + dense
        self._keys = self._keys + keys


@dataclass(frozen=True, slots=True)
class Receipt:
    """What really ran, by layer index."""

    layers: Mapping[int, LayerReceipt]

    @property
    def keys_read_mean(self) -> float:
        """Keys read per prompt query, averaged over the full-attention layers."""
        means = [layer.keys_read_mean for layer in self.layers.values()]
        return sum(means) / len(means)

    @property
    def kernels(self) -> str:
        """Names of the sparse kernels that ran in any layer; `dense` if none did."""
        names = {name for layer in self.layers.values() for name in layer.backends} - {"dense"}
        return "+".join(sorted(names)) or "dense"

    def __str__(self) -> str:
        return "\n".join(map(_told, self.layers.values()))


class Run:
    """Handle of a `sparsify` block.

    Attributes:
        observe: Called with every selection: what the selector saw, its support and its rule. `None` observes nothing.
    """

    def __init__(self, selector: Selector, *, backend: str, decode: Decode, record_support: bool) -> None:
        self.selector, self.backend, self.decode, self.record_support = selector, backend, decode, record_support
        # sparse decoding reads every index key at once
        served = isinstance(selector, IndexerSelector)
        self.index = IndexKeys(selector.indexer, defer=decode == "dense") if served else None
        self._receipt = Receipt({})
        # what the model's own attention ran, and is not in the receipt yet: batch, first position, length
        self._left: Counter[tuple[int, int, int]] = Counter()
        self.observe: Observe | None = None
        self._parts: dict[int, dict[int | None, list[Support]]] = {}
        self._carry: dict[tuple[int | None, int], dict[str, Any]] = {}
        self._plans: dict[tuple[int, bool], tuple[Selector, SupportRule | None]] = {}

    @property
    def supports(self) -> dict[int, Support | list[Support]]:
        """Recorded supports by layer, the chunks of a prompt joined; for a padded batch one support per sequence.

        Raises:
            ConfigError: `record_support` is off, chunks met inside a query block, or several prompts ran without `clear`.
        """
        if not self.record_support:
            raise ConfigError("Supports were not recorded; pass record_support=True to sparsify.")
        joined = {}
        for layer, samples in self._parts.items():
            whole = samples.get(None, [])
            padded = {i: parts for i, parts in samples.items() if i is not None}
            if not padded:
                joined[layer] = _join(whole)
                continue
            # chunks before the first padding were read as one batch
            rows = range(whole[0].groups.shape[0]) if whole else sorted(padded)
            joined[layer] = [_join([p.sequence(i) for p in whole] + padded.get(i, [])) for i in rows]
        return joined

    @property
    def receipt(self) -> Receipt:
        """What each full-attention layer did so far."""
        left, self._left = self._left, Counter()
        for forward, times in left.items():
            for layer in self._receipt.layers.values():
                self._count_left(layer, forward, times)
        return self._receipt

    def _count_left(self, receipt: LayerReceipt, forward: tuple[int, int, int], times: int) -> None:
        batch, start, length = forward
        queries = batch * length * times
        if _generated(start, length):
            receipt.count("dense", decode=queries, calls=times)
            return
        rule = self._plan(receipt.layer, decode=False)[1]
        reason = "kept dense by the selector" if rule is None else _within(rule)
        receipt.count("dense", dense=queries, reason=reason, keys=times * _pairs(*forward), calls=times)

    def leaves(self, batch: int, start: int, length: int) -> bool:
        """Whether the model's own attention runs a forward, as all of its queries read every key."""
        if self.record_support:
            return False
        if not _generated(start, length):
            dense = all(rule is None or rule.reads_all(start, length) for rule in self._prompt_rules)
        else:
            dense, start = self.decode == "dense", 1
        if dense:
            self._left[batch, start, length] += 1
        return dense

    def clear(self) -> None:
        """Forget receipts and supports, before another prompt."""
        self._left.clear()
        for layer in self.receipt.layers:
            self.receipt.layers[layer].__init__(layer=layer)  # type: ignore[misc]
        self._parts.clear()

    def begin_forward(self) -> None:
        """A new forward of the model starts."""
        self._carry.clear()
        if self.index is not None:
            self.index.begin_forward()

    def __call__(self, call: LayerCall) -> Float[Tensor, "batch q_len q_heads v_dim"]:
        """Attention of one layer call."""
        receipt = self._receipt.layers[call.layer]
        b, q_len = call.q.shape[:2]
        if call.decode and self.decode == "dense":
            receipt.count("dense", decode=b * q_len)
            return _dense(call)
        selector, rule = self._plan(call.layer, decode=call.decode)
        if rule is None:
            receipt.count("dense", dense=b * q_len, reason="kept dense by the selector", keys=_causal_keys(call))
            return _dense(call)
        if not self.record_support and rule.reads_all(call.q_start, q_len):
            return self._all_keys(call, rule)
        index = None
        if self.index is not None and call.inputs is not None and call.index_rows is not None:
            index = self.index.vectors(call.layer, call.inputs, call.index_rows, call.q, call.k)
        out = None
        for lo, hi in self._spans(call, selector, rule):
            part = self._span(call, selector, rule, index, lo, hi)
            if hi - lo == q_len:
                return part
            out = part.new_empty(b, q_len, *part.shape[2:]) if out is None else out
            out[:, lo:hi] = part
        assert out is not None
        return out

    @cached_property
    def _prompt_rules(self) -> set[SupportRule | None]:
        """Rules that prompts have in any layer; asked before every forward."""
        return {self._plan(layer, decode=False)[1] for layer in self._receipt.layers}

    def _plan(self, layer: int, *, decode: bool) -> tuple[Selector, SupportRule | None]:
        key = layer, decode
        if key not in self._plans:
            selector = self.selector.per_query() if decode else self.selector
            self._plans[key] = selector, selector.rule(layer)
        return self._plans[key]

    def _all_keys(self, call: LayerCall, rule: SupportRule) -> Tensor:
        queries = call.q.shape[0] * call.q.shape[1]
        self._receipt.layers[call.layer].count("dense", dense=queries, reason=_within(rule), keys=_causal_keys(call))
        return _dense(call)

    def _spans(self, call: LayerCall, selector: Selector, rule: SupportRule) -> Iterator[tuple[int, int]]:
        """As few stretches of the queries as memory allows; those below the crossover are one of their own."""
        q_len, start = call.q.shape[1], call.q_start
        dense = 0 if self.record_support else min(max(_crossover(rule) - start, 0), q_len)
        if dense:
            yield 0, dense
        for lo, hi in split_queries(start + dense, q_len - dense, _most_queries(call, selector, rule)):
            yield dense + lo, dense + hi

    def _span(
        self,
        call: LayerCall,
        selector: Selector,
        rule: SupportRule,
        index: tuple[Tensor, Tensor] | None,
        lo: int,
        hi: int,
    ) -> Tensor:
        stop = call.q_start + hi
        part = LayerCall(
            layer=call.layer,
            q=call.q[:, lo:hi],
            k=call.k[:, :stop],
            v=call.v[:, :stop],
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            decode=call.decode,
            sample=call.sample,
        )
        if not self.record_support and rule.reads_all(part.q_start, hi - lo):
            return self._all_keys(part, rule)
        inputs = AttentionInputs(
            q=part.q,
            k=part.k,
            layer=call.layer,
            scale=call.scale,
            softcap=call.softcap,
            sinks=call.sinks,
            iq=None if index is None else index[0][:, lo:hi],
            ik=None if index is None else index[1][:, : stop // rule.granularity.kv_block],
            carry=self._carry.setdefault((call.sample, part.q_start), {}),
            backend=self.backend,
        )
        with _dispatch.record() as selection:
            support = selector.select(inputs)
        if self.observe is not None:
            self.observe(inputs, support, rule)
        if self.record_support:
            self._parts.setdefault(call.layer, {}).setdefault(call.sample, []).append(support)
        settings = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        with _dispatch.record() as attention:
            out, _ = sparse_prefill(part.q, part.k, part.v, support, **settings, backend=self.backend)
        b, rows = part.q.shape[:2]
        sparse = rule.sparse_queries(part.q_start, rows)
        keys = support.keys_read()
        self._receipt.layers[call.layer].count(
            attention["sparse_prefill"],
            sparse=sparse * b,
            dense=(rows - sparse) * b,
            reason=_within(rule),
            keys=keys.sum().double() / keys.shape[1],
            selection=selection,
        )
        return out


@contextmanager
def sparsify(
    model: nn.Module,
    selector: Selector,
    *,
    backend: str = "auto",
    decode: Decode = "dense",
    record_support: bool = False,
) -> Iterator[Run]:
    """Run the full-attention layers of `model` over the keys that `selector` chooses.

    Works on any supported transformers causal language model, also through `generate` and in any chunking of the
    prompt. Linear and sliding-window layers are left alone, and so is a forward whose queries all read every key: a short
    prompt, or a generated token. The model is restored when the block ends, also after an
    exception. An indexer has to see every position: with an `IndexerSelector`, the cache has to begin inside the block.

    Args:
        model: A model from `AutoModelForCausalLM`, or a wrapper around one; in eval mode.
        selector: Chooses the keys of every query.
        backend: Kernel backend: `"auto"`, or the name of one of the sparse attention, which never falls back. What selects
            takes the same name, likewise, where it has a backend of that name, and `"auto"` where it has none; the receipt
            names both.
        decode: Whether generated positions read all keys or a support of their own. A call with one query after a
            non-empty cache counts as generated.
        record_support: Keep every support, for `run.supports`.

    Yields:
        A `Run` with `receipt` and `supports`.

    Raises:
        UnsupportedModelError: The model, its cache or its mask is one that topmass cannot replace exactly.
        ConfigError: A setting is wrong, the indexer is another model's, or the model is already inside such a block.
        BackendUnavailableError: `backend` is unknown, or cannot run a call.

    Example:
        >>> import torch, topmass
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config).eval()
        >>> with topmass.sparsify(model, topmass.OracleSelector(budget=8)) as run:
        ...     _ = model(torch.arange(32)[None])
        >>> run.receipt.layers[0].mode, run.receipt.layers[0].keys_read_mean
        ('sparse', 7.125)
    """
    if decode not in get_args(Decode):
        raise ConfigError(f"decode must be 'dense' or 'sparse', got {decode!r}.")
    if not isinstance(selector, Selector):
        raise ConfigError(
            f"selector must be a topmass selector such as OracleSelector(budget=2048), got {type(selector).__name__}."
        )
    # a name is checked even if every query of the prompt turns out dense
    if backend != "auto":
        _dispatch.known("sparse_prefill", backend)
    run = Run(selector, backend=backend, decode=decode, record_support=record_support)
    session = Session(model, run, index=run.index, leave=run.leaves)
    if isinstance(selector, IndexerSelector):
        check_indexer(selector.indexer, session.decoder, session.layers)
    with session:
        run._receipt = Receipt({i: LayerReceipt(layer=i) for i in sorted(session.layers)})
        try:
            yield run
        finally:
            # what was read from the handle inside the block is complete, too
            run.receipt  # noqa: B018


def _join(parts: list[Support]) -> Support:
    # generated positions select per query, whatever the prompt did
    if len({part.granularity for part in parts}) > 1:
        parts = [part.per_query() for part in parts]
    try:
        return Support.cat(parts)
    except ConfigError as error:
        raise ConfigError(f"{error} Between prompts call run.clear().") from error


def _crossover(rule: SupportRule) -> int:
    # where dense attention is the faster one, and not only what the budget covers anyway; no query block is cut
    plain = rule.budget is not None and rule.budget.mass is None
    covered = rule.budget.tokens or 0 if plain and rule.budget else 0
    return rule.dense_below // rule.granularity.q_block * rule.granularity.q_block if rule.dense_below > covered else 0


def _most_queries(call: LayerCall, selector: Selector, rule: SupportRule) -> int:
    """Queries, a multiple of `q_block`, whose ids and scores fit the workspace; ops cap what they need beside."""
    b, _, q_heads, _ = call.q.shape
    kv_len, kv_heads, g = call.k.shape[1], call.k.shape[2], rule.granularity.q_block
    heads = selector.score_heads(q_heads, kv_heads)
    if heads and not call.q.is_cuda:
        # plain PyTorch keeps several copies
        heads = q_heads
    wanted = rule.groups_wanted_at(kv_len - 1)
    ids = 4 * wanted * rule.granularity.share_heads(q_heads, kv_heads) / g
    query_bytes = b * (heads * kv_len * max(call.q.element_size(), 4) + ids)
    return max(int(workspace(call.q) / query_bytes) // g if query_bytes else call.k.shape[1] // g + 1, 1) * g


def _dense(call: LayerCall) -> Tensor:
    return dense_prefill(call.q, call.k, call.v, scale=call.scale, softcap=call.softcap, sinks=call.sinks)


def _causal_keys(call: LayerCall) -> int:
    return _pairs(call.q.shape[0], call.q_start, call.q.shape[1])


def _pairs(batch: int, start: int, length: int) -> int:
    return batch * (start + 1 + start + length) * length // 2


def _generated(start: int, length: int) -> bool:
    return start > 0 and length == 1


def _told(r: LayerReceipt) -> str:
    chosen = f", selected by {r.selected_by}" if r.selection else ""
    reason = f", dense {r.reason}" if r.reason else ""
    return f"layer {r.layer}: {r.mode}, {r.backend}, {r.keys_read_mean:.1f} keys/query{chosen}{reason}"


def _within(rule: SupportRule) -> str:
    return "within the budget" if rule.dense_below == 0 else f"within the budget or dense_below={rule.dense_below}"
