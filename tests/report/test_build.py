"""Reports: complete from any runs, self-contained, honest about what is not causal."""

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from topmass.errors import RunError
from topmass.report import build, figures
from topmass.report.aggregate import AuditTable, EvalTable
from topmass.report.build import ReportPaths
from topmass.report.compose import compose


@pytest.fixture(scope="module")
def report(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> ReportPaths:
    """The report of both runs, for tests that only read it."""
    return build(runs, tmp_path_factory.mktemp("report") / "out")


class Loads(HTMLParser):
    """Collects whatever a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        if tag in {"script", "link", "iframe", "object", "embed", "base"}:
            self.found.append(tag)
        links = [given.get(name) or "" for name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action")]
        self.found += [value for value in links if value and not value.startswith("#")]


def test_html_is_self_contained(report: ReportPaths) -> None:
    html = report.html.read_text(encoding="utf-8")
    loads = Loads()
    loads.feed(html)
    assert loads.found == []
    assert not re.findall(r"@import|url\((?!#)", html)
    assert "http" not in html.replace('xmlns="http://www.w3.org/2000/svg"', "").replace(
        'xmlns:xlink="http://www.w3.org/1999/xlink"', ""
    )
    assert len(loads.ids) == len(set(loads.ids))


def test_first_screen(report: ReportPaths) -> None:
    for path in (report.html, report.markdown):
        first = path.read_text(encoding="utf-8").partition("Accuracy against achieved keys")[0]
        assert "How much dense attention does this model need?" in first
        assert "At 16K tokens:" in first
        assert "95 % interval" in first
        assert "topmass eval reference" in first
        assert "cores" in first
        assert re.search(r"eval-\d{8}T\d{6}-[0-9a-f]{6}", first)
        assert "not causal" in first


def test_what_is_decided_comes_first(eval_rows, setting, make_run) -> None:
    kinds = [setting("dense", None), *(setting(s, 1024) for s in ("oracle", "streaming", "random"))]
    # more than any task needs, but too few haystacks to say so
    rows = [
        r | ({"score": 1.0} if r["selector"] in ("dense", "oracle") else {}) for r in eval_rows((4096, 8192), 5, kinds)
    ]
    mean = {
        s: np.mean([r["score"] for r in rows if r["selector"] == s and r["length"] == 4096])
        for s in ("streaming", "random")
    }

    first, *rest = compose([make_run("eval", rows)], command="").answers

    gain = 100 * (1 - max(mean.values()))
    assert mean["streaming"] > mean["random"]
    assert first.startswith(
        "At 4K tokens: which keys are read decides. With 1,024 keys per query, 993 achieved, 24.2% of the"
    )
    assert f"the oracle scores 100.0 %, {gain:.1f} points more (95 % interval" in first
    assert "than sink and window of that budget, on 4 tasks." in first
    assert [text[:27] for text in rest] == ["At 4K tokens: not decided. ", "At 8K tokens: not decided. "]


def test_a_length_that_is_decided_comes_before_one_that_is_not(eval_rows, setting, make_run) -> None:
    kinds = [setting("dense", None), setting("oracle", 1024)]
    few, many = (eval_rows((n,), haystacks, kinds) for n, haystacks in ((4096, 5), (8192, 400)))
    run = make_run("eval", [r | {"score": 1.0} for r in [*few, *many]])
    assert [text[:32] for text in compose([run], command="").answers] == [
        "At 8K tokens: 1,024 keys per que",
        "At 4K tokens: not decided. With ",
    ]


def test_as_good_without_looking_decides_nothing(eval_rows, setting, make_run) -> None:
    kinds = [setting("dense", None), *(setting(s, 1024) for s in ("oracle", "streaming"))]
    run = make_run("eval", [r | {"score": 1.0} for r in eval_rows((4096,), 5, kinds)])
    (answer,) = compose([run], command="").answers
    assert answer.startswith("At 4K tokens: not decided.")


def test_oracle_table_marks_infeasible_cells(report: ReportPaths) -> None:
    text = report.markdown.read_text(encoding="utf-8")
    table = text[text.index("| nominal budget | per query, tokens | per query, groups of 4 |") :]
    row = next(line for line in table.splitlines() if line.startswith("| 32 |"))
    assert row.endswith("| - | - |")
    assert re.search(r"\d+\.\d \[-?\d+\.\d, -?\d+\.\d\]; 31 \|", row)


def test_figures_of_the_markdown_exist_and_are_svg(report: ReportPaths) -> None:
    linked = re.findall(r"\]\((figures/[^)]+)\)", report.markdown.read_text(encoding="utf-8"))
    assert {report.markdown.parent / name for name in linked} == set(report.figures)
    for path in report.figures:
        assert ET.parse(path).getroot().tag.endswith("svg")


@pytest.mark.parametrize("kind", ["eval", "audit"])
def test_one_kind_of_run_is_enough(runs: Path, tmp_path: Path, kind: str) -> None:
    text = build(runs / kind, tmp_path / "out").markdown.read_text(encoding="utf-8")
    assert ("retain 95% of the attention mass" in text) == (kind == "audit")
    assert ("Accuracy against achieved keys" in text) == (kind == "eval")


@pytest.mark.parametrize("keep", ["dense", "oracle", "nothing", "baselines"])
def test_little_data(eval_rows, make_run, tmp_path: Path, keep: str) -> None:
    wanted = {
        "dense": {"dense"},
        "oracle": {"oracle"},
        "nothing": set(),
        "baselines": {"dense", "streaming", "random"},
    }[keep]
    rows = [r for r in eval_rows(lengths=(4096,), haystacks=2) if r["selector"] in wanted]
    run = make_run("eval", rows)
    assert "These runs do not say" in build(run.path, tmp_path / "out").markdown.read_text(encoding="utf-8")


def test_everything_infeasible(eval_rows, make_run, tmp_path: Path) -> None:
    rows = eval_rows(lengths=(4096,), haystacks=2)
    rows = [
        r if r["selector"] == "dense" else r | {"status": "infeasible", "score": None, "keys_read_mean": None}
        for r in rows
    ]
    run = make_run("eval", rows)
    assert "no per-query oracle was run" in build(run.path, tmp_path / "out").markdown.read_text(encoding="utf-8")


def test_one_text_has_no_interval(audit_rows, make_run, tmp_path: Path) -> None:
    text = build(make_run("audit", audit_rows(texts=1)).path, tmp_path / "out").markdown.read_text(encoding="utf-8")
    assert "nan" not in text


def test_models_are_not_mixed(eval_rows, make_run, tmp_path: Path) -> None:
    rows = eval_rows(lengths=(4096,), haystacks=2)
    runs = [make_run("eval", rows, "a").path, make_run("eval", rows, "b", weights_hash="other").path]
    with pytest.raises(RunError, match="one model at a time"):
        build(runs, tmp_path / "out")


def test_unwritable_output(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(RunError, match=r"Cannot write the report .*Choose another --out"):
        build(runs / "audit", tmp_path / "taken")


def test_dashes_and_pipes_cannot_break_a_page(eval_rows, make_run, tmp_path: Path) -> None:
    run = make_run("eval", eval_rows(lengths=(4096,), haystacks=2), model="<script>alert(1)</script>|x")
    html = build(run.path, tmp_path / "out").html.read_text(encoding="utf-8")
    assert "<script" not in html


def test_a_selector_has_one_colour(runs: Path) -> None:
    from topmass.results import load_run

    table = EvalTable([load_run(runs / "eval")])
    for chart in (
        figures.accuracy_by_keys(table),
        figures.accuracy_by_task(table, 4096),
        figures.granularity(table, 4096),
    ):
        assert figures.PALETTE["oracle"] in figures.write_svg(chart, "x")
    assert len(set(figures.PALETTE.values())) == len(figures.PALETTE)


def test_figures_have_units_on_their_axes(runs: Path) -> None:
    from topmass.results import load_run

    table, audit = EvalTable([load_run(runs / "eval")]), AuditTable([load_run(runs / "audit")])
    for chart, units in (
        (figures.accuracy_by_keys(table), ["achieved keys per query", "(%)"]),
        (
            figures.layer_heat_map(audit, "retained_mass_mean", "retained mass (fraction)"),
            ["keys per query", "fraction"],
        ),
        (figures.per_layer_plan(audit), ["keys per query", "layer"]),
        (figures.union_growth(audit), ["neighbouring queries", "keys"]),
    ):
        svg = figures.write_svg(chart, "x")
        assert all(unit in svg for unit in units)
        assert 'fill="#ffffff"' in svg or "white" in svg


def test_labels_keep_apart_and_inside() -> None:
    placed = figures._dodge([("a", 99.0), ("b", 98.5), ("c", 2.0), ("d", 1.0), ("e", 0.0)], 0.0, 100.0, 0.1)
    values = sorted(placed.values())
    assert all(b - a >= 9.99 for a, b in itertools.pairwise(values))
    assert values[0] >= 0
    assert values[-1] <= 100
    assert placed["a"] > placed["b"] > placed["c"] > placed["d"] > placed["e"]


def test_reporting_needs_no_torch() -> None:
    code = "import sys, topmass.report, topmass.results; assert not {'torch', 'transformers'} & set(sys.modules)"
    with mock.patch.dict("os.environ", {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}):
        subprocess.run([sys.executable, "-c", code], check=True)
