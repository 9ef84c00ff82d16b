"""Requests to an engine: what is asked, what is recorded and shown; the engine itself is a stand-in with known times."""

import json
from pathlib import Path

import pytest

from topmass.bench import serve as bench
from topmass.bench.serve import ServeSetting, bench_serve, make_load
from topmass.bench.serve_engines import Answers, Engine, Launch, open_engine, timing
from topmass.bench.serve_models import prepare, untrained_indexer, vocabulary_of, write_shape
from topmass.bench.serve_worker import drive
from topmass.cli import main
from topmass.errors import ConfigError, DataError, TopmassError
from topmass.integrations.transformers.reference import REFERENCE
from topmass.report import serve as report
from topmass.report.serve import ServeTable, answers, line
from topmass.results import LoadedRun, load_run
from topmass.results.schema import SERVE_METRICS, check_rows
from topmass.selection.indexer import Indexer

SPEED = {"dense": 4.0, "sparse": 2.0, "floor": 1.0}
SETTING = ServeSetting(lengths=(8, 32), rates=(0.0, 4.0), requests=3, new_tokens=3, sparse={"budget": 4})


class Stand(Engine):
    """Answers at once, and says times that a prompt's length and the mode give."""

    def __init__(self, mode: str, log: list):
        self.mode, self.log = mode, log

    def ask(self, prompts, moments, new_tokens):
        self.log.append((self.mode, [list(p) for p in prompts], moments))
        slow = [SPEED[self.mode] * len(p) for p in prompts]
        return Answers(
            requests=[timing(0.0, t / 1e3, (t + 10.0 * (new_tokens - 1)) / 1e3, new_tokens) for t in slow],
            seconds=float(len(prompts)),
            generated=new_tokens * len(prompts),
            cached=0,
            usage=0.5,
            kv_memory=0.25,
        )

    def close(self) -> None:
        self.log.append((self.mode, "closed"))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list:
    found: list = []

    def stand(driver, launch, options):
        extra = options["additional_config"]
        mode = "sparse" if "topmass" in extra else "floor" if "topmass_floor" in extra else "dense"
        found.append((mode, options))
        return Stand(mode, found)

    monkeypatch.setattr(bench, "open_engine", stand)
    return found


LAUNCH = Launch(model="m", vocabulary=50, indexer="i")


def loaded(rows) -> LoadedRun:
    manifest = {"started": "2026", "kind": "serve", "device": "cpu", "config": {}, "model": "m"}
    return LoadedRun(path=Path("r"), manifest=manifest, records=check_rows("serve", rows))


def test_every_mode_gets_the_same_requests_and_modes_take_turns(log: list) -> None:
    rows = bench_serve(LAUNCH, SETTING)
    options = dict(entry for entry in log[:3])
    assert options["dense"] == {"max_model_len": 35, "enable_prefix_caching": False, "additional_config": {}}
    assert options["sparse"]["additional_config"] == {"topmass": {"indexer": "i", "budget": 4}}
    assert options["sparse"]["attention_config"] == {"backend": "CUSTOM"}
    asked = [entry for entry in log[3:] if len(entry) == 3]
    # after the three warm-ups of the first case, one request at a time in another order each round
    rounds = [[mode for mode, _, _ in asked[i : i + 3]] for i in (3, 6, 9)]
    assert [sorted(one) for one in rounds] == [sorted(SPEED)] * 3
    assert len({tuple(one) for one in rounds}) == 3
    by_mode = {m: [p for mode, p, _ in asked if mode == m] for m in SPEED}
    assert by_mode["dense"] == by_mode["sparse"] == by_mode["floor"]
    assert log[-3:] == [("floor", "closed"), ("sparse", "closed"), ("dense", "closed")]
    checked = check_rows("serve", rows)
    assert all(r["unit"] == SERVE_METRICS[r["metric"]][0] for r in checked)
    assert {r["metric"] for r in checked} == set(SERVE_METRICS)


