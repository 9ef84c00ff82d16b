"""Run directories: nothing lost after a kill, nothing overwritten by mistake, one line with a remedy otherwise."""

import json
import os
import re
import signal
import subprocess
import sys
from io import FileIO
from pathlib import Path
from unittest import mock

import pytest

from topmass.errors import RunError
from topmass.results import Run, find_runs, finish_partial, load_run, make_manifest
from topmass.results.schema import SCHEMAS, check_rows, markdown


def row(text: int = 0, **changes):
    values = {c.name: {"str": "a", "int": 1, "float": 0.5}[c.kind] for c in SCHEMAS["audit"].columns}
    return values | {"text": text} | changes


def manifest(**config):
    return make_manifest("audit", config, model="tiny", seeds={"data": 0}, command="topmass audit tiny")


def interrupt(path: Path, *texts: int, overwrite: bool = False, value: float = 0.5, **config) -> str:
    """Leave an unfinished run behind; return what the exception says about it."""

    def work() -> None:
        with Run.open(path, manifest(**config), overwrite=overwrite) as run:
            for text in texts:
                run.append([row(text, value=value), row(text, value=value, metric="b")])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        work()
    return " ".join(getattr(error.value, "__notes__", []))


def complete(path: Path, value: float = 0.5, **config) -> None:
    with Run.open(path, manifest(**config), overwrite=path.exists()) as run:
        run.append([row(0, value=value)])
        run.finish()


def assert_one_line(error: pytest.ExceptionInfo[RunError]) -> None:
    assert "\n" not in str(error.value)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    with Run.open(path, manifest(length=4096)) as run:
        assert not path.exists()
        run.append([row(0, value=0.25), row(0, value=None, metric="b")])
        run.finish()
    loaded = load_run(path)
    assert [r["value"] for r in loaded.records] == [0.25, None]
    assert list(loaded.records[0]) == [c.name for c in SCHEMAS["audit"].columns]
    assert loaded.manifest["config"] == {"length": 4096}
    assert loaded.manifest["finished"]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "records.parquet"]
    assert [p.name for p in path.parent.iterdir()] == ["run"]


def test_units_are_stored_with_the_columns(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    complete(tmp_path / "run")
    assert pq.read_schema(tmp_path / "run" / "records.parquet").field("q_len").metadata[b"unit"] == b"tokens"


def test_resumes_after_an_interrupt(tmp_path: Path) -> None:
    interrupt(tmp_path / "run", 0, 1)
    with Run.open(tmp_path / "run", manifest()) as run:
        assert run.resumed == 4
        assert [run.done((i,)) for i in range(3)] == [True, True, False]
        assert run.done(row(1))
        run.append([row(2)])
        run.finish()
    loaded = load_run(tmp_path / "run")
    assert [r["text"] for r in loaded.records] == [0, 0, 1, 1, 2]
    assert [a["rows_before"] for a in loaded.manifest["attempts"]] == [0, 4]


def test_each_attempt_has_its_own_start(tmp_path: Path) -> None:
    for hour in ("01", "02"):
        with Run.open(tmp_path / "run", manifest() | {"started": f"2026-01-01T{hour}:00:00+00:00"}) as run:
            run.append([row(int(hour))])
    assert run.manifest["started"][11:13] == "01"
    assert [a["started"][11:13] for a in run.manifest["attempts"]] == ["01", "02"]


def test_a_change_anywhere_in_the_package_marks_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from topmass.results import _machine

    def git(*args: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *args], cwd=tmp_path, check=True, capture_output=True)

    for part in ("results/_machine.py", "ops/kernel.py"):
        (tmp_path / "topmass" / part).parent.mkdir(parents=True)
        (tmp_path / "topmass" / part).write_text("a = 1\n")
    git("init"), git("add", "."), git("commit", "-m", "a")
    monkeypatch.setattr(_machine, "__file__", str(tmp_path / "topmass" / "results" / "_machine.py"))
    clean = _machine.git_commit()
    (tmp_path / "topmass" / "ops" / "kernel.py").write_text("a = 2\n")
    assert clean is not None
    assert _machine.git_commit() == clean + "+"


def test_a_partial_run_is_completed_as_it_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(tmp_path / "run", 0, 1)
    measured = json.loads((tmp_path / "run.partial" / "manifest.json").read_text())
    monkeypatch.setattr("topmass.results._machine.machine", lambda: {"processor": "another"})

    run = finish_partial(tmp_path / "run", keep=lambda rows: [r for r in rows if r["text"] == 1], stopped="early")

    assert {name: run.manifest[name] for name in measured if name != "finished"} == {
        name: value for name, value in measured.items() if name != "finished"
    }
    assert len(run.manifest["attempts"]) == 1
    assert (run.manifest["rows"], run.manifest["stopped"]) == (2, "early")
    assert [r["text"] for r in run.records] == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_partial_run_replaces_the_run_that_it_was_to_overwrite(tmp_path: Path) -> None:
    complete(tmp_path / "run")
    interrupt(tmp_path / "run", 0, overwrite=True, value=0.25)
    assert {r["value"] for r in finish_partial(tmp_path / "run").records} == {0.25}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["run", "nothing"])
