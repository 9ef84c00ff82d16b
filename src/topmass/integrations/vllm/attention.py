"""What every attention backend of ours does: dense rows its own way, sparse rows over the pages."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from topmass.integrations.vllm.batch import Batch, Part
from topmass.integrations.vllm.service import Arithmetic

__all__ = ["SparseImpl"]


class SparseImpl:
    """Mixin in front of an `AttentionImpl` of vLLM. Its metadata carries a `Batch` as `topmass`, or `None`: all dense."""

    head_size: int
    scale: float
    forward_includes_kv_cache_update: ClassVar[bool] = False

    def dense(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: Any, output: Tensor
    ) -> None:
        """Dense attention of the whole batch."""
        raise NotImplementedError

    def dense_parts(
        self, layer: Any, query: Tensor, cache: Tensor, metadata: Any, output: Tensor, parts: Sequence[Part]
    ) -> None:
        """Dense attention of some parts."""
        raise NotImplementedError

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write the tokens of a batch to the pages, index keys included, whatever they will be read for."""
        value, index, _ = layer.unpack(value)
        n = slot_mapping.shape[0]
        layer.pages(kv_cache).write(key[:n], value[:n], None if index is None else index[:n], slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a batch, written to `output`."""
        assert output_scale is None
        assert output_block_scale is None
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        values, _, raw = layer.unpack(value)
        batch: Batch | None = None if raw is None else attn_metadata.topmass
        parts, sparse = ((), ()) if batch is None else batch.split(layer.server.threshold)
        if raw is None or not sparse:
            self.dense(layer, query, key, values, kv_cache, attn_metadata, output)
            return output
        if parts:
            self.dense_parts(layer, query, kv_cache, attn_metadata, output, parts)
        arithmetic = self.arithmetic()
        for part in sparse:
            rows = slice(*part.rows)
            output[rows] = layer.server.attend(
                query[rows],
                layer.index.queries(raw[rows], part.start),
                layer.pages(kv_cache),
                attn_metadata.block_table[part.index],
                part,
                arithmetic=arithmetic,
                finish=layer.index.keys,
            )
        return output

    def arithmetic(self) -> Arithmetic:
        """How the model computes its attention."""
        softcap: Any = getattr(self, "logits_soft_cap", None)
        sinks: torch.Tensor | None = getattr(self, "sinks", None)
        return Arithmetic(scale=self.scale, softcap=softcap or None, sinks=sinks)