def test_a_case_is_told_in_a_sentence_and_a_table(log: list) -> None:
    table = ServeTable([loaded(bench_serve(LAUNCH, SETTING))])
    assert [(c.length, c.rate) for c in table.cases] == [(8, 0.0), (32, 0.0), (8, 4.0), (32, 4.0)]
    case = table.cases[1]
    # of the 96 ms that the floor saves, sparse attention saves 64
    assert case.attained("sparse") == pytest.approx(2 / 3)
    assert line(case, "sparse")[:7] == ["sparse", "64", "64", "2x", "10", "10", "1x"]
    assert case.total("sparse", "throughput") == pytest.approx(3.0)
    said = answers(table)
    assert len(said) == 4
    assert "sparse takes 64 ms to the first token" in said[1]
    assert "67% of what the floor saves, 100.0% over the floor; time per output token +0.0%" in said[1]


def test_a_sparse_engine_for_each_q_block(log: list) -> None:
    setting = ServeSetting(**{**_fields(SETTING), "q_blocks": (1, 32), "sparse": {"granularity": {"kv_block": 4}}})
    table = ServeTable([loaded(bench_serve(LAUNCH, setting))])
    sparse = [entry[1]["additional_config"]["topmass"] for entry in log[:4] if entry[0] == "sparse"]
    assert [one["granularity"] for one in sparse] == [{"kv_block": 4, "q_block": 1}, {"kv_block": 4, "q_block": 32}]
    assert table.cases[0].modes == ["dense", "sparse q1", "sparse q32", "floor"]
    said = answers(table)
    assert len(said) == 8
    assert "sparse q32 takes 64 ms" in said[3]
    assert report.ttft_by_length(table, "m", "cpu") is not None
    with pytest.raises(ConfigError, match="power of two"):
        ServeSetting(**{**_fields(SETTING), "q_blocks": (3,)})


def test_one_engine_at_a_time_gives_the_same_records(log: list) -> None:
    together = bench_serve(LAUNCH, SETTING)
    apart = bench_serve(LAUNCH, ServeSetting(**{**_fields(SETTING), "interleave": False}))
    order = ["length", "rate", "mode", "request", "metric"]
    key = [tuple(r[name] for name in order) for r in together]
    assert sorted(key) == sorted(tuple(r[name] for name in order) for r in apart)
    closed = [entry[0] for entry in log if entry[1] == "closed"][3:]
    assert closed == ["dense", "sparse", "floor"]


def _fields(setting: ServeSetting) -> dict:
    return {name: getattr(setting, name) for name in ServeSetting.__dataclass_fields__}


