"""vLLM's attention layer with an index projection beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from topmass.errors import ConfigError, UnsupportedModelError
from topmass.integrations.vllm import versions
from topmass.integrations.vllm.pages import PageLayout, Pages
from topmass.integrations.vllm.service import LayerServer
from topmass.selection.indexer import LayerIndexer, index_rope

__all__ = ["IndexProjection", "IndexedAttention", "IndexedModel"]


# by the RoPE module that layers share
_GROUP_TABLES: WeakKeyDictionary[nn.Module, dict[Any, Sequence[Tensor]]] = WeakKeyDictionary()


class IndexProjection(nn.Module):
    """Index keys and queries of tokens from the input of their attention layer.

    The same on every tensor-parallel rank, so that all ranks select the same keys without talking.

    Args:
        length: Tokens of the longest sequence.
    """

    def __init__(
        self, server: LayerServer, rotary: nn.Module, dtype: torch.dtype, device: torch.device, *, length: int
    ) -> None:
        super().__init__()
        assert server.indexer is not None
        self._server, self._rotary = [server], [rotary]
        config = server.indexer.config
        with torch.device("meta"):
            self.layer = LayerIndexer(config)
        # one product for queries and keys; the module keeps the norms
        del self.layer.q_proj, self.layer.k_proj
        weight, norms = self._weights()
        self.layer.load_state_dict({name: x.detach().to(device, copy=True) for name, x in norms.items()}, assign=True)
        self.layer.requires_grad_(False)
        # in the model's dtype: rounding here is what each call would do
        self.weight = nn.Parameter(weight.detach().to(device, dtype), requires_grad=False)
        # before memory is measured, not when the first prompt comes; a buffer, which vLLM keeps when it sleeps
        for i, table in enumerate(self._group_tables(length // config.kv_block, dtype, device)):
            self.register_buffer(f"groups_{i}", table, persistent=False)

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """`[index key | index queries of all heads]` of every token."""
        config, tables = self.layer.config, self.tables(positions, hidden.dtype)
        raw = F.linear(hidden, self.weight)[None]
        queries, keys = raw.split([config.heads * config.dim, config.dim], -1)
        # a group of one token is finished at once; a longer one when it is read, because a chunk may end inside
        if config.kv_block == 1:
            keys = self.layer.finish_keys(keys, *tables)
        return torch.cat([keys[0], self.layer.finish_queries(queries, *tables)[0].flatten(1)], -1)

    def finish(self, stored: Tensor) -> Tensor:
        """Index keys of the complete groups of a sequence, from what the pages hold of its tokens."""
        if (r := self.layer.config.kv_block) == 1:
            return stored
        n = stored.shape[0] // r
        return self.layer.finish_groups(
            stored[None, : n * r].unflatten(1, (n, r)), *(x[:, :n] for x in self.buffers())
        )[0]

    def tables(self, positions: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """RoPE tables of positions at the indexer's width; nothing without RoPE."""
        if not self.layer.config.rotary_dim:
            return ()
        # text only: the sections of a multimodal position are equal
        positions = positions if positions.ndim == 1 else positions[0]
        cos, sin = self._rotary[0].cos_sin_cache[positions].to(dtype).chunk(2, -1)
        tables = (torch.cat([x, x], -1)[None] for x in (cos, sin))
        return index_rope(*tables, self.layer.config.rotary_dim)

    def restore(self) -> None:
        """Load the weights again, after vLLM filled every parameter with noise (`--load-format dummy`)."""
        weight, norms = self._weights()
        self.weight.data.copy_(weight)
        for name, norm in norms.items():
            self.layer.get_parameter(name).data.copy_(norm)

    def _group_tables(self, groups: int, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
        """RoPE tables of the groups' first positions, which layers with one RoPE share; nothing for groups of one."""
        config = self.layer.config
        if config.kv_block == 1:
            return ()
        kept = _GROUP_TABLES.setdefault(self._rotary[0], {})
        key = groups, config.kv_block, config.rotary_dim, dtype
        if key not in kept:
            kept[key] = self.tables(torch.arange(groups, device=device) * config.kv_block, dtype)
        return kept[key]

    def _weights(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What projects queries, then keys; and the norms by name."""
        indexer = self._server[0].indexer
        assert indexer is not None
        state = dict(indexer.state_dict())
        return torch.cat([state.pop("q_proj.weight"), state.pop("k_proj.weight")]), state


class IndexedAttention(Attention):
    """Attention whose pages hold index keys, and whose value argument may carry `[value | index key | index queries]`."""

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

    def project(self, positions: Tensor, hidden: Tensor) -> Tensor | None:
        """What `forward` takes as `index`; `None` for a layer without an indexer."""
        return None if self.index is None else self.index(positions, hidden)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor | None = None, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if index is None:
            return super().forward(query, key, value, **kwargs)
        tokens = query.shape[0]
        q = query.view(-1, self.num_heads, self.head_size)
        k = key.view(-1, self.num_kv_heads, self.head_size)
        # two dimensions, values first: what is written to the pages is contiguous per head
        packed = torch.cat([value.view(tokens, -1), index], -1)
        out = torch.empty_like(q)
        versions.run_attention(self, q, k, packed, out)
        return out.view(tokens, -1)

    def unpack(self, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values per head, index keys, and index queries per head."""
        if value.ndim == 3:
            return value, None, None
        assert self.index is not None
        config = self.index.layer.config
        width = self.num_kv_heads * self.head_size
        v, key, queries = value.split([width, config.dim, config.heads * config.dim], -1)
        return v.unflatten(1, (self.num_kv_heads, -1)), key, queries.unflatten(1, (config.heads, -1))

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
        # the projections are loaded; vLLM wants every parameter named
        return super().load_weights(weights) | self._index_names  # pyright: ignore[reportAttributeAccessIssue]


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
                server, module.rotary_emb, model_config.dtype, device, length=model_config.max_model_len
            )
        module.__class__ = model.swaps[type(module)]
        attn.__class__ = IndexedAttention
        attn.serve(server, layout, index)
        if index is not None:
            names |= {f"{name}.attn.index.{parameter}" for parameter, _ in index.named_parameters()}
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
