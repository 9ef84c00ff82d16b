"""What a report says: the first screen and the sections, as plain values that the templates only lay out."""

from dataclasses import dataclass, field
from typing import Any

from topmass.report.figures import write_svg

__all__ = ["Figure", "Report", "Section", "Table", "add_figure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A picture with its caption.

    Attributes:
        name: File name without suffix, unique in the report.
        svg: The picture.
        caption: What it shows and under which conditions.
        folded: Whether HTML shows it only when asked.
    """

    name: str
    svg: str
    caption: str
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text.

    Attributes:
        caption: What it shows and under which conditions.
        header: One text a column.
        rows: One list of texts a row, as long as the header.
        folded: Whether HTML shows it only when asked.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    folded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading, what to know, and what there is to see."""

    title: str
    text: list[str] = field(default_factory=list)
    items: list[Figure | Table] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that a reader sees.

    Attributes:
        model: Name of the model.
        question: What the first screen answers.
        answers: The answer, a sentence a length, each with its interval.
        figure: The one figure of the first screen.
        facts: Machine, versions, commands, run ids: name and value.
        notes: What limits the answer.
        sections: The rest.
    """

    model: str
    question: str
    answers: list[str]
    figure: Figure | None
    facts: list[tuple[str, str]]
    notes: list[str]
    sections: list[Section]


def add_figure(items: list[Figure | Table], name: str, chart: Any, caption: str, *, folded: bool = False) -> None:
    """Append a chart to `items`; nothing where there is nothing to draw, which is `None`."""
    if chart is not None:
        items.append(Figure(name=name, svg=write_svg(chart, name), caption=caption, folded=folded))
