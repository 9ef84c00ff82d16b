"""`topmass bench kernels`."""

from pathlib import Path

import pytest
import torch

from topmass.results import load_run
from topmass.results.schema import SCHEMAS

SMALL = ("--shape", "4/2x16", "--lengths", 64, 80, "--budget", 48, "--dim", 8, "--rounds", 2)


def test_table_json_run_and_report(cli) -> None:
    result = cli("bench", "kernels", *SMALL, "--device", "cpu", "--json")
    assert result.code == 0, result.err
    assert "warning: on a CPU plain PyTorch is timed" in result.err
    assert result.json["run"].endswith("runs/bench-4-2x16")
    cells = {(c["length"], c["name"]): c for c in result.json["cells"]}
    assert {name for _, name in cells} == {"sdpa", "index", "attend", "layer", "copy", "matmul"}
    layer = cells[80, "layer"]
    assert set(layer) == {
        "shape", "length", "what", "config", "name", "role", "status", "ms", "tflops", "tb_per_s", "speedup",
        "keys_read_mean", "union_growth", "peak_memory_gib", "gate_error",
    }  # fmt: skip
    assert layer["ms"]["p10"] <= layer["ms"]["median"] <= layer["ms"]["p90"]
    assert layer["ms"]["samples"] == layer["speedup"]["sdpa"]["samples"] == 2
    assert cells[80, "attend"]["gate_error"] < 1e-5
    assert cells[80, "copy"]["tb_per_s"] > 0
    run = load_run("runs/bench-4-2x16")
    assert set(run.records[0]) == {c.name for c in SCHEMAS["bench"].columns}
    assert run.manifest["config"] == {
        "shape": "4/2x16", "budget": "48", "q_block": 32, "kv_block": 1, "dim": 8, "backend": "reference", "rounds": 2,
        "seed": 0, "device": "cpu",
    } | {"lengths": [64, 80], "what": ["layer"], "growth": []}  # fmt: skip

    report = cli("report", "runs/bench-4-2x16", "--json")
    assert report.code == 0, report.err
    text = Path(report.json["markdown"]).read_text()
    assert "A sparse layer at 80 tokens (b=48 q32 k1 layer):" in text
    assert "says nothing of any kernel" in text
    assert "figures/layer-time.svg" in text
    assert cli("bench", "kernels", *SMALL, "--device", "cpu").code == 2


def test_without_a_gpu_it_says_so(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli("bench", "kernels", *SMALL)
    assert result.code == 2
    assert result.err.splitlines() == [
        "topmass: error: bench kernels found no CUDA GPU: run it where there is one, or time plain PyTorch with --device cpu."
    ]
    assert not Path("runs").exists()


def test_recipe(cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[bench.kernels]\nshape = "4/2x16"\nlengths = [70]\nbudget = 40\nq_block = 1\nkv_block = 4\ngrowth = [1.5]\n'
    )
    argv = ("bench", "kernels", "--config", "recipe.toml", "--device", "cpu", "--rounds", 1, "--dim", 8, "--out", "run")
    result = cli(*argv)
    assert result.code == 0, result.err
    assert {(r["length"], r["config"]) for r in load_run("run").records} == {(70, "b=40 q1 k4 layer u=1.5")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bench.kernels]\nlength = [70]\n", "unknown key 'length' in [bench.kernels]; did you mean 'lengths'?"),
        ("[bench]\nlengths = [70]\n", "unknown key 'lengths' in [bench]; there are: [bench.kernels]."),
    ],
)
def test_misspelt_recipe(cli, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    result = cli("bench", "kernels", "--config", "recipe.toml", "--device", "cpu")
    assert result.code == 2
    assert result.err.strip().endswith(f"recipe.toml, line 2: {message}")
