"""The commands end to end on a tiny random model."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from topmass.cli import _progress, doctor, main
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.results import _machine, load_run

SRC = str(Path(__file__).parents[2] / "src")
EVAL = ("--tasks", "niah_single", "--lengths", 512, "--haystacks", 2, "--budgets", 16, 64)
AUDIT = ("--length", 256, "--texts", 1, "--budgets", 16)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], []])
def test_help_imports_no_torch(argv: list[str]) -> None:
    code = f"""
import sys
from topmass.cli import main
code = main({argv})
heavy = {{"torch", "transformers", "numpy", "pyarrow", "altair"}} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": SRC}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_of_every_command(cli) -> None:
    for name in ("audit", "eval", "report", "demo", "doctor"):
        result = cli(name, "--help")
        assert result.code == 0
        assert "--config" in result.out


def test_eval_report(cli, model: Path, tmp_path: Path) -> None:
    result = cli("eval", model, *EVAL, "--baselines", "streaming", "pooled", "--out", "runs/eval", "--json")
    assert result.code == 0, result.err
    cells = result.json["cells"]
    assert {c["setting"]["selector"] for c in cells} == {"dense", "oracle", "streaming", "pooled"}
    assert all(c["score"]["low"] <= c["score"]["point"] <= c["score"]["high"] for c in cells if c["status"] == "ok")
    run = load_run("runs/eval")
    assert run.manifest["config"]["budgets"] == ["16", "64"]
    assert run.manifest["model"] == str(model)
    assert len(run.manifest["weights_hash"]) == 64
    report = cli("report", "runs", "--json")
    assert report.code == 0, report.err
    assert Path(report.json["html"]) == Path("runs/report/report.html")
    assert Path(report.json["html"]).is_file()


def test_audit_writes_a_plan(cli, model: Path) -> None:
    import topmass

    result = cli("audit", model, *AUDIT, "--plan", "plan.toml", "--mass", 0.9, "--json", "--out", "runs/audit")
    assert result.code == 0, result.err
    assert set(result.json["plan"]) == {"0", "1"}
    assert {str(k): str(v) for k, v in topmass.Plan.load("plan.toml").layers.items()} == result.json["plan"]
    assert cli("report", "runs/audit").code == 0


def test_audit_of_own_text(cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    argv = (
        "audit",
        model,
        "--text",
        "book.txt",
        "--length",
        100,
        "--budgets",
        16,
        "--forwards",
        "dense",
        "--out",
        "run",
    )
    result = cli(*argv, "--texts", 9)
    assert result.code == 0, result.err
    assert "warning: --texts and --seed have no effect with --text" in result.err
    assert {r["q_len"] for r in load_run("run").records} == {100}


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (("--kv-blocks", 4), "add 1 to --kv-blocks"),
        (("--kv-blocks", 4, 16, "--q-blocks", 32, "--share", "kv_head"), "add 1 to --q-blocks, add 1 to --kv-blocks, use --share layer"),
        (("--kv-blocks", 1, 4), ""),
        (("--q-blocks", 32, "--kv-blocks", 1, "--grid", "axes"), ""),
    ],
)  # fmt: skip
def test_an_indexer_without_an_oracle_like_it_is_told_of(cli, argv: tuple, remedy: str, monkeypatch) -> None:
    def stop(*_, **__) -> None:
        raise ConfigError("far enough")

    monkeypatch.setattr("topmass.cli.eval.load", lambda *_: (None, None, {}))
    monkeypatch.setattr("topmass.cli.eval._check_indexer", lambda *_: None)
    monkeypatch.setattr("topmass.cli.eval.write_run", stop)
    told = cli("eval", "reference", "--indexer", "reference", "--budgets", 128, *argv).err.splitlines()
    text = f"warning: no oracle selects as the indexer does, so its gaps are not measured; {remedy}"
    assert told == [*([text] if remedy else []), "topmass: error: far enough."]


