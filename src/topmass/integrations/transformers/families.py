"""Model families whose full-attention layers topmass replaces. A new family is one line and one test parameter."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from topmass.errors import UnsupportedModelError

__all__ = ["Family", "family_of", "find_layers", "list_families", "list_refused", "register_family"]


def _by_flag(module: Any) -> bool:
    return bool(getattr(module, "use_rope", True))


def _never(module: Any) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture, by its text model.

    Attributes:
        model_type: `model_type` of the text configuration.
        attention: Class name of the attention module.
        pairs: Which dimensions of a head RoPE turns together: `"halves"` (i and i + half), or `"neighbours"` (2i and 2i + 1).
        tables: How often cosines and sines name a frequency: `"halves"` (all, then all again), `"neighbours"` (each twice),
            or `"once"`.
        uses_rope: Whether an attention module turns its queries and keys at all.
        resumes: Whether the layers beside the full-attention ones take up their state in the middle of a prompt. Where
            transformers starts them anew with every call of several tokens, a prompt has to be one call.
    """

    model_type: str
    attention: str
    pairs: Literal["halves", "neighbours"] = "halves"
    tables: Literal["halves", "neighbours", "once"] = "halves"
    uses_rope: Callable[[Any], bool] = _by_flag
    resumes: bool = True

    def rope_tables(self, module: nn.Module, given: Any) -> tuple[Tensor | None, Tensor | None]:
        """Cosines and sines that `module` received, all frequencies and then all again; `None` where it turns nothing.

        Args:
            module: An attention module of this family.
            given: Its argument `position_embeddings`.
        """
        if given is None or not self.uses_rope(module):
            return None, None
        cos, sin = (given.real, given.imag) if isinstance(given, Tensor) else given
        if cos.ndim == 4:
            cos, sin = (_merge_sections(x, module) for x in (cos, sin))
        if self.tables == "halves":
            return cos, sin
        step = 2 if self.tables == "neighbours" else 1
        cos, sin = (torch.cat([x[..., ::step], x[..., ::step]], -1) for x in (cos, sin))
        return cos, sin