def test_only_a_partial_run_can_be_completed(tmp_path: Path, name: str) -> None:
    complete(tmp_path / "run")
    with pytest.raises(RunError, match=r"no unfinished run at .*\.partial, so .*; check the path") as error:
        finish_partial(tmp_path / name)
    assert_one_line(error)


def test_a_run_that_is_being_written_is_not_completed(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", manifest()) as run:
        run.append([row(0)])
        with pytest.raises(RunError, match="Another process is writing"):
            finish_partial(tmp_path / "run")
        run.finish()


def test_an_interrupt_says_how_to_resume(tmp_path: Path) -> None:
    note = interrupt(tmp_path / "run", 0)
    assert re.match(r"2 rows are kept in .*run\.partial; the same command resumes there", note)


def test_resumes_after_a_kill(tmp_path: Path) -> None:
    code = f"""
import os, signal
from topmass.results import Run, make_manifest
run = Run.open({str(tmp_path / "run")!r}, make_manifest("audit", {{}}, model="tiny", seeds={{"data": 0}}))
run.append([{row(0)!r}])
os.kill(os.getpid(), signal.SIGKILL)
"""
    src = Path(__file__).parents[2] / "src"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(src)}, check=False)
    assert done.returncode == -signal.SIGKILL
    with Run.open(tmp_path / "run", manifest()) as run:
        assert run.done((0,))


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_half_written_last_batch_is_dropped_as_a_whole(tmp_path: Path, cut: int) -> None:
    interrupt(tmp_path / "run", 0, 1)
    journal = tmp_path / "run.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    with Run.open(tmp_path / "run", manifest()) as run:
        assert (run.done((0,)), run.done((1,)), run.resumed) == (True, False, 2)
        run.append([row(1)])
        run.finish()
    assert [r["text"] for r in load_run(tmp_path / "run").records] == [0, 0, 1]


def test_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    interrupt(tmp_path / "run", 0, 1)
    journal = tmp_path / "run.partial" / "journal.jsonl"
    first, second, _ = journal.read_bytes().split(b"\n")
    journal.write_bytes(first[:-9] + b"\n" + second + b"\n")
    with pytest.raises(RunError, match=r"line 1, is damaged; delete .*run\.partial") as error:
        Run.open(tmp_path / "run", manifest())
    assert_one_line(error)


class FullDisk(FileIO):
    """Writes half of a batch, then finds the disk full."""

    def write(self, data) -> int:
        if len(data) < 40:
            raise OSError(28, "No space left on device")
        return super().write(data[: len(data) - 20])


def test_failed_write_leaves_the_journal_whole(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", manifest()) as run:
        run.append([row(0)])
        run._journal, journal = FullDisk(tmp_path / "run.partial" / "journal.jsonl", "a+"), run._journal
        with pytest.raises(RunError, match="No space left"):
            run.append([row(1)])
        run._journal.close()
        run._journal = journal
        run.append([row(2)])
    with Run.open(tmp_path / "run", manifest()) as run:
        assert [run.done((i,)) for i in range(3)] == [True, False, True]


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"kind": "audit"}'])
def test_resume_with_a_broken_manifest_is_refused(tmp_path: Path, broken: str) -> None:
    interrupt(tmp_path / "run", 0)
    (tmp_path / "run.partial" / "manifest.json").write_text(broken)
    with pytest.raises(RunError, match=r"manifest.*delete") as error:
        Run.open(tmp_path / "run", manifest())
    assert_one_line(error)
    with Run.open(tmp_path / "run", manifest(), overwrite=True) as run:
        assert not run.done((0,))


def test_resume_without_a_manifest_is_refused(tmp_path: Path) -> None:
    interrupt(tmp_path / "run", 0)
    (tmp_path / "run.partial" / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"no manifest\.json"):
        Run.open(tmp_path / "run", manifest())


def test_resume_with_another_configuration_names_the_difference(tmp_path: Path) -> None:
    interrupt(tmp_path / "run", 0, lengths=[4096], oracle={"budget": 128, "sink": 0})
    with pytest.raises(RunError, match=r"with lengths = \[4096\], not \[8192\]; oracle.budget = 128, not 64;") as error:
        Run.open(tmp_path / "run", manifest(lengths=[8192], oracle={"budget": 64, "sink": 0}))
    assert_one_line(error)
    with Run.open(tmp_path / "run", manifest(lengths=[8192]), overwrite=True) as run:
        assert run.resumed == 0


def test_resume_with_other_weights_is_refused(tmp_path: Path) -> None:
    interrupt(tmp_path / "run", 0)
    with pytest.raises(RunError, match="weights_hash"):
        Run.open(tmp_path / "run", manifest() | {"weights_hash": "other"})


def test_unfinished_run_without_rows_binds_nobody(tmp_path: Path) -> None:
    interrupt(tmp_path / "run", lengths=[4096])
    with Run.open(tmp_path / "run", manifest(lengths=[8192])) as run:
        assert run.manifest["config"] == {"lengths": [8192]}


