"""`topmass report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from topmass.cli._common import emit, say

__all__ = ["report"]


def report(
    runs: Annotated[tuple[Path, ...], Parameter(negative=())],
    /,
    *,
    out: Path | None = None,
    json: bool = False,
    config: Path | None = None,
) -> None:
    """Render runs as Markdown and self-contained HTML.

    Args:
        runs: Run directories, or directories of runs.
        out: Directory of the report; default `report` in the first of the runs.
        json: Print the paths as JSON.
        config: Recipe (TOML) with a table `[report]`.
    """
    from topmass.report import build

    paths = build(runs, out or runs[0] / "report")
    say(f"wrote {paths.html} and {paths.markdown}")
    if json:
        emit({"html": str(paths.html), "markdown": str(paths.markdown), "figures": [str(p) for p in paths.figures]})
