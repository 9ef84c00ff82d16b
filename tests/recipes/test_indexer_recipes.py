"""The indexer's recipes: budgets, batches, checks that can fail, and the page made of result files."""

import importlib
import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from topmass.results import LoadedRun

FOLDER = Path(__file__).parents[2] / "recipes" / "indexer"
NAMES = (
    "choice",
    "common",
    "compared",
    "found",
    "gap_report",
    "gap_tables",
    "gaps",
    "measure",
    "page",
    "promises",
    "training",
)


@pytest.fixture(scope="module")
def recipes():
    pytest.importorskip("transformers")
    pytest.importorskip("pyarrow")
    sys.path.insert(0, str(FOLDER))
    try:
        found = SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
        found.promises.SAMPLES = 40
        yield found
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


SCORES = {
    "dense": 0.95, "indexer": 0.95, "oracle": 0.95, "indexer shared": 0.9, "streaming": 0.3, "random": 0.3, "untrained": 0.2,
}  # fmt: skip


def rows_of(recipes, length, *, n, scores, budget):
    """Records as gaps.py writes them; every sample has one difficulty, so that scores are paired."""
    rng = np.random.default_rng(length)
    rows = []
    for task in recipes.common.list_tasks():
        hard = rng.random(n)
        for (label, score), h in itertools.product(scores.items(), range(n)):
            selector = label.split(maxsplit=1)[0]
            rows.append(
                {
                    "selector": selector, "budget": None if selector == "dense" else str(int(budget * length)),
                    "q_block": 32 if label.endswith("shared") else 1, "kv_block": 1, "share": "layer", "pool": "sum", "sink": 0, "window": 1,
                    "task": task, "length": length, "seed": 5, "haystack": h, "question_id": 0, "config": label, "dense_below": 0,
                    "decode": "dense", "fingerprint": "", "status": "ok", "score": float(hard[h] < score), "prediction": "",
                    "references": "[]", "prompt_tokens": length, "keys_read_mean": 1.0, "seconds": 0.1, "backend": "reference",
                    "support_recall": None if label == "dense" else 0.8,
                }
            )  # fmt: skip
    return rows


def runs_of(recipes, tmp_path, *, n=40, budget="1/16", trained=8192, seed=5, lengths=(4096, 8192, 16384), **changes):
    (tmp_path / "choice.json").write_text(json.dumps({"seed": 1001}))
    shares = recipes.common.Shares.parse(budget)
    found = []
    for length in lengths:
        rows = rows_of(recipes, length, n=n, scores={**SCORES, **changes}, budget=shares.mean)
        manifest = {
            "kind": "eval", "run_id": "x", "started": f"2026-01-01T00:00:{length % 60:02d}", "device": "a GPU", "seeds": {"tasks": seed},
            "config": {"budget": budget, "length": length, "trained_length": trained},
        }  # fmt: skip
        found.append(LoadedRun(path=tmp_path / f"test-{length}", manifest=manifest, records=rows))
    return found


def failures(recipes, runs) -> set[str]:
    nine = recipes.found.Found(runs, recipes.common.NINE)
    ten = recipes.found.Found(runs)
    return {c.name for c in recipes.promises.checks(runs, nine, ten) if not c.holds}


def test_shares_are_tokens_or_parts_of_the_visible_keys(recipes) -> None:
    uniform, split = (recipes.common.Shares.parse(text) for text in ("1/16", "1/64,7/64"))
    assert str(uniform.budget(4096, [3, 7])) == "256"
    assert str(split.budget(4096, [3, 7], extra=16)) == "plan(3:80, 7:464, default:dense)"
    assert split.tokens(4096) == uniform.tokens(4096) == 256
    visible = recipes.common.Shares.parse("1/16v")
    assert (str(visible), str(visible.budget(4096, [3, 7]))) == ("1/16v", "6.25%")


