"""The engine in float32: the tokens of transformers, whatever the scheduler does to a prompt."""

import json
from dataclasses import replace

import pytest
import torch
from vllm_tiny import make, prompt

import topmass

PROMPTS = [prompt(n, seed) for seed, n in enumerate((300, 129, 40, 577))]
SPARSE = {"budget": 48, "sink": 2, "window": 4}


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make(tmp_path_factory.mktemp("one"), "qwen3")


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """An indexer with several heads, and keys pooled by four."""
    return make(tmp_path_factory.mktemp("pooled"), "qwen3", kv_block=4, heads=2)


def test_a_budget_that_covers_the_prompt_gives_the_stock_engine_s_tokens(model, engine):
    stock = engine(model).run(*PROMPTS)
    ours = engine(model, {"budget": 1024})
    assert ours.run(*PROMPTS) == stock
    assert not ours.service.receipts.backends


def test_without_settings_the_engine_is_the_stock_one(qwen3, engine):
    plain = engine(qwen3)
    assert plain.service is None
    assert not any("Indexed" in type(layer).__name__ for layer in plain.layers.values())


def test_same_tokens_as_transformers_with_the_same_indexer(model, engine):
    ours = engine(model, SPARSE).run(*PROMPTS)
    assert ours == [model.generate(p, **SPARSE) for p in PROMPTS]
    assert ours != [model.generate(p) for p in PROMPTS]


def test_pooled_keys_and_several_heads(pooled, engine):
    """Chunks end inside key groups: pages keep raw keys."""
    expected = [pooled.generate(p, **SPARSE) for p in PROMPTS]
    assert engine(pooled, SPARSE).run(*PROMPTS) == expected
    assert engine(pooled, SPARSE, max_num_batched_tokens=70, max_num_seqs=8).run(*PROMPTS) == expected


def test_a_plan_keeps_a_layer_dense(qwen3, engine, tmp_path):
    from topmass.core.budget import Budget
    from topmass.core.plan import Plan

    plan = Plan(layers={0: Budget(tokens=48), 1: None})
    plan.save(tmp_path / "plan.toml")
    ours = engine(qwen3, {"plan": str(tmp_path / "plan.toml")})
    assert ours.run(*PROMPTS) == [qwen3.generate(p, budget=plan) for p in PROMPTS]
    assert ours.service.receipts.total.layers[1].sparse == 0


@pytest.fixture(scope="module")
def expected(qwen3):
    return [qwen3.generate(p, decode="sparse", **SPARSE) for p in PROMPTS]


@pytest.mark.parametrize("chunk", [64, 512])
def test_chunks_of_a_prompt_change_nothing(qwen3, engine, expected, chunk):
    """Each prompt alone, and all in one batch: chunks of some run beside decoding of others."""
    one = engine(qwen3, {**SPARSE, "decode": "sparse"}, max_num_batched_tokens=chunk, max_num_seqs=8)
    assert [one.run(p)[0] for p in PROMPTS] == expected
    assert one.run(*PROMPTS) == expected


def test_sparse_decode_is_that_of_transformers_and_not_dense(qwen3, engine, expected):
    one = engine(qwen3, {**SPARSE, "decode": "sparse"})
    assert one.run(*PROMPTS) == expected
    assert expected != [qwen3.generate(p, **SPARSE) for p in PROMPTS]


def test_cached_prefixes_change_nothing(qwen3, engine, expected):
    one = engine(qwen3, {**SPARSE, "decode": "sparse"}, enable_prefix_caching=True)
    assert one.run(*PROMPTS) == expected
    before = one.service.receipts.total.layers[0].sparse
    assert one.run(*PROMPTS) == expected
    # 300 tokens are nine pages and a rest; decoding counts as before
    computed = one.service.receipts.total.layers[0].sparse - before
    assert computed < before / 2


def test_a_prompt_s_last_token_alone_is_prefill(qwen3, engine):
    """One token after a cached prefix or a chunk is no decoding: it selects, though decoding is dense."""
    p = prompt(257, 7)
    expected = qwen3.generate(p, **SPARSE)
    cached = engine(qwen3, SPARSE, enable_prefix_caching=True)
    assert cached.run(p) == [expected]
    before = cached.service.receipts.total.layers[0].sparse
    assert before == 257 - 48
    assert cached.run(p) == [expected]
    assert cached.service.receipts.total.layers[0].sparse == before + 1
    chunked = engine(qwen3, SPARSE, max_num_batched_tokens=64, max_num_seqs=8)
    assert chunked.run(p) == [expected]
    assert chunked.service.receipts.total.layers[0].sparse == 257 - 48


