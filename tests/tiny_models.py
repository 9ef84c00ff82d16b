"""Tiny random models of every supported family, in float64, with attention sharp enough to choose between keys."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 24,
    "patch_size": 4,
}
TOKENS = {"image_token_id": 58, "video_token_id": 59, "vision_start_token_id": 56, "vision_end_token_id": 57}
# dense feed-forward layers: grouped matrix products know no float64
EXPERTS = {"mlp_only_layers": [0, 1, 2, 3], "num_experts": 2, "num_experts_per_tok": 1}
# the loop over experts does
MOE = {"experts_implementation": "eager", "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SLIDING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 9,
}
MAMBA = {
    "num_hidden_layers": 3,
    "mamba_n_heads": 4,
    "mamba_d_head": 12,
    "mamba_d_state": 6,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
WIDE = {"hidden_size": 32}  # four heads of 8, for configurations that compute the width of a head

# name: (prefix of the classes, suffix of the configuration's, of the model's, fields beside COMMON)
_TEXT, _CAUSAL, _VL = "Config", "ForCausalLM", "ForConditionalGeneration"
_TABLE: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5", "TextConfig", _CAUSAL, LINEAR),
    "qwen3_5_vl": ("Qwen3_5", _TEXT, _VL, LINEAR),
    "qwen3_next": ("Qwen3Next", _TEXT, _CAUSAL, LINEAR | EXPERTS),
    "qwen3": ("Qwen3", _TEXT, _CAUSAL, {}),
    "qwen2": ("Qwen2", _TEXT, _CAUSAL, {}),
    "llama": ("Llama", _TEXT, _CAUSAL, {}),
    "mistral": ("Mistral", _TEXT, _CAUSAL, {"sliding_window": None}),
    "gemma3": ("Gemma3", "TextConfig", _CAUSAL, SLIDING | {"query_pre_attn_scalar": 8}),
    "mha": ("Llama", _TEXT, _CAUSAL, {"num_key_value_heads": 4}),
    "mqa": ("Llama", _TEXT, _CAUSAL, {"num_key_value_heads": 1}),
}
FAMILIES = tuple(_TABLE)
GATED_DELTA = ("qwen3_5", "qwen3_5_vl", "qwen3_next", "qwen3_5_moe", "olmo_hybrid")
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "full_attention"], "num_hidden_layers": 3}
_CONVOLUTION = {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3}
_SCALED = {"attention_multiplier": 0.2}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 12}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_NEMOTRON_H = {
    "layers_block_type": ["mamba", "attention", "moe", "attention"],
    "num_hidden_layers": 4,
    "ssm_state_size": 6,
    "mamba_num_heads": 4,
    "mamba_head_dim": 12,
    "n_groups": 1,
    "chunk_size": 16,
    "use_mamba_kernels": False,
    "experts_implementation": "eager",
    "n_routed_experts": 3,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12,
}
_JAMBA = {
    "num_hidden_layers": 3,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 6,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
_LLAMA4 = {
    "num_local_experts": 3,
    "no_rope_layers": [1, 0],
    "attention_chunk_size": 8,
    "intermediate_size_mlp": 12,
    "moe_layers": [],
}
_ZAMBA2 = {
    "layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid"],
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "mamba_d_state": 6,
    "n_mamba_heads": 4,
    "mamba_ngroups": 1,
    "chunk_size": 16,
    "num_mem_blocks": 1,
    "use_shared_attention_adapter": True,
    "adapter_rank": 4,
    "use_mem_rope": True,
    "use_mamba_kernels": False,
    "head_dim": 12,
}
# seen in fewer tests each
MORE: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "arcee": ("Arcee", _TEXT, _CAUSAL, {}),
    "bamba": ("Bamba", _TEXT, _CAUSAL, MAMBA | WIDE | {"mamba_d_head": 16, "attn_layer_indices": [1, 2]}),
    "cohere": ("Cohere", _TEXT, _CAUSAL, WIDE),
    "cohere2": ("Cohere2", _TEXT, _CAUSAL, SLIDING),
    "ernie4_5": ("Ernie4_5", _TEXT, _CAUSAL, {}),
    "exaone4": ("Exaone4", _TEXT, _CAUSAL, SLIDING | WIDE),
    "falcon_h1": ("FalconH1", _TEXT, _CAUSAL, MAMBA | {"mamba_d_ssm": 48}),
    "gemma": ("Gemma", _TEXT, _CAUSAL, {}),
    # eager: SDPA of older versions leaves the soft-cap out
    "gemma2": (
        "Gemma2",
        _TEXT,
        _CAUSAL,
        SLIDING | {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, "attn_implementation": "eager"},
    ),
    "glm": ("Glm", _TEXT, _CAUSAL, {}),
    "glm4": ("Glm4", _TEXT, _CAUSAL, {}),
    "glm4_moe": ("Glm4Moe", _TEXT, _CAUSAL, MOE | {"n_routed_experts": 3, "n_shared_experts": 1}),
    "gpt_oss": ("GptOss", _TEXT, _CAUSAL, SLIDING | MOE | {"num_local_experts": 3}),
    "granite": ("Granite", _TEXT, _CAUSAL, WIDE | _SCALED),
    "granitemoe": ("GraniteMoe", _TEXT, _CAUSAL, WIDE | MOE | _SCALED | {"num_local_experts": 3}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        _TEXT,
        _CAUSAL,
        MAMBA | WIDE | MOE | _HYBRID | _SCALED | {"mamba_d_head": 16, "num_local_experts": 3},
    ),
    "granitemoehybrid_rope": (
        "GraniteMoeHybrid",
        _TEXT,
        _CAUSAL,
        MAMBA
        | WIDE
        | MOE
        | _HYBRID
        | _SCALED
        | {"mamba_d_head": 16, "num_local_experts": 3, "position_embedding_type": "rope"},
    ),
    "helium": ("Helium", _TEXT, _CAUSAL, WIDE),
    "jamba": ("Jamba", _TEXT, _CAUSAL, WIDE | MOE | _JAMBA),
    "lfm2": ("Lfm2", _TEXT, _CAUSAL, WIDE | _CONVOLUTION | {"block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("Lfm2Moe", _TEXT, _CAUSAL, WIDE | MOE | _CONVOLUTION | {"num_dense_layers": 1}),
    "llama3": ("Llama", _TEXT, _CAUSAL, {"rope_parameters": _LLAMA3}),
    "llama4": ("Llama4", "TextConfig", _CAUSAL, MOE | _LLAMA4),
    "mimo_v2_flash": ("MiMoV2Flash", _TEXT, _CAUSAL, MOE | SLIDING | {"n_routed_experts": 3, "v_head_dim": 6}),
    "minimax_m2": ("MiniMaxM2", _TEXT, _CAUSAL, MOE | {"num_local_experts": 3}),
    "ministral": ("Ministral", _TEXT, _CAUSAL, SLIDING),
    "mixtral": ("Mixtral", _TEXT, _CAUSAL, MOE | {"num_local_experts": 3, "sliding_window": None}),
    "nemotron": ("Nemotron", _TEXT, _CAUSAL, WIDE),
    "nemotron_h": ("NemotronH", _TEXT, _CAUSAL, _NEMOTRON_H),
    "olmo": ("Olmo", _TEXT, _CAUSAL, WIDE),
    "olmo2": ("Olmo2", _TEXT, _CAUSAL, WIDE),
    "olmo3": ("Olmo3", _TEXT, _CAUSAL, SLIDING | WIDE),
    "olmo_hybrid": ("OlmoHybrid", _TEXT, _CAUSAL, LINEAR | WIDE),
    "olmoe": ("Olmoe", _TEXT, _CAUSAL, MOE | WIDE),
    "phi": ("Phi", _TEXT, _CAUSAL, WIDE),
    "phi3": ("Phi3", _TEXT, _CAUSAL, WIDE),
    "qwen2_moe": ("Qwen2Moe", _TEXT, _CAUSAL, MOE | _SHARED_EXPERT),
    "qwen2_vl": ("Qwen2VL", _TEXT, _VL, WIDE | _SECTIONS),
    "qwen2_5_vl": ("Qwen2_5_VL", _TEXT, _VL, WIDE | _SECTIONS),
    "qwen3_5_moe": ("Qwen3_5Moe", "TextConfig", _CAUSAL, LINEAR | MOE | _SHARED_EXPERT),
    "qwen3_5_moe_vl": ("Qwen3_5Moe", _TEXT, _VL, LINEAR | MOE | _SHARED_EXPERT),
    "qwen3_moe": ("Qwen3Moe", _TEXT, _CAUSAL, MOE),
    "qwen3_vl": ("Qwen3VL", _TEXT, _VL, _SECTIONS),
    "qwen3_vl_moe": ("Qwen3VLMoe", _TEXT, _VL, MOE | _SECTIONS),
    "seed_oss": ("SeedOss", _TEXT, _CAUSAL, {}),
    "smollm3": ("SmolLM3", _TEXT, _CAUSAL, WIDE | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}),
    "stablelm": ("StableLm", _TEXT, _CAUSAL, WIDE),
    "starcoder2": ("Starcoder2", _TEXT, _CAUSAL, WIDE | {"sliding_window": None}),
    "zamba2": ("Zamba2", _TEXT, _CAUSAL, _ZAMBA2),
}
# a family newer than the installed transformers is left out
_THERE = set(dir(transformers))
EVERY = tuple(name for name, (prefix, _, kind, _) in (_TABLE | MORE).items() if prefix + kind in _THERE)


def config_of(family: str, **more):
    """Configuration of a tiny model; `more` goes to its text model."""
    prefix, suffix, kind, fields = (_TABLE | MORE)[family]
    config = getattr(transformers, prefix + suffix)
    fields = {**COMMON, **fields, **more}
    # a wrapper hands its own choice down
    experts = {k: fields[k] for k in ("experts_implementation",) if k in fields}
    if kind != _VL:
        return config(**fields)
    return config(text_config=fields, vision_config=_vision(prefix, fields["hidden_size"]), **TOKENS, **experts)


def module_of(family: str) -> str:
    """Name of transformers' module with the model."""
    prefix, _, kind, _ = (_TABLE | MORE)[family]
    return getattr(transformers, prefix + kind).__module__


