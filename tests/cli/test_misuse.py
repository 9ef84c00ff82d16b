"""Misuse ends in one line with a remedy and exit code 2."""

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from topmass.ops import _dispatch


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
        (["audit", "reference", "--mass", "2"], "--mass must be one of 0.9, 0.95, 0.99, got 2"),
        (["audit", "reference", "--plan", "no/such/plan.toml"], "there is no directory no/such"),
        (["audit", "reference", "--budgets", "abc"], "Cannot read the budget 'abc'"),
        (["audit", "reference", "--text", "nosuch.txt"], "Cannot read nosuch.txt: there is no such file"),
        (["eval", "reference", "--tasks", "niah_singel"], "Unknown task 'niah_singel'. Did you mean"),
        (["bench", "ttft", "tiny", "--device", "cpu", "--budgets", "0"], "at least 1 token"),
        (["bench", "ttft", "tiny", "--device", "cpu", "--q-blocks", "3"], "power of two"),
        (["bench", "ttft", "tiny", "--device", "cpu", "--backend", "nosuch"], "Unknown backend 'nosuch'"),
        (["bench", "serve", "tiny", "--modes", "dense", "--indexer", "nosuch"], "--indexer is of sparse engines"),
        (["bench", "serve", "tiny", "--q-blocks", "32", "--modes", "dense"], "no mode is sparse"),
        (["bench", "serve", "tiny", "--serve", "f.toml", "--budget", "64"], "--budget and --serve exclude each other"),
        (["bench", "serve", "tiny", "--indexer", "reference", "--dim", "32"], "--dim is of an untrained indexer"),
        (["report", "runs/nothing"], "No run at runs/nothing"),
        (["report"], "runs.*requires an argument"),
        (["eval", "./no/such/model"], "There is no model at ./no/such/model; give a directory"),
        (["audit", "./no/such/model"], "There is no model at"),
        (["audit", "reference", "--device", "tpu0"], "The device 'tpu0' cannot be used"),
    ],
)
def test_refused(cli, argv: list[str], pattern: str) -> None:
    assert_refused(cli(*argv), pattern)


def test_a_gpu_with_an_old_driver_is_told_of_in_one_line(cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        text = (
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update it."
        )
        warnings.warn(
            text + "\nAlternatively, go to ... (Triggered internally at CUDAFunctions.cpp:119.)", stacklevel=2
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    result = cli("eval", model, "--tasks", "niah_single", "--lengths", 4096, "--haystacks", 1)
    told = [line for line in result.err.splitlines() if "driver" in line]
    assert told == [
        "warning: The GPU is not used (CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)); "
        "update its driver or torch, or choose a device."
    ]


def test_triton_that_is_not_installed(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    pattern = "Unknown backend 'triton'.*known: reference; the package triton is not installed"
    assert_refused(cli("eval", "reference", "--backend", "triton"), pattern)


def test_triton_without_a_gpu_is_asked_for_by_name(cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("attention_mass", "sparse_prefill"):
        no_gpu = _dispatch.KernelBackend(name="triton", fn=print, why_not=lambda *_, **__: "needs CUDA tensors.")
        monkeypatch.setitem(_dispatch._BACKENDS[op], "triton", no_gpu)
    argv = ("eval", model, "--tasks", "niah_single", "--lengths", 512, "--haystacks", 1, "--budgets", 32)
    assert_refused(cli(*argv, "--backend", "triton"), "attention_mass' can run this call: triton needs CUDA tensors")


@pytest.mark.parametrize(
    ("made", "pattern"),
    [
        (lambda n: transformers.GPT2Config(vocab_size=n, n_embd=16, n_layer=2, n_head=2), "type 'gpt2' are not supported"),
        (
            lambda n: transformers.MistralConfig(
                vocab_size=n, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, sliding_window=8,
            ),
            "has no full-attention layer",
        ),
    ],
)  # fmt: skip
def test_unsupported_family(cli, model: Path, tmp_path: Path, made, pattern: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    config = made(len(tokenizer))
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "text.txt").write_text("some words to read " * 20)
    assert_refused(cli("audit", "other", "--text", "text.txt", "--length", 32), pattern)
    assert_refused(cli("distill", "other", "-o", "out", "--length", 128, "--budget", 16), pattern)


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


def test_checkpoint_without_tokenizer(cli, model: Path, tmp_path: Path) -> None:
    path = copy_model(model, tmp_path / "model")
    for file in path.glob("token*"):
        file.unlink()
    assert_refused(cli("audit", path), "has no tokenizer that transformers can read; put tokenizer.json")


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
    # refused before a text of that length is made
    assert_refused(cli("audit", model, "--length", 1_000_000_000), "2048 positions")


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
