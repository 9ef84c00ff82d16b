"""The GPU backend's bookkeeping on a CPU, with a plain function in the place of FlashAttention's kernels."""

from itertools import pairwise

import pytest
import torch
from vllm_tiny import make, prompt

from topmass.ops import dense_prefill

PROMPTS = [prompt(n, seed) for seed, n in enumerate((300, 129, 40, 577))]
SPARSE = {"budget": 48, "sink": 2, "window": 4}


def attend(*, q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, causal, **rest):
    """Causal attention of a ragged batch over pages, one sequence after another."""
    assert causal is True
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    for i, (lo, hi) in enumerate(pairwise(starts)):
        if lo == hi:
            continue
        pages = block_table[i, : -(-lengths[i] // k.shape[1])].long()
        keys, values = (x[pages].flatten(0, 1)[None, : lengths[i]] for x in (k, v))
        out[lo:hi] = dense_prefill(q[None, lo:hi], keys, values, scale=softmax_scale)[0]


def write(key, value, key_cache, value_cache, slots, *rest):
    slots = slots[slots >= 0]
    size = key_cache.shape[1]
    key_cache[slots // size, slots % size] = key[: len(slots)]
    value_cache[slots // size, slots % size] = value[: len(slots)]


@pytest.fixture
def flash(engine, monkeypatch):
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    from topmass.integrations.vllm import versions

    versions.register()
    # an engine of another test may have asked
    _cached_get_attn_backend.cache_clear()
    kernel = (
        "_FA4_DENSE_ATTENTION_KERNEL"
        if hasattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL")
        else "flash_attn_varlen_func"
    )
    monkeypatch.setattr(flash_attn, kernel, attend, raising=False)
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", write, raising=False)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *args, **kwargs: 2)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_quant_query_input", lambda *args: False, raising=False)
    before = AttentionBackendEnum.CUSTOM.get_path()
    register_backend(AttentionBackendEnum.CUSTOM, "topmass.integrations.vllm.backend_flash.SparseFlashBackend")
    # registering again, as every new engine does, would bring the CPU's backend back
    monkeypatch.setattr(versions, "register", lambda: None)
    yield engine
    register_backend(AttentionBackendEnum.CUSTOM, before)
    _cached_get_attn_backend.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("flash"), "qwen3")


@pytest.mark.parametrize("chunk", [64, 2048])
def test_dense_and_sparse_rows_of_a_batch_go_where_they_belong(model, flash, chunk):
    expected = [model.generate(p, **SPARSE) for p in PROMPTS]
    one = flash(model, SPARSE, max_num_batched_tokens=chunk, max_num_seqs=8)
    assert one.run(*PROMPTS) == expected
    assert type(next(iter(one.layers.values())).impl).__name__ == "SparseFlashImpl"
    assert one.service.receipts.backends


def test_sparse_decode_needs_its_batches_outside_of_graphs(model, flash):
    from vllm.v1.attention.backend import AttentionCGSupport

    from topmass.integrations.vllm.backend_flash import SparseFlashBuilder

    one = flash(model, {**SPARSE, "decode": "sparse"})
    assert one.run(*PROMPTS) == [model.generate(p, decode="sparse", **SPARSE) for p in PROMPTS]
    assert SparseFlashBuilder.get_cudagraph_support(one.config, None) == AttentionCGSupport.NEVER


def test_layers_with_other_budgets_have_dense_rows_of_their_own(model, flash, tmp_path):
    from topmass.core.budget import Budget
    from topmass.core.plan import Plan

    plan = Plan(layers={0: Budget(tokens=48), 1: Budget(tokens=150)})
    plan.save(tmp_path / "plan.toml")
    one = flash(model, {"plan": str(tmp_path / "plan.toml")}, max_num_batched_tokens=64, max_num_seqs=8)
    assert one.run(*PROMPTS) == [model.generate(p, budget=plan) for p in PROMPTS]


def test_graphs_of_decoding_are_kept_from_a_prompt_s_last_token(model, flash):
    """Where a batch of single tokens holds one that selects, the runner must not replay a graph with dense attention."""
    one = flash(model, SPARSE, enable_prefix_caching=True)
    runner = one.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    if not hasattr(runner, "cudagraph_dispatcher"):
        pytest.skip("this version's runner decides elsewhere")
    seen = []
    original = runner.cudagraph_dispatcher.dispatch

    def watch(*args, **kwargs):
        seen.append(kwargs["uniform_decode"])
        return original(*args, **kwargs)

    runner.cudagraph_dispatcher.dispatch = watch
    p = prompt(257, 7)
    one.run(p, tokens=3)
    seen.clear()
    one.run(p, tokens=3)
    assert seen == [False, True, True]


def test_pages_that_begin_in_the_middle_of_an_engine_s_memory_keep_their_columns(model, flash):
    one = flash(model, SPARSE)
    layer = next(iter(one.layers.values()))
    assert layer.kv_cache.shape[-1] == 2 * 32 + layer.layout.columns
    assert not torch.isnan(layer.kv_cache).any()
