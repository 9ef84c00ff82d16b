"""Redirects the full-attention layers of one model to a function of ours, and puts everything back.

transformers looks the attention function and the mask function up by the name in the configuration. A session sets that
name to `topmass`; layers that it does not cover are handed on to the function the model had before, with the mask that
function expects. Covered layers get the two-dimensional padding mask, so that nothing is ever `N x N`.
"""

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from topmass.errors import ConfigError, DataError, UnsupportedModelError
from topmass.integrations.transformers.families import family_of, find_layers
from topmass.integrations.transformers.index_features import LayerInputs
from topmass.integrations.transformers.index_keys import CACHE_LAYERS, IndexKeys, KeyRows

__all__ = ["Attend", "LayerCall", "Session"]

NAME = "topmass"
# where transformers' configurations keep the name of their attention
_NAMED = "_attn_implementation_internal"

# whether a forward may run the model's own attention: batch, first position, length
Leave = Callable[[int, int, int], bool]

# keyed by identity: modules and configurations are alive while their session is
_BY_MODULE: dict[int, "Session"] = {}
_BY_CONFIG: dict[int, "Session"] = {}


class LayerCall:
    """One call of one full-attention layer for sequences of equal length without padding.

    Attributes:
        layer: Layer index.
        q, k, v: `[batch, len, heads, dim]`, after norm and RoPE; queries are the last `q_len` positions.
        scale, softcap, sinks: As the model uses them.
        decode: True for a single query after a non-empty cache.
        sample: Row of the padded batch, or `None` if the whole batch is here.
        inputs: What the attention module received for the queries, if the session captures it.
        index_rows: Raw index keys of all positions, if an indexer serves this layer.
    """

    __slots__ = ("decode", "index_rows", "inputs", "k", "layer", "q", "sample", "scale", "sinks", "softcap", "v")

    def __init__(
        self,
        *,
        layer: int,
        q: Float[Tensor, "batch q_len q_heads head_dim"],
        k: Float[Tensor, "batch kv_len kv_heads head_dim"],
        v: Float[Tensor, "batch kv_len kv_heads v_dim"],
        scale: float,
        softcap: float | None,
        sinks: Float[Tensor, " q_heads"] | None,
        decode: bool,
        sample: int | None,
        inputs: LayerInputs | None = None,
        index_rows: KeyRows | None = None,
    ) -> None:
        self.layer, self.q, self.k, self.v = layer, q, k, v
        self.scale, self.softcap, self.sinks, self.decode, self.sample = scale, softcap, sinks, decode, sample
        self.inputs, self.index_rows = inputs, index_rows

    @property
    def q_start(self) -> int:
        """Position of the first query."""
        return self.k.shape[1] - self.q.shape[1]


@runtime_checkable
class Attend(Protocol):
    """What a session calls: attention of one layer call, and the start of each forward."""

    def __call__(self, call: LayerCall) -> Float[Tensor, "batch q_len q_heads v_dim"]:
        """Attention output for `call`."""
        ...

    def begin_forward(self) -> None:
        """A new forward of the model starts."""
        ...


