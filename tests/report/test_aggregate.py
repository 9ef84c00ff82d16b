"""From records to numbers."""

import pytest

from topmass.report.aggregate import AuditTable, EvalTable, Setting, budget_keys, budget_name, budget_order


def rows_of(rows: list[dict], selector: str, **columns) -> list[dict]:
    return [r for r in rows if r["selector"] == selector and all(r[k] == v for k, v in columns.items())]


@pytest.fixture
def rows(eval_rows) -> list[dict]:
    return eval_rows(lengths=(4096,), haystacks=12)


def find(rows: list[dict], selector: str, **columns) -> Setting:
    return Setting.of(rows_of(rows, selector, **columns)[0])


def test_loss_is_paired_on_common_samples(rows, make_run) -> None:
    oracle = find(rows, "oracle", budget="1024")
    few = [r for r in rows if r["selector"] == "dense" or r["haystack"] < 5]
    table = EvalTable([make_run("eval", few)])
    cell = table.cell(4096, oracle)
    common = [r for r in rows if r["haystack"] < 5]

    def score(selector: str, **columns) -> float:
        mine = rows_of(common, selector, **columns)
        return sum(r["score"] for r in mine) / len(mine)

    assert cell.loss.point == pytest.approx(score("dense") - score("oracle", budget="1024", q_block=1, kv_block=1))
    assert cell.loss.clusters == 5 * len(table.tasks)


def test_infeasible_cells_have_no_score(rows, make_run) -> None:
    cell = EvalTable([make_run("eval", rows)]).cell(4096, find(rows, "oracle", budget="32", kv_block=64))
    assert cell.infeasible
    assert cell.score is None


def test_setting_that_misses_a_task_is_not_averaged_over_the_others(rows, make_run) -> None:
    partial = [r for r in rows if not (r["selector"] == "random" and r["task"] == "needle")]
    table = EvalTable([make_run("eval", partial)])
    assert table.cell(4096, find(rows, "random", budget="64")).score is None
    assert table.cell(4096, find(rows, "random", budget="64"), "variables").score is not None


def test_answer_is_the_smallest_budget_that_is_enough(eval_rows, setting, make_run) -> None:
    kinds = [setting("dense", None), *(setting("oracle", b) for b in (32, 64, 128, 256, 512, 1024))]
    table = EvalTable([make_run("eval", eval_rows(lengths=(4096,), haystacks=150, kinds=kinds))])
    cell = table.answer(4096)
    assert cell.setting.budget == "1024"
    assert cell.loss.point <= 0.01
    assert cell.loss.high <= 0.02
    smaller = [c for c in table.cells(lambda s: table.oracle(s) and s.per_query) if c.keys < cell.keys]
    assert len(smaller) == 5
    assert not any(c.enough for c in smaller)


def test_few_haystacks_answer_nothing(rows, make_run) -> None:
    assert EvalTable([make_run("eval", rows)]).answer(4096) is None


def test_later_run_counts_for_repeated_samples(rows, make_run) -> None:
    wrong = [r | {"score": 0.0} for r in rows_of(rows, "dense")]
    runs = [
        make_run("eval", wrong, "b", started="2026-01-02T00:00:00+00:00"),
        make_run("eval", rows, "a", started="2026-01-01T00:00:00+00:00"),
    ]
    table = EvalTable(runs)
    assert table.repeated == len(wrong)
    assert table.cell(4096, table.dense()).score.point == 0.0


def test_plainest_oracle_is_compared(rows, make_run) -> None:
    windowed = [r | {"window": 64, "sink": 4} for r in rows_of(rows, "oracle", q_block=1, kv_block=1)]
    table = EvalTable([make_run("eval", rows + windowed)])
    assert (table.variant.window, table.variant.sink) == (1, 0)
    assert not table.oracle(Setting.of(windowed[0]))


def test_audit_clusters_by_text(audit_rows, make_run) -> None:
    rows = audit_rows(texts=3)
    table = AuditTable([make_run("audit", rows)])
    oracle = next(s for s in table.settings if s.budget == "64" and s.per_query)
    expected = [
        r["value"] for r in rows_of(rows, "oracle", budget="64", q_block=1, kv_block=1, layer=3, metric="logit_kl")
    ]
    value = table.value(4096, oracle, 3, "logit_kl")
    assert value.point == pytest.approx(sum(expected) / 3)
    assert value.clusters == 3
    assert table.over_layers(4096, oracle, "retained_mass_mean").clusters == 3
    assert [(layer, mass) for layer, mass, _ in table.plan(4096)] == [(n, m) for n in (3, 7) for m in (0.9, 0.95, 0.99)]


def test_budgets_sort_by_size() -> None:
    budgets = ["mass:0.95<=512", "1024", "5%", "64", "100/3%"]
    assert sorted(budgets, key=budget_order) == ["64", "1024", "5%", "100/3%", "mass:0.95<=512"]


@pytest.mark.parametrize(
    ("budget", "name", "keys"),
    [
        (None, "", None),
        ("256", "256", 256),
        ("6.25%", "6.25%", None),
        ("plan(3:448, 7:64, default:dense)", "448+64", 256),
        ("plan(3:64, 7:dense, default:dense)", "64+dense", None),
        ("plan(3:64, 7:12.5%, default:dense)", "64+12.5%", None),
        ("plan(3:64, default:8)", "64, others 8", None),
        ("plan(0:64, 1:64, 2:64, 3:512, 4:1024, default:dense)", "64x3+512+1024", 345.6),
    ],
)
def test_budgets_have_names_and_tokens(budget, name, keys) -> None:
    assert budget_name(budget) == name
    assert budget_keys(budget) == (None if keys is None else pytest.approx(keys))


def test_plans_are_ordered_by_their_tokens() -> None:
    plans = ["plan(3:1792, 7:256, default:dense)", "512", "plan(3:448, 7:64, default:dense)"]
    assert sorted(plans, key=budget_order) == [plans[2], plans[1], plans[0]]