def _vision(prefix: str, width: int) -> dict[str, Any]:
    vision = VISION | {"out_hidden_size": width}
    if prefix == "Qwen2VL":
        return vision | {"embed_dim": 16, "hidden_size": width, "mlp_ratio": 1}
    if prefix == "Qwen2_5_VL":
        return vision | {"fullatt_block_indexes": [0], "window_size": 8}
    return vision | ({"deepstack_visual_indexes": [0]} if prefix.startswith("Qwen3VL") else {})


def build(family: str, *, dtype=torch.float64, seed=0, **more) -> PreTrainedModel:
    """The model in eval mode, with weights large enough that attention is neither flat nor one-hot."""
    config, (prefix, _, kind, _) = config_of(family, **more), (_TABLE | MORE)[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, prefix + kind)(config).eval()
        with torch.no_grad():
            for module in model.modules():
                if type(module).__name__.endswith("LayerNorm1P"):  # counts from 1
                    module.weight.zero_()
            for name, weight in model.named_parameters():
                if name.endswith("sinks"):
                    weight.normal_(0, 1.0)
                elif weight.ndim == 2 and "visual" not in name:
                    wide = "adapter" in name or weight.shape[1] > 32
                    weight.normal_(0, 1.0 if "embed" in name else 0.2 if wide else 0.45)
    return model.to(dtype).requires_grad_(False)


