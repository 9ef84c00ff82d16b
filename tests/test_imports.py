"""Importing topmass costs little and changes nothing; each layer runs without the libraries it does not need."""

import json
import subprocess
import sys
import textwrap

import pytest


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter once `code` has run."""
    script = f"{textwrap.dedent(code)}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_import_is_lazy() -> None:
    loaded = modules_after("import topmass")
    assert not loaded & {"torch", "transformers", "triton", "vllm", "numpy", "scipy"}


@pytest.mark.parametrize("package", ["core", "ops", "selection"])
def test_lower_layers_know_no_model_library(package: str) -> None:
    assert not modules_after(f"import topmass.{package}") & {"transformers", "vllm"}


@pytest.mark.parametrize("package", ["results", "report"])
def test_results_are_read_without_torch(package: str) -> None:
    assert not modules_after(f"import topmass.{package}") & {"torch", "transformers"}


def test_every_public_name_resolves() -> None:
    modules_after("import topmass\nfor name in topmass.__all__:\n    assert getattr(topmass, name) is not None")


def test_unknown_name_is_an_attribute_error() -> None:
    modules_after("import topmass\nassert not hasattr(topmass, 'no_such_name')")


def test_import_patches_nothing_in_transformers() -> None:
    modules_after(
        """
        import torch, transformers
        from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils
        from transformers.models.qwen3 import modeling_qwen3
        from transformers.models.qwen3_5 import modeling_qwen3_5

        def state():
            registries = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
            spaces = [vars(m) for m in (modeling_utils, modeling_qwen3, modeling_qwen3_5)]
            spaces += [vars(c) for c in (modeling_qwen3.Qwen3Attention, modeling_qwen3_5.Qwen3_5Attention)]
            spaces += [vars(transformers.PreTrainedModel), vars(torch.nn.Module), vars(torch.nn.functional)]
            return [{name: id(value) for name, value in space.items()} for space in (*registries, *spaces)]

        before = state()
        import topmass
        for name in topmass.__all__:
            getattr(topmass, name)
        assert state() == before
        """
    )
