"""On a GPU: kernels under compute-sanitizer, and operators as PyTorch checks them."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from topmass.core.granularity import Granularity
from topmass.ops import _dispatch, index_topk

PROGRAM = Path(__file__).with_name("small_kernels.py")


def load_program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("small_kernels", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = load_program()
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# Triton 3.6's interpreter calls int() on arrays of one element
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")


def find_sanitizer() -> str | None:
    """`compute-sanitizer` on the path, in the toolkit, or in NVIDIA's wheel."""
    wheel = importlib.util.find_spec("nvidia")
    roots = [
        os.environ.get("CUDA_HOME", ""),
        "/usr/local/cuda",
        *(wheel.submodule_search_locations or [] if wheel else []),
    ]
    found = [path for root in roots if root for path in Path(root).glob("**/bin/compute-sanitizer") if path.is_file()]
    return shutil.which("compute-sanitizer") or next(map(str, found), None)


def test_every_kernel_is_in_the_program() -> None:
    """A kernel that is registered and not watched fails here."""
    ops = {name for name in _dispatch.ops() if "triton" in _dispatch.available(name)}
    assert ops - {"dense_prefill", "dense_lse", "pooled_mass"} == set(SMALL.KERNELS)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("name", SMALL.KERNELS)
def test_the_program_matches_the_reference(name: str) -> None:
    SMALL.KERNELS[name]()


@gpu
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize("name", SMALL.KERNELS)
def test_sanitizer_finds_nothing(name: str, tool: str) -> None:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    # every tensor an allocation of its own, so that nothing lies behind its end
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-regex",
        "kns=_kernel",
        sys.executable,
        str(PROGRAM),
    ]
    done = subprocess.run([*command, name], env=env, capture_output=True, text=True, timeout=500, check=False)
    if "not supported" in done.stdout and "ok" not in done.stdout:
        pytest.skip(f"compute-sanitizer cannot watch this device: {done.stdout[-200:]}")
    if "Internal Sanitizer Error" in done.stdout:
        pytest.skip(
            f"compute-sanitizer's {tool} fails in itself: {done.stdout.split('Internal Sanitizer Error: ')[1][:80]}"
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{name} ok" in done.stdout


# -- operators

SAMPLES: dict[str, Callable[[int], tuple[object, ...]]] = {}


def sample(name: str) -> Callable[[Callable[[int], tuple[object, ...]]], Callable[[int], tuple[object, ...]]]:
    """Register the arguments of an operator for a number of queries that share a selection."""

    def keep(make: Callable[[int], tuple[object, ...]]) -> Callable[[int], tuple[object, ...]]:
        SAMPLES[name] = make
        return make

    return keep


@sample("sparse_prefill")
def _sparse_prefill(q_block: int) -> tuple[object, ...]:
    q, k, v = SMALL.layer()
    s = SMALL.support_of(Granularity(q_block=q_block), "reference")
    tensors = (q, k, v, s.groups, s.counts, s.window_start, s.dense_len, None, None)
    return (*tensors, q_block, 1, "layer", s.sink, s.window, s.q_start, 0.2, None)


def operators() -> list[str]:
    """Names of what the package registers with PyTorch."""
    assert index_topk
    prefix = "topmass::"
    return sorted({s.name.removeprefix(prefix) for s in torch._C._jit_get_all_schemas() if s.name.startswith(prefix)})


def test_every_operator_has_a_sample() -> None:
    assert set(operators()) == set(SAMPLES)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("q_block", [1, 32])
@pytest.mark.parametrize("name", SAMPLES)
def test_operator_is_sound(name: str, q_block: int) -> None:
    torch.library.opcheck(getattr(torch.ops.topmass, name).default, SAMPLES[name](q_block))
