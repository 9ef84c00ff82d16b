"""Model families whose full-attention layers topmass replaces. A new family is one line and one test parameter."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from topmass.errors import UnsupportedModelError

__all__ = ["Family", "find_layers", "list_families", "register_family"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture, by its text model.

    Attributes:
        model_type: `model_type` of the text configuration.
        attention: Class name of the attention module.
    """

    model_type: str
    attention: str


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Add a family; the last entry for a `model_type` wins."""
    _FAMILIES[family.model_type] = family


def list_families() -> tuple[str, ...]:
    """Model types that topmass knows."""
    return tuple(sorted(_FAMILIES))


for _family in (
    Family(model_type="gemma3_text", attention="Gemma3Attention"),
    Family(model_type="llama", attention="LlamaAttention"),
    Family(model_type="mistral", attention="MistralAttention"),
    Family(model_type="qwen2", attention="Qwen2Attention"),
    Family(model_type="qwen3", attention="Qwen3Attention"),
    Family(model_type="qwen3_5_text", attention="Qwen3_5Attention"),
    Family(model_type="qwen3_next", attention="Qwen3NextAttention"),
):
    register_family(_family)


def find_layers(model: nn.Module) -> tuple[PreTrainedModel, dict[int, nn.Module]]:
    """The text decoder of `model`, and its full-attention modules by layer index.

    Raises:
        UnsupportedModelError: The architecture is not known, or has no full-attention layer.
    """
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not parts:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model; load it with AutoModelForCausalLM."
        )
    known = [m for m in parts if m.config.model_type in _FAMILIES]
    if not known:
        raise UnsupportedModelError(
            f"Models of type {parts[0].config.model_type!r} are not supported{_reason(parts[0])}; supported: "
            f"{', '.join(list_families())}. Other causal GQA models: topmass.integrations.transformers.families.register_family."
        )
    # the innermost model holds the layers and receives the cache
    inner = [m for m in known if not any(o is not m and o in known for o in m.modules())]
    if len(inner) > 1:
        raise UnsupportedModelError(f"{type(model).__name__} holds {len(inner)} language models; pass one of them.")
    decoder = inner[0]
    family = _FAMILIES[decoder.config.model_type]
    modules: list[Any] = [m for m in decoder.modules() if type(m).__name__ == family.attention]
    full = {m.layer_idx: m for m in modules if _is_full(decoder, m.layer_idx)}
    if not full:
        raise UnsupportedModelError(
            f"This {decoder.config.model_type!r} model has no full-attention layer: every layer is linear or slides a window."
        )
    return decoder, full


def _is_full(decoder: PreTrainedModel, layer: int) -> bool:
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds is not None:
        return kinds[layer] == "full_attention"
    return getattr(decoder.config, "sliding_window", None) is None


def _reason(model: PreTrainedModel) -> str:
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return " (encoder-decoder: cross-attention has no causal support)"
    if getattr(config, "kv_lora_rank", None):
        return " (latent attention: keys are not per KV head)"
    if not getattr(config, "is_decoder", True):
        return " (an encoder: tokens see what comes after them)"
    return ""
