"""`topmass distill` from the command line."""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import topmass
from topmass.results import load_run

SMALL = (
    "--length", 128, "--steps", 3, "--batch", 2, "--dim", 8, "--budget", 16, "--held-out", 1, "--evaluate-every", 3,
)  # fmt: skip


def assert_refused(result, pattern: str) -> None:
    assert result.code == 2
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if not line.startswith("loading ")]
    assert len(lines) == 1, result.err
    assert re.match(rf"topmass: error: .*({pattern})", lines[0], re.IGNORECASE), lines[0]


def test_one_command_makes_an_indexer(cli, model: Path) -> None:
    result = cli("distill", model, "-o", "indexer", *SMALL, "--json")
    assert result.code == 0, result.err
    assert result.json["held_out"] == {"length": 128, "budget": 16, "sequences": 1}
    assert set(result.json["recall"]) == {"0", "1"}
    assert "held out: 1 sequences of 128 tokens, 16 keys per query\n" in result.err
    assert f"next: topmass eval {model} --indexer indexer" in result.err
    indexer = topmass.load_indexer("indexer")
    assert indexer.info.model == str(model)
    assert indexer.info.recipe["steps"] == 3
    assert_refused(cli("distill", model, "-o", "indexer", *SMALL), "is a complete run; .*--overwrite")
    assert cli("distill", model, "-o", "indexer", *SMALL, "--overwrite").code == 0


def test_own_text(cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 90)
    result = cli("distill", model, "-o", "out", "--data", "book.txt", *SMALL)
    assert result.code == 0, result.err
    assert topmass.load_indexer("out").info.recipe["data"] == "book.txt, seed 0"


def test_recipe(cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[distill]\nsteps = 2\nheads = 2\nkv_block = 4\n")
    small = [x for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] != "--steps" for x in pair]
    result = cli("distill", model, "-o", "out", "--config", "recipe.toml", *small)
    assert result.code == 0, result.err
    info = topmass.load_indexer("out").info
    assert (info.recipe["steps"], info.layers[0].heads, info.kv_block) == (2, 2, 4)


def test_ctrl_c_saves_and_the_same_command_goes_on(cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from topmass.distill import trainer

    measured = trainer._Trainer._check
    steps = []

    def check(self, *args):
        steps.append(self.step)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return measured(self, *args)

    monkeypatch.setattr(trainer._Trainer, "_check", check)
    result = cli("distill", model, "-o", "out", *SMALL)
    assert result.code == 130
    assert "the same command resumes there" in result.err.splitlines()[-1]
    assert not Path("out").exists()
    again = cli("distill", model, "-o", "out", *SMALL)
    assert again.code == 0
    assert re.search(r"^resuming .*out.partial: 2 of 3 steps are done$", again.err, re.MULTILINE), again.err
    assert steps == [0, 1, 2]
    attempts = load_run("out").manifest["attempts"]
    assert [a.get("resumed_at_step") for a in attempts] == [None, 2]


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["distill", "reference"], "-o|--out"),
        (["distill", "reference", "-o", "out", "--data", "missing.txt"], "There is no file missing.txt"),
        (["distill", "reference", "-o", "out", "--data", "rows.json"], "read from JSONL only"),
        (["distill", "reference", "-o", "out", "--length", "512", "--budget", "512"], "leave nothing to select"),
        (["distill", "reference", "-o", "out", "--steps", "0"], "steps must be a whole number of at least 1"),
        (["distill", "reference", "-o", "out", "--q-block", "3"], "power of two"),
        (["distill", "reference", "-o", "out", "--features", "keys"], "keys.*--features"),
        (["distill", "./no/such/model", "-o", "out"], "There is no model at ./no/such/model"),
    ],
)
def test_refused(cli, argv: list[str], pattern: str) -> None:
    assert_refused(cli(*argv), pattern)
    assert not Path("out").exists()


def test_refused_after_loading(cli, model: Path, tmp_path: Path) -> None:
    assert_refused(cli("distill", model, "-o", "out", "--length", 4096), "beyond the model's 2048 positions")
    (tmp_path / "short.txt").write_text("too short")
    argv = ("distill", model, "-o", "out", "--data", "short.txt", *SMALL)
    assert_refused(cli(*argv), "too few for two sequences of 128")
    (tmp_path / "empty.jsonl").write_text("")
    assert_refused(cli("distill", model, "-o", "out", "--data", "empty.jsonl", *SMALL), "holds no text")
    assert not Path("out").exists()


