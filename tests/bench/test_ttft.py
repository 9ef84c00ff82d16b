"""Times to first token on a CPU: what is recorded, that a wrong result is never timed, and what is refused."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import topmass
from topmass.bench import modes as ways
from topmass.bench.models import MODELS, build_model, is_shape
from topmass.bench.shapes import SHAPES
from topmass.bench.ttft import Setting, bench_ttft, make_modes, random_prompts, text_prompts
from topmass.bench.ttft_clock import prefill
from topmass.bench.ttft_gate import check_mode
from topmass.cli import main
from topmass.errors import ConfigError
from topmass.ops import _dispatch
from topmass.results import load_run
from topmass.results.schema import TTFT_METRICS, check_rows
from topmass.selection import Indexer

SMALL = Setting(budgets=("24",), q_blocks=(8,), rounds=2, new_tokens=2, dim=8)


@pytest.fixture(autouse=True)
def reference_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    # kernels in Triton's interpreter would take minutes
    plain = {op: {"reference": table["reference"]} for op, table in _dispatch._BACKENDS.items() if "reference" in table}
    monkeypatch.setattr(_dispatch, "_BACKENDS", plain)


@pytest.fixture(autouse=True)
def one_thread():
    # a pool of threads only waits for itself in a model this small
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def tiny():
    return build_model("tiny", device="cpu", dtype=torch.float32)


def rows_of(rows: list[dict], name: str, metric: str) -> list[dict]:
    return [r for r in rows if (r["name"], r["metric"]) == (name, metric)]


def test_records_of_every_way_to_attend() -> None:
    model = tiny()
    setting = replace(SMALL, selectors=("indexer", "streaming"))
    before = model.config._attn_implementation
    rows = bench_ttft(model, setting, lengths=(20, 50), batches=(2,), prompts=random_prompts(model))
    assert model.config._attn_implementation == before
    assert check_rows("ttft", rows)[0]["name"] == "stock"
    indexer, streaming = "untrained b=24 q8 k1 layer max_prob", "streaming b=24 q1 k1 layer sink=4 window=20"
    mine = [r for r in rows if r["length"] == 50]
    assert {r["name"]: r["role"] for r in mine} == {
        "stock": "dense", "sdpa": "dense", indexer: "sparse", streaming: "sparse", "floor": "floor",
    }  # fmt: skip
    for name in ("stock", "sdpa", indexer, streaming, "floor"):
        for metric in ("ttft", "layer", "tpot"):
            found = rows_of(mine, name, metric)
            assert [r["round"] for r in found] == [0, 1]
            assert all(r["value"] > 0 and r["unit"] == TTFT_METRICS[metric][0] for r in found)
    # 2 full layers x 2 prompts x 50 positions x keys and values of 2 heads of 16 in float32
    assert {r["value"] * 2**20 for r in mine if r["metric"] == "kv_memory"} == {2 * 2 * 50 * 2 * 2 * 16 * 4}
    # a raw key of 8, and one half of its RoPE tables
    assert rows_of(mine, indexer, "index_memory")[0]["value"] * 2**20 == 2 * 2 * 50 * (8 + 2 * 2) * 4
    assert rows_of(mine, streaming, "index_memory")[0]["value"] == 0
    assert rows_of(mine, "floor", "gate_error") == []
    for name in ("sdpa", indexer, streaming):
        assert rows_of(mine, name, "gate_error")[0]["value"] < 1e-6
        assert rows_of(mine, name, "gate_logits_error")[0]["value"] < 1e-5


def test_receipts_say_what_ran() -> None:
    model = tiny()
    rows = bench_ttft(model, SMALL, lengths=(20, 50), prompts=random_prompts(model))
    first = {(r["length"], r["name"]): r for r in rows}
    indexer = "untrained b=24 q8 k1 layer max_prob"
    assert first[50, indexer]["backend"] == "reference"
    # the budget covers the prompt: dense, by its own kernel
    assert first[20, indexer]["backend"] == "dense"
    assert (first[50, "stock"]["backend"], first[50, "floor"]["backend"]) == ("stock", "floor")
    receipt = json.loads(first[50, indexer]["receipt"])
    assert [(x["layer"], x["mode"]) for x in receipt] == [(1, "sparse"), (3, "sparse")]
    assert "within the budget" in receipt[0]["reason"]
    assert [x["backend"] for x in json.loads(first[50, "sdpa"]["receipt"])] == ["sdpa", "sdpa"]
    keys = {
        name: rows_of([r for r in rows if r["length"] == 50], name, "keys_read_mean")[0]["value"]
        for name in (indexer, "sdpa", "floor")
    }
    assert keys["sdpa"] == 25.5
    assert keys["floor"] == 0
    assert keys[indexer] < 25.5
    fingerprint = first[50, indexer]["fingerprint"]
    (mode,) = [m for m in make_modes(model, SMALL)[0].values() if m.role == "sparse"]
    assert mode.selector.fingerprint == fingerprint
    assert first[50, "stock"]["fingerprint"] == topmass.DenseSelector().fingerprint


def test_chunks_give_the_same_logits_and_are_timed_whole() -> None:
    model = tiny()
    rows = bench_ttft(model, replace(SMALL, chunk=16), lengths=(50,), prompts=random_prompts(model))
    indexer = next(r for r in rows if r["role"] == "sparse")
    assert indexer["chunk"] == 16
    assert rows_of(rows, "sdpa", "keys_read_mean")[0]["value"] == 25.5
    ids = random_prompts(model)(1, 50)
    with torch.inference_mode():
        whole, parts = (prefill(model, ids, chunk)[0] for chunk in (0, 16))
    torch.testing.assert_close(parts, whole)
    with pytest.raises(ConfigError, match="chunk=20 splits query blocks of 8"):
        replace(SMALL, chunk=20)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    table = _dispatch._BACKENDS["sparse_prefill"]
    right = table["reference"]

    def forgets_a_key(q, k, v, support, **settings):
        return right.fn(q, k, torch.cat([v[:, :1] * 0, v[:, 1:]], 1), support, **settings)

    monkeypatch.setitem(table, "triton", replace(right, name="triton", fn=forgets_a_key))
    with pytest.raises(AssertionError, match=r"untrained b=24 q8 k1 layer max_prob, full budget, layer 1: max error"):
        bench_ttft(model, replace(SMALL, backend="triton"), lengths=(50,), prompts=random_prompts(model))
    assert model.config._attn_implementation == "sdpa"


def test_the_floor_would_not_pass_the_gate() -> None:
    model = tiny()
    floor = ways.Mode(name="copy", role="dense", attend=ways.copy_values)
    with pytest.raises(AssertionError, match="copy, layer 1: max error"):
        check_mode(model, floor, random_prompts(model)(1, 40))


def test_a_dense_kernel_that_refuses_costs_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()

    def refuses(q, k, v):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setitem(ways.BASELINES, "sdpa", replace(ways.BASELINES["sdpa"], run=refuses))
    rows = bench_ttft(model, SMALL, lengths=(50,), prompts=random_prompts(model))
    (row,) = [r for r in rows if r["name"] == "sdpa"]
    assert (row["value"], row["status"]) == (None, "failed: no kernel for this shape")
    assert rows_of(rows, "stock", "ttft")


def test_queries_that_share_are_scored_in_every_way_that_is_asked_for() -> None:
    found, _ = make_modes(tiny(), replace(SMALL, q_blocks=(1, 8), reduces=("max_prob", "max", "max")))
    modes = [m for m in found.values() if m.role == "sparse" and m.selector.config()["selector"] == "indexer"]
    # one query a block has one score
    assert [(m.selector.config()["q_block"], m.selector.config()["reduce"]) for m in modes] == [
        (1, "max_prob"),
        (8, "max_prob"),
        (8, "max"),
    ]
    assert len({m.name for m in modes}) == 3


def test_infeasible_settings_have_a_row_and_nothing_else_is_an_error() -> None:
    model = tiny()
    _, absent = make_modes(model, replace(SMALL, budgets=("4", "24")))
    ((name, (_, reason)),) = absent.items()
    assert (name, reason[:30]) == ("untrained b=4 q8 k1 layer", "infeasible: A budget of 4 keys")
    with pytest.raises(ConfigError, match="A budget of 4 keys cannot hold"):
        make_modes(model, replace(SMALL, budgets=("4",)))
    with pytest.raises(ConfigError, match="Unknown dense kernel 'fa2' on cpu"):
        make_modes(model, replace(SMALL, dense=("fa2",)))


def test_indexers_of_one_shape_have_two_names() -> None:
    model = tiny()
    mode = next(m for m in make_modes(model, SMALL)[0].values() if m.role == "sparse")
    info = mode.selector.indexer.info.replace(training_tokens=1)
    pair = [Indexer.create(info.layers, info.fingerprint, seed=i, training_tokens=1) for i in (0, 1)]
    names = [m.name for m in make_modes(model, SMALL, pair)[0].values() if m.role == "sparse"]
    assert names == [f"indexer b=24 q8 k1 layer max_prob {i.digest[:6]}" for i in pair]


def test_prompts_have_the_exact_length() -> None:
    model, tokenizer = topmass.load_reference()
    ids = text_prompts(model, tokenizer)(2, 1300)
    assert ids.shape == (2, 1300)
    assert not torch.equal(ids[0], ids[1])
    assert torch.equal(text_prompts(model, tokenizer)(2, 1300), ids)
    assert torch.equal(random_prompts(tiny())(2, 9), random_prompts(tiny())(2, 9))


@pytest.mark.parametrize("name", [n for n in MODELS if n in SHAPES])
def test_shapes_are_those_of_the_kernels(name: str) -> None:
    from transformers import AutoConfig

    kind, settings = MODELS[name]
    config, shape = AutoConfig.for_model(kind, **settings), SHAPES[name]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        shape.q_heads, shape.kv_heads, shape.head_dim,
    )  # fmt: skip
    full = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    assert (
        full.count("full_attention") == {"qwen3.5-9b": 8, "qwen3.5-0.8b": 6, "qwen3-8b": 36, "llama-3.1-8b": 32}[name]
    )


def test_names_of_shapes() -> None:
    assert is_shape("tiny")
    assert not is_shape("meta-llama/Llama-3.1-8B")
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3.1-8b'\?"):
        is_shape("llama-3.1-8B")


# -- the command

ARGV = ["bench", "ttft", "tiny", "--lengths", "40", "--budgets", "24", "--q-blocks", "8", "--dim", "8", "--rounds", "2"]


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code = main([*ARGV, "--device", "cpu", "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "warning: on a CPU plain PyTorch is timed, which says nothing of any kernel" in err
    assert "random weights: stress rows, which say nothing of quality" in err
    found = json.loads(out)
    assert found["stress"]
    cell = next(c for c in found["cells"] if c["role"] == "sparse")
    assert cell["ttft_ms"]["samples"] == cell["speedup"]["stock"]["samples"] == 2
    assert {x["mode"] for x in cell["receipt"]} == {"sparse"}
    manifest = load_run(found["run"]).manifest
    assert (manifest["model"], manifest["weights_hash"], manifest["config"]["weights"]) == ("tiny", None, "random")
    assert "gated delta rule" in manifest["config"]["linear_attention"]
    assert main([*ARGV, "--device", "cpu"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (ARGV, "bench ttft found no CUDA GPU: run it where there is one, or try the command with"),
        (
            ["bench", "ttft", "qwen3-8b", "--device", "cpu"],
            "qwen3-8b is too large to be timed on a CPU: run it on a GPU",
        ),
    ],
)
def test_a_gpu_is_needed_for_anything_else(argv, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"topmass: error: {message}")
    assert not Path("runs").exists()
