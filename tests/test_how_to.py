"""Code of the pages runs, in order: how to add a part (what it registers goes away again), and the tutorials."""

import re
import textwrap
from pathlib import Path
from unittest import mock

import pytest

from topmass.eval.tasks import TASKS
from topmass.integrations.transformers.families import _FAMILIES
from topmass.ops import _dispatch

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted((DOCS / "how-to").glob("add-a-*.md"))
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_page_runs(page: Path) -> None:
    backends = {op: dict(table) for op, table in _dispatch._BACKENDS.items()}

    with mock.patch.dict(TASKS), mock.patch.dict(_FAMILIES), mock.patch.dict(_dispatch._BACKENDS, backends):
        assert run_blocks(page) >= 2


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_code_of_the_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "frontier").mkdir(parents=True)
    # the files that its commands write, as it shows them
    (tmp_path / "plan.toml").write_text(shown("audit-your-model", "plan.toml"))
    (tmp_path / "runs" / "frontier" / "recommended.toml").write_text(
        "version = 1\n" + shown("choose-a-configuration", "runs/frontier/recommended.toml")
    )

    assert run_blocks(page) == 1


def run_blocks(page: Path) -> int:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    # dataclasses look their module up
    names = {"__name__": f"docs.{page.stem}"}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)
    return len(blocks)


def shown(page: str, name: str) -> str:
    text = (DOCS / "tutorials" / f"{page}.md").read_text()
    (found,) = re.findall(rf"    \$ cat {re.escape(name)}\n((?:    .*\n|\n)+)", text)
    return textwrap.dedent(found)


def test_there_is_a_page_for_every_part() -> None:
    assert [page.stem for page in PAGES] == ["add-a-family", "add-a-kernel", "add-a-selector", "add-a-task"]
