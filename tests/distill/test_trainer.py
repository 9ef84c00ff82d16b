"""Distillation end to end on tiny random models: it learns, leaves the backbone alone, and can be interrupted."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_distill import CONFIG, FACTS, RandomIds, curve, run
from tiny_models import build, prompt

import topmass
from topmass.distill import DistillConfig, distill, indexer_kl, untrained
from topmass.distill.parallel import World
from topmass.distill.teacher import Lesson, Teacher, checksum
from topmass.distill.trainer import _Trainer
from topmass.errors import ConfigError, DataError, RunError
from topmass.ops import _dispatch
from topmass.ops.dense_prefill import dense_lse
from topmass.selection.indexer import IndexerSelector

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch):
    """Kernels in Triton's interpreter would take minutes; one thread makes sums repeat."""
    table = {op: {"reference": t["reference"]} for op, t in _dispatch._BACKENDS.items() if "reference" in t}
    monkeypatch.setattr(_dispatch, "_BACKENDS", table)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run that nobody interrupted."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(out).state_dict()


@pytest.mark.parametrize(("family", "settings"), [
    ("qwen3_5", {}),
    ("gemma3", {"features": "qk", "kv_block": 2, "heads": 2}),
    ("llama", {"q_block": 4, "kv_block": 2, "reduce": "max", "pool": "max", "sink": 2, "window": 3, "budget": 16}),
])  # fmt: skip
def test_learns_and_leaves_the_backbone_alone(family: str, settings: dict) -> None:
    model = build(family, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    config = dataclasses.replace(CONFIG, steps=24, rows_fraction=1.0, lr=2e-2, evaluate_every=24, **settings)
    seen = []
    indexer = distill(
        model, None, RandomIds(), config, progress=lambda *a: seen.append(float(a[2].split()[1].strip(",")))
    )
    assert sum(seen[-4:]) < 0.9 * sum(seen[:4])
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())
    start = untrained(model, config)
    assert mean_recall(model, indexer, config) > mean_recall(model, start, config)
    with topmass.sparsify(model, indexer.selector(budget=config.budget)) as served:
        model(prompt(40))
    assert {r.mode for r in served.receipt.layers.values()} == {"sparse"}


def mean_recall(model, indexer, config) -> float:
    trainer = _Trainer(model, resolved(config), RandomIds(), start=indexer, world=World(), run=None, progress=None)
    with trainer.teacher.open():
        rows = trainer._measure()
    return next(r["value"] for r in rows if r["metric"] == "recall" and r["layer"] == -1)


def resolved(config: DistillConfig) -> DistillConfig:
    return config.resolve(positions=None, gpu=False)


def test_measured_quality_is_of_the_held_out_sequences(whole) -> None:
    info = topmass.load_indexer(whole[0]).info
    assert info.held_out == {"length": 48, "budget": 8, "sequences": 2}
    assert all(0 < x < 1 for x in (*info.recall.values(), *info.retained_mass.values()))
    assert info.training_tokens == 48 * 4 * info.recipe["best_step"]
    last = curve(whole[0])
    assert all(r <= o for r, o in zip(last["retained_mass -1"], last["oracle_mass -1"], strict=True))
    assert len(last["kl 1"]) == 12
    assert len(last["recall 3"]) == 3
    assert sorted(p.name for p in whole[0].iterdir() if p.is_file()) == [
        "indexer.json",
        "indexer.safetensors",
        "manifest.json",
        "records.parquet",
    ]


@pytest.mark.parametrize("features", ["hidden", "qk"])
@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
def test_trainer_and_server_compute_the_same_bits(family: str, features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, dtype=torch.bfloat16)
    indexer = untrained(model, dataclasses.replace(CONFIG, features=features, kv_block=4))
    taught, served = {}, {}

    def learn(lesson: Lesson) -> None:
        taught[lesson.layer] = lesson.iq, lesson.ik

    with Teacher(model, indexer).open() as teacher:
        teacher.teach(prompt(30), learn, grad=False)
    select = IndexerSelector.select

    def spy(self, inputs):
        served[inputs.layer] = inputs.iq, inputs.ik
        return select(self, inputs)

    monkeypatch.setattr(IndexerSelector, "select", spy)
    with topmass.sparsify(model, indexer.selector(budget=29)):  # all but the last query dense: the inputs stay the same
        model(prompt(30))
    first = min(taught)
    assert all(torch.equal(a, b[..., : a.shape[-1]]) for a, b in zip(taught[first], served[first], strict=True))
    assert set(taught) == set(indexer.info.layers)


