"""Write a report: one content, two templates."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from topmass.errors import RunError
from topmass.report.compose import compose
from topmass.report.content import Figure, Report
from topmass.results import LoadedRun, find_runs, load_run

__all__ = ["ReportPaths", "build"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPaths:
    """Where a report lies.

    Attributes:
        html: One file that needs nothing else.
        markdown: The same with its figures beside it.
        figures: The figures, SVG.
        answers: The sentences of the first screen.
    """

    html: Path
    markdown: Path
    figures: list[Path]
    answers: list[str]


def build(runs: str | Path | Iterable[str | Path], out: str | Path, *, command: str | None = None) -> ReportPaths:
    """Write `report.html`, `report.md` and `figures/` into the directory `out`.

    Args:
        runs: A run, a directory of runs, or several of either.
        out: Made if it does not exist; an earlier report there is replaced.
        command: How it is made again; `None` names `topmass report`.

    Raises:
        RunError: A run cannot be read, the runs are of different models, or `out` cannot be written.
    """
    given = [runs] if isinstance(runs, (str, Path)) else list(runs)
    loaded = [
        load_run(path) for path in dict.fromkeys(p.resolve() for given_path in given for p in find_runs(given_path))
    ]
    _check(loaded)
    out = Path(out)
    command = command or shlex.join(["topmass", "report", *map(str, given), "--out", str(out)])
    return _write(compose(loaded, command=command), out)


def _check(runs: Sequence[LoadedRun]) -> None:
    if not runs:
        raise RunError("No run to report; name at least one run directory.")
    first = runs[0]
    for run in runs[1:]:
        if any(run.manifest.get(name) != first.manifest.get(name) for name in ("model", "weights_hash")):
            raise RunError(
                f"{first.path} is of the model {first.manifest['model']}, {run.path} of {run.manifest['model']} or other "
                "weights; report one model at a time."
            )


def _write(report: Report, out: Path) -> ReportPaths:
    figures = [
        item for item in [report.figure, *(i for s in report.sections for i in s.items)] if isinstance(item, Figure)
    ]
    paths = ReportPaths(
        html=out / "report.html",
        markdown=out / "report.md",
        figures=[out / "figures" / f"{figure.name}.svg" for figure in figures],
        answers=report.answers,
    )
    texts = {path: figure.svg for path, figure in zip(paths.figures, figures, strict=True)}
    texts |= {paths.html: _render("report.html", report), paths.markdown: _render("report.md", report)}
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"Cannot write the report to {out}: {reason}. Choose another --out.") from error
    return paths


def _render(template: str, report: Report) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("topmass.report", "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"bold": _bold, "cell": _cell}
    environment.tests["figure"] = lambda item: isinstance(item, Figure)
    return environment.get_template(template).render(report=report)


def _bold(text: str) -> Markup:
    """Markdown's `**bold**` of a whole cell, in HTML."""
    if text.startswith("**") and text.endswith("**"):
        return Markup("<b>{}</b>").format(text[2:-2])
    return escape(text)


def _cell(text: str) -> str:
    """Text inside a Markdown table."""
    return text.replace("|", "\\|")
