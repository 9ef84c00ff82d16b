"""What a benchmark records, whether its gates catch what is wrong, and whether its inputs are as asked."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from topmass.bench import gates, kernels
from topmass.bench.baselines import Baseline
from topmass.bench.inputs import Inputs, drifting, find_keep, make_inputs, select, union_growth
from topmass.bench.kernels import Setting, bench_kernels
from topmass.bench.shapes import shape_of
from topmass.core.support import Support
from topmass.errors import BackendUnavailableError, ConfigError
from topmass.ops import sparse_prefill
from topmass.ops._triton_common import INTERPRETED
from topmass.results import Run, make_manifest
from topmass.results.schema import check_rows

SMALL = Setting(shape="4/2x16", budget=48, q_block=32, dim=8, rounds=2, device="cpu")
PER_QUERY = replace(SMALL, q_block=1, kv_block=4)


def small_inputs(setting: Setting = PER_QUERY, length: int = 130, keep: float = 0.9) -> Inputs:
    shape = shape_of(setting.shape)
    return make_inputs(shape, length, kv_block=setting.kv_block, dim=8, keep=keep, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def chosen() -> tuple[Inputs, Support]:
    inputs = small_inputs()
    return inputs, select(inputs.iq, inputs.ik, PER_QUERY.rule, start=0, backend="reference")


def test_a_layer_is_recorded_by_stage_with_its_checks() -> None:
    rows = bench_kernels(SMALL, lengths=[101])
    assert check_rows("bench", rows) == rows
    roles = {row["name"]: row["role"] for row in rows}
    assert roles == {
        "sdpa": "dense", "index": "stage", "attend": "stage", "layer": "total", "copy": "ceiling", "matmul": "ceiling",
    }  # fmt: skip
    for name in roles:
        assert [r["round"] for r in rows if r["name"] == name and r["metric"] == "time"] == [0, 1]
    metrics = {(row["name"], row["metric"]): row["value"] for row in rows}
    assert metrics["sdpa", "flop"] == 2 * 4 * 16 * 101 * 102
    assert metrics["layer", "flop"] == metrics["index", "flop"] + metrics["attend", "flop"]
    assert metrics["attend", "flop"] == pytest.approx(4 * 4 * 16 * 101 * metrics["layer", "keys_read_mean"])
    assert metrics["attend", "gate_error"] <= 2 * metrics["attend", "gate_plain_error"] + 1e-6
    assert metrics["index", "gate_rows"] > 0


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
# Triton 3.6's interpreter calls int() on arrays of one element
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_kernels_pass_the_gates_at_the_timed_shape() -> None:
    setting = replace(SMALL, backend="triton", rounds=1)
    rows = bench_kernels(setting, lengths=[101], what=("layer", "oracle", "kl"))
    checked = {(r["what"], r["name"]) for r in rows if r["metric"] in ("gate_error", "gate_rows")}
    assert checked >= {
        ("layer", "index"),
        ("layer", "attend"),
        ("oracle", "select"),
        ("oracle", "attend"),
        ("kl", "kl"),
    }
    assert {r["backend"] for r in rows if r["role"] in ("stage", "total") and r["what"] == "layer"} == {"triton"}


def test_growth_is_timed_apart_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("topmass.bench.inputs.STEPS", 8)
    rows = bench_kernels(replace(PER_QUERY, budget=128, rounds=1), lengths=[400], growths=(1.1, 2.0))
    grown = {r["growth"]: r["value"] for r in rows if r["metric"] == "union_growth"}
    assert grown[1.1] == pytest.approx(1.1, abs=0.08)
    assert grown[2.0] == pytest.approx(2.0, abs=0.2)
    assert {r["role"] for r in rows if r["name"] == "union"} == {"part"}
    assert {r["config"] for r in rows} == {"b=128 q1 k4 layer u=1.1", "b=128 q1 k4 layer u=2"}
    # one set of rounds: each growth has its own layer beside the same dense times
    times = {(r["growth"], r["name"]): r["value"] for r in rows if r["metric"] == "time"}
    assert times[1.1, "sdpa"] == times[2.0, "sdpa"]
    assert times[1.1, "layer"] != times[2.0, "layer"]


def test_oracle_and_loss_are_recorded() -> None:
    rows = bench_kernels(PER_QUERY, lengths=[90], what=("oracle", "kl"))
    assert check_rows("bench", rows) == rows
    names = {(r["what"], r["name"]) for r in rows if r["role"] in ("stage", "part", "total")}
    assert names == {
        ("oracle", "lse"), ("oracle", "select"), ("oracle", "attend"), ("oracle", "oracle"), ("kl", "loss"), ("kl", "kl"),
    }  # fmt: skip
    assert next(r["value"] for r in rows if r["name"] == "kl" and r["metric"] == "gate_error") < 1e-5


def test_a_kernel_that_is_not_there_has_an_honest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    there, _ = kernels.baselines_for("cpu")
    monkeypatch.setattr(kernels, "baselines_for", lambda device: (there, {"fa3": "not installed: needs it."}))
    rows = [r for r in bench_kernels(SMALL, lengths=[64]) if r["name"] == "fa3"]
    assert [(r["metric"], r["value"], r["status"]) for r in rows] == [("time", None, "not installed: needs it.")]


def test_a_dense_kernel_that_refuses_costs_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("No available kernel.\nAborting execution.")

    broken = Baseline(name="cudnn", about="refuses", device="cpu", run=refuse)
    monkeypatch.setattr(kernels, "baselines_for", lambda device: ([broken], {}))
    rows = bench_kernels(SMALL, lengths=[64])
    assert {r["status"] for r in rows if r["name"] == "cudnn"} == {"failed: No available kernel. Aborting execution."}
    assert any(r["name"] == "layer" and r["metric"] == "time" for r in rows)


def test_a_wrong_dense_kernel_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncausal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
        return out.transpose(1, 2)

    wrong = Baseline(name="wrong", about="sees the future", device="cpu", run=uncausal)
    monkeypatch.setattr(kernels, "baselines_for", lambda device: ([wrong], {}))
    with pytest.raises(AssertionError, match="wrong: max error"):
        bench_kernels(SMALL, lengths=[64])


def test_gate_of_attention(chosen: tuple[Inputs, Support]) -> None:
    inputs, support = chosen
    out = sparse_prefill(inputs.q, inputs.k, inputs.v, support, backend="reference")[0]
    assert gates.check_attention(inputs, support, out, PER_QUERY.rule)["gate_error"] < 1e-5
    out[:, -1, 0] += 1e-3
    with pytest.raises(AssertionError, match="sparse attention: max error"):
        gates.check_attention(inputs, support, out, PER_QUERY.rule)
    out[:, -1, 0] = torch.nan
    with pytest.raises(AssertionError, match="finite"):
        gates.check_attention(inputs, support, out, PER_QUERY.rule)


def test_gate_of_selections(chosen: tuple[Inputs, Support]) -> None:
    inputs, support = chosen
    assert gates.check_index(inputs, support, PER_QUERY.rule)["gate_rows"] >= 60
    other = small_inputs(keep=0.0)
    wrong = select(other.iq, other.ik, PER_QUERY.rule, start=0, backend="reference")
    with pytest.raises(AssertionError, match="misses a group that scores"):
        gates.check_index(inputs, wrong, PER_QUERY.rule)
    fewer = replace(support, counts=support.counts - 1, groups=support.groups)
    with pytest.raises(AssertionError, match="not as many"):
        gates.check_index(inputs, fewer, PER_QUERY.rule)


def test_a_swap_of_near_ties_is_counted_not_refused(chosen: tuple[Inputs, Support]) -> None:
    inputs, support = chosen
    query, taken = inputs.iq[0, -1, 0], support.groups[0, 0, -1, : int(support.counts[0, 0, -1])].tolist()
    worst = min(taken, key=lambda group: float(query @ inputs.ik[0, group]))
    later = next(group for group in range(worst + 1, 31) if group not in taken)
    ik = inputs.ik.clone()
    # better than the worst that was taken, by less than float16 can tell: the lower group wins the tie
    ik[0, later] = ik[0, worst] * (1 + 1e-6 * (query @ ik[0, worst]).sign())
    tied = replace(inputs, ik=ik)
    again = select(tied.iq, ik, PER_QUERY.rule, start=0, backend="reference")
    assert worst in again.groups[0, 0, -1].tolist()
    assert later not in again.groups[0, 0, -1].tolist()
    found = gates.check_index(tied, again, PER_QUERY.rule)
    assert found["gate_near_ties"] >= 1
    assert 0 < found["gate_largest_gap"] < 1e-2


def test_gate_of_the_loss(chosen: tuple[Inputs, Support], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = chosen
    monkeypatch.setattr(gates, "_kl", lambda *args: [torch.ones(()), torch.ones(3), torch.ones(3)])
    args = inputs, torch.zeros(1, 130, 4), PER_QUERY.rule.granularity, torch.arange(3)
    assert gates.check_kl(*args) == {"gate_error": 0.0}
    values = iter(
        [[torch.ones(()), torch.ones(3), torch.ones(3)], [torch.ones(()), torch.full((3,), 1.1), torch.ones(3)]]
    )
    monkeypatch.setattr(gates, "_kl", lambda *args: next(values))
    with pytest.raises(AssertionError, match="relative errors of loss and gradients"):
        gates.check_kl(*args)


def test_a_walk_is_the_recurrence_that_it_says() -> None:
    torch.manual_seed(0)
    noise, keep = torch.randn(37, 3), 0.8
    want = [noise[0]]
    for row in noise[1:]:
        want.append(keep * want[-1] + (1 - keep**2) ** 0.5 * row)
    torch.testing.assert_close(drifting(noise, keep), torch.stack(want))
    torch.testing.assert_close(drifting(noise, 0.0), noise)


def test_union_growth_counts_a_tile_of_32_against_one_query() -> None:
    rule = replace(PER_QUERY.rule, budget=SMALL.rule.budget)
    inputs = small_inputs(length=192, keep=0.9)
    support = select(inputs.iq, inputs.ik, rule, start=0, backend="reference")
    union = chosen = 0.0
    for tile in range(2, 6):
        ids = [
            set(support.groups[0, 0, t][: int(support.counts[0, 0, t])].tolist())
            for t in range(tile * 32, tile * 32 + 32)
        ]
        union, chosen = union + len(set.union(*ids)), chosen + sum(map(len, ids)) / 32
    assert union_growth(support) == pytest.approx(union / chosen)
    assert union_growth(select(inputs.iq[:, :32], inputs.ik, rule, start=0, backend="reference")) is None
    assert find_keep(inputs.ik, rule, length=192, growth=1.0, seed=1, backend="reference") > 0.999


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "mass:0.9<=64"}, "time tokens"),
        ({"rounds": 0}, "at least 1"),
        ({"shape": "qwen9b"}, "Unknown shape"),
        ({"budget": 20}, "the smallest that works is 33"),
        ({"device": "mps"}, "cuda or cpu"),
    ],
)
def test_settings_that_cannot_be_timed(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **changes)


def test_calls_that_cannot_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not grow"):
        bench_kernels(SMALL, lengths=[64], growths=(1.5,))
    with pytest.raises(ConfigError, match="at least 1, got"):
        bench_kernels(PER_QUERY, lengths=[64], growths=(0.5,))
    with pytest.raises(ConfigError, match="what='layer' only"):
        bench_kernels(PER_QUERY, lengths=[64], what=("kl",), growths=(1.5,))
    with pytest.raises(ConfigError, match="at least one key group"):
        bench_kernels(PER_QUERY, lengths=[3])
    # an explicit kernel never falls back
    with pytest.raises(BackendUnavailableError, match="Unknown backend 'nosuch'"):
        bench_kernels(replace(SMALL, backend="nosuch"), lengths=[64])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        replace(SMALL, device="cuda")


def test_what_a_run_holds_is_not_timed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = kernels._measure
    monkeypatch.setattr(kernels, "_measure", lambda s, n, *rest: measured.append(n) or measure(s, n, *rest))
    manifest = make_manifest("bench", {}, model="4-2x16")
    for lengths in ([64], [64, 65, 65]):
        with Run.open(tmp_path / "run", manifest) as run:
            bench_kernels(SMALL, lengths=lengths, run=run)
    assert measured == [64, 65]
