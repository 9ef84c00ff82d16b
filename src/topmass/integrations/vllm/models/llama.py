"""Llama, and what vLLM runs as Llama under that architecture's name."""

from typing import ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import llama

from topmass.integrations.vllm.layer import IndexedModel

__all__ = ["LlamaForCausalLM"]


class IndexedAttention(llama.LlamaAttention):
    """Attention with an index projection in its product for queries, keys and values."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, packed = self.attn.project(self.qkv_proj, hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        out: torch.Tensor = self.attn(q, k, v, packed)
        return self.o_proj(out)[0]


class LlamaForCausalLM(IndexedModel, llama.LlamaForCausalLM):
    """vLLM's model, with an indexer if the engine serves one."""

    swaps: ClassVar = {llama.LlamaAttention: IndexedAttention}
