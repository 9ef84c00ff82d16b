"""vLLM's attention layer with an index projection beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.utils import extract_layer_index

from topmass.errors import ConfigError, UnsupportedModelError
from topmass.integrations.vllm import versions
from topmass.integrations.vllm.pages import PageLayout, Pages
from topmass.integrations.vllm.service import LayerServer
from topmass.selection.indexer import LayerIndexer, index_rope

__all__ = ["IndexProjection", "IndexedAttention", "IndexedModel"]

# rows of a product that kernels like
ALIGN = 64
# RoPE tables by the RoPE module that layers share
_TABLES: WeakKeyDictionary[nn.Module, dict[Any, Sequence[Tensor]]] = WeakKeyDictionary()


class IndexProjection(nn.Module):
    """Raw index keys and queries of tokens from the input of their attention layer, and what makes them complete.

    Raw ones come out of the layer's own product for queries, keys and values, whose weights get rows for them, so that a token costs no
    product more. Norm and RoPE, and the mean over a group of keys, wait until they are read: a generated token never does where decoding is dense.

    The same on every tensor-parallel rank, so that all ranks select the same keys without talking.

    Args:
        linear: The product for queries, keys and values. One that is quantised, offloaded or has a bias stays as it is, and a product
            of its own gives the raw index keys and queries.
        length: Tokens of the longest sequence.
        join: Whether `linear` may have more rows at all.

    Raises:
        ConfigError: The model's RoPE ends before the longest sequence.
    """

    def __init__(
        self,
        server: LayerServer,
        linear: Any,
        rotary: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        *,
        length: int,
        join: bool = True,
    ) -> None:
        super().__init__()
        assert server.indexer is not None
        self._server, self._linear = [server], [linear]
        config = server.indexer.config
        with torch.device("meta"):
            self.layer = LayerIndexer(config)
        # one product for keys and queries; the module keeps the norms
        del self.layer.q_proj, self.layer.k_proj
        rows, norms = self._weights()
        self.layer.load_state_dict({name: x.detach().to(device, copy=True) for name, x in norms.items()}, assign=True)
        self.layer.requires_grad_(False)
        self.rows = rows.shape[0]
        # in the model's dtype: rounding here is what each call would do
        weight = rows.detach().to(device, dtype)
        joined = join and _join(linear, weight, self._restore_rows)
        self.weight = None if joined else nn.Parameter(weight, requires_grad=False)
        # before memory is measured, not when the first prompt comes; a buffer, which vLLM keeps when it sleeps
        for i, table in enumerate(_tables(rotary, config.rotary_dim, length, dtype, device)):
            self.register_buffer(f"table_{i}", table, persistent=False)

    @property
    def joined(self) -> bool:
        """Whether the layer's own product gives the raw index keys and queries."""
        return self.weight is None

    def split(self, mixed: Tensor, hidden: Tensor, values: int) -> tuple[Tensor, Tensor]:
        """`[queries | keys | values]`, and `[values | raw index key | raw index queries]`.

        Args:
            mixed: What `linear` gave for `hidden`.
            values: Columns of the values.
        """
        if self.weight is not None:
            return mixed, torch.cat([mixed[..., -values:], F.linear(hidden, self.weight)], -1)
        # beside each other, where nothing has to be copied
        own = mixed.shape[-1] - self.rows
        return mixed[..., :own], mixed[..., own - values :]

    def keys(self, raw: Tensor) -> Tensor:
        """Index keys of the complete groups of a sequence, from the raw ones of its tokens."""
        tables = (x[:, : raw.shape[0]] for x in self._buffers.values())
        return self.layer.finish_keys(raw[None], *tables, backend=self._server[0].vectors)[0]

    def queries(self, raw: Tensor, start: int) -> Tensor:
        """Index queries per head of the tokens at `start` and after it."""
        tables = (x[:, start : start + raw.shape[0]] for x in self._buffers.values())
        return self.layer.finish_queries(raw[None], *tables, backend=self._server[0].vectors)[0]

    def restore(self) -> None:
        """Load the weights again, after vLLM filled every parameter with noise (`--load-format dummy`), or with nothing (sleep)."""
        rows, norms = self._weights()
        if self.weight is not None and not self.weight.is_meta:
            self.weight.data.copy_(rows)
        for name, norm in norms.items():
            if not (parameter := self.layer.get_parameter(name)).is_meta:
                parameter.data.copy_(norm)
        if self.weight is None:
            self._restore_rows()

    def _restore_rows(self) -> None:
        weight = self._linear[0].weight
        # a CPU packs what it has, and keeps no rows
        if not weight.is_meta and weight.numel():
            weight.data[-self.rows :].copy_(self._weights()[0])

    def _weights(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What projects a key, then queries; and the norms by name."""
        indexer = self._server[0].indexer
        assert indexer is not None
        state = dict(indexer.state_dict())
        rows = torch.cat([state.pop("k_proj.weight"), state.pop("q_proj.weight")])
        return F.pad(rows, (0, 0, 0, -rows.shape[0] % ALIGN)), state


def _tables(rotary: Any, width: int, length: int, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
    """RoPE tables of all positions at the indexer's width, which layers with one RoPE share; nothing without RoPE."""
    if not width:
        return ()
    kept, key = _TABLES.setdefault(rotary, {}), (width, length, dtype)
    if (known := rotary.cos_sin_cache.shape[0]) < length:
        raise ConfigError(
            f"The model's RoPE ends at position {known}, and max_model_len is {length}; set it to that at most."
        )
    if key not in kept:
        cos, sin = rotary.cos_sin_cache[:length].to(device, dtype).chunk(2, -1)
        kept[key] = index_rope(*(torch.cat([x, x], -1)[None] for x in (cos, sin)), width)
    return kept[key]


class _Joined(UnquantizedLinearMethod):
    """A product whose last rows are an index projection's."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.restore_index()
        super().process_weights_after_loading(layer)


def _join(linear: Any, rows: Tensor, restore: Callable[[], None]) -> bool:
    """Give a product more rows; false for one that cannot have them."""
    weight = getattr(linear, "weight", None)
    if type(linear.quant_method) is not UnquantizedLinearMethod or linear.bias is not None:
        return False
    # offloaded: what is on the host stays there
    if weight is None or weight.device != rows.device or getattr(weight, "_vllm_is_uva_offloaded", False):
        return False
    # vLLM loads its own rows by where they begin
    weight.data = torch.cat([weight.data, rows])
    linear.quant_method.__class__ = _Joined
    linear.restore_index = restore
    return True


class IndexedAttention(Attention):
    """Attention whose pages hold index keys, and whose value argument may carry `[value | raw index key | raw index queries]`."""

    server: LayerServer
    layout: PageLayout
    index: IndexProjection | None

    def serve(self, server: LayerServer, layout: PageLayout, index: IndexProjection | None) -> None:
        """Set what a change of class could not."""
        self.server, self.layout, self.index = server, layout, index
        self._pages: tuple[Tensor, Pages] | None = None

    def pages(self, cache: Tensor) -> Pages:
        """Views of this layer's pages, made once for a cache."""
        if self._pages is None or self._pages[0] is not cache:
            self._pages = cache, self.layout.open(cache)
        return self._pages[1]

    def project(self, linear: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[queries | keys | values]`, and what `forward` takes as `packed`: `None` for a layer without an indexer.

        Args:
            linear: The product for queries, keys and values.
        """
        mixed, _ = linear(hidden)
        return (mixed, None) if self.index is None else self.index.split(mixed, hidden, self._values)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, packed: Tensor | None = None, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Attention; `packed` is `value` with the columns of an `IndexProjection` behind it."""
        if packed is None:
            return super().forward(query, key, value, **kwargs)
        q = query.view(-1, self.num_heads, self.head_size)
        k = key.view(-1, self.num_kv_heads, self.head_size)
        out = torch.empty_like(q)
        # two dimensions, values first: what is written to the pages is contiguous per head
        versions.run_attention(self, q, k, packed, out)
        return out.view(query.shape[0], -1)

    def unpack(self, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values per head, raw index keys and raw index queries."""
        if value.ndim == 3:
            return value, None, None
        assert self.index is not None
        config = self.index.layer.config
        edges = self._values, self._values + config.dim, self._values + (1 + config.heads) * config.dim
        v, key, queries = (value[:, lo:hi] for lo, hi in pairwise((0, *edges)))
        return v.unflatten(1, (self.num_kv_heads, -1)), key, queries

    @property
    def _values(self) -> int:
        """Columns of the values."""
        return self.num_kv_heads * self.head_size

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        spec: Any = super().get_kv_cache_spec(vllm_config)
        return spec and replace(spec, head_size_v=self.head_size + self.layout.columns)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.index is not None:
            self.index.restore()


class IndexedModel:
    """Mixin in front of a model class of vLLM: swaps its attention layers if the engine serves an indexer.

    Attributes:
        swaps: Class of the attention module, and ours in its place.
    """

    swaps: ClassVar[Mapping[type[nn.Module], type[nn.Module]]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # pyright: ignore[reportCallIssue]
        self._index_names = attach(self, vllm_config)  # pyright: ignore[reportArgumentType]

    def load_weights(self, weights: Any) -> set[str]:
        named = super().load_weights(weights)  # pyright: ignore[reportAttributeAccessIssue]
        # as they may have been dropped meanwhile; vLLM wants every parameter named
        for module in self.modules():  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(module, IndexProjection):
                module.restore()
        return named | self._index_names


def attach(model: Any, vllm_config: VllmConfig) -> set[str]:
    """Give every attention layer of `model` its index projection, and return the names of the new parameters.

    Raises:
        ConfigError: The indexer does not fit the model.
        UnsupportedModelError: An attention layer cannot carry index keys.
    """
    if versions.wants_floor(vllm_config):
        copy_values(model)
        return set()
    service = versions.open_engine(vllm_config)
    if service is None:
        return set()
    versions.check_engine(vllm_config, service)
    names: set[str] = set()
    layouts: set[PageLayout] = set()
    apart = 0
    found = [(name, m) for name, m in model.named_modules() if type(m) in model.swaps]
    for name, module in found:
        attn: Any = module.attn
        if type(attn) is not Attention or attn.sliding_window is not None or attn.kv_sharing_target_layer_name:
            raise UnsupportedModelError(
                f"{name} slides a window, shares its keys or is no plain attention; topmass serves full attention only."
            )
        layout = PageLayout.fit(kv_heads=attn.num_kv_heads, head_dim=attn.head_size, index_dim=service.index_dim)
        layouts.add(layout)
        server = service.server(extract_layer_index(name))
        index = None
        if server.indexer is not None:
            model_config, device = vllm_config.model_config, vllm_config.device_config.device
            index = IndexProjection(
                server,
                module.qkv_proj,
                module.rotary_emb,
                model_config.dtype,
                device,
                length=model_config.max_model_len,
                # adapters may add to the columns that they know of only
                join=vllm_config.lora_config is None,
            )
        module.__class__ = model.swaps[type(module)]
        attn.__class__ = IndexedAttention
        attn.serve(server, layout, index)
        if index is not None:
            names |= {f"{name}.attn.index.{parameter}" for parameter, _ in index.named_parameters()}
            apart += not index.joined
    if apart:
        service.tell(
            f"topmass: the indexer of {apart} layers takes a product of its own for every token, as the layers' products are "
            "quantised, offloaded, have a bias, or may get adapters."
        )
    if len(layouts) != 1:
        raise ConfigError(f"The attention layers need one shape of pages, got {len(layouts)}.")
    versions.hold(found[0][1].attn.attn_backend, layouts.pop(), vllm_config, service)
    return names


def copy_values(model: Any) -> None:
    """Have the attention of every batch with a prompt copy values: what no attention at all would cost. Tokens mean nothing."""
    for module in model.modules():
        if type(module) in model.swaps:
            module.attn.impl.forward = _copying(module.attn.impl.forward)


def _copying(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> Any:
        # one token a request: decoding, which stays as it is
        if attn_metadata is None or attn_metadata.max_query_len == 1:
            return original(layer, query, key, value, kv_cache, attn_metadata, **kwargs)
        out, value = kwargs["output"].view_as(query), value.view(value.shape[0], -1, query.shape[-1])
        return out.copy_(value.repeat_interleave(query.shape[1] // value.shape[1], 1))

    return forward
