"""Qwen3-Next: gated delta rule layers with gated full attention in between."""

from typing import ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_next

from topmass.integrations.vllm.layer import IndexedModel

__all__ = ["IndexedAttention", "Qwen3NextForCausalLM"]


class IndexedAttention(qwen3_next.Qwen3NextAttention):
    """Attention with an index projection in its product for queries, keys and values."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, packed = self.attn.project(self.qkv_proj, hidden_states)
        q, k, v, gate = self._project_qkv_gate(qkv, positions)
        out: torch.Tensor = self.attn(q, k, v, packed)
        return self.o_proj(out if gate is None else out * torch.sigmoid(gate))[0]


class Qwen3NextForCausalLM(IndexedModel, qwen3_next.Qwen3NextForCausalLM):
    """vLLM's model, with an indexer if the engine serves one."""

    swaps: ClassVar = {qwen3_next.Qwen3NextAttention: IndexedAttention}
