"""One engine's settings, indexer and receipts, and the sparse attention of a layer over the pages; knows nothing of vLLM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topmass.core.granularity import split_queries
from topmass.core.rule import SupportRule
from topmass.errors import ConfigError
from topmass.integrations.vllm.batch import Batch, Part, Step, first_sparse
from topmass.integrations.vllm.metrics import Counters
from topmass.integrations.vllm.pages import Pages
from topmass.integrations.vllm.receipts import Receipts
from topmass.integrations.vllm.settings import Settings
from topmass.ops import _dispatch, index_topk, sparse_prefill
from topmass.ops._logits import rows_that_fit
from topmass.selection.indexer import IndexerSelector, LayerIndexer, ModelFingerprint

__all__ = ["Arithmetic", "LayerServer", "Service", "open_service"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How the model computes its attention.

    Attributes:
        scale: Multiplies the logits.
        softcap: Soft-cap of the logits, if the model has one.
        sinks: Learned sink logit per query head, if the model has them.
    """

    scale: float
    softcap: float | None = None
    sinks: Float[Tensor, " q_heads"] | None = None

    def settings(self) -> dict[str, Any]:
        """Arguments of the attention ops."""
        return {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}


def _threshold(rule: SupportRule | None) -> int | None:
    """First position that is sparse, in the prompt or generated."""
    found = [first_sparse(one) for one in (rule, rule and rule.per_query())]
    return min((t for t in found if t is not None), default=None)


