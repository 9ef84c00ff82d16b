"""The frozen model: one forward shows every full-attention layer's attention and what its indexer makes of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from topmass.errors import ConfigError, DataError
from topmass.integrations.transformers._session import LayerCall, Session
from topmass.integrations.transformers.index_features import index_features
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.ops.dense_prefill import dense_lse, dense_prefill
from topmass.selection.indexer import Indexer, LayerIndexer, index_rope

__all__ = ["Lesson", "Teacher", "check_ready", "checksum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One full-attention layer during a forward, for sequences of equal length without padding.

    Attributes:
        layer: Layer index.
        q: Queries after norm and RoPE.
        k: Keys, likewise.
        lse: Natural-log normaliser of the dense attention, learned sinks included.
        iq: Index queries, finished; with a graph back to the indexer's weights where gradients are on.
        ik: Index keys, finished, likewise.
        scale, softcap, sinks: As the model uses them.
    """

    layer: int
    q: Float[Tensor, "batch len q_heads head_dim"]
    k: Float[Tensor, "batch len kv_heads head_dim"]
    lse: Float[Tensor, "batch len q_heads"]
    iq: Float[Tensor, "batch len heads dim"]
    ik: Float[Tensor, "batch groups dim"]
    scale: float
    softcap: float | None
    sinks: Float[Tensor, " q_heads"] | None


Learn = Callable[[Lesson], None]


class Teacher:
    """Runs the frozen model and hands every layer's lesson on while the forward is at that layer.

    Nothing outlives its layer: the model runs without gradients, a lesson's graph begins at the detached hidden states.
    """

    def __init__(self, model: nn.Module, indexer: Indexer) -> None:
        self._model, self._indexer = model, indexer
        self._learn: Learn | None = None
        self._grad = False

    @contextmanager
    def open(self) -> Iterator["Teacher"]:
        """Redirect the model's full attention; it is restored when the block ends, also after an exception."""
        with Session(self._model, self, capture=True) as session, fast_linear_attention(self._model):
            self._decoder = session.decoder
            yield self

    def teach(self, ids: Int[Tensor, "batch len"], learn: Learn, *, grad: bool) -> None:
        """One forward of the model; `learn` is called for every layer that has an indexer.

        Args:
            ids: Tokens of equally long sequences.
            learn: Given the lesson of one layer after the other.
            grad: Whether lessons carry a graph back to the indexer.
        """
        self._learn, self._grad = learn, grad
        with torch.no_grad():
            # the decoder alone: no logits are needed
            self._decoder(input_ids=ids.to(next(self._decoder.parameters()).device), use_cache=False)

    def begin_forward(self) -> None:
        """Nothing is carried from one forward to the next."""

    def __call__(self, call: LayerCall) -> Float[Tensor, "batch q_len q_heads v_dim"]:
        """Dense attention of one layer call, and its lesson."""
        settings = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
        indexer = self._indexer.layer(call.layer)
        if indexer is None:
            return dense_prefill(call.q, call.k, call.v, **settings)
        assert self._learn is not None
        out, lse = dense_lse(call.q, call.k, call.v, **settings)
        with torch.set_grad_enabled(self._grad):
            iq, ik = _index(indexer, call)
            self._learn(Lesson(layer=call.layer, q=call.q, k=call.k, lse=lse, iq=iq, ik=ik, **settings))
        return out


def _index(indexer: LayerIndexer, call: LayerCall) -> tuple[Tensor, Tensor]:
    """Index queries and keys of a call, by the functions that serve them."""
    inputs, config = call.inputs, indexer.config
    assert inputs is not None
    for_q, for_k = index_features(config.features, inputs, call.q, call.k)
    rope = ()
    if config.rotary_dim and inputs.cos is not None and inputs.sin is not None:
        rope = index_rope(inputs.cos, inputs.sin, config.rotary_dim)
    iq = indexer.project_queries(for_q, *rope)
    return iq, indexer.finish_keys(indexer.project_keys(for_k), *rope)


def checksum(model: nn.Module) -> dict[str, int]:
    """A number for every weight that changes when a bit of it does, worked out where the weights are."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = {}
    for name, weight in model.named_parameters():
        bits = weight.detach().contiguous().view(-1).view(kinds[weight.element_size()])
        # wraps around: only equality counts. Odd factors by place, so that exchanged values show
        factors = torch.arange(1, 2 * min(len(bits), 4096), 2, device=bits.device)
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for part in bits.split(len(factors) * 1024):
            whole = len(part) // len(factors) * len(factors)
            total += (part[:whole].view(-1, len(factors)).sum(0, dtype=torch.int64) * factors).sum()
            total += (part[whole:] * factors[: len(part) - whole]).sum()
        found[name] = int(total)
    return found


def check_ready(model: nn.Module) -> None:
    """Refuse a model that would not stay as it is.

    Raises:
        ConfigError: It is in training mode, or holds gradients.
        DataError: It has no weights.
    """
    if model.training:
        raise ConfigError("The model is in training mode; call model.eval() before topmass.distill.")
    if any(p.grad is not None for p in model.parameters()):
        raise ConfigError("The model holds gradients; call model.zero_grad(set_to_none=True) before topmass.distill.")
    if next(model.parameters(), None) is None:
        raise DataError("The model has no weights.")
