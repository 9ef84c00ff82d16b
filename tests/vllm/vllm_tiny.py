"""Tiny random models as directories, each with an untrained indexer, and what transformers generates with them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import transformers

import topmass
from topmass.integrations.transformers.index_features import describe_model, index_configs
from topmass.selection.indexer import Indexer

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
FAMILIES = {
    "llama": ("Llama", SIZES),
    "qwen3": ("Qwen3", SIZES),
    "qwen3_next": (
        "Qwen3Next",
        {
            **SIZES,
            **LINEAR,
            "mlp_only_layers": [0, 1, 2],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    ),
    "qwen3_5": ("Qwen3_5", {**SIZES, **LINEAR}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": None}),
}


@dataclass
class Model:
    """A model's directory, and its indexer's."""

    path: Path
    indexer: Path

    @cached_property
    def transformers(self):
        return transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def generate(self, prompt, tokens=16, decode="dense", **settings):
        """Greedy continuation by transformers, dense without settings."""
        ids, options = torch.tensor([prompt]), {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
        if not settings:
            return self.transformers.generate(ids, **options)[0, len(prompt) :].tolist()
        selector = topmass.load_indexer(self.indexer).selector(**settings)
        with topmass.sparsify(self.transformers, selector, backend="reference", decode=decode):
            return self.transformers.generate(ids, **options)[0, len(prompt) :].tolist()


def make(folder, family, **settings):
    """Save a tiny random model and an untrained indexer."""
    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}TextConfig" if family == "qwen3_5" else f"{name}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # sharp enough to choose between keys
            if parameter.ndim == 2:
                parameter.normal_(0, 2.0 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder / "model")
    indexer = Indexer.create(index_configs(model, **{"dim": 16, **settings}), describe_model(model)[0])
    indexer.save(folder / "indexer")
    return Model(folder / "model", folder / "indexer")


def prompt(length, seed=0, vocabulary=97):
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
