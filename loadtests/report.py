"""The HTML report of load tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from vllm_vtprune_evaluation.load.page import Section, distribution, empty, svg, write_page
from vllm_vtprune_evaluation.load.records import Record
from vllm_vtprune_evaluation.load.results import Metric, samples
from vllm_vtprune_evaluation.tables import table, written

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

DISTRIBUTIONS: tuple[tuple[Metric, str], ...] = (("ttft", "TTFT"), ("itl", "ITL"), ("e2el", "E2E"))
WINDOW = 5  # seconds, about, of a rate

DEFINITIONS = (
    "TTFT: from when the request was due, connecting included, to the first chunk with content; it is due when it is "
    "sent, or, at a constant rate, when the schedule says. ITL: the gaps between chunks with content, of all requests "
    "together. E2E: to the last chunk with a choice. TPOT: (E2E - TTFT) / (output tokens - 1). While the client was "
    "busy otherwise, it saw no chunk: a TTFT or a gap may be so much too long. Percentiles are of the raw samples of "
    "requests that succeeded; a dash is what was not measured."
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
        results: run -> result of `vllm_vtprune_evaluation.load.results.result`.
        records: run -> its records.
        notes: paragraphs about the measurement.
    """
    kinds = [
        (run, kind, *(written(values[key], style) for key, _, style in KIND_COLUMNS))
        for run, result in results.items()
        for kind, values in result["vtprune"]["kinds"].items()
    ]
    errors = [
        (run, error, str(count))
        for run, result in results.items()
        for error, count in result["vtprune"]["errors"].items()
    ]
    write_page(
        path,
        "Load test",
        [
            Section(before=notes),
            Section(
                "Results",
                head=("", *results),
                rows=[(label, *values) for label, values in table_rows(results)],
                after=[DEFINITIONS],
            ),
            *([Section("Failures", head=("run", "error", "requests"), rows=errors, texts=2)] if errors else []),
            Section(
                "Kinds of request",
                head=("run", "kind", *(heading for _, heading, _ in KIND_COLUMNS)),
                rows=kinds,
                texts=2,
                grouped=True,
            ),
            Section("Plots", plots=plots(records)),
        ],
    )


def results_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results of runs as a table for a terminal."""
    return table(("", *results), [(label, *values) for label, values in table_rows(results)])


def table_rows(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Label and values of every run, without rows that no run has measured."""
    flat = [{**result, **result["vtprune"]} for result in results.values()]
    rows = [(label, [written(result[key], style) for result in flat]) for key, label, style in ROWS]
    return [(label, values) for label, values in rows if any(value != "-" for value in values)]


def plots(records: Mapping[str, Sequence[Record]]) -> list[Markup]:
    """The plots as SVG elements: distributions of TTFT, ITL and E2E, requests over time, TTFT by keep ratio."""
    measured = {run: samples(run_records) for run, run_records in records.items()}
    drawn = [
        distribution(
            f"{title}: share of {'gaps' if title == 'ITL' else 'requests'} within",
            {run: run_samples[metric] for run, run_samples in measured.items()},
        )
        for metric, title in DISTRIBUTIONS
    ]
    return [*drawn, over_time(records), by_keep_ratio(records)]


def over_time(records: Mapping[str, Sequence[Record]]) -> Markup:
    """Requests that ended per second, in windows of about `WINDOW`."""
    figure, axes = empty("Requests ended per second")
    starts = [record.started for run_records in records.values() for record in run_records]
    for run, run_records in records.items():
        ends = [record.started + record.elapsed - min(starts) for record in run_records if record.error is None]
        if ends:
            edges = np.linspace(0, max(ends), max(1, round(max(ends) / WINDOW)) + 1)
            axes.stairs(np.histogram(ends, edges)[0] / np.diff(edges), edges, label=run)
    axes.set_xlabel("seconds since the first request")
    axes.set_ylim(bottom=0)
    return svg(figure, axes)


def by_keep_ratio(records: Mapping[str, Sequence[Record]]) -> Markup:
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
