"""Models run on the reference ops, and can be made float64 throughout."""

import importlib

import pytest
import tiny_models
import torch

from topmass.integrations.transformers.gated_delta import chunk_gated_delta_rule
from topmass.ops import _dispatch


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch):
    # Triton's interpreter would only be slow here
    monkeypatch.setattr(_dispatch, "available", lambda op: ("reference",))


class Wide:
    """`torch`, for a module that asks for float32 in the middle of a float64 model."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@pytest.fixture
def float64_throughout(request, monkeypatch):
    """Transformers' norms, softmax and gated delta rule in float64, for a float64 model.

    Rounded to float32 in between, a difference of one part in 1e16 may become one in 1e7.
    """
    callspec = getattr(request.node, "callspec", None)
    named = callspec.params.get("family") if callspec else None
    for name in dict.fromkeys(tiny_models.module_of(family) for family in {named or "llama", *tiny_models.FAMILIES}):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "torch", Wide())
        for rule in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
            if hasattr(module, rule):
                monkeypatch.setattr(module, rule, chunk_gated_delta_rule)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
