"""Misuse ends in one line with a remedy and exit code 2."""

import re
from pathlib import Path

import pytest
import torch


def assert_refused(result, pattern: str) -> None:
    assert result.code == 2
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1, result.err
    assert re.match(rf"topmass: error: .*{pattern}", lines[0], re.IGNORECASE), lines[0]


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["evla", "reference"], "evla.*Did you mean \"?'?eval"),
        (["eval"], "model.*requires an argument"),
        (["eval", "reference", "--lenghts", "512"], "--lenghts.*Did you mean"),
        (["eval", "reference", "--lengths", "many"], "lengths.*many"),
        (["eval", "reference", "--share", "head"], "share.*head"),
        (["eval", "reference", "--haystacks", "0"], "haystacks must be at least 1, got 0"),
        (["eval", "reference", "--budgets", "lots"], "lots"),
        (["eval", "reference", "--budgets", "2", "--sink", "8"], "budget"),
        (["eval", "reference", "--q-blocks", "3"], "power of two"),
        (["audit", "reference", "--length", "0"], "length and texts must be at least 1"),
        (["report", "runs/nothing"], "No run at runs/nothing"),
        (["report"], "runs.*requires an argument"),
        (["eval", "./no/such/model"], "There is no model at ./no/such/model; give a directory"),
        (["audit", "./no/such/model"], "There is no model at"),
        (["audit", "reference", "--device", "tpu0"], "The device 'tpu0' cannot be used"),
    ],
)
def test_refused(cli, argv: list[str], pattern: str) -> None:
    assert_refused(cli(*argv), pattern)


def test_hub_id_without_network(cli) -> None:
    assert_refused(cli("eval", "nobody/no-such-model"), "is no directory, and the hub gives no such model")


def test_directory_without_checkpoint(cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(cli("audit", tmp_path / "empty"), r"has no config\.json")


def test_file_as_model(cli, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("x")
    assert_refused(cli("audit", tmp_path / "model.gguf"), "is a file; give the directory")


def copy_model(model: Path, to: Path) -> Path:
    to.mkdir()
    for path in model.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_unknown_architecture(cli, model: Path, tmp_path: Path) -> None:
    path = copy_model(model, tmp_path / "model")
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace('"llama"', '"perceptron"'))
    assert_refused(cli("audit", path), "transformers cannot load .*perceptron")


def test_damaged_weights(cli, model: Path, tmp_path: Path) -> None:
    path = copy_model(model, tmp_path / "model")
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:100])
    assert_refused(cli("audit", path), "cannot be read .*; get it again")


def test_nan_weights(cli, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy_model(model, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert_refused(cli("audit", path), r"The weights hold NaN or infinity \(first in model\.norm\.weight\)")


def test_length_beyond_the_positions(cli, model: Path) -> None:
    assert_refused(cli("eval", model, "--tasks", "niah_single", "--lengths", 4096, "--haystacks", 1), "2048 positions")


def test_unknown_task(cli, model: Path) -> None:
    assert_refused(
        cli("eval", model, "--tasks", "niah_singel", "--lengths", 512), "niah_singel.*Did you mean 'niah_single'"
    )


def test_empty_text(cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert_refused(cli("audit", model, "--text", tmp_path / "empty.txt"), "is empty")
    assert_refused(cli("audit", model, "--text", tmp_path / "none.txt"), "Cannot read")


def test_output_in_the_way(cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    argv = ("audit", model, "--length", 256, "--texts", 1, "--out", tmp_path / "run")
    assert_refused(cli(*argv), "is a file and in the way")


RECIPES = [
    ("[eval]\nlenghts = [512]\n", "line 2: unknown key 'lenghts' in .eval.; did you mean 'lengths'"),
    (
        "[audit]\nlength = 9\n\n[evel]\nlengths = [512]\n",
        "line 4: 'evel' is not the table of a command; did you mean 'eval'",
    ),
    ("# x\nlengths = [512]\n", "line 2: 'lengths' is not the table of a command"),
    ("[audit]\njunk = 1\n[eval]\nseed = 1\njunk = 2\n", "line 5: unknown key 'junk'"),
    ("[eval]\nconfig = 'other.toml'\n", "line 2: unknown key 'config'"),
    ("[eval\n", "is not TOML.*line 1"),
]


@pytest.mark.parametrize(("recipe", "pattern"), RECIPES)
def test_bad_recipe(cli, tmp_path: Path, recipe: str, pattern: str) -> None:
    (tmp_path / "recipe.toml").write_text(recipe)
    assert_refused(cli("eval", "reference", "--config", "recipe.toml"), rf"recipe\.toml.*{pattern}")


def test_missing_recipe(cli) -> None:
    assert_refused(cli("eval", "reference", "--config", "none.toml"), r"Cannot read the recipe none\.toml")
