"""Traced by `torch.compile`, as every engine without `enforce_eager` is: what Python decides while tracing must hold afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_tiny import make, prompt

PROMPTS = [prompt(n, seed) for seed, n in enumerate((300, 129, 40))]
SPARSE = {"budget": 48, "sink": 2, "window": 4}


@pytest.mark.parametrize(("family", "backend"), [("qwen3", "eager"), ("llama", "eager"), ("qwen3", "inductor")])
def test_traced_layers_select_as_eager_ones(tmp_path, family, backend):
    # in a process without the checks of shapes, which cannot be traced; graphs as traced, or compiled to C++
    asked = {"VLLM_CPU_CI_ENV": "1" if backend == "eager" else "0", "VLLM_DISABLE_COMPILE_CACHE": "1"}
    command = [sys.executable, __file__, str(tmp_path), family]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["modes"][0].startswith("none")
    assert found["modes"][1] == f"dynamo_trace_once {backend}"
    assert found["tokens"][0] == found["tokens"][1]
    assert found["sparse"] == [(300 - 48) + (129 - 48)] * 2


def main(folder, family):
    """Write down the tokens of an eager and of a traced engine."""
    import torch
    from conftest import Engine

    torch.set_grad_enabled(False)
    model = make(Path(folder), family)
    found = {"modes": [], "tokens": [], "sparse": []}
    for options in ({}, {"enforce_eager": False, "max_num_batched_tokens": 70, "max_num_seqs": 8}):
        one = Engine(model, SPARSE, **options)
        compilation = one.config.compilation_config
        found["modes"].append(f"{compilation.mode.name.lower()} {compilation.backend}")
        found["tokens"].append(one.run(*PROMPTS))
        found["sparse"].append(one.service.receipts.total.layers[1].sparse)
        one.llm.llm_engine.engine_core.shutdown()
    (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
