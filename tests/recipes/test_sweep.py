"""The sweep of launch settings: candidates around today's, wrong results told from slow ones, and a file that is gone on with."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "recipes"
pytest.importorskip("triton")
# numpy's, of the interpreter
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")


@pytest.fixture
def sweep(load_recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES / "kernels"))
    return load_recipe("kernels/sweep.py")


@pytest.fixture
def cases(sweep: ModuleType) -> ModuleType:
    return importlib.import_module("sweep_cases")


@pytest.mark.parametrize("small", [False, True])
def test_every_case_is_listed_once_and_begins_with_todays_settings(sweep: ModuleType, small: bool) -> None:
    cases = sweep.plan(small)
    assert len({(case.op, case.name) for case in cases}) == len(cases)
    assert {case.op for case in cases} == {"sparse_prefill", "index_topk", "topk_support", "attention_mass"}
    for case in cases:
        configs = case.candidates(sweep.ROOM)
        assert configs[0] == case.today()
        assert 2 <= len(configs) <= case.most
        assert len({json.dumps(config) for config in configs}) == len(configs)
        assert not any(case.hopeless(config, sweep.ROOM) for config in configs[1:])
        # less shared memory, fewer candidates
        assert all(not case.hopeless(config, 100_000) for config in case.candidates(100_000)[1:])


def test_neighbours_share_two_thirds_of_a_random_support(cases: ModuleType) -> None:
    case = cases.Attend(length=1024, q_heads=4, kv_heads=1, dim=32, q_block=1, kv_block=4, budget=192, sink=4, window=8)
    support = cases.Draw("cpu").support(case.rule(1, 4), case.length)
    groups, counts = support.groups[0, 0], support.counts[0, 0]
    rows = groups[-32:]
    assert (counts[-32:] == rows.shape[1]).all()
    assert (rows.diff(dim=1) > 0).all()
    assert rows.min() >= 1
    assert ((rows.max(1).values + 1) * 4 <= support.window_start[-32:]).all()
    growth = rows.unique().numel() / rows.shape[1]
    assert growth == pytest.approx(1.5, abs=0.05)
    # short rows take every candidate
    early = int((counts > 0).nonzero()[0])
    assert groups[early, : counts[early]].tolist() == list(range(1, 1 + int(counts[early])))


def test_small_sweep_checks_times_and_goes_on(
    sweep: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep.json"
    # without time, nothing is begun
    assert sweep.main(["--out", str(out), "--small", "--seconds", "0"]) == 0
    assert json.loads(out.read_text())["cases"] == []
    assert "left out" in capsys.readouterr().out

    assert sweep.main(["--out", str(out), "--small"]) == 0
    found = json.loads(out.read_text())
    assert {case["op"] for case in found["cases"]} == {case.op for case in sweep.plan(True)}
    assert len(found["cases"]) == len(sweep.plan(True))
    assert found["versions"]["torch"] == torch.__version__
    for case in found["cases"]:
        assert case["winner"] in [entry["config"] for entry in case["entries"]]
        assert case["today_over_winner"] >= 1.0
        assert all(entry["status"] in ("ok", "dropped") and entry["ms"] > 0 for entry in case["entries"])
    assert {table["key"] for table in found["tables"]} <= {case["key"] for case in found["cases"]}

    # the same command finds everything done
    monkeypatch.setattr(sweep, "measure", lambda *_: pytest.fail("measured again"))
    capsys.readouterr()
    assert sweep.main(["--out", str(out), "--small"]) == 0
    assert f"{len(found['cases'])} cases kept, 0 to do" in capsys.readouterr().out
    assert json.loads(out.read_text())["cases"] == found["cases"]


def _toy(sweep: ModuleType, run: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows of a case whose results and failures are made up: settings are 1, 2, 3."""
    case = sweep.plan(True)[-1]
    monkeypatch.setattr(type(case), "open", lambda *_: sweep.Work(run, lambda a, b: (abs(a - b), int(a != b))))
    return sweep.measure(case, [({"n": n}, None) for n in (1, 2, 3)], sweep.Clock(60.0))


def test_wrong_results_and_failures_are_recorded_and_never_win(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: dict[str, int]) -> float:
        if config["n"] == 3:
            raise RuntimeError("out of resource: shared memory")
        return 5.0 * config["n"]

    rows = _toy(sweep, run, monkeypatch)
    assert [row["status"] for row in rows] == ["ok", "wrong", "does not launch"]
    assert "shared memory" in rows[2]["reason"]
    assert [("ms" in row) for row in rows] == [True, False, False]
    record = sweep.conclude(sweep.plan(True)[-1], rows)
    assert record["winner"] == {"n": 1}
    assert len(list(sweep.describe(record))) == 5


def test_a_nan_or_another_value_is_an_error(cases: ModuleType) -> None:
    a = torch.randn(1, 40, 2, 32)
    lse = torch.randn(1, 40, 2)
    assert cases.Attend.error((a, lse), (a.clone(), lse.clone())) == (0.0, 0)
    bad = a.clone()
    bad[0, 7, 1, 3] = float("nan")
    assert cases.Attend.error((bad, lse), (a, lse))[0] > 1
    off = lse + 0.01
    assert cases.Attend.error((a, off), (a, lse))[0] > 1
    assert cases.Scores.error(a[0, :, 0] + 0.1, a[0, :, 0])[0] > 1
    assert cases._unequal(torch.tensor([1, 2]), torch.tensor([1, 3])) == (2.0, 1)


def test_one_entry_serves_cases_that_lose_little(sweep: ModuleType) -> None:
    def record(name: str, times: dict[int, float]) -> dict[str, Any]:
        rows = [{"config": {"n": n}, "status": "ok", "ms": ms} for n, ms in times.items()]
        best = min(times.values())
        winner = next(row["config"] for row in rows if row["ms"] == best)
        return {"key": "k", "name": name, "entries": rows, "winner": winner, "today_over_winner": times[1] / best}

    (table,) = sweep.tables([record("a", {1: 1.2, 2: 1.0, 3: 1.02}), record("b", {1: 1.0, 2: 1.1, 3: 1.02})])
    assert table["config"] == {"n": 3}
    assert table["worst"] == pytest.approx(1.02)
    assert table["one_entry_serves_all"]
    assert table["today_worst"] == pytest.approx(1.2)
    (table,) = sweep.tables([record("a", {1: 1.2, 2: 1.0}), record("b", {1: 1.0, 2: 1.1})])
    assert not table["one_entry_serves_all"]