VISUAL = tuple(name for name in EVERY if (_TABLE | MORE)[name][2] == _VL)


def images(model: PreTrainedModel, n: int, *, video: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A prompt of `n` text tokens with a picture or a short film in it, and what else the forward takes."""
    config: Any = model.config
    vision, token = config.vision_config, config.video_token_id if video else config.image_token_id
    frames, height, width = (2 if video else 1), 4, 6
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(
        frames * height * width,
        vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        generator=generator,
        dtype=model.dtype,
    )
    grid = torch.tensor([[frames, height, width]])
    one = torch.full((1, height * width // vision.spatial_merge_size**2), token)
    start, end = torch.tensor([[config.vision_start_token_id]]), torch.tensor([[config.vision_end_token_id]])
    text = prompt(n)
    # frames in one run or each on its own, as a family's processor writes them
    apart = type(model).__name__.startswith("Qwen3")
    runs = [torch.cat([start, one, end], 1)] * frames if apart else [start, *[one] * frames, end]
    ids = torch.cat([text[:, : n // 3], *runs, text[:, n // 3 :]], 1)
    kinds = (ids == token).int() * (2 if video else 1)
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    return ids, {names[0]: patches, names[1]: grid, "mm_token_type_ids": kinds}


def prompt(n: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 56, (batch, n), generator=torch.Generator().manual_seed(seed))