class Session:
    """Context manager: `attend` computes the full-attention layers of `model`.

    Args:
        capture: Keep what each attention module receives, for `LayerCall.inputs`.
        index: Writes index keys at every position; needs what `capture` keeps, and turns it on.
        leave: Asked before every forward that could do without `attend`, with its batch, first position and length. True leaves
            the forward to the model's own attention, which costs nothing; index keys are written all the same.
    """

    def __init__(
        self,
        model: nn.Module,
        attend: Attend,
        *,
        capture: bool = False,
        index: IndexKeys | None = None,
        leave: Leave | None = None,
    ) -> None:
        self.decoder, self.layers = find_layers(model)
        self.attend = attend
        self._family = family_of(self.decoder)
        self._layer_of = {id(m): i for i, m in self.layers.items()}
        self._configs: list[Any] = list({id(m.config): m.config for m in self.layers.values()}.values())
        self._original: list[str] = []
        self._capture, self._index, self._leave = capture or index is not None, index, leave
        # the forward that runs is left to the model's own attention
        self._left = False
        # hidden states that its attention modules were called with, by layer, if it is of one generated token, and their tables
        self._token: dict[int, Tensor] | None = None
        self._given: dict[int, Any] = {}
        self._cache: Any = None
        # the cache that was checked last, which is its owner's to keep, and how many layers it had
        self._checked: tuple[Callable[[], Any], int] = (lambda: None), 0
        self._received: dict[int, LayerInputs] = {}
        self._first = tuple(self.layers)[:1]
        self._turns = {i: self._family.uses_rope(m) for i, m in self.layers.items()}
        # by the identity of what modules are given, which is held so that it stays its own
        self._tables: dict[tuple[int, bool], tuple[Any, tuple[Tensor | None, Tensor | None]]] = {}
        # where the configurations keep the name, which is written twice a forward
        self._names: list[dict[str, Any] | None] = []

    def __enter__(self) -> "Session":
        if any(id(c) in _BY_CONFIG for c in self._configs):
            raise ConfigError(
                "This model, or one that shares its configuration object, is already inside topmass.sparsify or an audit; "
                "leave that block first."
            )
        if not _BY_CONFIG:
            ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
            ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
        self._original = [c._attn_implementation for c in self._configs]
        for config in self._configs:
            config._attn_implementation = NAME
            _BY_CONFIG[id(config)] = self
        self._names = [c.__dict__ if _NAMED in c.__dict__ else None for c in self._configs]
        for module in (self.decoder, *self.layers.values()):
            _BY_MODULE[id(module)] = self
        _watch(self.decoder, _forward)
        for module in self.layers.values() if self._capture else ():
            _watch(module, _attend)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in (self.decoder, *self.layers.values()):
            _unwatch(module)
            _BY_MODULE.pop(id(module), None)
        self._received.clear()
        self._tables.clear()
        for config, original in zip(self._configs, self._original, strict=True):
            config._attn_implementation = original
            _BY_CONFIG.pop(id(config), None)
        if not _BY_CONFIG:
            type(ALL_ATTENTION_FUNCTIONS)._global_mapping.pop(NAME, None)
            type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.pop(NAME, None)

    @functools.cached_property
    def own(self) -> set[int]:
        """Identities of the decoder's modules."""
        return {id(m) for m in self.decoder.modules()}

    def original(self, config: Any) -> str:
        """Attention implementation that `config` named before this session."""
        return next(o for c, o in zip(self._configs, self._original, strict=True) if c is config)

    def _before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = _by_name(self.decoder, args, kwargs)
        ids = kwargs.get("input_ids")
        given = ids if ids is not None else kwargs.get("inputs_embeds")
        if given is not None and given.shape[1] == 0:
            raise DataError("The prompt is empty; give at least one token.")
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:
            raise UnsupportedModelError(_NOT_CAUSAL)
        cache = kwargs.get("past_key_values")
        if not self._family.resumes and given is not None and given.shape[1] > 1 and _holds_tokens(cache, self.layers):
            raise UnsupportedModelError(
                f"transformers starts the recurrent layers of {self._family.model_type!r} models anew with every call of "
                "several tokens; give the whole prompt in one call."
            )
        if cache is not None:
            self._check_cache(cache)
        self._received.clear()
        self._tables.clear()
        start = 0 if cache is None else cache.get_seq_length(*self._first)
        self._left = given is not None and self._leaves(given, mask, start)
        if self._left:
            self._name(self._original)
            if given is not None and given.shape[1] == 1 and start > 0:
                self._token, self._cache = {}, cache
        self.attend.begin_forward()

    def _check_cache(self, cache: Any) -> None:
        layers = getattr(cache, "layers", ())
        known, held = self._checked
        # its layers go on together: a forward outside of the block shows in any of them
        for layer in self._first if known() is cache and held == len(layers) else self.layers:
            _check_cache_layer(cache, layer)
            if self._index is not None:
                self._index.check_cache(cache, layer)
        self._checked = weakref.ref(cache), len(layers)

    def _leaves(self, given: Tensor, mask: Any, start: int) -> bool:
        if self._leave is None or (self._index is not None and not self._index.reads_hidden):
            return False
        batch, length = given.shape[:2]
        # a wrapper that made the mask made it for this session
        if not (mask is None or (isinstance(mask, Tensor) and mask.shape == (batch, start + length))):
            return False
        # padding moves positions; a generated token is never padding
        if (length > 1 or start == 0) and mask is not None and not bool(mask.all()):
            return False
        return self._leave(batch, start, length)

    def _after_forward(self) -> None:
        if self._left:
            self._left = False
            self._name([NAME] * len(self._configs))
            if self._token is not None:
                token, self._token = self._token, None
                # together, and after the layers have run: a call a layer would cost as much again
                self._wait(token)
            self._write_left()

    def _name(self, names: Iterable[str]) -> None:
        for config, held, name in zip(self._configs, self._names, names, strict=True):
            # the property checks and passes on to sub-configurations, which costs more than all else of a forward that is left
            if held is not None:
                held[_NAMED] = name
            else:
                config._attn_implementation = name

    def _write_left(self) -> None:
        """Index keys of the layer before, whose cache the forward has reached by now."""
        while self._received:
            layer, inputs = self._received.popitem()
            if self._index is not None and inputs.cache is not None:
                self._index.extend(layer, inputs, inputs.hidden, later=True)

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = _by_name(module, args, kwargs)
        if self._left:
            self._write_left()
        layer = self._layer_of[id(module)]
        self._received[layer] = self._inputs(layer, kwargs)

    def _inputs(self, layer: int, kwargs: dict[str, Any]) -> LayerInputs:
        cos, sin = self._rope_tables(layer, kwargs.get("position_embeddings"))
        cache = kwargs.get("past_key_values")
        return LayerInputs(hidden=kwargs["hidden_states"], cos=cos, sin=sin, cache=cache, pairs=self._family.pairs)

    def _wait(self, token: dict[int, Tensor]) -> None:
        """Let a generated token wait for its index keys in every layer, or write the keys of all that wait there."""
        index, (cache, self._cache), (given, self._given) = self._index, (self._cache, None), (self._given, {})
        if index is None or not token:
            return
        # most models give all of their layers one object
        if len(set(map(id, given.values()))) == 1:
            turning = next((i for i in given if self._turns[i]), next(iter(given)))
            if index.wait_together(cache, token, self._rope_tables(turning, given[turning]), self._turns):
                return
        for layer, hidden in token.items():
            cos, sin = self._rope_tables(layer, given[layer])
            if not index.wait(cache.layers[layer], hidden, cos, sin):
                inputs = LayerInputs(hidden=hidden, cos=cos, sin=sin, cache=cache, pairs=self._family.pairs)
                index.extend(layer, inputs, hidden, later=True)

    def _rope_tables(self, layer: int, given: Any) -> tuple[Tensor | None, Tensor | None]:
        # the layers of a forward are given the same tables
        key = id(given), self._turns[layer]
        if (found := self._tables.get(key)) is None:
            found = self._tables[key] = given, self._family.rope_tables(self.layers[layer], given)
        return found[1]

    def run(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "batch kv_len"] | None, **settings: Any
    ) -> Tensor:
        """Call `attend`, per sequence where the batch is padded: padding is never a key and never counts as a position."""
        decode = q.shape[1] == 1 and k.shape[1] > 1
        if mask is not None and mask.shape[1] != k.shape[1]:
            raise DataError(
                f"attention_mask covers {mask.shape[1]} of {k.shape[1]} positions; with a cache it has to cover the cached "
                "tokens too."
            )
        inputs = self._received.pop(layer, None)
        index = None
        if self._index is not None and inputs is not None:
            features = self._index.key_features(layer, inputs, q, k)
            index = self._index.extend(layer, inputs, features, k.shape[1])
        settings |= {"layer": layer, "decode": decode}
        if mask is None:
            return self.attend(LayerCall(q=q, k=k, v=v, sample=None, inputs=inputs, index_rows=index, **settings))
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        for i, real in enumerate(mask):
            rows = real[-q.shape[1] :]
            if not bool(rows.any()):
                continue
            one = {"q": q[i, rows][None], "k": k[i, real][None], "v": v[i, real][None]}
            own = {
                "inputs": inputs and inputs.sequence(i, rows),
                "index_rows": None if index is None else index.sequence(i, real),
            }
            out[i, rows] = self.attend(LayerCall(**one, **own, sample=i, **settings))[0]
        return out


