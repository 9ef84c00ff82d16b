"""Union growth of a model's own selections, to be marked on the curve of time against growth."""

from collections.abc import Iterable
from typing import Any

import torch

import topmass
from topmass.bench.inputs import union_growth
from topmass.bench.ttft import Prompts
from topmass.integrations.transformers.linear import fast_linear_attention
from topmass.selection.base import Selector

__all__ = ["model_growth"]


def model_growth(
    model: Any, prompts: Prompts, selector: Selector, *, name: str, lengths: Iterable[int], backend: str = "auto"
) -> list[dict[str, Any]]:
    """Measure U/K of every sparse layer at several lengths; return records of the kind `bench`.

    Args:
        model: A model that `topmass.sparsify` takes.
        prompts: Gives ids for a batch and a length, on the model's device.
        selector: Selects per query.
        name: Name of the model in the records.
        lengths: Prompt lengths, tokens.
        backend: Kernels of the forward, and of the union.
    """
    rows: list[dict[str, Any]] = []
    for length in lengths:
        with (
            torch.inference_mode(),
            fast_linear_attention(model),
            topmass.sparsify(model, selector, backend=backend, record_support=True) as run,
        ):
            model(prompts(1, length), logits_to_keep=1)
        for layer, support in run.supports.items():
            assert isinstance(support, topmass.Support)
            growth = union_growth(support, backend=backend)
            if growth is not None:
                rows.append(_row(model, selector, name, length, layer, growth))
    return rows


def _row(model: Any, selector: Selector, name: str, length: int, layer: int, growth: float) -> dict[str, Any]:
    config, unit = model.config.get_text_config(), selector.config()
    heads = config.num_attention_heads
    return {
        "shape": name,
        "q_heads": heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "length": length,
        "what": "growth",
        "config": f"{unit['selector']} b={unit['budget']} q{unit['q_block']} k{unit['kv_block']}",
        "budget": str(unit["budget"]),
        "q_block": unit["q_block"],
        "kv_block": unit["kv_block"],
        "growth": None,
        "name": f"layer {layer}",
        "role": "part",
        "backend": "",
        "round": -1,
        "metric": "union_growth",
        "value": growth,
        "unit": "ratio",
        "status": "ok",
    }