def test_drawn_rows_estimate_the_whole_without_bias() -> None:
    model = build("llama", dtype=torch.float32)
    config = resolved(dataclasses.replace(CONFIG, rows_fraction=0.25))
    trainer = _Trainer(model, config, RandomIds(), start=None, world=World(), run=None, progress=None)
    gen = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 48, 2, 4, generator=gen).double(), torch.randn(1, 48, 1, 4, generator=gen).double()
    iq = torch.randn(1, 48, 1, 4, generator=gen).double().requires_grad_()
    ik = torch.randn(1, 48, 4, generator=gen).double().requires_grad_()
    _, lse = dense_lse(q, k, k, scale=1.0)

    def gradient(rows):
        loss = indexer_kl(q, k, lse, iq, ik, scale=1.0, granularity=config.granularity, mask_forced=True, rows=rows)
        return torch.autograd.grad(loss, ik)[0]

    whole, draws, seen = gradient(None), [], torch.zeros(48)
    for step in range(600):
        trainer.step = step
        rows = trainer._drawn_rows()[0]
        assert len(set(rows.tolist())) == 12
        seen[rows] += 1
        draws.append(gradient(rows))
    # every row is drawn with probability 1/4: five standard deviations of a binomial
    assert (seen - 150).abs().max() < 5 * (600 * 0.25 * 0.75) ** 0.5
    mean, spread = torch.stack(draws).mean(0), torch.stack(draws).std(0)
    assert ((mean - whole).abs() <= 5 * spread / 600**0.5 + 1e-12).all()
    assert spread.max() > 0