def test_output_in_the_way_is_told_before_loading(cli, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for argv in (("distill", "./no/such/model", "-o", "mine"), ("eval", "./no/such/model", "--out", "mine")):
        assert_refused(cli(*argv), "mine exists and is not a run")


def test_eval_refuses_the_indexer_of_another_model_at_once(cli, model: Path) -> None:
    assert cli("distill", model, "-o", "indexer", *SMALL).code == 0
    other = topmass.load_indexer("indexer")
    other.info = other.info.replace(fingerprint=replace(other.info.fingerprint, num_layers=12))
    other.save("other")
    argv = ("eval", model, "--tasks", "niah_single", "--lengths", 512, "--haystacks", 1, "--out", "run")
    assert_refused(cli(*argv, "--indexer", "other"), "belongs to another model.*num_layers is 2")
    assert not list(Path().glob("run*"))


def test_eval_passes_the_crossover_and_the_backend_on(cli, model: Path) -> None:
    assert cli("distill", model, "-o", "indexer", *SMALL).code == 0
    indexer = topmass.load_indexer("indexer")
    indexer.info = indexer.info.replace(crossover={"cpu": 300})
    indexer.save("indexer")
    argv = ("eval", model, "--tasks", "niah_single", "--lengths", 512, "--haystacks", 1, "--budgets", 16)
    baselines = ("--baselines", "random", "streaming")
    extra = (*baselines, "--indexer", "indexer", "--dense-below", "auto", "--backend", "reference")
    result = cli(*argv, *extra, "--out", "run")
    assert result.code == 0, result.err
    assert "--dense-below has no effect on the streaming baseline" in result.err
    run = load_run("run")
    assert (run.manifest["config"]["dense_below"], run.manifest["config"]["backend"]) == ("auto", "reference")
    keys = {r["selector"]: r["keys_read_mean"] for r in run.records}
    assert keys["oracle"] == keys["indexer"] == keys["random"] > 100 > 16 >= keys["streaming"]
    number = cli(*argv, "--dense-below", 300, "--out", "other")
    assert number.code == 0, number.err
    same = {r["selector"]: r for r in load_run("other").records}["oracle"]
    assert same["fingerprint"] in {r["fingerprint"] for r in run.records}
    assert_refused(cli(*argv, "--dense-below", "auto", "--out", "third"), "give --indexer, or a number")
    assert_refused(cli(*argv, "--backend", "tritn", "--out", "third"), "Unknown backend 'tritn'.*known: reference")
    assert_refused(cli(*argv, "--dense-below", -1, "--out", "third"), "dense_below must not be negative")


def test_eval_of_an_indexer_prints_the_gaps(cli, model: Path) -> None:
    assert cli("distill", model, "-o", "indexer", *SMALL).code == 0
    argv = (
        "eval",
        model,
        "--tasks",
        "niah_single",
        "--lengths",
        512,
        "--haystacks",
        2,
        "--budgets",
        16,
        64,
        "--q-blocks",
        1,
        8,
    )
    result = cli(*argv, "--indexer", "indexer", "--out", "run", "--json")
    assert result.code == 0, result.err
    assert {c["setting"]["selector"] for c in result.json["cells"]} == {"dense", "oracle", "indexer", "untrained"}
    gaps = {(g["gap"], g["setting"]["budget"], g["setting"]["q_block"]) for g in result.json["gaps"]}
    assert {("oracle", "16", 1), ("indexer", "64", 1), ("sharing", "64", 8), ("realization", "16", 1)} <= gaps
    records = load_run("run").records
    assert all(r["support_recall"] == 1.0 for r in records if r["selector"] == "oracle" and r["status"] == "ok")
    assert all(
        0 < r["support_recall"] < 1
        for r in records
        if r["selector"] in ("indexer", "untrained") and r["status"] == "ok"
    )
    report = cli("report", "run", "--json")
    assert report.code == 0, report.err
    assert_refused(cli(*argv, "--indexer", "nowhere"), "There is no indexer at nowhere")
