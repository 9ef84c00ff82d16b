"""Engine tests: a real vLLM on the CPU, in an environment of its own (`make test-vllm`); never part of `make test`."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

RUN = os.environ.get("TOPMASS_TEST_VLLM") == "1"
collect_ignore_glob = [] if RUN else ["test_*.py"]
# helpers beside the tests; a package here would be taken for vLLM itself
sys.path.append(str(Path(__file__).parent))

if RUN:
    # the engine in this process, so that a test can look inside; read when vLLM is imported
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_LOGGING_LEVEL="WARNING",
        VLLM_NO_USAGE_STATS="1",
        VLLM_PLUGINS="topmass",
        TRITON_INTERPRET="0",
    )


@pytest.fixture(autouse=True)
def poison_empty():
    """Nothing: vLLM reads memory that it has not written, where no result depends on it."""
    return


class Engine:
    """One vLLM engine, and the receipts of what it runs."""

    def __init__(self, model, settings=None, **options):
        from vllm import LLM

        if settings is not None:
            table = {"indexer": str(model.indexer), **settings}
            options["additional_config"] = {"topmass": table}
            options["attention_config"] = {"backend": "CUSTOM"}
        base = {
            "model": str(model.path),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "block_size": 32,
            "num_gpu_blocks_override": 256,
            "seed": 0,
        }
        self.llm = LLM(**{**base, **options})

    @property
    def config(self):
        return self.llm.llm_engine.vllm_config

    @property
    def service(self):
        from topmass.integrations.vllm import versions

        return versions.service_of(self.config)

    @property
    def layers(self):
        return self.config.compilation_config.static_forward_context

    def run(self, *prompts, tokens=16):
        """Greedy continuations, in the order of the prompts."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs]


@pytest.fixture
def engine():
    """Builds engines, and takes each away with the test."""
    made = []

    def build(model, settings=None, **options):
        made.append(Engine(model, settings, **options))
        return made[-1]

    yield build
    for one in made:
        one.llm.llm_engine.engine_core.shutdown()
    made.clear()
    gc.collect()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