@pytest.mark.parametrize("reduce", ["max", "max_prob"])
def test_queries_that_share_are_those_of_transformers_where_no_block_is_cut(qwen3, engine, tmp_path, reduce):
    topmass.load_indexer(qwen3.indexer).reducing(reduce).save(tmp_path / "indexer")
    model = replace(qwen3, indexer=tmp_path / "indexer")
    settings = {"granularity": {"q_block": 16}, "decode": "sparse", "budget": 48}
    unit = topmass.Granularity(q_block=16)
    expected = [model.generate(p, granularity=unit, decode="sparse", budget=48) for p in PROMPTS]
    assert [engine(model, settings).run(p)[0] for p in PROMPTS] == expected
    chunked = engine(model, settings, max_num_batched_tokens=64, max_num_seqs=8)
    assert [chunked.run(p)[0] for p in PROMPTS] == expected
    assert expected != [model.generate(p, decode="sparse", budget=48) for p in PROMPTS]


@pytest.mark.parametrize("decode", ["dense", "sparse"])
def test_preempted_requests_generate_the_same(qwen3, engine, decode):
    """What was generated before a preemption is computed again in one call with its prompt, and stays generated."""
    prompts = [prompt(n, 20 + n) for n in (100, 90, 110, 95)]
    settings = {**SPARSE, "decode": decode}
    calm = engine(qwen3, settings).run(*prompts, tokens=60)
    tight = engine(qwen3, settings, num_gpu_blocks_override=14, max_model_len=256)
    scheduler = tight.llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    original = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *a, **k: (preempted.append(request), original(request, *a, **k))[1]
    assert tight.run(*prompts, tokens=60) == calm
    assert preempted


def test_receipts_of_requests_are_written(qwen3, engine, tmp_path):
    path = tmp_path / "receipts.jsonl"
    one = engine(qwen3, {**SPARSE, "receipts": str(path)})
    one.run(PROMPTS[0], tokens=5)
    one.run(PROMPTS[2], tokens=5)
    receipt = json.loads(path.read_text().splitlines()[0])
    assert receipt["generated"] == 4
    assert receipt["layers"]["0"]["sparse"] == 300 - 48
    assert receipt["layers"]["1"]["dense"] == {"within the budget": 48}


def test_dummy_weights_leave_the_indexer_alone(qwen3, engine):
    from topmass.selection.indexer import Indexer

    one = engine(qwen3, SPARSE, load_format="dummy")
    indexer = Indexer.load(qwen3.indexer).layer(1)
    (layer,) = (layer for name, layer in one.layers.items() if "layers.1." in name)
    served, hidden = layer.index, torch.randn(5, 64)
    _, packed = layer.project(served._linear[0], hidden)
    _, key, queries = layer.unpack(packed)
    torch.testing.assert_close(key, indexer.k_proj(hidden), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(queries, indexer.q_proj(hidden), rtol=1e-5, atol=1e-5)
    saved = {name: x for name, x in indexer.state_dict().items() if "proj" not in name}
    assert saved.keys() == served.layer.state_dict().keys()
    for name, weight in saved.items():
        assert torch.equal(served.layer.state_dict()[name], weight)


def test_a_product_that_takes_no_rows_has_one_beside_it(qwen3, engine, monkeypatch):
    """As for quantised weights, or a bias."""
    from topmass.integrations.vllm import layer
    from topmass.integrations.vllm.service import Service

    said = []
    monkeypatch.setattr(Service, "tell", lambda self, line: said.append(line))
    monkeypatch.setattr(layer, "_join", lambda *args: False)
    one = engine(qwen3, SPARSE)
    assert not any(served.index.joined for served in one.layers.values())
    assert [line for line in said if f"indexer of {len(one.layers)} layers takes a product of its own" in line]
    assert one.run(*PROMPTS) == [qwen3.generate(p, **SPARSE) for p in PROMPTS]


@pytest.mark.parametrize("joined", [True, False])
def test_weights_that_are_loaded_again_keep_the_indexer(qwen3, engine, monkeypatch, joined):
    from topmass.integrations.vllm import layer

    if not joined:
        monkeypatch.setattr(layer, "_join", lambda *args: False)
    one = engine(qwen3, SPARSE)
    expected = [qwen3.generate(p, **SPARSE) for p in PROMPTS]
    assert one.run(*PROMPTS) == expected
    one.llm.collective_rpc("reload_weights")
    assert one.run(*PROMPTS) == expected


def test_pages_hold_the_index_keys(qwen3, engine):
    one = engine(qwen3, SPARSE)
    layer = next(iter(one.layers.values()))
    assert layer.kv_cache.shape[-1] == 2 * 32 + 8
    spec = layer.get_kv_cache_spec(one.config)
    assert spec.page_size_bytes == 32 * 2 * (2 * 32 + 8) * 4
