"""The frontier's recipe from end to end, and its verdict on kernels that disagree with arithmetic."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from topmass.results import load_run

SRC = Path(__file__).parents[2] / "src"
TINY = ["--lengths", "1024", "--budgets", "64", "--q-blocks", "32", "--groups", "1", "--tasks", "majority"]
TINY += ["--haystacks", "2", "--rounds", "1", "--workers", "1", "--seconds", "100000"]


@pytest.fixture
def frontier(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("frontier.py")


def run(frontier: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["frontier.py", *arguments])
    return frontier.main()


@pytest.mark.slow
def test_measure_and_finish(frontier: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("altair")
    monkeypatch.setattr("topmass.bench.ttft.GATE", 80)
    monkeypatch.setenv("PYTHONPATH", str(SRC))

    assert run(frontier, monkeypatch, "measure", "--out", str(tmp_path), *TINY) == 0
    status = run(frontier, monkeypatch, "finish", "--out", str(tmp_path))

    found = json.loads((tmp_path / "realization.json").read_text())
    # on a CPU both sides are plain PyTorch
    assert (found["samples"], found["equal_predictions"]) == (2, 1.0)
    assert found["realization_gap"]["low"] <= 0 <= found["realization_gap"]["high"]
    assert status == 0
    assert (tmp_path / "report" / "report.md").is_file()
    # nothing is measured by `finish`
    assert all(len(load_run(tmp_path / name).manifest["attempts"]) == 1 for name in frontier.RUNS)


def row(haystack: int, prediction: str, score: float) -> dict:
    return {
        "task": "majority", "length": 1024, "seed": 11, "haystack": haystack, "question_id": 0, "config": "c", "prediction": prediction,
        "score": score, "backend": "triton",
    }  # fmt: skip


def test_wrong_kernels_are_found(frontier: ModuleType) -> None:
    arithmetic = [row(i, "red", 1.0) for i in range(40)]
    kernels = [row(i, "blue" if i % 4 == 0 else "red", float(i % 4 > 0)) for i in range(40)]

    found = frontier.realization(kernels, arithmetic)

    assert not found["pass"]
    assert found["equal_predictions"] == 0.75
    assert found["realization_gap"]["low"] > 0
    assert len(found["different"]) == 10


def test_incomplete_haystacks_are_dropped(frontier: ModuleType) -> None:
    rows = [row(i, "red", 1.0) | {"config": c} for c in ("a", "b") for i in range(3)]
    late = row(3, "red", 1.0) | {"config": "a"}

    assert frontier.complete_haystacks([*rows, late]) == rows
    assert frontier.complete_haystacks(rows) == rows


def test_no_common_sample_is_no_pass(frontier: ModuleType) -> None:
    assert not frontier.realization([row(0, "red", 1.0)], [row(1, "red", 1.0)])["pass"]
