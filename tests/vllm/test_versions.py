"""What differs between vLLM's versions, without an engine."""

import sys
from types import SimpleNamespace

import pytest

from topmass.integrations.vllm import versions
from topmass.integrations.vllm.pages import PageLayout
from topmass.integrations.vllm.service import Service
from topmass.integrations.vllm.settings import Settings

QWEN = "Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"


def test_a_text_only_configuration_is_prepared_where_vllm_does_not(monkeypatch):
    """The recurrent state in the dtype that the model names, and no positions of three dimensions."""
    from vllm.model_executor.models import config as module

    table = {QWEN[0]: module.MODELS_CONFIG_MAP[QWEN[0]]}
    monkeypatch.setattr(module, "MODELS_CONFIG_MAP", table)
    versions.register()
    rope = {"rope_theta": 1e6, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    text = SimpleNamespace(mamba_ssm_dtype="float32", rope_parameters=rope)
    cache = SimpleNamespace(mamba_ssm_cache_dtype="auto")
    given = SimpleNamespace(cache_config=cache, model_config=SimpleNamespace(hf_text_config=text))
    table[QWEN[1]].verify_and_update_config(given)
    assert cache.mamba_ssm_cache_dtype == "float32"
    assert rope == {"rope_theta": 1e6}


def test_what_vllm_prepares_itself_is_left_alone(monkeypatch):
    from vllm.model_executor.models import config as module

    table = dict.fromkeys(QWEN, object())
    monkeypatch.setattr(module, "MODELS_CONFIG_MAP", dict(table))
    versions.register()
    assert table == module.MODELS_CONFIG_MAP


class Older:
    """A V1 runner."""

    def execute_model(self):
        pass

    _build_attention_metadata = _determine_batch_execution_and_padding = execute_model


class Newer:
    """A V2 runner as of 0.26, which decides on graphs before it can be asked."""

    def execute_model(self):
        pass

    prepare_inputs = execute_model


@pytest.mark.parametrize(("newer", "guarded"), [(False, True), (True, False)])
def test_full_graphs_hang_on_the_runner_that_is_used(monkeypatch, newer, guarded):
    """Not on one that is merely loaded, by an engine before this one."""
    monkeypatch.setitem(sys.modules, versions._V1, SimpleNamespace(GPUModelRunner=type("A", (Older,), {})))
    monkeypatch.setitem(sys.modules, versions._V2, SimpleNamespace(GPUModelRunner=type("B", (Newer,), {})))
    monkeypatch.setattr(versions, "_speaks", lambda config: False)
    said = []
    service = Service(Settings(indexer="reference", budget=64), device="d", say=said.append)
    config = SimpleNamespace(additional_config={}, use_v2_model_runner=newer)
    backend = SimpleNamespace()
    versions.hold(backend, PageLayout(kv_heads=2, head_dim=8, columns=8), config, service)
    assert service.guarded is guarded
    assert bool(said) is not guarded
    assert backend.index_columns == 8
