"""Interleaved rounds, the statistics over them, and the check without which there is no timing."""

import pytest
import torch

from topmass.bench import Timings, time_rounds
from topmass.bench.baselines import BASELINES, baselines_for
from topmass.bench.shapes import SHAPES, shape_of
from topmass.errors import ConfigError
from topmass.ops.dense_prefill import _flash3


def test_rounds_are_interleaved_and_rotate() -> None:
    calls: list[str] = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = time_rounds(fns, gate=lambda: "checked", rounds=4, warmup=1, device="cpu")
    assert timings.gate == "checked"
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    # the warm-up, then each name once a round; no name always first, nor always after the same other
    assert rounds == ["abc", "abc", "acb", "cab", "cba"]
    assert {name: len(times) for name, times in timings.milliseconds.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(t >= 0 for times in timings.milliseconds.values() for t in times)


def test_statistics_are_medians_and_ratios_are_paired() -> None:
    slow = [10.0, 20.0, 40.0, 80.0, 160.0]
    timings = Timings(milliseconds={"dense": slow, "ours": [t / 8 for t in slow]}, gate=None)
    assert timings.spread("dense").median == 40.0
    assert timings.spread("dense").p10 == pytest.approx(14.0)
    assert timings.spread("dense").p90 == pytest.approx(128.0)
    # the drift between rounds is 16-fold; the ratio has none of it
    ratio = timings.ratio("dense", "ours")
    assert (ratio.p10, ratio.median, ratio.p90, ratio.samples) == (8.0, 8.0, 8.0, 5)


def test_nothing_is_timed_when_the_gate_fails() -> None:
    def gate() -> None:
        raise AssertionError("wrong result")

    calls: list[int] = []
    with pytest.raises(AssertionError, match="wrong result"):
        time_rounds({"a": lambda: calls.append(1)}, gate=gate, device="cpu")
    assert calls == []


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"warmup": -1}])
def test_what_cannot_be_timed_is_refused(settings: dict) -> None:
    with pytest.raises(ConfigError, match="at least 1 round"):
        time_rounds({"a": lambda: None}, gate=lambda: None, device="cpu", **settings)
    with pytest.raises(ConfigError, match="needs callables"):
        time_rounds({}, gate=lambda: None, device="cpu")


def test_shapes() -> None:
    found = {name: (s.q_heads, s.kv_heads, s.head_dim) for name, s in SHAPES.items()}
    assert found == {
        "qwen3.5-9b": (16, 4, 256),
        "qwen3.5-0.8b": (8, 2, 256),
        "qwen3-8b": (32, 8, 128),
        "llama-3.1-8b": (32, 8, 128),
        "reference": (8, 2, 128),
    }
    assert shape_of("12/3x96").head_dim == 96
    with pytest.raises(ConfigError, match=r"did you mean 'qwen3.5-9b'\?"):
        shape_of("qwen3.5-9")
    with pytest.raises(ConfigError, match="multiple of kv_heads"):
        shape_of("7/2x64")


def test_registry_of_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(BASELINES) == {"fa2", "cudnn", "fa3", "sdpa"}
    there, absent = baselines_for("cpu")
    assert ([b.name for b in there], absent) == (["sdpa"], {})
    monkeypatch.setattr(_flash3, "_has_package", lambda: False)
    monkeypatch.setattr(_flash3, "_extension", lambda: None)
    there, absent = baselines_for("cuda")
    assert "fa2" in {b.name for b in there}
    assert absent["fa3"].startswith("not installed: needs flash_attn_interface")


def test_the_baseline_of_a_cpu_is_causal_attention_over_grouped_heads() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 8)
    out = BASELINES["sdpa"].run(q, k, v)
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * 8**-0.5
    p = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhts,bshd->bthd", p, v.repeat_interleave(2, 2)))
