"""Tiny random models of every supported family, in float64, with attention sharp enough to choose between keys."""

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
# dense feed-forward layers: grouped matrix products know no float64
EXPERTS = {"mlp_only_layers": [0, 1, 2, 3], "num_experts": 2, "num_experts_per_tok": 1}
FAMILIES = ("qwen3_5", "qwen3_5_vl", "qwen3_next", "qwen3", "qwen2", "llama", "mistral", "gemma3", "mha", "mqa")
GATED_DELTA = ("qwen3_5", "qwen3_5_vl", "qwen3_next")


def config_of(family: str, **more):
    t = transformers
    if family == "qwen3_5":
        return t.Qwen3_5TextConfig(**{**COMMON, **LINEAR, **more})
    if family == "qwen3_5_vl":
        text = {**COMMON, **LINEAR, **more}
        return t.Qwen3_5Config(
            text_config=text, vision_config=VISION, image_token_id=58, video_token_id=59, vision_start_token_id=56, vision_end_token_id=57
        )  # fmt: skip
    if family == "qwen3_next":
        return t.Qwen3NextConfig(**{**COMMON, **LINEAR, **EXPERTS, **more})
    if family == "gemma3":
        layers = ["sliding_attention", "full_attention"] * 2
        sliding = {"num_hidden_layers": 4, "layer_types": layers, "sliding_window": 9, "query_pre_attn_scalar": 8}
        return t.Gemma3TextConfig(**{**COMMON, **sliding, **more})
    if family == "mistral":
        return t.MistralConfig(**{**COMMON, "sliding_window": None, **more})
    if family == "mha":
        return t.LlamaConfig(**{**COMMON, "num_key_value_heads": 4, **more})
    if family == "mqa":
        return t.LlamaConfig(**{**COMMON, "num_key_value_heads": 1, **more})
    return {"qwen3": t.Qwen3Config, "qwen2": t.Qwen2Config, "llama": t.LlamaConfig}[family](**{**COMMON, **more})


def build(family: str, *, dtype=torch.float64, seed=0, **more) -> PreTrainedModel:
    """The model in eval mode, with weights large enough that attention is neither flat nor one-hot."""
    config = config_of(family, **more)
    classes = {
        "qwen3_5": transformers.Qwen3_5ForCausalLM,
        "qwen3_5_vl": transformers.Qwen3_5ForConditionalGeneration,
        "qwen3_next": transformers.Qwen3NextForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
        "mistral": transformers.MistralForCausalLM,
        "gemma3": transformers.Gemma3ForCausalLM,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classes.get(family, transformers.LlamaForCausalLM)(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and "visual" not in name:
                    weight.normal_(0, 1.0 if "embed" in name else 0.45)
    return model.to(dtype).requires_grad_(False)


def prompt(n: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, 56, (batch, n), generator=torch.Generator().manual_seed(seed))