def test_moments_are_a_poisson_process_and_prompts_share_their_beginning() -> None:
    setting = ServeSetting(modes=("dense",), requests=2000, shared=0.25)
    load = make_load(setting, 1000, 8, 5.0)
    assert load.moments is not None
    gaps = [b - a for a, b in zip(load.moments, load.moments[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    # the mean of 2000 exponential gaps, within five of its standard errors
    assert abs(mean - 0.2) < 5 * 0.2 / 2000**0.5
    assert {tuple(p[:2]) for p in load.prompts} == {tuple(load.prompts[0][:2])}
    assert len({tuple(p) for p in load.prompts}) == 2000
    assert make_load(setting, 1000, 8, 5.0) == load
    assert make_load(setting, 1000, 8, 0.0).moments is None


def test_prompts_are_windows_of_a_text() -> None:
    text = list(range(100, 140))
    load = make_load(ServeSetting(modes=("dense",), requests=50, shared=0.5), 9, 8, 0.0, text=text)
    assert len({p[4] for p in load.prompts}) > 10
    for prompt in load.prompts:
        assert prompt[:4] == load.prompts[0][:4]
        assert prompt[4:] == list(range(prompt[4], prompt[4] + 4))
    with pytest.raises(ConfigError, match="has 40 tokens, and a prompt 41"):
        make_load(ServeSetting(modes=("dense",)), 9, 41, 0.0, text=text)


def test_a_text_needs_a_model_with_words(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The code of Ada is 12345. " * 20, encoding="utf-8")
    setting = ServeSetting(modes=("dense",), lengths=(64,))
    launch, _ = prepare("reference", setting, tmp_path, text=text)
    assert len(launch.text) > 64
    assert max(launch.text) < launch.vocabulary
    # without a file it is the needle task's, and more than a prompt of it
    assert len(prepare("reference", setting, tmp_path)[0].text) > 100
    assert not prepare("tiny", setting, tmp_path)[0].text
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((REFERENCE / "config.json").read_text())
    said: list[str] = []
    assert not prepare(str(tmp_path / "bare"), setting, tmp_path, say=said.append)[0].text
    assert any("no tokenizer, so prompts are random" in line for line in said)
    with pytest.raises(ConfigError, match="The shape tiny has no words"):
        prepare("tiny", setting, tmp_path, text=text)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        prepare("reference", setting, tmp_path, text=tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        prepare("reference", setting, tmp_path, text=tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"requests": 0}, "requests must be at least 1"),
        ({"new_tokens": 1}, "new_tokens must be at least 2"),
        ({"modes": ("dense", "fast")}, "modes are dense, sparse, floor"),
        ({"drivers": ()}, "drivers are offline, server; got none"),
        ({"lengths": (0,)}, "Lengths must be at least 1"),
        ({"rates": (float("nan"),)}, "Rates must be at least 0"),
        ({"shared": 1.0}, "below 1"),
        ({}, "needs an indexer and a budget"),
        ({"modes": ("dense",), "q_blocks": (32,)}, "no mode is sparse"),
        ({"modes": ("dense",), "engine": {"additional_config": 3}}, "additional_config must be a JSON object, got 3"),
        ({"modes": ("dense",), "engine": {"attention_config": "x"}}, "attention_config must be a JSON object"),
    ],
)
def test_wrong_settings_are_refused(given: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServeSetting(**given)


@pytest.mark.parametrize(
    ("sparse", "indexer", "words"),
    [
        ({"budget": "abc"}, None, "Cannot read the budget 'abc'"),
        ({"budget": 8, "dense_below": -1}, None, "dense_below must be a whole number"),
        ({"config": "missing.toml"}, None, "Cannot read the settings missing.toml"),
        ({"budget": 8}, "nosuch", "There is no indexer at nosuch"),
        ({"budget": 8}, "reference", "belongs to another model"),
    ],
)
def test_what_a_sparse_engine_would_refuse_is_refused_before_any_starts(
    tmp_path: Path, sparse: dict, indexer: str | None, words: str
) -> None:
    setting = ServeSetting(lengths=(64,), sparse=sparse)
    with pytest.raises(TopmassError, match=words):
        prepare("tiny", setting, tmp_path, indexer=indexer, say=lambda line: None)


def test_without_vllm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # the folder of its tests would pass for it
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[vllm\]'"):
        open_engine("offline", LAUNCH, {})


def test_a_process_that_ends_is_reported_with_its_own_words(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho noise\necho "ValueError: no such model" >&2\nexit 3\n')
    script.chmod(0o755)
    launch = Launch(model="m", vocabulary=5, python=str(script))
    for driver in ("offline", "server"):
        with pytest.raises(ConfigError, match=r"exit code 3\); it said: ValueError: no such model"):
            open_engine(driver, launch, {})


def test_shapes_become_directories_with_a_tokenizer_and_an_indexer_that_fits(tmp_path: Path) -> None:
    folder = write_shape("tiny", tmp_path / "tiny")
    assert vocabulary_of(folder) == 128
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3_5ForCausalLM"]
    info = Indexer.load(untrained_indexer(folder, tmp_path / "indexer", dim=8)).info
    assert sorted(info.layers) == [1, 3]
    assert info.layers[1].dim == 8
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder)("t5 t127")["input_ids"] == [5, 127]


def test_the_command_writes_a_run_and_a_report(
    log: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [
        "bench",
        "serve",
        "tiny",
        "--lengths",
        "8",
        "32",
        "--requests",
        "3",
        "--new-tokens",
        "3",
        "--drivers",
        "offline",
        "--dim",
        "8",
        "--budget",
        "4",
    ]
    assert main([*argv, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    cell = next(c for c in out["cells"] if c["mode"] == "sparse" and c["length"] == 32)
    assert cell["dense_ttft_over_this"]["median"] == pytest.approx(2.0)
    assert cell["of_attainable_saving"] == pytest.approx(2 / 3)
    run = load_run(out["run"])
    assert run.kind == "serve"
    assert run.manifest["weights_hash"] is None
    assert main(["report", out["run"], "--json"]) == 0
    text = Path(json.loads(capsys.readouterr().out)["markdown"]).read_text()
    assert "as fast as dense" in text
    assert "random weights" in text
    assert "figures/serve-ttft.svg" in text
    assert main([*argv, "--out", "other", "--engine", "[1]"]) == 2


def test_the_worker_s_loop_sends_requests_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine that counts its steps, on a clock that only it and sleeping move."""
    from types import ModuleType, SimpleNamespace

    from topmass.bench import serve_worker

    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(
        perf_counter=lambda: clock.now, sleep=lambda s: setattr(clock, "now", clock.now + max(s, 1e-6))
    )
    monkeypatch.setattr(serve_worker, "time", fake)
    vllm = ModuleType("vllm")
    vllm.SamplingParams = lambda **k: SimpleNamespace(**k)  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "vllm", vllm)

    class Core:
        def __init__(self) -> None:
            self.open: dict[str, int] = {}
            pool = SimpleNamespace(num_gpu_blocks=11, get_num_free_blocks=lambda: 10 - len(self.open))
            group = SimpleNamespace(kv_cache_spec=SimpleNamespace(page_size_bytes=2**30), layer_names=["a", "b"])
            scheduler = SimpleNamespace(
                kv_cache_manager=SimpleNamespace(block_pool=pool),
                kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
            )
            self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
            self.sent: list[tuple[str, float]] = []

        def has_unfinished_requests(self) -> bool:
            return bool(self.open)

        def add_request(self, name, prompt, sampling) -> None:
            self.open[name] = 0
            self.sent.append((name, clock.now))

        def step(self):
            clock.now += 1.0
            found = []
            for name in list(self.open):
                self.open[name] += 1
                done = self.open[name] == 3
                tokens = SimpleNamespace(token_ids=list(range(self.open[name])))
                found.append(
                    SimpleNamespace(request_id=f"{name}-x", outputs=[tokens], finished=done, num_cached_tokens=2)
                )
            for out in found:
                if out.finished:
                    del self.open[out.request_id.split("-")[0]]
            return found

    core = Core()
    found = drive(core, [[1, 2], [3, 4], [5, 6]], [0.0, 0.5, 9.0], 3)
    assert [name for name, _ in core.sent] == ["0", "1", "2"]
    # the second is due while a step runs, and waits for its end
    assert [at for _, at in core.sent] == pytest.approx([0.0, 1.0, 9.0])
    assert [r["ttft"] for r in found["requests"]] == pytest.approx([1000.0, 1500.0, 1000.0])
    assert [r["tpot"] for r in found["requests"]] == pytest.approx([1000.0] * 3)
    assert (found["generated"], found["cached"], found["usage"]) == (9, 6, 0.2)
    assert found["kv_memory"] == pytest.approx(4.0)
    core = Core()
    found = drive(core, [[1], [2]], None, 3)
    assert [at - core.sent[0][1] for _, at in core.sent] == [0.0, 3.0]
    assert found["seconds"] == pytest.approx(6.0)
