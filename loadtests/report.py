"""The HTML report: one self-contained file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtests.records import Record
from loadtests.results import METRICS, samples

ROWS: tuple[tuple[str, str, str], ...] = (
    ("completed", "requests that succeeded", ".0f"),
    ("failed", "requests that failed", ".0f"),
    ("duration", "seconds", ".1f"),
    ("request_throughput", "requests per second", ".3f"),
    ("request_goodput", "good requests per second", ".3f"),
    ("output_throughput", "output tokens per second", ".1f"),
    ("max_concurrent_requests", "requests due and not answered, at most", ".0f"),
    ("offered_rate", "requests per second that were due", ".3f"),
    ("achieved_rate", "requests per second that were sent", ".3f"),
    ("unsent", "requests that were due and never sent", ".0f"),
    ("p99_lag_ms", "sent after it was due, p99 (ms)", ".1f"),
    ("max_lag_ms", "sent after it was due, at most (ms)", ".1f"),
    ("p99_stall_ms", "client busy otherwise, p99 (ms)", ".1f"),
    ("max_stall_ms", "client busy otherwise, at most (ms)", ".1f"),
    *(
        (f"{statistic}_{metric}_ms", f"{shown.upper()} {label} (ms)", ".1f")
        for metric, shown in (("ttft", "ttft"), ("itl", "itl"), ("tpot", "tpot"), ("e2el", "e2e"))
        for statistic, label in (("mean", "mean"), ("median", "median"), ("p95", "p95"), ("p99", "p99"))
    ),
)
"""(key of a result or of its ``vtprune`` part, label, number format)."""

KIND_COLUMNS = (
    ("requests", "requests", ".0f"),
    ("mean_input_tokens", "prompt tokens, mean", ".0f"),
    ("keep_ratio", "share of visual tokens kept", ".3f"),
    ("median_ttft_ms", "TTFT median (ms)", ".1f"),
    ("p99_ttft_ms", "TTFT p99 (ms)", ".1f"),
)


def write_report(
    path: Path,
    results: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Sequence[Record]],
    notes: Sequence[str] = (),
) -> None:
    """Write the report of one or several runs, side by side.

    Args:
        path: the HTML file.
        results: run -> result of `loadtests.results.result`.
        records: run -> its records.
        notes: paragraphs about the measurement.
    """
    template = Environment(loader=PackageLoader("loadtests", "."), autoescape=True).get_template("report.html.jinja")
    path.write_text(
        template.render(
            runs=list(results),
            notes=notes,
            rows=table_rows(results),
            kind_columns=[heading for _, heading, _ in KIND_COLUMNS],
            kinds=[
                (run, kind, [written(values[key], style) for key, _, style in KIND_COLUMNS])
                for run, result in results.items()
                for kind, values in result["vtprune"]["kinds"].items()
            ],
            errors=[
                (run, error, count)
                for run, result in results.items()
                for error, count in result["vtprune"]["errors"].items()
            ],
            plots=[Markup(svg) for svg in plots(records)],
        )
    )


def table_rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Label and values of every run, without rows that no run has measured."""
    flat = [{**result, **result["vtprune"]} for result in results.values()]
    rows = [(label, [written(result[key], style) for result in flat]) for key, label, style in ROWS]
    return [(label, values) for label, values in rows if any(value != "-" for value in values)]


def table(rows: Sequence[tuple[str, Sequence[str]]], headings: Sequence[str]) -> str:
    """Rows as aligned text."""
    lines = [("", headings), *rows]
    first = max(len(label) for label, _ in lines)
    width = max(len(value) for _, values in lines for value in values) + 2
    return "\n".join(label.ljust(first) + "".join(value.rjust(width) for value in values) for label, values in lines)


def written(value: float | None, style: str) -> str:
    """A number for a table; a dash for what was not measured."""
    return "-" if value is None else format(value, style)


def plots(records: Mapping[str, Sequence[Record]]) -> list[str]:
    """The plots as SVG elements: distributions of TTFT, ITL and E2E, requests over time, TTFT by keep ratio."""
    measured = {run: samples(run_records) for run, run_records in records.items()}
    drawn = [
        distribution(title, {run: run_samples[metric] for run, run_samples in measured.items()})
        for metric, title in zip(METRICS, ("TTFT", "TPOT", "ITL", "E2E"), strict=True)
        if metric != "tpot"
    ]
    return [*drawn, over_time(records), by_keep_ratio(records)]


def distribution(title: str, milliseconds: Mapping[str, Sequence[float]]) -> str:
    """Empirical distribution functions, one line per run."""
    figure, axes = empty(f"{title}: share of {'gaps' if title == 'ITL' else 'requests'} within")
    for run, values in milliseconds.items():
        if values:
            axes.ecdf(np.asarray(values), label=run)
    axes.set_xlabel("ms")
    axes.set_ylim(0, 1.02)
    return svg(figure, axes)


def over_time(records: Mapping[str, Sequence[Record]], seconds: float = 5) -> str:
    """Requests that ended per second, in windows of about ``seconds``."""
    figure, axes = empty("Requests ended per second")
    starts = [record.started for run_records in records.values() for record in run_records]
    for run, run_records in records.items():
        ends = [record.started + record.elapsed - min(starts) for record in run_records if record.error is None]
        if ends:
            edges = np.linspace(0, max(ends), max(1, round(max(ends) / seconds)) + 1)
            axes.stairs(np.histogram(ends, edges)[0] / np.diff(edges), edges, label=run)
    axes.set_xlabel("seconds since the first request")
    axes.set_ylim(bottom=0)
    return svg(figure, axes)


def by_keep_ratio(records: Mapping[str, Sequence[Record]]) -> str:
    """TTFT of each request against its keep ratio (1 without a report)."""
    figure, axes = empty("TTFT by share of visual tokens kept")
    for run, run_records in records.items():
        points = [
            (1.0 if record.keep_ratio is None else record.keep_ratio, 1000 * record.ttft)
            for record in run_records
            if record.error is None and record.ttft is not None
        ]
        if points:
            axes.plot(*zip(*points, strict=True), ".", alpha=0.5, label=run)
    axes.set_xlabel("share kept (1: not pruned)")
    axes.set_ylabel("ms")
    axes.set_xlim(0, 1.05)
    axes.set_ylim(bottom=0)
    return svg(figure, axes)


def empty(title: str) -> tuple[Figure, Axes]:
    """An empty figure."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.3)
    return figure, axes


def svg(figure: Figure, axes: Axes) -> str:
    """The figure as an SVG element."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "nothing was measured", ha="center", transform=axes.transAxes)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML header
