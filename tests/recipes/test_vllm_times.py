"""Times in vLLM in parts: what the parts say of themselves is what the complete run says."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from topmass.results import SCHEMAS, Run, load_run, make_manifest


def test_parts_become_a_run_without_another_attempt(load_recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    row = {c.name: {"str": "a", "int": 1, "float": 0.5}[c.kind] for c in SCHEMAS["serve"].columns}
    with Run.open(tmp_path / "serve", make_manifest("serve", {}, model="tiny", device="a GPU")) as run:
        run.append([row])

    load_recipe("vllm/times.py").main(["tiny", "--out", str(tmp_path / "serve"), "--finish"])

    found = load_run(tmp_path / "serve")
    assert found.records == [row]
    assert found.manifest["attempts"] == run.manifest["attempts"]