@pytest.mark.parametrize("ends", [(300, 100, 50), (7,), (5, 5, 5), (1, 40)])
def test_blocks_cover_every_haystack_once_and_fit(recipes, ends) -> None:
    found = list(recipes.common.blocks(16384, ends, 524288))
    assert [h for lo, hi in found for h in range(lo, hi)] == list(range(max(ends)))
    assert all(0 < hi - lo <= 32 for lo, hi in found)
    assert all(hi <= end or lo >= end for lo, hi in found for end in ends)


def test_samples_in_parts_are_those_of_one_call(recipes) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(recipes.common.REFERENCE)
    whole = recipes.common.make_samples("niah_single", tokenizer, length=512, n=3, seed=4)
    (part,) = recipes.common.write_samples(("niah_single", 512, 2, 1, 4))
    assert part[0] == whole[2]
    known = recipes.common.Known(tokenizer, {part[0].context: part[1]})
    assert known(part[0].context)["input_ids"] == tokenizer(part[0].context)["input_ids"]
    assert known.pad_token_id == tokenizer.pad_token_id


def test_a_good_indexer_passes_every_check(recipes, tmp_path) -> None:
    assert failures(recipes, runs_of(recipes, tmp_path)) == set()


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"indexer": 0.92}, {"indexer within 1 point", "the same, ten tasks", "the same at one length twice"}),
        ({"streaming": 0.85}, {"streaming at least 15"}),
        ({"random": 0.85}, {"random at least 15"}),
        ({"untrained": 0.85}, {"untrained at least 15"}),
        ({"budget": "1/16,3/32"}, {"budget at most 1/16"}),
        ({"seed": 1001}, {"budget chosen on other seeds"}),
        ({"n": 39}, {"40 samples"}),
        ({"trained": 16384}, {"the same at one length twice"}),
        ({"lengths": (4096, 16384)}, {"the three lengths"}),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_every_check_can_fail(recipes, tmp_path, changes, failed) -> None:
    found = failures(recipes, runs_of(recipes, tmp_path, **changes))
    assert {prefix for prefix in failed if any(name.startswith(prefix) for name in found)} == failed
    assert all(any(name.startswith(prefix) for prefix in failed) for name in found)


def test_gaps_are_steps_of_one_staircase(recipes, tmp_path) -> None:
    found = recipes.found.Found(runs_of(recipes, tmp_path, oracle=0.93, indexer=0.9), recipes.common.NINE)
    steps = [
        found.difference(a, b, found.lengths).point
        for a, b in (("dense", "oracle"), ("oracle", "indexer"), ("dense", "indexer"))
    ]
    assert steps[0] + steps[1] == pytest.approx(steps[2])
    assert found.difference("dense", "pooled", found.lengths) is None
    assert "pooled" not in recipes.gap_tables.gap_table(found, found)


def test_the_budget_is_the_smallest_of_the_best(recipes, tmp_path) -> None:
    (run,) = runs_of(recipes, tmp_path, lengths=(4096,), n=50)
    rows = []
    for r in run.records:
        if r["config"] == "dense":
            rows.append(r)
        for spec, keys in (("1/16", 256.0), ("1/32", 128.0)):
            if r["config"] in ("indexer", "streaming", "random", "untrained"):
                score = 0.0 if spec == "1/32" and r["config"] == "indexer" and r["haystack"] < 10 else r["score"]
                rows.append(r | {"config": f"{r['config']} {spec}", "keys_read_mean": keys, "score": score})
    small, large = sorted(
        recipes.choice.ranked([replace(run, records=rows)], ("1/16", "1/32")), key=lambda c: c["keys"]
    )
    assert (small["budget"], small["keys"]) == ("1/32", 128 / 4096)
    assert small["loss"] > large["loss"] == 0
    assert small["feasible"]
    assert large["feasible"]


