"""The soak passes on a right backend and fails on a wrong one."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from topmass.ops import _dispatch

TINY = [
    "--device",
    "cpu",
    "--dtype",
    "bfloat16",
    "--backend",
    "reference",
    "--max-length",
    "70",
    "--most-tokens",
    "90",
    "--minutes",
    "2",
]


@pytest.fixture
def soak(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("soak.py")


def run(soak: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["soak.py", *TINY, *arguments])
    return soak.main()


def test_right_backend_passes(soak: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(soak, monkeypatch, "--cases", "6", "--out", str(tmp_path / "soak.json")) == 0

    summary = json.loads((tmp_path / "soak.json").read_text())
    assert summary["ok"]
    assert summary["cases"] == 6
    assert min(summary["rows_own"], summary["rows_listed"]) > 100
    assert summary["backends"]["reference"] > 6


def wrong(fn, spoil):
    def run(q, k, v, support, **settings):
        return spoil(fn, q, k, v, support, settings)

    return run


def misses_the_window(fn, q, k, v, support, settings):
    return fn(q, k, v, replace(support, window_start=support.window_start + 1), **settings)


def leaves_rows_out(fn, q, k, v, support, settings):
    out, lse = fn(q, k, v, support, **settings)
    hole = torch.empty_like(out)
    hole[:, : out.shape[1] // 2] = out[:, : out.shape[1] // 2]
    return hole, lse


@pytest.mark.parametrize("spoil", [misses_the_window, leaves_rows_out])
def test_wrong_backend_fails(soak: ModuleType, monkeypatch: pytest.MonkeyPatch, spoil, tmp_path: Path) -> None:
    table = _dispatch._BACKENDS["sparse_prefill"]
    backend = table["reference"]
    monkeypatch.setitem(table, "spoiled", replace(backend, name="spoiled", fn=wrong(backend.fn, spoil)))

    status = run(soak, monkeypatch, "--backend", "spoiled", "--cases", "3", "--out", str(tmp_path / "soak.json"))

    assert status == 1
    assert json.loads((tmp_path / "soak.json").read_text())["mismatches"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")
def test_kernel_in_the_interpreter(soak: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from topmass.ops._triton_common import INTERPRETED

    if not INTERPRETED:
        pytest.skip("the GPU runs the recipe itself")

    kernel = ("--backend", "triton", "--dtype", "float16", "--max-length", "36", "--cases", "3")
    assert run(soak, monkeypatch, *kernel) == 0


def test_cases_are_a_function_of_the_seed(soak: ModuleType) -> None:
    there = soak.subjects("cpu", torch.float32, 90)
    same = [str(soak.draw(i, seed, there, 90, 200)) for seed in (0, 0, 1) for i in range(5)]

    assert same[:5] == same[5:10] != same[10:]
