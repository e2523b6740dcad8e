"""A page of HTML with tables and plots: one file that loads nothing."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """A part of a page; an empty field is left out.

    Attributes:
        heading: its heading.
        before: paragraphs above the table.
        head: the table's head.
        rows: its rows; a `Markup` stands as it is.
        texts: so many of the first columns are text, the others numbers.
        grouped: whether a line divides rows that differ in the first column.
        plots: SVG elements, from `svg`.
        after: paragraphs at the end.
    """

    heading: str = ""
    before: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    texts: int = 1
    grouped: bool = False
    plots: Sequence[Markup] = ()
    after: Sequence[str] = ()


def write_page(path: Path, title: str, sections: Sequence[Section], alerts: Sequence[str] = ()) -> None:
    """Write a page of HTML; ``alerts`` come before its sections."""
    loader = PackageLoader("vllm_vtprune_evaluation.load", ".")
    template = Environment(loader=loader, autoescape=True).get_template("page.html.jinja")
    path.write_text(template.render(title=title, sections=sections, alerts=alerts), encoding="utf-8")


def distribution(title: str, milliseconds: Mapping[str, Sequence[float]]) -> Markup:
    """Empirical distribution functions, one line per run."""
    figure, axes = empty(title)
    for run, values in milliseconds.items():
        if values:
            axes.ecdf(np.asarray(values), label=run)
    axes.set_xlabel("ms")
    axes.set_ylim(0, 1.02)
    return svg(figure, axes)


def empty(title: str) -> tuple[Figure, Axes]:
    """An empty figure."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    return figure, axes


def svg(figure: Figure, axes: Axes) -> Markup:
    """The figure as an SVG element, with a legend."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])  # without the XML header
