"""Plain PyTorch attention over paged keys, for the CPU engine: slow, exact, and the same steps as on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, MultipleOf

from topmass.integrations.vllm import versions
from topmass.integrations.vllm.attention import SparseImpl
from topmass.integrations.vllm.batch import Batch, Part, Step
from topmass.ops import dense_prefill

__all__ = ["ReferenceBackend"]


class ReferenceBackend(AttentionBackend):
    """`--attention-backend CUSTOM` on a CPU."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False
    index_columns = 0

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["ReferenceImpl"]:
        return ReferenceImpl

    @staticmethod
    def get_builder_cls() -> type["ReferenceBuilder"]:
        return ReferenceBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_kv_cache_shape(
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Shape of a layer's pages, for versions that ask the backend."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size + cls.index_columns

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """Orders of the cache's memory that it works with, likewise."""
        return versions.whole_pages()

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Order of the dimensions in memory, likewise."""
        return (1, 0, 3, 2, 4) if include_num_layers_dimension else (0, 2, 1, 3)


@dataclass
class ReferenceMetadata:
    """A batch.

    Attributes:
        topmass: Its parts.
        block_table: Pages of every request.
    """

    topmass: Batch
    block_table: Tensor


class ReferenceBuilder(AttentionMetadataBuilder[Any]):
    """Plans every batch."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._service = versions.service_of(vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> ReferenceMetadata:
        common = common_attn_metadata
        start, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
        batch = self._service and self._service.plan(start, lengths)
        if batch is None:
            dummy = Step(requests=[""] * common.num_reqs, prompt_lens=[0] * common.num_reqs)
            batch = Batch.plan(dummy, start, lengths)
        return ReferenceMetadata(topmass=batch, block_table=common.block_table_tensor)


class ReferenceImpl(SparseImpl, AttentionImpl[Any]):
    """Dense rows by `dense_prefill` over the gathered pages of their request."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.logits_soft_cap, self.sinks = logits_soft_cap, sinks

    def dense(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: Any, output: Tensor
    ) -> None:
        self.dense_parts(layer, query, cache, metadata, output, metadata.topmass.parts)

    def dense_parts(
        self, layer: Any, query: Tensor, cache: Tensor, metadata: Any, output: Tensor, parts: Sequence[Part]
    ) -> None:
        settings = self.arithmetic().settings()
        pages = layer.pages(cache)
        for part in parts:
            owned = metadata.block_table[part.index, : pages.count(part.stop)].long()
            k, v = (x[owned].flatten(0, 1)[None, : part.stop] for x in (pages.keys, pages.values))
            rows = slice(*part.rows)
            output[rows] = dense_prefill(query[None, rows], k, v, **settings)[0]