def _watch(module: nn.Module, watched: Callable[..., Any]) -> None:
    """Let `watched` run `module`: hooks would do, and their price would be most of a short prompt's and of a token's."""
    own = module.__dict__.get("forward")
    # parts that a deep copy of the model copies, so that the copy calls its own
    part = functools.partial(watched, module, own)
    part.__wrapped__ = module.forward  # type: ignore[attr-defined]
    module.__dict__["forward"] = part


def _unwatch(module: nn.Module) -> None:
    part: Any = module.__dict__.get("forward")
    # what somebody put around it stays, and finds no session
    if getattr(part, "func", None) in (_forward, _attend):
        del module.__dict__["forward"]
        if part.args[1] is not None:
            module.__dict__["forward"] = part.args[1]


def _forward(module: Any, own: Callable[..., Any] | None, /, *args: Any, **kwargs: Any) -> Any:
    """Run a decoder between the start and the end of its session's forward."""
    run = functools.partial(type(module).forward, module) if own is None else own
    if (session := _BY_MODULE.get(id(module))) is None:
        return run(*args, **kwargs)
    session._before_forward(args, kwargs)
    try:
        return run(*args, **kwargs)
    finally:
        session._after_forward()


def _attend(module: Any, own: Callable[..., Any] | None, /, *args: Any, **kwargs: Any) -> Any:
    """Run an attention module, and tell its session what it is called with."""
    if (session := _BY_MODULE.get(id(module))) is not None:
        if (token := session._token) is not None:
            given = _by_name(module, args, kwargs) if args else kwargs
            layer = session._layer_of[id(module)]
            token[layer], session._given[layer] = given["hidden_states"], given.get("position_embeddings")
        else:
            session._before_attention(module, args, kwargs)
    return type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)


