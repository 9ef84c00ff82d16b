"""Hybrid models: gated delta rule layers in between, whose state vLLM keeps in pages of another group."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm_gated_delta import gated_delta_float32
from vllm_tiny import Model, make, prompt

import topmass

PROMPTS = [prompt(n, seed) for seed, n in enumerate((300, 129, 40))]
SPARSE = {"budget": 48, "sink": 2, "window": 4}


@pytest.fixture(autouse=True)
def float32_states(monkeypatch):
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as module

    # the CPU engine's own kernels want bfloat16; the layer finds them through its module's `torch`
    monkeypatch.setattr(module, "torch", Torch())


class Torch:
    """`torch`, with one operator of vLLM's in float32."""

    ops = SimpleNamespace(vllm=SimpleNamespace(cpu_gdn_attention_core=gated_delta_float32))

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_next"])
def model(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The shipped checkpoint, with an untrained indexer."""
    from topmass.integrations.transformers.index_features import describe_model, index_configs
    from topmass.selection.indexer import Indexer

    folder = tmp_path_factory.mktemp("reference")
    model = Model(Path(topmass.__file__).parent / "assets" / "reference", folder)
    indexer = Indexer.create(index_configs(model.transformers, dim=32), describe_model(model.transformers)[0])
    indexer.save(folder)
    return model


def test_same_tokens_as_transformers_with_the_same_indexer(model, engine):
    ours = engine(model, SPARSE, block_size=None).run(*PROMPTS)
    assert ours == [model.generate(p, **SPARSE) for p in PROMPTS]
    assert ours != [model.generate(p) for p in PROMPTS]


def test_the_reference_checkpoint_in_chunks_and_in_a_batch(reference, engine):
    prompts = [prompt(n, seed, 2048) for seed, n in enumerate((300, 140))]
    expected = [reference.generate(p, decode="sparse", **SPARSE) for p in prompts]
    for chunk in (64, 2048):
        one = engine(
            reference, {**SPARSE, "decode": "sparse"}, block_size=None, max_num_batched_tokens=chunk, max_num_seqs=8
        )
        assert one.run(*prompts) == expected
    assert sorted(one.service.receipts.total.layers) == [3, 7]