def test_the_report_names_what_keeps_a_gap_and_what_does_not(recipes, tmp_path) -> None:
    runs = runs_of(recipes, tmp_path)
    for run in runs:
        for row in run.records:
            if row["task"] == "majority" and row["config"] == "indexer":
                row["score"] = 0.0
            if row["task"] == "niah_uuid" and row["config"] in recipes.gap_tables.SERVED:
                row["score"] = next(
                    r["score"] for r in run.records
                    if (r["task"], r["haystack"], r["config"]) == ("niah_uuid", row["haystack"], "dense")
                )  # fmt: skip
    nine, ten = recipes.found.Found(runs, recipes.common.NINE), recipes.found.Found(runs)

    assert recipes.found.real_gaps(ten) == ["majority"]
    rows, rest = recipes.gap_tables.task_parts(ten)
    assert "`majority`" in rows
    assert "`niah_uuid`" not in rows
    assert "`niah_uuid`" in rest
    _, text = recipes.gap_report.short_parts(runs, nine, ten, recipes.promises.checks(runs, nine, ten))
    assert "remains on `majority` and on no other task of the 10" in text
    assert "the same, ten tasks" in text.rpartition("not: ")[2]
    missing = "\n".join(recipes.gap_tables.layer_parts([], ["majority"], tmp_path))
    assert f"layers --out {tmp_path} --tasks majority" in missing
    assert "--budget" not in missing
    assert "--tasks majority --budget 1/16\n" in "\n".join(
        recipes.gap_tables.layer_parts([], ["majority"], tmp_path, budget="1/16")
    )


def test_what_was_to_be_shown_stands_first_and_says_where_it_fails(recipes, tmp_path) -> None:
    runs = runs_of(recipes, tmp_path, budget="7/64,1/64")
    uniform = runs_of(recipes, tmp_path, indexer=0.9, oracle=0.9)
    nine, ten = recipes.found.Found(runs, recipes.common.NINE), recipes.found.Found(runs)
    (tmp_path / "memory.json").write_text(
        json.dumps({"shape": "a", "tokens": 32768, "target": 2.5, "ratio": 2.6, "modes": {"step": {"peak_gib": 21.0}}})
    )
    checks = ["PASS  one curve: mean distance 1e-06 nats", "Throughput: 1.50 times that of one process."]
    (tmp_path / "two-gpus.json").write_text(json.dumps({"checks": checks, "throughput_ratio": 1.5}))

    head, lines = recipes.gap_report.short_parts(
        runs, nine, ten, recipes.promises.checks(runs, nine, ten), uniform=uniform, out=tmp_path
    )
    holds = {row.split(" | ")[0].strip("| "): row.split(" | ")[-1].strip("| ") for row in head.splitlines()}

    assert holds["with a budget of at most 1/16 of the context"] == "in the mean, not in every layer"
    assert holds["the same with 1/16 in every layer, nine tasks"] == "**no**"
    assert holds["the same on ten tasks"] == "yes"
    assert (
        holds["distillation step of a model of the shape `a` at 32,768 tokens: at most 2.5 times the dense forward"]
        == "**no**"
    )
    assert "| mean distance 1e-06 nats; 1.50 times the throughput | yes |" in head
    assert re.search(r"the oracle [1-9]", lines)
    assert "and the indexer against the oracle 0.0 [" in lines


def test_a_budget_in_every_layer_is_shown_with_what_fails(recipes, tmp_path) -> None:
    runs = runs_of(recipes, tmp_path, indexer=0.8, oracle=0.82)
    (tmp_path / "choice.json").unlink()
    runs[1].manifest["stopped"] = "out of time after 7 rows"
    text = "\n".join(recipes.gap_report.uniform_parts(runs))
    assert "FAIL  indexer within 1 point" in text
    assert "budget chosen on other seeds" not in text
    assert "sharing" not in text
    assert "8,192 tokens: out of time after 7 rows" in text


@pytest.fixture
def work(recipes, monkeypatch):
    """A run of two haystacks, whose processes have time for one at each start."""
    measure = recipes.measure
    rows = rows_of(recipes, 512, n=2, scores={"dense": 1.0}, budget=1 / 16)[:2]

    def block(self, work, library, run, lo, hi) -> None:
        run.append([rows[len(run.rows)]])
        raise TimeoutError

    monkeypatch.setattr(measure.Library, "order", lambda *_: None)
    monkeypatch.setattr(measure.Bench, "load", lambda self: setattr(self, "hash", "x"))
    monkeypatch.setattr(measure.Bench, "_block", block)
    monkeypatch.setattr(measure, "describe_device", lambda model: "a device")
    return measure.Work(
        part="test", length=512, tasks=(rows[0]["task"],), seed=5, selectors={}, counts={"dense": 2}, facts={}
    )


