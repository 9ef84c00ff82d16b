"""FlashAttention with index keys in its pages: dense rows are FlashAttention's own, sparse rows ours."""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from topmass.integrations.vllm import versions
from topmass.integrations.vllm.attention import SparseImpl
from topmass.integrations.vllm.batch import Part

__all__ = ["SparseFlashBackend"]


class SparseFlashBackend(FlashAttentionBackend):
    """`--attention-backend CUSTOM` on a GPU."""

    index_columns = 0

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["SparseFlashImpl"]:
        return SparseFlashImpl

    @staticmethod
    def get_builder_cls() -> type["SparseFlashBuilder"]:
        return SparseFlashBuilder

    @classmethod
    def get_kv_cache_shape(
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Shape of a layer's pages, for versions that ask the backend."""
        if block_size % 16:
            raise ValueError(f"FlashAttention's pages hold a multiple of 16 tokens, got {block_size}.")
        return num_blocks, num_kv_heads, block_size, 2 * head_size + cls.index_columns

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """Orders of the cache's memory that it works with."""
        return versions.whole_pages()

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[Any]:
        """Sizes of the pages that FlashAttention's kernels take, by the head that they will see."""
        if kv_cache_spec is None:
            return super().get_supported_kernel_block_sizes()
        return super().get_supported_kernel_block_sizes(_plain(kv_cache_spec))

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        return kv_cache_dtype in (None, "auto", "float16", "bfloat16")


class SparseFlashBuilder(FlashAttentionMetadataBuilder):
    """FlashAttention's metadata, with the plan of a batch if any of its rows may select."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(_plain(kv_cache_spec), layer_names, vllm_config, device)
        self.kv_cache_spec = kv_cache_spec
        self._service = versions.service_of(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        service = versions.service_of(vllm_config)
        if service is not None and (service.settings.decode == "sparse" or not service.guarded):
            return AttentionCGSupport.NEVER
        return cls._cudagraph_support

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        common = common_attn_metadata
        metadata: Any = super().build(0, common, fast_build)
        metadata.topmass = None
        if self._service is None or self._service.step is None:
            return metadata
        # the bound is exact for every row, as there is no speculative decoding
        start, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
        batch = self._service.plan(start, lengths)
        if batch is not None and batch.split(self._service.threshold)[1]:
            metadata.topmass = batch
            metadata.topmass_dense = {}
            metadata.topmass_build = lambda parts: self._some(common, parts)
        return metadata

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Never: it would split a plan."""
        return False

    def _some(self, common: Any, parts: Sequence[Part]) -> Any:
        """Metadata of a batch of nothing but `parts`, one after another."""
        lengths = [p.stop - p.start for p in parts]
        seen = torch.tensor([p.stop for p in parts], dtype=torch.int32)
        start = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        index = torch.tensor([p.index for p in parts])
        changed = {
            "query_start_loc": start.to(self.device, non_blocking=True),
            "query_start_loc_cpu": start,
            "seq_lens": seen.to(self.device, non_blocking=True),
            "seq_lens_cpu_upper_bound": seen,
            "num_reqs": len(parts),
            "num_actual_tokens": sum(lengths),
            "max_query_len": max(lengths),
            "max_seq_len": int(seen.max()),
            "block_table_tensor": common.block_table_tensor[index.to(self.device, non_blocking=True)],
            "slot_mapping": common.slot_mapping[: sum(lengths)],
            "is_prefilling": None,
        }
        # caches and copies that some versions keep
        changed |= {f.name: None for f in fields(CommonAttentionMetadata) if f.name.startswith("_")}
        # without the schedule that FlashAttention 3 keeps in one buffer for the whole batch
        return super().build(0, replace(common, **changed), True)


class SparseFlashImpl(SparseImpl, FlashAttentionImpl):
    """FlashAttention over the keys and values of the pages."""

    def dense(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: Any, output: Tensor
    ) -> None:
        FlashAttentionImpl.forward(self, layer, query, key, value, layer.pages(cache).rows, metadata, output)

    def dense_parts(
        self, layer: Any, query: Tensor, cache: Tensor, metadata: Any, output: Tensor, parts: Sequence[Part]
    ) -> None:
        threshold = layer.server.threshold
        if threshold not in metadata.topmass_dense:
            metadata.topmass_dense[threshold] = _rows(parts, query.device), metadata.topmass_build(parts)
        rows, some = metadata.topmass_dense[threshold]
        part = torch.empty_like(query[: some.num_actual_tokens])
        # FlashAttention reads the keys from the pages
        self.dense(layer, query[rows], query, query, cache, some, part)
        output[rows] = part


def _plain(spec: Any) -> Any:
    """A layer's specification without the extra columns, which are no part of what FlashAttention sees."""
    return replace(spec, head_size_v=spec.head_size)


def _rows(parts: Sequence[Part], device: torch.device) -> slice | Tensor:
    """Rows of some parts: a slice where they are consecutive, as a batch of decoding with one long prompt has them."""
    if all(a.rows[1] == b.rows[0] for a, b in pairwise(parts)):
        return slice(parts[0].rows[0], parts[-1].rows[1])
    rows = torch.cat([torch.arange(*p.rows) for p in parts])
    return rows.to(device, non_blocking=True)