def test_overwriting_resumes_an_unfinished_run_of_the_same_configuration(tmp_path: Path) -> None:
    interrupt(tmp_path / "run", 0)
    with Run.open(tmp_path / "run", manifest(), overwrite=True) as run:
        assert run.done((0,))


def test_complete_run_is_not_overwritten_by_mistake(tmp_path: Path) -> None:
    complete(tmp_path / "run")
    with pytest.raises(RunError, match="complete run; choose another output directory, or overwrite") as error:
        Run.open(tmp_path / "run", manifest())
    assert_one_line(error)


def test_overwritten_run_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    complete(tmp_path / "run", 0.25)
    interrupt(tmp_path / "run", 0, overwrite=True, value=0.75)
    assert load_run(tmp_path / "run").records[0]["value"] == 0.25
    with Run.open(tmp_path / "run", manifest(), overwrite=True) as run:
        run.finish()
    assert load_run(tmp_path / "run").records[0]["value"] == 0.75
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_replacement_interrupted_between_its_renames_is_undone(tmp_path: Path) -> None:
    complete(tmp_path / "run", 0.25)
    (tmp_path / "run").rename(tmp_path / "run.old")
    with pytest.raises(RunError, match="complete run"):
        Run.open(tmp_path / "run", manifest())
    assert load_run(tmp_path / "run").records[0]["value"] == 0.25


def test_kill_between_table_and_rename_loses_nothing(tmp_path: Path) -> None:
    with mock.patch("topmass.results.store._publish", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        complete(tmp_path / "run")
    with Run.open(tmp_path / "run", manifest()) as run:
        assert run.done((0,))
        run.finish()
    assert len(load_run(tmp_path / "run").records) == 1


def test_two_writers_are_kept_apart(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", manifest()), pytest.raises(RunError, match="Another process is writing"):
        Run.open(tmp_path / "run", manifest())


@pytest.mark.parametrize("name", ["run", "run.partial"])
def test_file_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match="is a file and in the way") as error:
        Run.open(tmp_path / "run", manifest())
    assert_one_line(error)
    assert (tmp_path / name).read_text() == "mine"


def test_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(RunError, match=r"Cannot write .*Choose a writable output directory") as error:
        Run.open(tmp_path / "runs" / "run", manifest())
    assert_one_line(error)


def test_read_only_directory(tmp_path: Path) -> None:
    # permissions do not bind root, who may run the tests
    denied = PermissionError(13, "Permission denied", str(tmp_path / "run.partial"))
    with (
        mock.patch.object(Path, "mkdir", side_effect=denied),
        pytest.raises(RunError, match="Permission denied") as error,
    ):
        Run.open(tmp_path / "run", manifest())
    assert_one_line(error)


def test_foreign_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="is not a run; choose another"):
        Run.open(tmp_path / "run", manifest(), overwrite=True)


def _edit_manifest(run: Path, **changes: object) -> None:
    """Change entries of a manifest; `...` takes one out."""
    path = run / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in manifest.items() if value is not ...}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.rename(p.with_name("other")), "No run at"),
        (lambda p: p.rename(p.with_name("run.partial")), "is unfinished"),
        (lambda p: (p / "manifest.json").unlink(), r"no manifest\.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "records.parquet").unlink(), "not a complete run"),
        (lambda p: (p / "records.parquet").write_bytes(b"PAR1 cut"), "cannot be read"),
        (lambda p: _edit_manifest(p, kind="ttft"), "has no column .*, so it holds no ttft records"),
        (lambda p: _edit_manifest(p, started=...), "is not a manifest of a topmass run"),
    ],
)
def test_unreadable_run(tmp_path: Path, spoil, message: str) -> None:
    complete(tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(RunError, match=message) as error:
        load_run(tmp_path / "run")
    assert_one_line(error)


def test_run_of_a_newer_schema(tmp_path: Path) -> None:
    complete(tmp_path / "run")
    _edit_manifest(tmp_path / "run", schema_version=99)
    with pytest.raises(RunError, match="upgrade topmass"):
        load_run(tmp_path / "run")


def test_find_runs(tmp_path: Path) -> None:
    for name in ("b", "a"):
        complete(tmp_path / name)
    interrupt(tmp_path / "c", 0)
    assert find_runs(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(RunError, match="No run at"):
        find_runs(tmp_path / "nothing")


def test_rows_must_fit_the_schema(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", manifest()) as run:
        run.append([row(0)])
        with pytest.raises(ValueError, match="stored already"):
            run.append([row(0)])
    for changes, message in [({"layer": "1"}, "'layer' must be of type int"), ({"speed": 1}, "no column 'speed'")]:
        with pytest.raises(ValueError, match=message):
            check_rows("audit", [row(**changes)])


def test_documentation_is_current() -> None:
    path = Path(__file__).parents[2] / "docs" / "schemas.md"
    assert path.read_text(encoding="utf-8") == markdown()