def started(recipes, out, **changes):
    """A process of gaps.py with time enough."""
    settings = {"device": "cpu", "out": out, "seconds": 1e9, "close": False, "batch_tokens": 512, **changes}
    return recipes.measure.Bench(SimpleNamespace(**settings), None)


def manifest_of(run):
    return json.loads((run / "manifest.json").read_text())


def test_a_run_that_is_closed_says_where_it_stopped(recipes, tmp_path, work) -> None:
    assert started(recipes, tmp_path, close=True).measure(work)
    manifest = manifest_of(tmp_path / "test-512")
    assert manifest["stopped"] == "out of time after 1 rows"
    assert len(manifest["attempts"]) == 1


def test_a_process_that_is_late_closes_a_run_without_an_attempt(recipes, tmp_path, work, monkeypatch) -> None:
    assert not started(recipes, tmp_path).measure(work)
    before = manifest_of(tmp_path / "test-512.partial")
    monkeypatch.setattr(recipes.measure.Bench, "load", lambda self: pytest.fail("the model is not needed"))

    assert not started(recipes, tmp_path, seconds=0).measure(work)
    assert manifest_of(tmp_path / "test-512.partial") == before
    # as a process that is killed leaves it
    with (tmp_path / "test-512.partial" / "journal.jsonl").open("a") as journal:
        journal.write("[[")
    assert started(recipes, tmp_path, seconds=0, close=True).measure(work)

    (run,) = recipes.found.load_parts(tmp_path, "test")
    assert len(run.records) == 1
    assert run.manifest["attempts"] == before["attempts"]
    assert run.manifest["stopped"] == "out of time after 1 rows"


def test_a_model_that_loads_for_too_long_logs_no_attempt(recipes, tmp_path, work, monkeypatch) -> None:
    monkeypatch.setattr(recipes.measure.Bench, "load", lambda self: setattr(self.args, "seconds", 0))
    assert not started(recipes, tmp_path).measure(work)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_all_its_rows_is_closed_as_complete(recipes, tmp_path, work) -> None:
    for _ in range(2):
        assert not started(recipes, tmp_path).measure(work)
    assert started(recipes, tmp_path, seconds=0, close=True).measure(work)
    manifest = manifest_of(tmp_path / "test-512")
    assert "stopped" not in manifest
    assert (manifest["rows"], len(manifest["attempts"])) == (2, 2)


def test_a_run_without_rows_is_not_published(recipes, tmp_path, work) -> None:
    assert not started(recipes, tmp_path, seconds=0, close=True).measure(work)
    assert list(tmp_path.iterdir()) == []


def layer_run(recipes, tmp_path, tasks):
    """A run at 4K with one sparse layer at a time, of which layer 3 loses."""
    scores = {"dense": 0.95, "indexer layer 3": 0.4, "oracle layer 3": 0.9, "indexer layer 7": 0.95}
    (run,) = runs_of(recipes, tmp_path, lengths=(4096,))
    rows = [
        row | {"budget": None if row["config"] == "dense" else f"plan({row['config'].split()[-1]}:64)"}
        for row in rows_of(recipes, 4096, n=40, scores=scores, budget=1 / 16)
        if row["task"] in tasks
    ]
    return replace(run, records=rows)


def test_the_layer_that_loses_is_named(recipes, tmp_path) -> None:
    run = layer_run(recipes, tmp_path, ("majority",))
    words = recipes.gap_tables.layer_parts([run], ["majority"], tmp_path)[1]
    assert words.startswith("`majority`: with the indexer the loss is in layer 3 (")
    assert "not told from zero: layer 7 0.0 [" in words
    assert "with layer 7 sparse on 0 of 40." in words


