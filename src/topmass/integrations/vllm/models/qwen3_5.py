"""Qwen3.5 (dense, text)."""

from typing import ClassVar

from vllm.model_executor.models import qwen3_5
from vllm.model_executor.models.interfaces import IsHybrid
from vllm.model_executor.models.qwen3_next import Qwen3NextAttention

from topmass.integrations.vllm.layer import IndexedModel
from topmass.integrations.vllm.models.qwen3_next import IndexedAttention

__all__ = ["Qwen3_5ForCausalLM"]


class _Hybrid(IsHybrid):
    """What vLLM's multimodal class says about the state of linear layers; the text class says it only from 0.28 on."""

    _whole = qwen3_5.Qwen3_5ForConditionalGeneration
    get_mamba_state_dtype_from_config = classmethod(_whole.get_mamba_state_dtype_from_config.__func__)  # pyright: ignore
    get_mamba_state_shape_from_config = classmethod(_whole.get_mamba_state_shape_from_config.__func__)  # pyright: ignore
    get_mamba_state_copy_func = classmethod(_whole.get_mamba_state_copy_func.__func__)  # pyright: ignore


class Qwen3_5ForCausalLM(IndexedModel, qwen3_5.Qwen3_5ForCausalLM, _Hybrid):  # noqa: N801
    """vLLM's model, with an indexer if the engine serves one."""

    swaps: ClassVar = {Qwen3NextAttention: IndexedAttention}