def test_interrupted_run_ends_as_if_it_had_not_been(whole, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def interrupt(done: int, total: int, what: str) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(out, progress=interrupt)
    assert "the same command resumes there" in caught.value.__notes__[0]
    assert not out.exists()
    steps = []
    indexer = run(out, progress=lambda done, *_: steps.append(done))
    assert steps == list(range(7, 13))
    assert_same(whole, out, indexer.state_dict())


def test_killed_run_ends_as_if_it_had_not_been(whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = start_child(out, "slow")
    journal = tmp_path / "run.partial" / "journal.jsonl"
    steps = 3 + int.from_bytes(os.urandom(1)) % 6
    until = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= steps):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    child.kill()
    child.communicate()
    indexer = run(out)
    assert_same(whole, out, indexer.state_dict())


def assert_same(whole, out: Path, weights: dict[str, torch.Tensor]) -> None:
    assert curve(out) == curve(whole[0])
    assert all(torch.equal(weights[name], w) for name, w in whole[1].items())


def start_child(out: Path, mode: str, **env: str) -> subprocess.Popen:
    path = os.pathsep.join(map(str, (HERE.parents[1] / "src", HERE.parent)))
    return subprocess.Popen(
        [sys.executable, HERE.parent / "tiny_distill.py", out, mode],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_do_what_one_does(whole, tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [start_child(tmp_path / "run", "part", **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]
    for child in children:
        text, _ = child.communicate(timeout=200)
        assert child.returncode == 0, text
    one, two = curve(whole[0]), curve(tmp_path / "run")
    assert one.keys() == two.keys()
    for name, values in one.items():
        # selection is discrete: a near tie may fall the other way
        close = 0.02 if name.startswith(("recall", "retained", "oracle")) else 2e-4
        assert two[name] == pytest.approx(values, rel=close, abs=1e-6), name


def test_starts_from_another_indexer(whole) -> None:
    first = topmass.load_indexer(whole[0])
    model = build("qwen3_5", dtype=torch.float32)
    config = dataclasses.replace(CONFIG, steps=1, lr=1e-9, evaluate_every=1)
    indexer = distill(model, None, RandomIds(), config, start=first)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(first.parameters(), indexer.parameters(), strict=True))
    assert indexer.info.training_tokens == first.info.training_tokens + 192
    with pytest.raises(ConfigError, match="other layers or shapes"):
        distill(model, None, RandomIds(), dataclasses.replace(config, dim=4), start=first)


def test_stops_when_recall_stops_rising() -> None:
    config = dataclasses.replace(CONFIG, steps=12, lr=1e-12, evaluate_every=1, patience=3)
    steps = []
    model = build("llama", dtype=torch.float32)
    indexer = distill(model, None, RandomIds(), config, progress=lambda done, *_: steps.append(done))
    assert steps[-1] == 4
    assert indexer.info.recipe["steps_taken"] == 4


def test_blocks_are_scored_by_probability_unless_sharing_is_trained() -> None:
    for q_block, asked, decided in ((1, None, "max_prob"), (4, None, "max"), (1, "max", "max"), (4, "mean", "mean")):
        config = DistillConfig(length=64, q_block=q_block, reduce=asked)
        assert config.resolve(positions=None, gpu=False).reduce == config.reducing == decided


def test_learning_rate_rises_and_falls() -> None:
    config = DistillConfig(steps=100, warmup=0.1, lr=1.0, lr_end=0.1)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates.index(1.0) == 9
    assert rates[-1] == pytest.approx(0.1)


def test_checksum_sees_every_bit() -> None:
    model = build("llama", dtype=torch.bfloat16)
    before = checksum(model)
    assert checksum(model) == before
    weight = model.model.layers[0].mlp.up_proj.weight
    flat = weight.data.view(-1)
    flat[5], flat[6] = flat[6].clone(), flat[5].clone()
    after = checksum(model)
    assert [name for name in before if before[name] != after[name]] == ["model.layers.0.mlp.up_proj.weight"]


# --- what is refused ------------------------------------------------------------------------------------------------------


def test_refuses_a_model_in_training_mode() -> None:
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        distill(build("llama").train(), None, RandomIds(), CONFIG)


def test_refuses_a_model_with_gradients() -> None:
    model = build("llama")
    weight = next(model.parameters()).requires_grad_()
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(ConfigError, match="holds gradients"):
        distill(model, None, RandomIds(), CONFIG)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"length": 4096}, "beyond the model's 512 positions"),
        ({"length": 48, "window": 48, "budget": None}, "leave nothing to select"),
        ({"length": 48, "budget": 48}, "leave nothing to select"),
        ({"length": 48, "sink": 20, "budget": 8}, "smallest that works"),
        ({"length": 24}, "sequences of 48 tokens; set length=48"),
    ],
)
def test_refuses_lengths(settings: dict, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        distill(build("llama"), None, RandomIds(), dataclasses.replace(CONFIG, **settings))


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"rows_fraction": 0.0}, "rows_fraction must be above 0"),
        ({"warmup": 2.0}, "warmup is a share"),
        ({"q_block": 3}, "power of two"),
        ({"q_block": 4, "reduce": "max_prob"}, "trained for it query by query"),
        ({"patience": -1}, "patience must not be negative"),
        ({"workers": -1}, "workers must not be negative"),
    ],
)
def test_refuses_settings(settings: dict, pattern: str) -> None:
    with pytest.raises(ConfigError, match=pattern):
        DistillConfig(**settings)


def test_nan_ends_in_an_error_and_overwrites_nothing(whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, config=dataclasses.replace(CONFIG, steps=1))
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    model = build("qwen3_5", dtype=torch.float32)
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(DataError, match="not a distribution"):
        distill(model, None, RandomIds(), CONFIG, out=out, overwrite=True, facts=FACTS)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_named(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topmass.distill.trainer.indexer_kl", lambda *a, **k: indexer_kl(*a, **k) * factor)
    with pytest.raises(DataError, match="loss of layer 0 is not finite at step 1: check"):
        distill(build("llama", dtype=torch.float32), None, RandomIds(), CONFIG)


def test_refuses_a_taken_directory(whole) -> None:
    with pytest.raises(RunError, match="is a complete run"):
        run(whole[0])


def test_unfinished_runs_resume_only_as_they_were(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def fail(done: int, *_) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out, progress=fail)
    with pytest.raises(RunError, match=r"lr = 0\.005, not 0\.01"):
        run(out, config=dataclasses.replace(CONFIG, lr=1e-2))
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        run(out, resume=False)
    checkpoint = tmp_path / "run.partial" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(RunError, match="cannot be read"):
        run(out)
    # another configuration that discards it starts anew, not from the old checkpoint
    steps = []
    config = dataclasses.replace(CONFIG, lr=1e-2, steps=3)
    run(out, config=config, overwrite=True, progress=lambda done, *_: steps.append(done))
    assert steps == [1, 2, 3]
