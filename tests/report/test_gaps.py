"""The four gaps from synthetic records: what each step loses, at which keys, and what cannot be said."""

import itertools
import json

import numpy as np
import pytest

from topmass.report import build
from topmass.report.aggregate import EvalTable
from topmass.report.compose import compose
from topmass.report.gaps import find_gaps

LENGTHS, TASKS = (4096, 8192), ("one", "two")
SCORES = {"dense": 0.95, "oracle": 0.9, "indexer": 0.8, "untrained": 0.3}


def rows_of(setting, cells, *, lengths=LENGTHS, haystacks=40, seed=0) -> list[dict]:
    """Records of (selector, budget, q_block, keys, score) cells; scores are paired through one difficulty a sample."""
    rng = np.random.default_rng(seed)
    rows = []
    for length, task in itertools.product(lengths, TASKS):
        hard = rng.random(haystacks)
        for (selector, budget, q, keys, score), h in itertools.product(cells, range(haystacks)):
            rows.append(
                setting(selector, budget, q=q)
                | {
                    "task": task, "length": length, "seed": 0, "haystack": h, "question_id": 0, "config": f"{selector} {budget} {q}",
                    "dense_below": 0, "decode": "dense", "fingerprint": "", "status": "ok", "score": float(hard[h] < score),
                    "prediction": "", "references": json.dumps([]), "prompt_tokens": length, "keys_read_mean": float(keys),
                    "seconds": 0.1, "support_recall": None if selector == "dense" else score,
                }
            )  # fmt: skip
    return rows


def points(gaps, name, **columns):
    found = [g for g in gaps if g.name == name and all(getattr(g.served, k) == v for k, v in columns.items())]
    assert len(found) == 1
    return found[0]


def exact(rows, left, right) -> float:
    """Mean over tasks and lengths of the difference of two configurations' means."""

    def mean(config, length, task):
        return np.mean([r["score"] for r in rows if (r["config"], r["length"], r["task"]) == (config, length, task)])

    return float(np.mean([mean(left, *c) - mean(right, *c) for c in itertools.product(LENGTHS, TASKS)]))


@pytest.fixture
def cells():
    return [
        ("dense", None, 1, 2000, 0.95),
        ("oracle", 64, 1, 60, 0.9),
        ("oracle", 256, 1, 240, 0.94),
        ("indexer", 64, 1, 60, 0.7),
        ("indexer", 256, 1, 240, 0.9),
        ("indexer", 256, 16, 120, 0.5),
    ]


def test_steps_are_paired_and_sum_to_the_total(cells, setting, make_run) -> None:
    rows = rows_of(setting, cells)
    gaps = find_gaps(EvalTable([make_run("eval", rows)]), LENGTHS)
    for budget in ("64", "256"):
        steps = {n: points(gaps, n, budget=budget, q_block=1).interval for n in ("oracle", "indexer", "total")}
        assert steps["oracle"].point == pytest.approx(exact(rows, "dense None 1", f"oracle {budget} 1"))
        assert steps["indexer"].point == pytest.approx(exact(rows, f"oracle {budget} 1", f"indexer {budget} 1"))
        assert steps["oracle"].point + steps["indexer"].point == pytest.approx(steps["total"].point)
        assert all(i.low <= i.point <= i.high for i in steps.values())
        assert steps["total"].clusters == 160


def test_sharing_is_compared_at_equal_achieved_keys(cells, setting, make_run) -> None:
    rows = rows_of(setting, cells)
    gap = points(find_gaps(EvalTable([make_run("eval", rows)]), LENGTHS), "sharing", q_block=16)
    # 120 keys lie halfway between 60 and 240 on a logarithmic axis
    low, high = (exact(rows, f"indexer {b} 1", "indexer 256 16") for b in (64, 256))
    assert gap.interval.point == pytest.approx((low + high) / 2)
    assert gap.reason == "at 120 achieved keys"


