"""Reports of benchmark runs: ratios are paired, what is missing is said, the crossover is read off."""

import math
from pathlib import Path

import pytest

from topmass.report import build, figures
from topmass.report.bench import answers, line, summaries
from topmass.report.bench_figures import time_by_growth, time_by_length
from topmass.report.timings import BenchTable, crossover
from topmass.results import LoadedRun, Run, load_run, make_manifest

TIMES = {"fa2": 8.0, "fa3": 4.0, "index": 0.5, "layer": 1.0, "copy": 2.0}
ROLES = {"fa2": "dense", "fa3": "dense", "cudnn": "dense", "index": "stage", "layer": "total", "copy": "ceiling"}


def rows_of(length: int, growth: float | None = None, factor: float = 1.0) -> list[dict]:
    fixed = {
        "shape": "qwen3.5-9b", "q_heads": 16, "kv_heads": 4, "head_dim": 256, "length": length, "what": "layer",
        "config": "b=2048 q1 k4 layer" + (f" u={growth:g}" if growth else ""), "budget": "2048", "q_block": 1,
        "kv_block": 4, "growth": growth, "backend": "triton",
    }  # fmt: skip

    def row(name: str, metric: str, value: float | None, unit: str, i: int = -1, status: str = "ok") -> dict:
        own = {"name": name, "role": ROLES[name], "metric": metric, "value": value, "unit": unit}
        return fixed | own | {"round": i, "status": status}

    # the clock drifts 2-fold over the rounds
    rows = [
        row(name, "time", ms * (1 + i / 4) * (factor if name == "layer" else 1.0), "ms", i)
        for name, ms in TIMES.items()
        for i in range(5)
    ]
    rows.append(row("cudnn", "time", None, "ms", status="not installed: no cuDNN."))
    rows.append(row("fa3", "flop", 6e12, "FLOP"))
    rows.append(row("copy", "bytes", 9e9, "B"))
    return [
        *rows,
        row("layer", "union_growth", growth or 1.3, "ratio"),
        row("layer", "keys_read_mean", 2000.0, "keys/query"),
    ]


@pytest.fixture
def run(tmp_path: Path) -> LoadedRun:
    manifest = make_manifest("bench", {}, model="qwen3.5-9b", device="a GPU", command="topmass bench kernels")
    with Run.open(tmp_path / "run", manifest) as run:
        run.append(rows_of(8192, factor=5.0))
        run.append(rows_of(131072))
        for growth in (1.5, 3.0):
            run.append(rows_of(131072, growth, factor=growth))
        return load_run(run.finish())


def test_ratios_are_paired_by_round(run: LoadedRun) -> None:
    case = next(c for c in BenchTable([run]).cases if c.length == 131072 and c.growth is None)
    assert (case.time("fa3").median, case.time("fa3").p90) == (6.0, pytest.approx(7.6))
    ratio = case.ratio("fa3", "layer")
    assert (ratio.p10, ratio.median, ratio.p90) == (4.0, 4.0, 4.0)
    assert (case.rate("fa3"), case.rate("copy", "bytes"), case.rate("index")) == (1000.0, 3.0, None)
    assert case.names() == ["fa2", "fa3", "cudnn", "index", "layer", "copy"]
    assert line(case, "cudnn")[-1] == "not installed: no cuDNN."
    assert line(case, "layer")[5:] == ["", "8x", "4x", "2,000 keys/query, U/K 1.30"]
    assert line(case, "copy")[4:6] == ["", "3"]


def test_answers_name_ratio_crossover_and_what_is_missing(run: LoadedRun) -> None:
    first = answers(BenchTable([run]))[0]
    assert first == (
        "A sparse layer at 128K tokens (b=2048 q1 k4 layer): 1.5 ms (p10-p90 1.1 to 1.9), 1/8 of FlashAttention-2's time, "
        "1/4 of FlashAttention-3's time. Not there to compare: cuDNN. It is faster than every dense kernel that ran from "
        "128K tokens on, of the lengths timed."
    )


def test_report_of_a_benchmark(run: LoadedRun, tmp_path: Path) -> None:
    paths = build(run.path, tmp_path / "report")
    assert {p.name for p in paths.figures} == {"layer-time.svg", "layer-growth.svg"}
    assert "| qwen3.5-9b | per query, groups of 4 | " in paths.markdown.read_text()
    text = paths.markdown.read_text()
    assert "How long does a sparse layer take beside dense kernels?" in text
    assert "| cuDNN | triton | - |" in text
    assert "b=2048 q1 k4 layer u=3" in text


def test_the_later_run_of_a_configuration_counts(run: LoadedRun) -> None:
    later = LoadedRun(path=run.path, manifest=run.manifest | {"started": "2999"}, records=rows_of(131072, factor=2.0))
    case = next(c for c in BenchTable([later, run]).cases if c.length == 131072 and c.growth is None)
    assert case.time("layer").median == 3.0


def test_a_crossover_lies_between_the_lengths_around_it(run: LoadedRun) -> None:
    (line,) = BenchTable([run]).lines("layer")
    # of several growths the length's line takes what was made for none
    assert [(c.length, c.growth) for c in line] == [(8192, None), (131072, None)]
    # 1.25 times FlashAttention-3's time, then a quarter of it
    share = math.log(1.25) / math.log(5)
    assert crossover(line, "fa3") == pytest.approx(8192 * 16**share)
    # faster at the shortest, not there, and slower at the longest
    assert (crossover(line, "fa2"), crossover(line, "cudnn"), crossover(line[:1], "fa3")) == (8192, None, math.inf)


def test_shapes_are_told_apart_and_a_models_own_growth_is_marked(run: LoadedRun, tmp_path: Path) -> None:
    other = [row | {"shape": "qwen3-8b", "q_heads": 32} for row in rows_of(8192) + rows_of(131072)]
    own = [
        row | {"shape": "reference", "what": "growth", "config": "indexer b=2048 q1 k1", "name": name, "value": value, "role": "part"}
        for row in rows_of(16384)[-2:-1]
        for name, value in (("layer 3", 1.5), ("layer 7", 1.7))
    ]  # fmt: skip
    both = LoadedRun(path=run.path, manifest=run.manifest, records=run.records + other + own)
    table = BenchTable([both])
    assert {(c.shape, c.what) for c in table.cases} == {("qwen3.5-9b", "layer"), ("qwen3-8b", "layer")}
    assert table.own == {16384: [1.5, 1.7]}
    assert [text.split(" at ")[0] for text in answers(table)] == [
        "A sparse layer of qwen3.5-9b",
        "A sparse layer of qwen3-8b",
    ]
    # the second shape wins from 8K on, and its neighbour's times are not taken for its own
    assert answers(table)[1].endswith("from 8K tokens on, of the lengths timed.")
    (_, glance), (_, since), (_, grown) = [(h, rows) for _, h, rows in summaries(table, "layer")]
    assert len(glance) == 6
    assert [row[0] for row in since] == ["qwen3.5-9b", "qwen3-8b"]
    assert grown == [["16K", "1.50, 1.70"]]
    svg = figures.write_svg(time_by_growth(table, "layer"), "x")
    assert "own at 16K" in svg
    panels = figures.write_svg(time_by_length(table, "layer"), "x")
    assert "qwen3.5-9b" in panels
    assert "qwen3-8b" in panels