def test_tasks_together_tell_which_layer_loses_more(recipes, tmp_path) -> None:
    run = layer_run(recipes, tmp_path, ("majority", "common_words"))
    found = recipes.found.Found([run])
    text = recipes.gap_tables.layers_together(found)
    assert text.startswith("`common_words` and `majority` together: layer 3 loses ")
    assert "points more in layer 3 than in layer 7." in text
    n, of = found.changed("indexer layer 3", "majority")
    assert 0 < n < of == 40


def test_a_device_is_named_for_the_lengths_that_it_ran(recipes, tmp_path) -> None:
    runs = runs_of(recipes, tmp_path)
    runs[2].manifest["attempts"] = [{"device": "a GPU, bfloat16"}, {"device": "another GPU, bfloat16"}]
    assert recipes.gap_report.devices(runs) == "a GPU (4,096, 8,192 tokens); a GPU and another GPU (16,384 tokens)"


def test_a_budget_by_mass_is_compared_at_equal_keys(recipes) -> None:
    found = object.__new__(recipes.page.Ablations)
    found.lengths = [4096]
    samples = [(4096, "majority", h, 0) for h in range(20)]
    levels = {"low": (0.5, 100.0), "high": (0.7, 400.0), "mass": (0.6, 200.0)}
    found.scores = {label: dict.fromkeys(samples, score) for label, (score, _) in levels.items()}
    found.keys = {(label, 4096): [keys] for label, (_, keys) in levels.items()}
    # 200 keys lie halfway between 100 and 400 on a logarithmic axis
    assert found.minus_between("mass", "low", "high").point == pytest.approx(0.0)
    assert found.minus("mass", "low").point == pytest.approx(0.1)
    assert found.minus_between("high", "low", "mass") is None


def test_the_published_ablations_make_every_section(recipes) -> None:
    folder = FOLDER.parents[1] / "benchmarks" / "indexer-ablations"
    parts = recipes.page.ablation_parts(recipes.page.Ablations(folder))
    headings = [part for part in parts if part.startswith("### ")]
    assert len(headings) == 12
    assert sum(part.startswith("What it tells:") for part in parts) >= 11
    assert "nan" not in "\n".join(parts).split()


def test_curves_are_held_against_run_to_run_noise(recipes) -> None:
    within = recipes.training.within
    assert within({"mean": 3e-3, "largest": 1.0}, {"mean": 2e-3, "largest": 1.0})
    assert not within({"mean": 5e-3, "largest": 1.0}, {"mean": 2e-3, "largest": 1.0})
    assert not within({"mean": 2e-4, "largest": 2e-4}, {"mean": 0.0, "largest": 0.0})


def test_the_page_says_what_is_missing(recipes, tmp_path) -> None:
    text = recipes.page.page(tmp_path / "results", tmp_path / "ablations")
    assert text.count("Not measured yet") == 5
    assert "gaps.py test" in text


def test_the_page_takes_numbers_from_files(recipes, tmp_path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    mode = {"median": 2.0, "p10": 1.5, "p90": 3.0, "samples": 4, "peak_gib": 31.25, "ratio": 1.0}
    found = {
        "shape": "a-shape",
        "tokens": 4096,
        "rounds": 4,
        "device": "a GPU",
        "modes": {"dense": mode},
        "ratio": 2.345,
        "target": 2.5,
    }
    (results / "memory.json").write_text(json.dumps(found))
    runs = {"one": {"tokens_per_s": 1234.5, "largest": 0.5, "mean": 0.25}}
    (results / "kill.json").write_text(json.dumps({"about": "About.", "runs": runs, "checks": ["PASS  it holds"]}))
    text = recipes.page.page(results, tmp_path / "ablations")
    assert "| dense | 2.00 [1.50, 3.00] | 2,048 | 31.2 |" in text
    assert "2.35 times" in text or "2.34 times" in text
    assert "| one | 1,234 | 5.00e-01 | 2.50e-01 |" in text
    assert "- PASS  it holds" in text
