"""The recipe of the long audit, on a tiny shape."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.parametrize(("most", "status"), [("1e9", 0), ("0", 1)])
def test_measures_every_layer_beside_the_dense_forward(
    most: str, status: int, load_recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = load_recipe("audit_100k.py")
    out = tmp_path / "audit.json"
    arguments = [
        "--shape",
        "tiny",
        "--tokens",
        "150",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--budgets",
        "32",
        "64",
        "--q-blocks",
        "1",
        "8",
        "--rounds",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["audit_100k.py", *arguments, "--most", most, "--out", str(out)])

    assert recipe.main() == status

    summary = json.loads(out.read_text())
    # two layers, two budgets, two query blocks
    assert len(summary["retained_mass"]) == 8
    assert summary["audit"]["times_the_faster_dense_forward"] == pytest.approx(
        summary["audit"]["seconds"] / min(d["seconds"] for d in summary["dense"].values())
    )