def _merge_sections(table: Tensor, module: Any) -> Tensor:
    # positions in time, height and width side by side, of which the attention takes sections in turn
    sections = module.config.rope_parameters["mrope_section"] * 2
    return torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, -1))], -1)


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Add a family; the last entry for a `model_type` wins."""
    _FAMILIES[family.model_type] = family


def list_families() -> tuple[str, ...]:
    """Model types that topmass knows."""
    return tuple(sorted(_FAMILIES))


def list_refused() -> dict[str, str]:
    """Model types that run on the attention interface and are refused all the same, with the reason."""
    return dict(sorted(_REFUSED.items()))


def family_of(decoder: PreTrainedModel) -> Family:
    """The family of a text decoder that `find_layers` returned."""
    return _FAMILIES[decoder.config.model_type]


for _family in (
    Family(model_type="arcee", attention="ArceeAttention"),
    Family(model_type="bamba", attention="BambaAttention", resumes=False),
    Family(model_type="cohere", attention="CohereAttention", pairs="neighbours", tables="neighbours"),
    Family(
        model_type="cohere2",
        attention="Cohere2Attention",
        pairs="neighbours",
        tables="neighbours",
        uses_rope=lambda m: m.sliding_window is not None,
    ),
    Family(model_type="ernie4_5", attention="Ernie4_5Attention", pairs="neighbours"),
    Family(
        model_type="exaone4",
        attention="Exaone4Attention",
        uses_rope=lambda m: m.sliding_window is None or m.is_sliding,
    ),
    Family(model_type="falcon_h1", attention="FalconH1Attention"),
    Family(model_type="gemma", attention="GemmaAttention"),
    Family(model_type="gemma2", attention="Gemma2Attention"),
    Family(model_type="gemma3_text", attention="Gemma3Attention"),
    Family(model_type="glm", attention="GlmAttention", pairs="neighbours"),
    Family(model_type="glm4", attention="Glm4Attention", pairs="neighbours"),
    Family(model_type="glm4_moe", attention="Glm4MoeAttention"),
    Family(model_type="gpt_oss", attention="GptOssAttention", tables="once"),
    Family(model_type="granite", attention="GraniteAttention"),
    Family(model_type="granitemoe", attention="GraniteMoeAttention"),
    Family(
        model_type="granitemoehybrid",
        attention="GraniteMoeHybridAttention",
        uses_rope=lambda m: m.config.position_embedding_type == "rope",
    ),
    Family(model_type="helium", attention="HeliumAttention", pairs="neighbours"),
    Family(model_type="jamba", attention="JambaAttention", uses_rope=_never, resumes=False),
    Family(model_type="lfm2", attention="Lfm2Attention"),
    Family(model_type="lfm2_moe", attention="Lfm2MoeAttention"),
    Family(model_type="llama", attention="LlamaAttention"),
    Family(model_type="llama4_text", attention="Llama4TextAttention", pairs="neighbours", tables="once"),
    Family(model_type="mimo_v2_flash", attention="MiMoV2FlashAttention"),
    Family(model_type="minimax_m2", attention="MiniMaxM2Attention"),
    Family(model_type="ministral", attention="MinistralAttention"),
    Family(model_type="mistral", attention="MistralAttention"),
    Family(model_type="mixtral", attention="MixtralAttention"),
    Family(model_type="nemotron", attention="NemotronAttention"),
    Family(model_type="nemotron_h", attention="NemotronHAttention", uses_rope=_never),
    Family(model_type="olmo", attention="OlmoAttention"),
    Family(model_type="olmo2", attention="Olmo2Attention"),
    Family(model_type="olmo3", attention="Olmo3Attention"),
    Family(model_type="olmo_hybrid", attention="OlmoHybridAttention"),
    Family(model_type="olmoe", attention="OlmoeAttention"),
    Family(model_type="phi", attention="PhiAttention"),
    Family(model_type="phi3", attention="Phi3Attention"),
    Family(model_type="qwen2", attention="Qwen2Attention"),
    Family(model_type="qwen2_5_vl_text", attention="Qwen2_5_VLAttention"),
    Family(model_type="qwen2_moe", attention="Qwen2MoeAttention"),
    Family(model_type="qwen2_vl_text", attention="Qwen2VLAttention"),
    Family(model_type="qwen3", attention="Qwen3Attention"),
    Family(model_type="qwen3_5_moe_text", attention="Qwen3_5MoeAttention"),
    Family(model_type="qwen3_5_text", attention="Qwen3_5Attention"),
    Family(model_type="qwen3_moe", attention="Qwen3MoeAttention"),
    Family(model_type="qwen3_next", attention="Qwen3NextAttention"),
    Family(model_type="qwen3_vl_moe_text", attention="Qwen3VLMoeTextAttention"),
    Family(model_type="qwen3_vl_text", attention="Qwen3VLTextAttention"),
    Family(model_type="seed_oss", attention="SeedOssAttention"),
    Family(model_type="smollm3", attention="SmolLM3Attention"),
    Family(model_type="stablelm", attention="StableLmAttention"),
    Family(model_type="starcoder2", attention="Starcoder2Attention"),
    Family(model_type="zamba2", attention="Zamba2Attention", uses_rope=lambda m: m.config.use_mem_rope),
):
    register_family(_family)

_OWN = "its own indexer already chooses the keys of every query"
_SHARED = "layers borrow the keys of others, which no cache layer of their own holds"
_REFUSED = {
    "deepseek_v32": _OWN,
    "deepseek_v4": _OWN,
    "gemma3n_text": _SHARED,
    "gemma4_text": "heads of its full-attention layers have another width than its configuration names, and some layers borrow keys",
    "glm_moe_dsa": _OWN,
    "minimax": "its cached forward departs from its uncached one, so nothing can be checked against it",
    "qwen4_exp_text": _OWN,
}


def find_layers(model: nn.Module) -> tuple[PreTrainedModel, dict[int, nn.Module]]:
    """The text decoder of `model`, and its full-attention modules by layer index.

    Raises:
        UnsupportedModelError: The architecture is not known, or has no full-attention layer.
    """
    # one walk: a block is entered for every prompt
    modules = list(model.named_modules())
    named = {name: m for name, m in modules if isinstance(m, PreTrainedModel)}
    parts = list(named.values())
    if not parts:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model; load it with AutoModelForCausalLM."
        )
    known = {name: m for name, m in named.items() if m.config.model_type in _FAMILIES}
    if not known:
        raise UnsupportedModelError(
            f"Models of type {parts[0].config.model_type!r} are not supported{_reason(parts[0])}; supported: "
            f"{', '.join(list_families())}. Other causal GQA models: topmass.integrations.transformers.families.register_family."
        )
    # the innermost model holds the layers and receives the cache
    inner = [name for name in known if not any(o != name and o.startswith(_inside(name)) for o in known)]
    # a module that is held twice has one name
    inner = [n for n in inner if len(inner) == 1 or not any(known[o] in known[n].modules() for o in inner if o != n)]
    if len(inner) > 1:
        raise UnsupportedModelError(f"{type(model).__name__} holds {len(inner)} language models; pass one of them.")
    decoder, within = known[inner[0]], _inside(inner[0])
    attention = family_of(decoder).attention
    found = _by_layer(
        decoder, attention, [m for n, m in modules if n.startswith(within) and type(m).__name__ == attention]
    )
    full = {i: m for i, m in found.items() if _is_full(decoder, i)}
    if not full:
        raise UnsupportedModelError(
            f"This {decoder.config.model_type!r} model has no full-attention layer: every layer is linear or slides a window."
        )
    return decoder, full


def _inside(name: str) -> str:
    """What the names of a module's parts begin with."""
    return f"{name}." if name else ""


def _by_layer(decoder: PreTrainedModel, attention: str, modules: list[Any]) -> dict[int, nn.Module]:
    if all(m.layer_idx >= 0 for m in modules):
        return {m.layer_idx: m for m in modules}
    # modules with shared weights do not know their layer
    layers: Any = decoder.layers
    owners = {i: [m for m in layer.modules() if type(m).__name__ == attention] for i, layer in enumerate(layers)}
    if len({id(m) for own in owners.values() for m in own}) < sum(map(len, owners.values())):
        raise UnsupportedModelError(
            f"Layers of this {decoder.config.model_type!r} model share one attention module; topmass cannot tell their keys apart."
        )
    return {i: own[0] for i, own in owners.items() if own}


def _is_full(decoder: PreTrainedModel, layer: int) -> bool:
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds is not None:
        return kinds[layer] in ("full_attention", "hybrid")
    return getattr(decoder.config, "sliding_window", None) is None


def _reason(model: PreTrainedModel) -> str:
    config = model.config
    text = config.get_text_config()
    if text.model_type in _REFUSED:
        return f" ({_REFUSED[text.model_type]})"
    if getattr(config, "is_encoder_decoder", False):
        return " (encoder-decoder: cross-attention has no causal support)"
    if getattr(text, "kv_lora_rank", None):
        return " (latent attention: keys are not per KV head)"
    if not getattr(config, "is_decoder", True):
        return " (an encoder: tokens see what comes after them)"
    return ""
