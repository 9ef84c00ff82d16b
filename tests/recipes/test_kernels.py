"""The list of what is published of the kernels: each item once, timed, recorded and found again."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from topmass.results import Run, load_run, make_manifest


@pytest.fixture
def publish(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("kernels/publish.py")


def test_what_is_published_is_listed_once(publish: ModuleType, tmp_path: Path) -> None:
    items = publish.plan(small=True, rounds=2)
    names = [publish.describe(item) for item in items]
    assert len(set(names)) == len(names)
    assert {item.what for item in items} == {"layer", "oracle", "kl"}
    assert all(item.seconds > 0 for item in items)
    # an item is done when each of its growths is
    grown = next(item for item in items if len(item.growths) == 5)
    # one without growths, the shortest
    item = min((item for item in items if item.what == "layer" and not item.growths), key=lambda item: item.length)
    with Run.open(tmp_path / "run", make_manifest("bench", {}, model="tiny")) as run:
        rows = publish.time_item(item, run)
        assert publish.done(run, item, None)
        assert not publish.done(run, grown, None)
    text = "\n".join(publish.lines(rows))
    assert "x sdpa" in text
    assert "keys_read_mean" in text


def test_finishing_is_no_attempt(publish: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item = next(item for item in publish.plan(small=True, rounds=1) if item.what == "layer" and not item.growths)
    with Run.open(tmp_path / "run", make_manifest("bench", {}, model="tiny")) as run:
        publish.time_item(item, run)
    reported = []
    monkeypatch.setattr(publish.subprocess, "run", lambda argv: reported.append(argv) or SimpleNamespace(returncode=0))
    monkeypatch.setattr(sys, "argv", ["publish.py", "finish", "--out", str(tmp_path / "run")])

    assert publish.main() == 0

    found = load_run(tmp_path / "run")
    assert found.records == run.rows
    assert found.manifest["attempts"] == run.manifest["attempts"]
    assert reported[0][-3:] == [str(tmp_path / "run"), "--out", str(tmp_path / "run-report")]


def test_what_does_not_fit_is_left_for_the_same_command(
    publish: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["publish.py", "measure", "--out", str(tmp_path / "run"), "--small", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert publish.main() == 0
    left = capsys.readouterr().out.splitlines()
    # every item, and the reference checkpoint's own growth
    assert len(left) == len(publish.plan(small=True, rounds=5)) + 1
    assert all(line.startswith("left out, ") for line in left)
    assert (tmp_path / "run.partial" / "manifest.json").is_file()
