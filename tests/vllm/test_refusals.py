"""What cannot be served exactly stops the start, in words that say what to do."""

import shutil

import pytest
from vllm_tiny import make


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make(tmp_path_factory.mktemp("one"), "qwen3")


def refusal(build):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - vLLM wraps errors of its configuration
        build()
    return str(caught.value)


def test_a_missing_indexer(qwen3, engine):
    assert "There is no indexer at nowhere" in refusal(lambda: engine(qwen3, {"indexer": "nowhere", "budget": 48}))


def test_a_damaged_indexer(qwen3, engine, tmp_path):
    shutil.copytree(qwen3.indexer, tmp_path / "indexer")
    weights = tmp_path / "indexer" / "indexer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "damaged" in refusal(lambda: engine(qwen3, {"indexer": str(tmp_path / "indexer"), "budget": 48}))


def test_an_indexer_of_another_model(qwen3, engine, tmp_path):
    other = make(tmp_path, "llama")
    found = refusal(lambda: engine(qwen3, {"indexer": str(other.indexer), "budget": 48}))
    assert "belongs to another model" in found
    assert "model_type is 'qwen3', the indexer's model had 'llama'" in found


def test_an_indexer_that_reads_queries_and_keys(engine, tmp_path):
    model = make(tmp_path, "qwen3", features="qk")
    assert "distil one with features = 'hidden'" in refusal(lambda: engine(model, {"budget": 48}))


def test_a_family_that_is_not_served(engine, tmp_path):
    model = make(tmp_path, "mistral")
    found = refusal(lambda: engine(model, {"budget": 48}))
    assert "topmass does not serve MistralForCausalLM" in found
    assert "LlamaForCausalLM, Qwen3ForCausalLM, Qwen3NextForCausalLM, Qwen3_5ForCausalLM" in found


def test_a_quantised_cache(qwen3, engine):
    found = refusal(lambda: engine(qwen3, {"budget": 48}, kv_cache_dtype="fp8"))
    assert "leave --kv-cache-dtype at 'auto'" in found


def test_another_attention_backend(qwen3, engine):
    found = refusal(lambda: engine(qwen3, additional_config={"topmass": {"indexer": str(qwen3.indexer), "budget": 48}}))
    assert "--attention-backend CUSTOM" in found


def test_a_budget_that_holds_nothing(qwen3, engine):
    assert "the smallest that works is" in refusal(lambda: engine(qwen3, {"budget": 4, "window": 8}))


def test_a_misspelt_setting(qwen3, engine):
    assert "did you mean 'dense_below'" in refusal(lambda: engine(qwen3, {"budget": 48, "dense_bellow": 4}))


def test_pages_that_travel(qwen3, engine):
    found = refusal(
        lambda: engine(
            qwen3, {"budget": 48}, kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
        )
    )
    assert "leave --kv-transfer-config out" in found


def test_micro_batches(qwen3, engine):
    assert "--ubatch-size" in refusal(lambda: engine(qwen3, {"budget": 48}, ubatch_size=2))
