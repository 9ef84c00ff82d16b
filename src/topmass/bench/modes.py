"""Ways to run the full-attention layers of one model, so that nothing but attention differs between them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from topmass.bench.baselines import BASELINES
from topmass.integrations.transformers._session import _BY_MODULE, LayerCall, Session
from topmass.integrations.transformers.families import find_layers
from topmass.integrations.transformers.sparsify import LayerReceipt, sparsify
from topmass.ops import dense_lse
from topmass.ops.dense_prefill import dense_prefill
from topmass.selection import Selector

__all__ = ["FLOOR", "STOCK", "Attention", "Handle", "Mode", "Watch", "copy_values", "dense_mode"]

STOCK, FLOOR = "stock", "floor"
# the same kernels where queries are not all of the positions, or the logits are not plain
_WITH_LSE = {"fa2": "flash2", "fa3": "flash3", "cudnn": "cudnn"}

Role = Literal["dense", "sparse", "floor"]
Attention = Callable[[LayerCall], Float[Tensor, "batch q_len q_heads v_dim"]]
# called with every call of a full-attention layer and its output, before the model goes on
Watch = Callable[[LayerCall, Tensor, "Handle"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handle:
    """What a running mode did.

    Attributes:
        layers: A receipt for each full-attention layer; none for the model as it is.
        supports: Recorded supports by layer.
        clear: Forgets both.
    """

    layers: Callable[[], Sequence[LayerReceipt]]
    supports: Callable[[], dict[int, Any]]
    clear: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to attend.

    Attributes:
        name: Label in tables.
        role: What it is compared as.
        attend: Computes the prompt's attention in place of the model's own.
        selector: Or chooses keys for the sparse kernels. With neither the model runs as it is.
        backend: Sparse kernels.
    """

    name: str
    role: Role
    attend: Attention | None = None
    selector: Selector | None = None
    backend: str = "auto"

    @contextmanager
    def running(self, model: nn.Module, *, watch: Watch | None = None) -> Iterator[Handle]:
        """Run `model` in this way inside the block.

        Args:
            watch: Sees every call of a full-attention layer, and has supports recorded. The model as it is has none to see.
        """
        if self.selector is not None:
            with sparsify(model, self.selector, backend=self.backend, record_support=watch is not None) as run:
                handle = Handle(
                    layers=lambda: list(run.receipt.layers.values()), supports=lambda: run.supports, clear=run.clear
                )
                _watch(model, watch, handle)
                yield handle
        elif self.attend is not None:
            counted = _Counted(self.name, self.attend)
            with Session(model, counted) as session:
                counted.start(session.layers)
                layers = session.layers
                handle = Handle(
                    layers=lambda: list(counted.layers.values()), supports=dict, clear=lambda: counted.start(layers)
                )
                _watch(model, watch, handle)
                yield handle
        else:
            yield Handle(layers=list, supports=dict, clear=lambda: None)


def _watch(model: nn.Module, watch: Watch | None, handle: Handle) -> None:
    if watch is None:
        return
    for module in find_layers(model)[1].values():
        session = _BY_MODULE[id(module)]
        if not isinstance(session.attend, _Watched):
            session.attend = _Watched(session.attend, watch, handle)


class _Watched:
    """Attention that shows its calls and outputs."""

    def __init__(self, attend: Any, watch: Watch, handle: Handle) -> None:
        self._attend, self._watch, self._handle = attend, watch, handle
        self.begin_forward = attend.begin_forward

    def __call__(self, call: LayerCall) -> Tensor:
        out = self._attend(call)
        self._watch(call, out, self._handle)
        return out


class _Counted:
    """Calls an attention function for the prompt, with receipts; generated positions are dense in every mode."""

    def __init__(self, name: str, attend: Attention) -> None:
        self._name, self._attend = name, attend
        self.layers: dict[int, LayerReceipt] = {}

    def start(self, layers: dict[int, nn.Module]) -> None:
        """Forget everything."""
        self.layers = {i: LayerReceipt(layer=i) for i in sorted(layers)}

    def begin_forward(self) -> None:
        """A new forward of the model starts."""

    def __call__(self, call: LayerCall) -> Tensor:
        queries = call.q.shape[0] * call.q.shape[1]
        if call.decode:
            self.layers[call.layer].count("dense", decode=queries)
            return dense_prefill(call.q, call.k, call.v, scale=call.scale, softcap=call.softcap, sinks=call.sinks)
        first, last = call.q_start + 1, call.k.shape[1]
        keys = 0 if self._name == FLOOR else call.q.shape[0] * (first + last) * call.q.shape[1] // 2
        self.layers[call.layer].count(self._name, dense=queries, reason="not sparse", keys=keys)
        return self._attend(call)


def dense_mode(name: str) -> Mode:
    """A dense kernel of `topmass.bench.baselines` by its name, or the model as it is under the name `stock`."""
    if name == STOCK:
        return Mode(name=name, role="dense")
    return Mode(name=name, role="dense", attend=lambda call: _dense(name, call))


def _dense(name: str, call: LayerCall) -> Tensor:
    plain = call.softcap is None and call.sinks is None and math.isclose(call.scale, call.q.shape[-1] ** -0.5)
    if plain and call.q.shape[1] == call.k.shape[1]:
        return BASELINES[name].run(call.q, call.k, call.v)
    settings: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks}
    if name not in _WITH_LSE:
        return dense_prefill(call.q, call.k, call.v, **settings)
    return dense_lse(call.q, call.k, call.v, **settings, backend=_WITH_LSE[name])[0]


def copy_values(call: LayerCall) -> Float[Tensor, "batch q_len q_heads v_dim"]:
    """No attention at all: every query takes the value of its own position."""
    return call.v[:, -call.q.shape[1] :].repeat_interleave(call.q.shape[2] // call.v.shape[2], 2)
