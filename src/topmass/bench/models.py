"""Whole models of known shapes with random weights: what can be timed where no checkpoint is at hand."""

import difflib
from typing import Any

import torch

from topmass.errors import ConfigError

__all__ = ["MODELS", "TINY", "build_model", "is_shape"]

TINY = "tiny"
# positions of every shape: more than the longest prompt anybody times
POSITIONS = 2**20

# model type of transformers, and its configuration
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5-9b": (
        "qwen3_5_text",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "vocab_size": 248320,
        },
    ),
    "qwen3.5-0.8b": (
        "qwen3_5_text",
        {
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "vocab_size": 248320,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    "llama-3.1-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    TINY: (
        "qwen3_5_text",
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "vocab_size": 128,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
}


def is_shape(name: str) -> bool:
    """Whether a name is that of a shape, not of a checkpoint.

    Raises:
        ConfigError: It is nearly the name of a shape.

    Example:
        >>> is_shape("qwen3-8b"), is_shape("reference")
        (True, False)
    """
    if name in MODELS:
        return True
    # a name without a slash is no hub id of today
    near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.85)
    if near and "/" not in name:
        raise ConfigError(f"Unknown shape {name!r}; did you mean {near[0]!r}?")
    return False


def build_model(
    name: str, *, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Any:
    """A causal language model of a named shape, random weights drawn on the device, in eval mode.

    Raises:
        ConfigError: There is no such shape.

    Example:
        >>> model = build_model("tiny", device="cpu", dtype=torch.float32)
        >>> model.config.num_hidden_layers
        4
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in MODELS:
        raise ConfigError(f"Unknown shape {name!r}; known: {', '.join(MODELS)}.")
    kind, settings = MODELS[name]
    config = AutoConfig.for_model(kind, max_position_embeddings=POSITIONS, **settings)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)