def test_blocks_that_are_scored_in_two_ways_are_two_settings(cells, setting, make_run) -> None:
    rows = [row | {"reduce": "max" if row["q_block"] > 1 else None} for row in rows_of(setting, cells)]
    better = rows_of(setting, [("indexer", 256, 16, 120, 0.8)])
    rows += [row | {"reduce": "max_prob", "config": "better"} for row in better]

    table = EvalTable([make_run("eval", rows)])
    gaps = [g for g in find_gaps(table, LENGTHS) if g.name == "sharing"]

    found = {g.served.reduce: g.interval.point for g in gaps}
    assert found.keys() == {"max", "max_prob"}
    # against one setting per query
    assert found["max"] - found["max_prob"] == pytest.approx(exact(rows, "better", "indexer 256 16"))
    assert {g.served.notes for g in gaps} == {"", ", by max_prob"}


def test_sharing_at_a_measured_number_of_keys_needs_no_interpolation(cells, setting, make_run) -> None:
    rows = rows_of(setting, [*cells[:-1], ("indexer", 256, 16, 60.3, 0.5)])
    gap = points(find_gaps(EvalTable([make_run("eval", rows)]), LENGTHS), "sharing", q_block=16)
    assert gap.interval.point == pytest.approx(exact(rows, "indexer 64 1", "indexer 256 16"))


def test_what_cannot_be_compared_is_not_measured(cells, setting, make_run) -> None:
    rows = rows_of(setting, [c for c in cells if c[:2] != ("oracle", 64)] + [("indexer", 512, 16, 500, 0.9)])
    gaps = find_gaps(EvalTable([make_run("eval", rows)]), LENGTHS)
    assert points(gaps, "oracle", budget="64", q_block=1).interval is None
    assert points(gaps, "indexer", budget="64", q_block=1).reason == "oracle was not run at this setting"
    assert points(gaps, "total", budget="64", q_block=1).interval is not None
    assert "around the 500 keys" in points(gaps, "sharing", budget="512").reason
    assert all(g.interval is None and "only one kernel ran" in g.reason for g in gaps if g.name == "realization")


@pytest.mark.parametrize("started", ["1", "9"])
def test_realization_is_plain_arithmetic_minus_the_kernel(started, cells, setting, make_run) -> None:
    kernel = [row | {"backend": "triton"} for row in rows_of(setting, cells)]
    served = [row for row in kernel if row["config"] == "indexer 256 1" and row["haystack"] < 30]
    # the kernel missed every answer of the first three haystacks, and was not asked the last
    plain = [row | {"backend": "reference", "score": 1.0 if row["haystack"] < 3 else row["score"]} for row in served]
    plain += [row | {"haystack": 99} for row in plain if row["haystack"] == 29]
    ran = make_run("eval", kernel, "kernel", started="5")
    table = EvalTable([ran, make_run("eval", plain, "plain", started=started)])
    gaps = find_gaps(table, LENGTHS)

    gap = points(gaps, "realization", budget="256", q_block=1)

    lost = np.mean([1.0 - row["score"] for row in served if row["haystack"] < 3])
    assert gap.interval.point == pytest.approx(lost * 3 / 30)
    assert gap.interval.samples == len(served)
    assert points(gaps, "realization", budget="64", q_block=1).interval is None
    # all else is the kernel's, and nothing counts as run twice
    alone = find_gaps(EvalTable([ran]), LENGTHS)
    assert [g for g in gaps if g.name != "realization"] == [g for g in alone if g.name != "realization"]
    served_at = table.cell(LENGTHS[0], points(gaps, "total", budget="256", q_block=1).served)
    assert served_at == EvalTable([ran]).cell(LENGTHS[0], served_at.setting)
    assert table.repeated == 0


def test_plain_arithmetic_alone_is_what_ran(cells, setting, make_run) -> None:
    rows = [row | {"backend": "reference"} for row in rows_of(setting, cells)]

    gaps = find_gaps(EvalTable([make_run("eval", rows)]), LENGTHS)

    assert points(gaps, "total", budget="256", q_block=1).interval is not None
    assert all(g.interval is None for g in gaps if g.name == "realization")


def test_without_an_indexer_there_are_no_gaps(cells, setting, make_run) -> None:
    table = EvalTable([make_run("eval", rows_of(setting, [c for c in cells if c[0] != "indexer"]))])
    assert find_gaps(table, LENGTHS) == []


