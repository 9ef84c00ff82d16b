"""The frontier: scores and times of the same configuration meet, and of nothing else; what is recommended can be run."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import topmass
from topmass.cli import main
from topmass.core.budget import Budget
from topmass.errors import ConfigError, RunError
from topmass.eval.settings import columns, label
from topmass.report import build
from topmass.report.frontier import find_frontier, recommend, to_toml
from topmass.report.ttft_text import answers
from topmass.results import LoadedRun, Run, load_run, make_manifest
from topmass.selection import Indexer, IndexerConfig, Selector
from topmass.selection.indexer import ModelFingerprint

DEVICE = "NVIDIA Something, bfloat16"
MODEL = ModelFingerprint(
    model_type="llama", hidden_size=16, num_layers=1, full_layers=(0,), q_heads=2, kv_heads=1, head_dim=8, vocab_size=32
)
DENSE = topmass.DenseSelector()
QUICK = topmass.StreamingSelector(sink=4, window=28)
GOOD = topmass.PooledSelector(budget=64)
SLOW = topmass.PooledSelector(budget=128)
ORACLE = topmass.OracleSelector(budget=32)
# milliseconds, and the share of samples that it answers; None was not evaluated
PLAN = {QUICK: (40.0, 0.5), GOOD: (60.0, 1.0), SLOW: (80.0, 1.0), ORACLE: (30.0, 1.0)}


def ttft_rows(
    plan: dict[Selector, tuple[float, float | None]],
    length: int = 4096,
    *,
    dense: float = 100.0,
    backend: str = "triton",
) -> list[dict]:
    def rows_of(name: str, role: str, selector: Selector, ms: float, kernel: str) -> list[dict]:
        fixed = {
            "length": length, "batch": 1, "chunk": 0, "name": name, "role": role, **columns(selector), "decode": "dense",
            "dense_below": 0, "fingerprint": "" if role == "floor" else selector.fingerprint, "backend": kernel, "receipt": "",
            "status": "ok",
        }  # fmt: skip
        # the clock drifts over the rounds
        times = [
            fixed | {"metric": metric, "unit": "ms", "round": i, "value": ms * factor * (1 + i / 4)}
            for metric, factor in (("ttft", 1.0), ("layer", 0.1), ("tpot", 0.01))
            for i in range(5)
        ]
        return [*times, fixed | {"metric": "keys_read_mean", "unit": "keys/query", "round": -1, "value": 60.0}]

    rows = rows_of("stock", "dense", DENSE, 2 * dense, "stock") + rows_of("fa3", "dense", DENSE, dense, "fa3")
    rows += rows_of("floor", "floor", DENSE, 20.0, "floor")
    for selector, (ms, _) in plan.items():
        rows += rows_of(label(selector), "sparse", selector, ms, backend)
    missing = rows[0] | {
        "name": "cudnn",
        "metric": "ttft",
        "round": -1,
        "value": None,
        "status": "not installed: none.",
    }
    return [*rows, missing]


def eval_rows(
    plan: dict[Selector, tuple[float, float | None]],
    length: int = 4096,
    *,
    backend: str | None = "triton",
    haystacks: int = 100,
) -> list[dict]:
    rows = []
    for selector, (_, share) in {DENSE: (0.0, 1.0), **plan}.items():
        if share is None:
            continue
        for task in ("a", "b"):
            rows += [
                columns(selector)
                | {
                    "task": task, "length": length, "haystack": h, "question_id": 0, "seed": 0, "config": label(selector),
                    "dense_below": 0, "decode": "dense", "fingerprint": selector.fingerprint, "status": "ok",
                    "score": float(h < share * haystacks), "prediction": "7", "references": "[]", "prompt_tokens": length,
                    "keys_read_mean": 60.0, "seconds": 0.1, "backend": None if backend is None else backend,
                }
                for h in range(haystacks)
            ]  # fmt: skip
    return rows


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., LoadedRun]:
    def write(kind: str, rows: list[dict], name: str = "", **changes) -> LoadedRun:
        config = {"weights": "checkpoint", "indexers": {}, "linear_attention": ""} | changes.pop("config", {})
        manifest = make_manifest(kind, config, model="m", weights_hash="abc", device=DEVICE, command=f"topmass {kind}")
        key = ("task", "length", "config") if kind == "eval" else None
        with Run.open(tmp_path / "runs" / (name or kind), manifest | changes, key=key) as run:
            run.append(rows)
            return load_run(run.finish())

    return write


def by_name(points) -> dict:
    return {p.name: p for p in points}


def test_scores_and_times_of_one_configuration_meet(make) -> None:
    frontier = find_frontier([make("ttft", ttft_rows(PLAN)), make("eval", eval_rows(PLAN))])
    points = by_name(frontier.points[4096])
    assert list(points) == ["dense (fa3)", *(label(s) for s in (ORACLE, QUICK, GOOD, SLOW))]
    good, quick = points[label(GOOD)], points[label(QUICK)]
    assert good.fingerprint == GOOD.fingerprint
    assert good.change is not None
    assert good.change.point == 0.0
    assert quick.change is not None
    assert quick.change.point == -0.5
    assert quick.change.low < -0.5 < quick.change.high
    # paired by round: the drift is not in it
    assert good.speedup is not None
    assert (good.speedup.p10, good.speedup.p90) == pytest.approx((100 / 60, 100 / 60))
    assert good.ttft.median == 90.0
    assert good.layer is not None
    assert good.layer.median == 9.0
    assert frontier.points[4096][0].change.method == "dense by definition"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no evaluation was given"),
        (eval_rows(PLAN, length=8192), "not evaluated at 4096 tokens"),
        (eval_rows({QUICK: (0, 1.0)}), "not evaluated"),
        (eval_rows(PLAN, backend="reference"), "evaluated with reference, timed with triton"),
        ([r for r in eval_rows(PLAN) if r["task"] == "a" or r["selector"] == "dense"], "not run on every task"),
    ],
    ids=["none", "length", "configuration", "backend", "tasks"],
)
def test_nothing_else_meets(make, rows: list[dict], reason: str) -> None:
    runs = [make("ttft", ttft_rows(PLAN)), *([make("eval", rows)] if rows else [])]
    point = by_name(find_frontier(runs).points[4096])[label(GOOD)]
    assert point.change is None
    assert reason in point.reason
    assert not point.best


def test_plain_arithmetic_beside_the_kernel_changes_nothing(make) -> None:
    timed, kernel = make("ttft", ttft_rows(PLAN)), make("eval", eval_rows(PLAN))
    # dense rows name the same kernel in both; the sparse ones answer nothing
    plain = [r | ({} if r["selector"] == "dense" else {"backend": "reference", "score": 0.0}) for r in eval_rows(PLAN)]

    found = find_frontier([timed, kernel, make("eval", plain, "plain")])

    assert found.points == find_frontier([timed, kernel]).points


def test_scores_of_several_runs_and_of_old_ones_count(make) -> None:
    parts = [{QUICK: PLAN[QUICK]}, {GOOD: PLAN[GOOD]}]
    evals = [make("eval", eval_rows(p, backend=None), f"eval{i}") for i, p in enumerate(parts)]
    points = by_name(find_frontier([make("ttft", ttft_rows(PLAN)), *evals]).points[4096])
    assert points[label(QUICK)].change.point == -0.5
    assert points[label(GOOD)].change.point == 0.0
    assert points[label(GOOD)].reason == "its kernel was not recorded"
    assert points[label(SLOW)].change is None


def test_pareto_set_and_recommendation(make) -> None:
    frontier = find_frontier([make("ttft", ttft_rows(PLAN)), make("eval", eval_rows(PLAN))])
    # the oracle is faster here and as good, but sees what no server can
    assert {p.name for p in frontier.points[4096] if p.best} == {label(ORACLE)}
    found = recommend(frontier)
    assert (found.point.fingerprint, found.decided) == (GOOD.fingerprint, True)
    served = {s: v for s, v in PLAN.items() if s != ORACLE}
    frontier = find_frontier([make("ttft", ttft_rows(served), "t"), make("eval", eval_rows(served), "e")])
    assert {p.name for p in frontier.points[4096] if p.best} == {label(QUICK), label(GOOD)}
    assert {p.name for p in frontier.points[4096] if p.best_layer} == {label(QUICK), label(GOOD)}


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({QUICK: (40.0, 0.5)}, "dense attention dominates at this length: nothing was as good"),
        ({QUICK: (110.0, 0.5)}, "dense attention dominates at this length: nothing was as good, and nothing faster"),
        ({GOOD: (110.0, 1.0)}, "dense attention dominates at this length: what was as good was not faster"),
        ({ORACLE: (30.0, 1.0)}, "nothing but diagnostics was timed beside dense attention"),
        ({GOOD: (30.0, None)}, "quality was not measured, so nothing is recommended"),
    ],
)
def test_dense_may_dominate(make, plan, text: str) -> None:
    found = recommend(find_frontier([make("ttft", ttft_rows(plan)), make("eval", eval_rows(plan))]))
    assert found.point.dense
    assert found.text == text


def test_few_samples_decide_nothing(make) -> None:
    plan = {GOOD: (60.0, 1.0)}
    runs = [make("ttft", ttft_rows(plan)), make("eval", eval_rows(plan, haystacks=5))]
    found = recommend(find_frontier(runs))
    assert found.point.dense
    assert found.text.startswith(f"not decided: {label(GOOD)} is faster and may be as good")


@pytest.mark.parametrize("changes", [{"weights_hash": "other"}, {"model": "n"}, {"weights_hash": None}])
def test_other_weights_are_refused(make, changes) -> None:
    runs = [make("ttft", ttft_rows(PLAN)), make("eval", eval_rows(PLAN), **changes)]
    with pytest.raises(RunError, match="only with the same weights in the same dtype"):
        find_frontier(runs)


def test_other_devices_and_missing_times_are_refused(make) -> None:
    timed = make("ttft", ttft_rows(PLAN))
    with pytest.raises(RunError, match="compare times of one device"):
        find_frontier([timed, make("ttft", ttft_rows(PLAN), "other", device="another")])
    with pytest.raises(RunError, match="needs times"):
        find_frontier([make("eval", eval_rows(PLAN))])
    with pytest.raises(RunError, match="No run timed batch 4"):
        find_frontier([timed], batch=4)
    with pytest.raises(RunError, match=r"128 tokens were not timed; timed: 4096\."):
        recommend(find_frontier([timed]), 128)


def test_crossover_is_the_longest_length_that_is_not_won(make) -> None:
    rows = [
        r for n, ms in ((1024, 101.0), (2048, 100.0), (4096, 60.0), (8192, 30.0)) for r in ttft_rows({GOOD: (ms, 1)}, n)
    ]
    table = find_frontier([make("ttft", rows)]).table
    found = table.crossover(GOOD.fingerprint, 1, 0)
    assert (found.wins, found.dense_below) == (4096, 2048)
    won = find_frontier([make("ttft", ttft_rows(PLAN), "won")]).table.crossover(GOOD.fingerprint, 1, 0)
    assert (won.wins, won.dense_below) == (4096, None)
    lost = find_frontier([make("ttft", ttft_rows({GOOD: (200.0, 1)}), "lost")]).table.crossover(GOOD.fingerprint, 1, 0)
    assert (lost.wins, lost.dense_below) == (None, None)


def test_shares_against_the_floor(make) -> None:
    (case,) = find_frontier([make("ttft", ttft_rows(PLAN))]).table.cases
    assert case.best_dense == "fa3"
    assert case.share("fa3").median == pytest.approx(0.8)
    assert case.attained(label(GOOD)).median == pytest.approx(0.5)
    assert case.attention(label(GOOD)).p10 == pytest.approx(4.0 * 1.1)
    assert case.reason("cudnn") == "not installed: none."


def test_stress_rows_have_no_quality(make, tmp_path: Path) -> None:
    untrained = Indexer.create({0: IndexerConfig(hidden_size=16, dim=8)}, MODEL).selector(budget=64)
    plan = PLAN | {untrained: (50.0, None)}
    run = make("ttft", ttft_rows(plan), weights_hash=None, model="qwen3-8b", config={"weights": "random"})
    frontier = find_frontier([run])
    assert frontier.stress
    assert all(p.change is None for p in frontier.points[4096])
    assert not recommend(frontier).decided
    assert "a stress row: runtime only, no quality" in answers(frontier)[0]
    assert "50% of the attainable saving" not in answers(frontier)[0]
    text = build(run.path, tmp_path / "report").markdown.read_text()
    assert "Stress rows: random weights and random tokens, so quality was not measured." in text
    assert "qwen3-8b (random weights)" in text
    # no table of scores that nothing has
    assert "score change" not in text
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label(untrained)} |")]
    assert "untrained: stands in for a trained one's cost" in line
    assert "diagnostic" not in line


def test_report_shows_the_frontier(make, tmp_path: Path) -> None:
    make("ttft", ttft_rows(PLAN)), make("eval", eval_rows(PLAN))
    paths = build(tmp_path / "runs", tmp_path / "report")
    assert {"frontier-4096.svg", "ttft.svg"} <= {p.name for p in paths.figures}
    assert paths.answers[0].startswith(
        f"At 4K tokens: {label(GOOD)} is the fastest that is as good as dense attention, +0.0 ["
    )
    text = paths.markdown.read_text()
    assert "Which configuration is as good as dense attention, and faster?" in text
    assert "0 by definition" in text
    assert "| **oracle b=32 q1 k1 layer** |" in text
    # one length: names stand on an axis, not on top of each other
    assert "Time to first token, bars are p10 to p90" in text
    assert ">floor<" in (tmp_path / "report" / "figures" / "ttft.svg").read_text()


def test_slower_than_dense_saves_nothing(make, tmp_path: Path) -> None:
    make("ttft", ttft_rows({GOOD: (300.0, 1.0)}))
    text = build(tmp_path / "runs", tmp_path / "report").markdown.read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label(GOOD)} | triton |")]
    assert "| none |" in line
    assert "-250%" not in text


# -- what is recommended can be run


def toml_of(make, plan: dict, indexers: dict[str, str] | None = None, name: str = "") -> str:
    runs = [make("ttft", ttft_rows(plan), f"ttft{name}"), make("eval", eval_rows(plan), f"eval{name}")]
    frontier = find_frontier(runs)
    return to_toml(recommend(frontier), frontier, indexers=indexers or {}, runs=[r.id for r in runs])


@pytest.fixture
def indexer(tmp_path: Path) -> Indexer:
    made = Indexer.create({0: IndexerConfig(hidden_size=16, dim=8, kv_block=4)}, MODEL, training_tokens=1)
    made.save(tmp_path / "indexer")
    return made


@pytest.mark.parametrize(
    "selector",
    [
        topmass.StreamingSelector(sink=2, window=30),
        topmass.PooledSelector(
            budget="5%", granularity=topmass.Granularity(q_block=8, kv_block=16), sink=16, window=32
        ),
    ],
    ids=lambda s: s.name,
)
def test_toml_round_trip(make, tmp_path: Path, selector: Selector) -> None:
    (tmp_path / "serve.toml").write_text(toml_of(make, {selector: (50.0, 1.0)}))
    loaded = topmass.load_selector(tmp_path / "serve.toml")
    assert (loaded, loaded.fingerprint) == (selector, selector.fingerprint)


def test_toml_of_an_indexer(make, tmp_path: Path, indexer: Indexer) -> None:
    selector = indexer.selector(budget=64, granularity=topmass.Granularity(q_block=8, kv_block=4), window=8)
    text = toml_of(make, {selector: (50.0, 1.0)}, {indexer.digest: "indexer"})
    path = tmp_path / "serve.toml"
    path.write_text(text)
    loaded = topmass.load_selector(path)
    assert loaded.fingerprint == selector.fingerprint
    assert loaded.rule(0).budget == Budget(tokens=64)
    with torch.no_grad():
        next(indexer.parameters()).add_(1.0)
    with pytest.raises(ConfigError, match="the file was measured with"):
        topmass.load_selector(path, indexer=indexer)


def test_toml_of_one_of_several_indexers(make, tmp_path: Path, indexer: Indexer) -> None:
    single = Indexer.create({0: IndexerConfig(hidden_size=16, dim=8, reduce="mean")}, MODEL, training_tokens=1)
    single.save(tmp_path / "single")
    chosen = single.selector(budget=64, granularity=topmass.Granularity(q_block=8))
    groups = indexer.selector(budget=64, granularity=topmass.Granularity(kv_block=4))
    known = {indexer.digest: "indexer", single.digest: "single"}
    text = toml_of(make, {chosen: (40.0, 1.0), groups: (50.0, 1.0)}, known)
    (tmp_path / "serve.toml").write_text(text)
    assert 'indexer = "single"' in text
    assert topmass.load_selector(tmp_path / "serve.toml").fingerprint == chosen.fingerprint
    with pytest.raises(RunError, match="not among those of the runs"):
        toml_of(make, {chosen: (40.0, 1.0)}, {"0123456789ab": "a", indexer.digest: "indexer"}, "-again")


def test_dense_is_a_recommendation_too(make, tmp_path: Path) -> None:
    text = toml_of(make, {QUICK: (40.0, 0.5)})
    (tmp_path / "serve.toml").write_text(text)
    assert "score_change" not in text
    assert topmass.load_selector(tmp_path / "serve.toml") == DENSE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = 2\n", "version 2 of a selector"),
        ("version = 1\n", r"no table \[selector\]"),
        ("= 1\n", "is not TOML"),
        ('version = 1\n[selector]\nname = "indexr"\n', "name must be one of dense"),
        (
            'version = 1\n[selector]\nname = "streaming"\nwindw = 3\n',
            r"unknown key 'windw' in \[selector\]; did you mean 'window'",
        ),
        ('version = 1\n[selector]\nname = "pooled"\n', "missing or of another type"),
        ('version = 1\n[selector]\nname = "pooled"\nbudget = 3\n', "smallest that works"),
        ('version = 1\n[selector]\nname = "indexer"\nbudget = 64\n', "give its directory"),
    ],
)
def test_toml_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        topmass.load_selector(tmp_path / "serve.toml")


def test_command_writes_toml_and_crossover(make, tmp_path: Path, indexer: Indexer, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    selector = indexer.selector(budget=64)
    plans = {1024: {selector: (120.0, 1.0)}, 4096: {selector: (50.0, 1.0)}}
    timed = [r for n, plan in plans.items() for r in ttft_rows(plan, n)]
    make("ttft", timed, config={"indexers": {indexer.digest: "indexer"}}, device="cpu, float32, 2 threads")
    make("eval", [r for n, plan in plans.items() for r in eval_rows(plan, n)])
    code = main(["frontier", "runs", "--out", "out", "--store-crossover", "indexer", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(out)
    assert found["recommended"]["crossover"] == {"wins": 4096, "dense_below": 1024}
    assert found["recommended"]["point"]["fingerprint"] == selector.fingerprint
    assert Path(found["html"]).is_file()
    assert "`topmass frontier runs --out out`" in Path(found["markdown"]).read_text()
    # the file lies beside nothing, so the indexer is looked for here
    assert topmass.load_selector(found["toml"]).fingerprint == selector.fingerprint
    stored = topmass.load_indexer("indexer")
    assert stored.info.crossover == {"cpu": 1024}
    assert stored.digest == indexer.digest
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stored.selector(budget=64, dense_below="auto").dense_below == 1024
    with pytest.raises(ConfigError, match="needs a crossover measured on cpu"):
        indexer.selector(budget=64, dense_below="auto")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--store-crossover", "nosuch"), "nosuch.*indexer"),
        (("--out", "taken/report"), r"Cannot write to .*taken/report: .*taken is no directory\. Choose another --out"),
        (("--toml", "taken/a.toml"), r"Cannot write to .*taken is no directory\. Choose another --toml"),
        (("--toml", "runs"), r"Cannot write runs: it is a directory\. Choose another --toml"),
        (("--out", "locked/report"), r"Cannot write to .*locked is write-protected\. Choose another --out"),
    ],
)
def test_command_refuses_what_it_cannot_write_before_it_works(
    make, tmp_path: Path, capsys, monkeypatch, argv: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "locked").mkdir()
    # root may write everywhere
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")
    make("ttft", ttft_rows(PLAN))
    assert main(["frontier", "runs/ttft", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not list(tmp_path.glob("**/report.html"))


def test_command_writes_no_toml_without_scores(make, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    make("ttft", ttft_rows(PLAN))
    assert main(["frontier", "runs/ttft", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["toml"] is None
    assert "no configuration was written: evaluate what was timed" in err
    assert not list(tmp_path.glob("**/*.toml"))