class LayerServer:
    """Selects and attends for one layer.

    Attributes:
        layer: Index of the layer in the model.
        threshold: First position that is sparse; `None` for a layer that stays dense.
        vectors: Backend that completes index keys and queries.
    """

    def __init__(self, layer: int, selector: IndexerSelector, *, backend: str, receipts: Receipts) -> None:
        self.layer = layer
        self.rule = selector.rule(layer)
        self.threshold = _threshold(self.rule)
        self.indexer: LayerIndexer | None = selector.indexer.layer(layer)
        self.vectors, self._topk = (_dispatch.known_or_auto(op, backend) for op in ("index_vectors", "index_topk"))
        self._backend, self._receipts = backend, receipts

    def attend(
        self,
        q: Float[Tensor, "rows q_heads head_dim"],
        iq: Float[Tensor, "rows heads dim"],
        pages: Pages,
        page_table: Int[Tensor, " n"],
        part: Part,
        *,
        arithmetic: Arithmetic,
        finish: Callable[[Float[Tensor, "length dim"]], Float[Tensor, "groups dim"]],
    ) -> Float[Tensor, "rows q_heads head_dim"]:
        """Sparse attention of the rows of `part`, whose pages are those of `page_table`.

        Args:
            finish: Index keys of complete groups from what the pages hold of them.
        """
        assert self.rule is not None
        assert self.rule.budget is not None
        assert self.indexer is not None
        # generated tokens come one at a time
        rule = self.rule.per_query() if part.generated else self.rule
        config = self.indexer.config
        owned = page_table[: pages.count(part.stop)].long()
        ik = finish(pages.read_index(owned, part.stop, config.dim))[None]
        block = rule.granularity.q_block
        step = max(rows_that_fit(q[None], part.stop, heads=1 if q.is_cuda else None) // block, 1) * block
        out: list[Tensor] = []
        for lo, hi in split_queries(part.start, q.shape[0], step):
            stop = part.start + hi
            with _dispatch.record() as selection:
                support = index_topk(
                    iq[None, lo:hi],
                    ik[:, : stop // config.kv_block],
                    budget=self.rule.budget,
                    granularity=rule.granularity,
                    sink=rule.sink,
                    window=rule.window,
                    dense_below=rule.dense_below,
                    q_start=part.start + lo,
                    reduce=config.reduce,
                    score_dtype=getattr(torch, config.score_dtype),
                    backend=self._topk,
                )
            with _dispatch.record() as attention:
                part_out, _ = sparse_prefill(
                    q[None, lo:hi],
                    pages.keys,
                    pages.values,
                    support,
                    page_table=owned[None, : pages.count(stop)],
                    backend=self._backend,
                    **arithmetic.settings(),
                )
            out.append(part_out[0])
            self._receipts.ran(attention["sparse_prefill"], selection)
        return out[0] if len(out) == 1 else torch.cat(out)


class Service:
    """What all layers of one engine share.

    Attributes:
        settings: What the user set.
        indexer: The indexer, on the CPU.
        selector: It, with a budget.
        receipts: What ran.
        step: Requests of the forward that is being prepared; `None` while vLLM measures or captures.
        guarded: A batch in which one token of a prompt selects is kept out of the CUDA graphs of decoding.
        threshold: First position that is sparse in any layer; asked in every forward.
        counters: What `/metrics` shows; `None` if nobody asks.

    Raises:
        ConfigError: The settings contradict each other or the indexer.
        DataError: The indexer is missing or damaged.
    """

    def __init__(self, settings: Settings, *, device: str, say: Callable[[str], Any] | None = None) -> None:
        self.settings = settings
        self.indexer = settings.open()
        self.selector = settings.selector(self.indexer, device)
        self.step: Step | None = None
        self.guarded = False
        self.counters: Counters | None = None
        info = self.indexer.info
        rules = {i: self.selector.rule(i) for i in info.fingerprint.full_layers}
        self.receipts = Receipts(rules, path=settings.receipts, say=say, log_every=settings.log_every)
        found = [_threshold(rule) for rule in rules.values()]
        self.threshold: int | None = min((t for t in found if t is not None), default=None)
        self._say = say

    @property
    def index_dim(self) -> int:
        """Values that the pages keep of an index key, the same for all layers."""
        return max(config.dim for config in self.indexer.info.layers.values())

    def server(self, layer: int) -> LayerServer:
        """The server of one layer."""
        return LayerServer(layer, self.selector, backend=self.settings.backend, receipts=self.receipts)

    def check(self, model: ModelFingerprint) -> None:
        """Refuse a model that the indexer does not fit.

        Raises:
            ConfigError: The model has another shape, or the indexer reads what serving does not give it.
        """
        info = self.indexer.info
        if reason := info.fingerprint.refusal(model):
            name = f" ({info.model})" if info.model else ""
            raise ConfigError(
                f"The indexer in {self.settings.indexer} belongs to another model{name}: {reason}; serve that model, or "
                "distil an indexer for this one."
            )
        for layer, config in info.layers.items():
            if config.features != "hidden":
                raise ConfigError(
                    f"Layer {layer} of the indexer in {self.settings.indexer} reads {config.features!r}; vLLM serves "
                    "indexers that read hidden states: distil one with features = 'hidden'."
                )
        if (block := self.selector.granularity.q_block) > 1:
            self.tell(
                f"topmass: {block} queries share a selection; where the scheduler or a cached prefix cuts them both parts select, "
                "so that answers depend on how prompts are cut."
            )
        if reason := info.fingerprint.doubt(model):
            self.tell(
                f"topmass: the model is not the one that the indexer was trained on ({reason}); check the recall."
            )

    def plan(self, query_start: Sequence[int], seq_lens: Sequence[int]) -> Batch | None:
        """Count the batch of the current step, and plan it; `None` outside of a step."""
        if self.step is None:
            return None
        batch = Batch.plan(self.step, query_start, seq_lens, sparse_decode=self.settings.decode == "sparse")
        self.receipts.add(batch)
        return batch

    def end_step(self) -> None:
        """Forget the requests of a forward that ended, and show what it did."""
        self.step = None
        if self.counters is not None:
            self.counters.write(self.receipts)

    def tell(self, line: str) -> None:
        """Say a line in the log."""
        if self._say is not None:
            self._say(line)


def open_service(
    additional: Any, *, device: str, say: Callable[[str], Any] | None = None, keep: bool = True
) -> Service | None:
    """The service of an engine with this `--additional-config`; `None` if it names no topmass.

    Args:
        device: Name of the device, for `dense_below="auto"`.
        say: Called with each line for the log.
        keep: Write receipts; one process of several says yes.

    Raises:
        ConfigError: A setting is wrong, or does not fit the indexer.
        DataError: The indexer is missing or damaged.
    """
    settings = Settings.parse(additional)
    if settings is None:
        return None
    if not keep:
        settings = replace(settings, receipts=None, log_every=0.0)
    return Service(settings, device=device, say=say)
