"""Qwen3 (dense)."""

from typing import ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3

from topmass.integrations.vllm.layer import IndexedModel

__all__ = ["Qwen3ForCausalLM"]


class IndexedAttention(qwen3.Qwen3Attention):
    """Attention with an index projection in its product for queries, keys and values."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, packed = self.attn.project(self.qkv_proj, hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        out: torch.Tensor = self.attn(q, k, v, packed)
        return self.o_proj(out)[0]


class Qwen3ForCausalLM(IndexedModel, qwen3.Qwen3ForCausalLM):
    """vLLM's model, with an indexer if the engine serves one."""

    swaps: ClassVar = {qwen3.Qwen3Attention: IndexedAttention}
