"""Plot what the dashboard's panels ask Prometheus, as one picture, where there is no Grafana.

example: python deploy/grafana/plot.py --prometheus http://localhost:9090 --minutes 15 --out dashboard.png
"""

from __future__ import annotations

import argparse
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "dashboards" / "vtprune.json"
COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """A panel of the dashboard: what it asks, as (query, legend) pairs, and what it shows."""

    title: str
    kind: str
    unit: str
    queries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Series:
    """One series of an answer: its labels, and its values by second; values that are no numbers are left out."""

    labels: Mapping[str, str]
    values: tuple[tuple[float, float], ...]


def panels(dashboard: Mapping[str, Any]) -> Iterator[Panel]:
    """All panels that ask for something, in order."""
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            queries = tuple((target["expr"], target.get("legendFormat", "")) for target in panel["targets"])
            yield Panel(panel["title"], panel["type"], panel["fieldConfig"]["defaults"].get("unit", ""), queries)


def filled(expr: str, interval: str, selection: Mapping[str, str] | None = None) -> str:
    """A query with the dashboard's variables replaced: by `selection`, else by what matches everything."""
    expr = expr.replace("$__rate_interval", interval)
    for name in ("model_name", "job", "instance"):
        expr = expr.replace(f"${name}", (selection or {}).get(name, ".*"))
    return expr


class Prometheus:
    """The parts of Prometheus's HTTP interface that are needed here."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str, **parameters: str | float) -> Any:
        """The `data` of an answer.

        Raises:
            RuntimeError: Prometheus refuses; with what it says.
        """
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path} {parameters}: {error.read().decode(errors='replace')}") from error

    def over(self, expr: str, start: float, end: float, step: float) -> list[Series]:
        """A query's answers between two times."""
        answer = self.get("query_range", query=expr, start=start, end=end, step=step)
        every = []
        for series in answer["result"]:
            values = ((second, float(value)) for second, value in series["values"])
            finite = tuple((second, value) for second, value in values if math.isfinite(value))
            every.append(Series(series["metric"], finite))
        return [series for series in every if series.values]


def legend_of(template: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template


def plot(answers: Sequence[tuple[Panel, list[tuple[str, Series]]]], out: Path) -> None:
    """One picture with all panels, over the same time; heatmaps as one line for each bucket."""
    from matplotlib.figure import Figure

    seconds = [second for _, curves in answers for _, curve in curves for second, _ in curve.values]
    start, end = min(seconds, default=0.0), max(seconds, default=1.0)
    rows = math.ceil(len(answers) / COLUMNS)
    figure = Figure(figsize=(6 * COLUMNS, 3 * rows))
    axes = figure.subplots(rows, COLUMNS, squeeze=False)
    for axis in axes.flat[len(answers) :]:
        axis.set_visible(False)
    for axis, (panel, curves) in zip(axes.flat, answers, strict=False):
        if not curves:
            axis.text(0.5, 0.5, "no data", ha="center", transform=axis.transAxes)
        elif panel.kind == "heatmap":
            draw_heatmap(axis, curves, start)
        else:
            for legend, curve in curves:
                line = with_gaps(curve.values)
                axis.plot([second - start for second, _ in line], [value for _, value in line], label=legend)
            if any(legend for legend, _ in curves):
                axis.legend(fontsize=6)
            axis.set_ylim(bottom=0)
        axis.set_xlim(0, end - start)
        axis.set_title(f"{panel.title} [{panel.unit}]" if panel.unit else panel.title, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("seconds")
    figure.tight_layout()
    figure.savefig(out, dpi=80)


def with_gaps(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Values by second, with one that is no number where some are left out, so that no line is drawn across."""
    step = min((later - earlier for (earlier, _), (later, _) in pairwise(values)), default=0.0)
    line = list(values[:1])
    for (earlier, _), (later, value) in pairwise(values):
        if later - earlier > 1.5 * step:
            line.append((earlier, math.nan))
        line.append((later, value))
    return line


def draw_heatmap(axis: Any, curves: Sequence[tuple[str, Series]], start: float) -> None:
    """Cumulative buckets as what falls into each of them, by seconds since the start."""
    ordered = sorted((curve for _, curve in curves), key=lambda curve: float(curve.labels["le"]))
    seconds = sorted({second for curve in ordered for second, _ in curve.values})
    below = [0.0] * len(seconds)
    rows = []
    for curve in ordered:
        at = dict(curve.values)
        counts = [at.get(second, 0.0) for second in seconds]
        rows.append([max(count - lower, 0.0) for count, lower in zip(counts, below, strict=True)])
        below = counts
    extent = (seconds[0] - start, seconds[-1] - start, 0, len(rows))
    axis.imshow(rows, aspect="auto", origin="lower", cmap="viridis", extent=extent)
    axis.set_yticks([index + 1 for index in range(len(ordered))], [curve.labels["le"] for curve in ordered])


def answers(
    prometheus: Prometheus, start: float, end: float, *, interval: str, step: float
) -> list[tuple[Panel, list[tuple[str, Series]]]]:
    """What Prometheus says to each panel, with the legend of each series."""
    drawn = []
    for panel in panels(json.loads(DASHBOARD.read_text())):
        series = [
            (legend_of(legend, curve.labels), curve)
            for expr, legend in panel.queries
            for curve in prometheus.over(filled(expr, interval), start, end, step)
        ]
        drawn.append((panel, series))
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://localhost:9090", metavar="URL", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=15, help="how far back; default: %(default)s")
    parser.add_argument("--interval", default="1m", help="window of rates, at least four scrapes; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    now = time.time()
    seconds = options.minutes * 60
    drawn = answers(
        Prometheus(options.prometheus), now - seconds, now, interval=options.interval, step=max(seconds / 200, 1)
    )
    plot(drawn, options.out)
    empty = [panel.title for panel, series in drawn if not series]
    print(f"wrote {options.out}" + (f"; no data for {', '.join(empty)}" if empty else ""))


if __name__ == "__main__":
    main()
