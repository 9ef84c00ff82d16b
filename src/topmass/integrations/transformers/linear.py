"""Faster linear-attention layers where flash-linear-attention is not installed."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from topmass.integrations.transformers.gated_delta import chunk_gated_delta_rule

__all__ = ["fast_linear_attention"]

_SLOW = "torch_chunk_gated_delta_rule"


@contextmanager
def fast_linear_attention(model: nn.Module) -> Iterator[None]:
    """Use the vectorised gated delta rule inside the block; put transformers' own back after it.

    Does nothing where flash-linear-attention is installed, or where the model has no such layer. The two agree to 1e-5
    relative.
    """
    if importlib.util.find_spec("fla"):
        yield
        return
    modules = {sys.modules[type(m).__module__] for m in model.modules()}
    before = {module: vars(module)[_SLOW] for module in modules if _SLOW in vars(module)}
    try:
        for module in before:
            setattr(module, _SLOW, chunk_gated_delta_rule)
        yield
    finally:
        for module, function in before.items():
            setattr(module, _SLOW, function)