def test_demo_reports_and_keeps_what_is_complete(cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from topmass.cli import demo

    monkeypatch.setattr(demo, "AUDIT", replace(demo.AUDIT, length=256, texts=1, budgets=("16",)))
    small = replace(demo.EVAL, tasks=("niah_single",), lengths=(512,), haystacks=1, budgets=("64",), indexer=None)
    monkeypatch.setattr(demo, "EVAL", small)
    load = demo.load
    monkeypatch.setattr(demo, "load", lambda name, *args: load(str(model), *args))
    result = cli("demo", "--out", "runs/demo", "--json", "--device", "cpu")
    assert result.code == 0, result.err
    assert result.json["answers"][0].startswith("At 512 tokens")
    assert Path(result.json["html"]).is_file()
    again = cli("demo", "--out", "runs/demo", "--device", "cpu")
    assert again.code == 0, again.err
    assert "runs/demo/audit is complete already" in again.err
    assert "runs/demo/eval is complete already" in again.err


def test_recipe_sets_options_and_the_command_line_wins(cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[eval]\ntasks = ["niah_single"]\nlengths = [512]\nhaystacks = 1\nbudgets = [16, "5%"]\n'
    )
    result = cli("eval", model, "--config", "recipe.toml", "--budgets", 32, "--out", "run")
    assert result.code == 0, result.err
    config = load_run("run").manifest["config"]
    assert (config["lengths"], config["haystacks"], config["budgets"]) == ([512], 1, ["32"])


def test_complete_run_is_kept(cli, model: Path) -> None:
    argv = ("audit", model, *AUDIT, "--out", "run")
    assert cli(*argv).code == 0
    again = cli(*argv)
    assert again.code == 2
    assert "is a complete run; choose another output directory, or overwrite it (--overwrite)" in again.err
    assert cli(*argv, "--overwrite").code == 0


def test_interrupt_and_resume(cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import topmass.eval.runner as runner

    argv = ("eval", model, *EVAL, "--batch-tokens", 512, "--out", "run")
    rows, calls = runner._rows, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return rows(*args, **kwargs)

    monkeypatch.setattr(runner, "_rows", interrupted)
    result = cli(*argv)
    assert result.code == 130
    assert "topmass: interrupted; 3 rows are kept in" in result.err.splitlines()[-1]
    assert "the same command resumes there" in result.err.splitlines()[-1]
    other = cli(*argv, "--seed", 1)
    assert other.code == 2
    assert "was started with seed = 0, not 1" in other.err
    result = cli(*argv)
    assert result.code == 0, result.err
    assert "resuming" in result.err
    assert len(load_run("run").records) == 6
    assert len(calls) == 4 + 3


@pytest.mark.slow
def test_real_interrupt(model: Path, tmp_path: Path) -> None:
    argv = ["eval", model, "--tasks", "niah_single", "--lengths", 512, "--haystacks", 20, "--batch-tokens", 1]
    process = subprocess.Popen(
        [sys.executable, "-m", "topmass.cli", *map(str, argv), "--out", "run"],
        env=os.environ | {"PYTHONPATH": SRC, "TRITON_INTERPRET": "0"}, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        # a shell's background jobs ignore interrupts, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    journal = tmp_path / "run.partial" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1].startswith("topmass: interrupted; ")
    assert "Traceback" not in err


def test_bug_of_ours_has_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topmass.cli.doctor._devices", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_doctor(cli) -> None:
    found = cli("doctor", "--json").json
    assert found["versions"]["torch"]
    assert found["devices"][0]["name"] == "cpu"
    cpu = [b for b in found["backends"] if b["device"] == "cpu" and b["backend"] == "reference"]
    assert cpu
    assert all(b["why_not"] is None for b in cpu)
    assert "reference" in cli("doctor").err


@pytest.mark.parametrize("op", _dispatch.ops())
def test_doctor_tries_every_op(op: str) -> None:
    assert doctor._try(op, "reference", "cpu") is not None


@pytest.mark.parametrize(
    ("program", "named"),
    [("/x/bin/topmass", "topmass"), ("/x/topmass/__main__.py", "topmass"), ("/x/topmass/cli/__main__.py", "topmass"),
     ("/x/topmass/mine.py", "python mine.py")],
)  # fmt: skip
def test_the_command_is_stored_as_one_would_type_it(monkeypatch: pytest.MonkeyPatch, program: str, named: str) -> None:
    monkeypatch.setattr("sys.argv", [program, "audit", "reference"])
    assert _machine.command_line() == f"{named} audit reference"


def test_plain_progress_is_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 61.0, 62.0, 125.0])
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    with _progress.progress("eval") as report:
        for done in (10, 40, 41, 72):
            report(done, 100, "4096 tokens")
    assert capsys.readouterr().err.splitlines() == [
        "eval: 40/100 (40%), 0.49/s, 2 min left; 4096 tokens",
        "eval: 72/100 (72%), 0.5/s, 1 min left; 4096 tokens",
    ]


def test_progress_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with _progress.progress("eval") as report:
        report(1, 4, "x")
        report(2, 4, "x")
    assert capsys.readouterr().out == ""