_NOT_CAUSAL = (
    "Full-attention layers received a mask that is not causal plus padding (packed sequences, a custom 4-D mask, "
    "bidirectional attention, or image tokens that see each other); run the sequences one by one, or as a padded batch with "
    "a 2-D attention_mask."
)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "batch q_heads q_len head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len v_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Float[Tensor, " q_heads"] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    session = _BY_MODULE.get(id(module))
    if session is None:
        return _hand_on(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, kwargs)
    if dropout:
        raise UnsupportedModelError("Attention dropout is on; call model.eval() before topmass.")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # no mask at all was made by another mask function, which leaves the rest to a kernel's own flags
    if attention_mask is None or attention_mask.ndim != 2 or not causal:
        raise UnsupportedModelError(_NOT_CAUSAL)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    settings = {"scale": scale, "softcap": softcap, "sinks": s_aux}
    mask = attention_mask if attention_mask.numel() else None
    return session.run(session._layer_of[id(module)], q, k, v, mask, **settings), None


def _hand_on(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    # a layer of the same model that topmass leaves alone (sliding window, for example)
    session = _BY_CONFIG.get(id(module.config))
    if session is None or id(module) not in session.own:
        raise ConfigError(
            "Another model was built from the configuration object of a model inside topmass.sparsify, or copied from that "
            "model, and would run with the wrong mask; give it a configuration of its own, or run it outside the block."
        )
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    original: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(session.original(module.config), eager)  # pyright: ignore
    extra = {k: v for k, v in (("softcap", softcap), ("s_aux", s_aux)) if v is not None}
    return original(module, query, key, value, mask, scaling=scaling, dropout=dropout, **extra, **kwargs)


def _mask(
    *,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    # causal: an empty mask without padding, else the padding mask; never None, which says nothing of causality
    if mask_function is not causal_mask_function:
        session = _BY_CONFIG.get(id(config))
        build = ALL_MASK_ATTENTION_FUNCTIONS.get(session.original(config)) if session else None
        if build is None:  # as transformers does for an attention without a mask function
            return None
        return build(
            kv_length=kv_length, mask_function=mask_function, attention_mask=attention_mask, config=config, **kwargs
        )
    if attention_mask is None:
        return torch.empty(0, 0, dtype=torch.bool)
    real = attention_mask[:, :kv_length].bool()
    return real[:0, :0] if real.shape[1] == kv_length and bool(real.all()) else real


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs} if args else kwargs


def _holds_tokens(cache: Any, layers: Iterable[int]) -> bool:
    return cache is not None and any(cache.get_seq_length(layer) for layer in layers)


def _check_cache_layer(cache: Any, layer: int) -> None:
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise UnsupportedModelError(f"A cache of type {type(cache).__name__} is not supported; use DynamicCache.")
    if getattr(cache, "offloading", False):
        raise UnsupportedModelError(
            "The cache is offloaded; topmass reads every key of a layer, so use a plain DynamicCache."
        )
    # a cache grows its layers as they are written
    if layer < len(layers) and type(layers[layer]) not in CACHE_LAYERS:
        raise UnsupportedModelError(
            f"Layer {layer} is cached in {type(layers[layer]).__name__}; topmass reads exact keys from DynamicCache only "
            "(not static, quantised or offloaded caches)."
        )