def test_no_loss_anywhere_has_an_interval_all_the_same(cells, setting, make_run) -> None:
    rows = rows_of(setting, [(s, b, q, k, 1.0) for s, b, q, k, _ in cells])
    gap = points(find_gaps(EvalTable([make_run("eval", rows)]), LENGTHS), "indexer", budget="64")
    assert gap.interval.point == 0
    assert gap.interval.low < 0 < gap.interval.high


def test_report_prints_and_plots_them(cells, setting, make_run, tmp_path) -> None:
    run = make_run("eval", rows_of(setting, [*cells, ("untrained", 64, 1, 60, 0.2)], haystacks=6))
    paths = build(run.path, tmp_path / "report")
    text = paths.markdown.read_text()
    assert "## The gaps: where quality is lost" in text
    assert "4K and 8K tokens together" in text
    assert "not measured (only one kernel ran on these supports)" in text
    assert "untrained indexer" in text
    assert {p.name for p in paths.figures} >= {"gaps-4096-8192.svg", "gaps-4096.svg", "gaps-8192.svg"}


def test_what_differs_in_dense_below_alone_stays_apart(cells, setting, make_run, tmp_path) -> None:
    plain = rows_of(setting, cells)
    worse = [(*c[:4], 0.5) for c in cells if c[0] in ("oracle", "indexer")]
    short = [r | {"dense_below": 1024, "config": f"{r['config']} d1024"} for r in rows_of(setting, worse)]
    run = make_run("eval", [*plain, *short])

    gaps = find_gaps(EvalTable([run]), LENGTHS)

    lost = {n: points(gaps, "oracle", budget="256", q_block=1, dense_below=n).interval.point for n in (0, 1024)}
    assert lost[1024] > lost[0] + 0.2
    paths = build(run.path, tmp_path / "report")
    rows = [line for line in paths.markdown.read_text().splitlines() if line.startswith("| 256 | per query, tokens")]
    assert {line.split(" | ")[1] for line in rows} == {"per query, tokens", "per query, tokens, dense below 1024"}
    (figure,) = [p for p in paths.figures if p.name == "gaps-4096.svg"]
    assert ">dense below 1024<" in figure.read_text()


def test_the_first_screen_ends_with_the_gaps(cells, setting, make_run) -> None:
    run = make_run("eval", rows_of(setting, cells))
    # 256 keys are a sixteenth of 4096; sharing ran at that budget
    answers = [a for a in compose([run], command="").answers if "points lost" in a]
    assert len(answers) == len(LENGTHS)
    assert answers[0].startswith("At 4K tokens and 256 keys per query")
    at_4k = find_gaps(EvalTable([run]), [4096])
    for name, what, q in (("oracle", "the budget", 1), ("indexer", "the indexer", 1), ("sharing", "sharing by 16", 16)):
        point = 100 * points(at_4k, name, budget="256", q_block=q).interval.point
        assert f"{point:{'+' if point < 0 else ''}.1f} to {what} (" in answers[0]


def test_a_plan_is_one_name_in_words_and_lines_in_the_figure(setting, make_run, tmp_path) -> None:
    plan = "plan(3:448, 7:64, default:dense)"
    wider = "plan(3:464, 7:80, default:dense)"
    cells = [("dense", None, 1, 2000, 0.95), ("oracle", plan, 1, 240, 0.95), ("indexer", plan, 1, 240, 0.9)]
    # a shared selection keeps room for its own queries: another budget, as many keys
    cells += [("indexer", wider, 32, 241, 0.5), ("indexer", "plan(3:900, 7:80, default:dense)", 32, 440, 0.6)]

    run = make_run("eval", rows_of(setting, cells))
    content = compose([run], command="")

    enough, *_, lost = [answer for answer in content.answers if answer.startswith("At 4K")]
    assert "448+64 keys by layer per query" in enough
    assert lost.startswith("At 4K tokens and 448+64 keys by layer per query, points lost")
    assert lost.count("to sharing by 32") == 1
    tables = [item for section in content.sections for item in section.items if hasattr(item, "rows")]
    assert not any("plan(" in cell for t in tables for row in [t.header, *t.rows] for cell in row)
    build([run.path], tmp_path / "report")
    figure = (tmp_path / "report" / "figures" / "gaps-4096.svg").read_text()
    assert ">3:448<" in figure
    assert "plan(" not in figure
