"""Overhead beside the stock model: every way is timed, in turns, and stock over stock is one."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

TINY = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--lengths", "48", "--prompts", "80"]
TINY += ["--rounds", "3", "--cycles", "2", "--dense-below", "64", "--budget", "48", "--dim", "16"]


@pytest.fixture
def overhead(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("overhead.py")


def test_every_way_is_timed_beside_stock(
    overhead: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["overhead.py", *TINY, "--out", str(tmp_path / "found.json")])

    assert overhead.main() == 0

    found = json.loads((tmp_path / "found.json").read_text())
    prompt, token = found["prompt"]["48"], found["token"]["80"]
    assert list(prompt) == ["stock", "again", "auto"]
    assert list(token) == ["stock", "again", "sparse"]
    assert {way["rounds"] for way in prompt.values()} == {3}
    assert {way["rounds"] for way in token.values()} == {2}
    for ways in (prompt, token):
        stock = ways["stock"]
        assert (stock["over_stock"], stock["low"], stock["high"]) == (1.0, 1.0, 1.0)
        assert all(way["milliseconds"] > 0 and way["low"] <= way["over_stock"] <= way["high"] for way in ways.values())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("prompt of 48: stock")
    assert lines[-1].startswith("token after 80: sparse")


def test_ways_alternate_and_warm_rounds_do_not_count(overhead: ModuleType) -> None:
    called = []

    class Way:
        def running(self, model):
            return torch.inference_mode()

    clock = iter(range(1000))
    overhead.now = lambda device: next(clock) ** 2
    ways, model = {name: Way() for name in "abc"}, SimpleNamespace(device=torch.device("cpu"))

    found = overhead.alternate(ways, model, lambda name: lambda: called.append(name), 4, warm=2, before=lambda: None)

    assert {name: len(values) for name, values in found.items()} == dict.fromkeys("abc", 4)
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert len(rounds) == 6
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    # nobody always goes first, or after the same one
    assert {order[0] for order in rounds} == {"a", "b", "c"}
    # two readings a call, one after the other: whoever is called later takes longer by this clock
    taken = sorted(ms for values in found.values() for ms in values)
    assert taken == [4 * i + 1 for i in range(6, 18)]


def test_a_limit_of_time_leaves_fewer_rounds(overhead: ModuleType) -> None:
    way = SimpleNamespace(running=lambda model: torch.inference_mode())
    model = SimpleNamespace(device=torch.device("cpu"))

    found = overhead.alternate({"a": way}, model, lambda name: lambda: None, 40, warm=1, before=lambda: None, end=0.0)

    assert len(found["a"]) == overhead.FEWEST


def test_ratios_are_taken_round_by_round(overhead: ModuleType) -> None:
    # the clock drifts a thousandfold; the ratio does not
    stock = [10.0**i for i in range(4)]
    found = overhead.told({"stock": stock, "auto": [1.25 * ms for ms in stock]})
    assert found["auto"]["milliseconds"] == 1.25 * 55
    assert (found["auto"]["over_stock"], found["auto"]["low"], found["auto"]["high"]) == (1.25, 1.25, 1.25)


def test_a_busy_host_disturbs_the_fastest_tenth_less_than_the_median(overhead: ModuleType) -> None:
    rng = np.random.default_rng(0)
    # every way takes 10 ms, one of them 1 % more, and most rounds wait for somebody else for up to twice as long
    stock, slower = (list(ms * (1 + rng.random(400) * (0.002 + (rng.random(400) < 0.7)))) for ms in (10.0, 10.1))
    found = overhead.told({"stock": stock, "auto": slower})["auto"]
    assert found["fastest_over_stock"] == pytest.approx(1.01, abs=0.002)
    assert found["fastest_low"] <= 1.01 <= found["fastest_high"] < found["high"]


def test_a_token_has_its_share_of_what_is_written_once_a_cycle(overhead: ModuleType) -> None:
    rng = np.random.default_rng(0)
    stock, sparse = np.full((9, overhead.CYCLE), 10.0), np.full((9, overhead.CYCLE), 10.1)
    sparse[:, -1] += 0.1 * overhead.CYCLE
    # one token in twenty waits for somebody else
    for times in (stock, sparse):
        times *= 1 + 9 * (rng.random(times.shape) < 0.05)

    found = overhead.told_tokens({"stock": stock, "sparse": sparse})

    assert found["sparse"]["over_stock"] == pytest.approx(1.02, abs=0.003)
    assert found["sparse"]["fastest_over_stock"] == pytest.approx(1.02)
    assert found["sparse"]["low"] <= found["sparse"]["over_stock"] <= found["sparse"]["high"]
    assert found["stock"]["over_stock"] == found["stock"]["low"] == found["stock"]["high"] == 1.0
    assert found["sparse"]["rounds"] == 9


def test_a_twin_shares_weights_and_nothing_else(overhead: ModuleType) -> None:
    model = overhead.build_model("tiny", device="cpu", dtype=torch.float32)
    other = overhead.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.config is not model.config
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}


def test_a_cycle_is_what_waits_and_the_token_that_writes(overhead: ModuleType) -> None:
    model = overhead.build_model("tiny", device="cpu", dtype=torch.float32)
    args = SimpleNamespace(dim=16, q_block=32, budget=48, dense_below=64)
    sparse, written = overhead.ways(model, args)["sparse"], []
    with torch.inference_mode(), sparse.running(model):
        logits, cache = overhead.forward(model, overhead.random_prompts(model)(1, 80), None)
        (held,) = [x for x in cache.layers if hasattr(x, "index_rows")][:1]
        for _ in range(2 * overhead.CYCLE):
            logits, cache = overhead.forward(model, logits.argmax(-1), cache)
            written.append(len(held.index_rows))
    assert written[overhead.CYCLE - 2 : overhead.CYCLE] == [80, 80 + overhead.CYCLE]
    assert written[-2:] == [80 + overhead.CYCLE, 80 + 2 * overhead.CYCLE]


@pytest.mark.parametrize("n", [9, 20, 121])
def test_interval_covers_a_known_median(overhead: ModuleType, n: int) -> None:
    draws = np.random.default_rng(n).lognormal(size=(2000, n))
    intervals = [overhead.median_interval(list(values)) for values in draws]
    # the median of the distribution is 1
    assert np.mean([low <= 1.0 <= high for low, high in intervals]) >= 0.93
    # and not by being all of it
    assert all(low > values.min() or high < values.max() for (low, high), values in zip(intervals, draws, strict=True))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_values_have_all_of_them_as_interval(overhead: ModuleType, n: int) -> None:
    assert overhead.median_interval(list(range(n))) == (0, n - 1)
