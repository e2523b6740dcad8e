"""Results as Markdown tables and plots.

    python -m vllm_vtprune_evaluation.report build/eval/results.json --out accuracy.png

redraws the plot of accuracies from a file of results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Literal, TypeVar

from vllm_vtprune_evaluation.results import DEFAULT_METHOD, RANKED_FROM, Difference, Result, comparable, mean_ranks
from vllm_vtprune_evaluation.tables import markdown, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measured = TypeVar("Measured", bound=Result | Difference)

End = tuple[str, float | None, float, str]
"""The end of a line: label, tokens (None: the edge of the axes), height, colour."""

LINES = 7  # at most, in a plot
BLUE, GREEN, ORANGE, PURPLE = "#0072B2", "#009E73", "#E69F00", "#CC79A7"
VERMILLION, SKY, BLACK = "#D55E00", "#56B4E9", "#000000"
OKABE_ITO = (BLUE, GREEN, ORANGE, PURPLE, VERMILLION, SKY, BLACK)  # without yellow, too pale for a line
ALWAYS = {DEFAULT_METHOD: VERMILLION, "uniform": SKY, "random": BLACK}  # drawn whenever they were measured
MARKERS = "osD^vPX"
DARK, LABEL_SIZE, DPI = "0.15", 10, 110


def accuracy_table(results: Sequence[Result]) -> str:
    """One row per arm: tokens, accuracy and interval, difference from unpruned, share retained."""
    head = [
        "arm",
        "mean tokens",
        "accuracy",
        "95 % interval",
        "against unpruned",
        "95 % interval",
        "retained",
    ]
    rows = [
        [
            result.arm,
            f"{result.mean_tokens:.1f}",
            percent(result.accuracy),
            f"{percent(result.ci95[0])} to {percent(result.ci95[1])}",
            f"{100 * result.difference:+.1f}",
            f"{100 * result.difference_ci95[0]:+.1f} to {100 * result.difference_ci95[1]:+.1f}",
            "-" if result.retained is None else percent(result.retained),
        ]
        for result in results
    ]
    return markdown(head, rows)


def budget_table(results: Sequence[Result]) -> str:
    """Methods in rows, best mean rank first; budgets in columns: accuracy and the difference from unpruned.

    Args:
        results: results with a budget, such as the `comparable` ones.
    """
    order = list(mean_ranks(results))

    def cell(result: Result) -> str:
        tokens = f", {result.mean_tokens:.0f} tokens" if result.adaptive else ""
        return f"{percent(result.accuracy)} ({100 * result.difference:+.1f}{tokens})"

    return _by_budget("method", sorted(results, key=lambda result: order.index(result.row)), cell)


def difference_table(differences: Sequence[Difference]) -> str:
    """Rows in the order of ``differences``, budgets in columns: points and interval, in bold if it excludes 0."""

    def cell(difference: Difference) -> str:
        low, high = difference.ci95
        points = f"{100 * difference.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        return points if low <= 0 <= high else f"**{points}**"

    return _by_budget("", differences, cell)


def _by_budget(corner: str, measured: Sequence[Measured], cell: Callable[[Measured], str]) -> str:
    """A table: rows in the order of ``measured``, budgets in columns, largest first."""
    keeps = sorted({item.keep for item in measured if item.keep is not None}, reverse=True)
    rows: dict[str, dict[int | None, str]] = {}
    for item in measured:
        rows.setdefault(item.row, {})[item.keep] = cell(item)
    return markdown(
        [corner, *(f"{keep} tokens" for keep in keeps)],
        ([f"`{name}`", *(row.get(keep, "") for keep in keeps)] for name, row in rows.items()),
    )


def split_table(results: Sequence[Result], by: Literal["kind", "density"]) -> str:
    """Arms in rows; kinds of question (``by="kind"``) or densities of pictures (``by="density"``) in columns."""
    tables = [result.by_kind if by == "kind" else result.by_density for result in results]
    names = sorted({name for table in tables for name in table})
    rows = (
        [result.arm, *(percent(table[name]) if name in table else "" for name in names)]
        for result, table in zip(results, tables, strict=True)
    )
    return markdown(["", *names], rows)


def plot_accuracy(results: Sequence[Result], unpruned: Result, file: Path) -> None:
    """Save `accuracy_figure` as a PNG; its metadata ``Description`` holds the numbers."""
    lines = plotted_lines(results)
    numbers = [
        f"{row}: " + ", ".join(f"{percent(point.accuracy)} at {point.mean_tokens:.1f} tokens" for point in points)
        for row, points in lines.items()
    ]
    description = "; ".join([f"unpruned: {percent(unpruned.accuracy)} of {unpruned.questions} questions", *numbers])
    save(accuracy_figure(results, unpruned), file, description)


def plotted_lines(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The rows to draw, at most `LINES`, with results sorted by tokens: those of `ALWAYS`, then the best mean ranks.

    Leaves out rows that lack a budget, because their ranks are not comparable.
    """
    # Methods inside the language model keep different token counts by layer: draw them by mean tokens, without others.
    shown = comparable(results) or [result for result in results if result.keep is not None]
    budgets = {result.keep for result in shown}
    rows: dict[str, list[Result]] = {row: [] for row in mean_ranks(shown)}
    for result in sorted(shown, key=lambda result: result.mean_tokens):
        rows[result.row].append(result)
    complete = [row for row, points in rows.items() if len(points) == len(budgets)]
    fixed = [row for row in ALWAYS if row in complete]
    best = [row for row in complete if row not in fixed][: LINES - len(fixed)]
    return {row: rows[row] for row in complete if row in (*fixed, *best)}


def accuracy_figure(results: Sequence[Result], unpruned: Result) -> Figure:
    """Plot accuracy against tokens: `plotted_lines`, 95 % intervals as bands, and a line for the unpruned model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    lines = plotted_lines(results)
    free = iter([colour for colour in OKABE_ITO if colour not in {ALWAYS.get(row) for row in lines}])
    ends: list[End] = [(f"unpruned ({unpruned.mean_tokens:.0f} tokens)", None, 100 * unpruned.accuracy, "0.4")]
    axes.axhline(100 * unpruned.accuracy, color="0.4", linewidth=1.2, linestyle=(0, (6, 3)))
    for (row, points), marker in zip(lines.items(), MARKERS, strict=False):
        colour = ALWAYS.get(row) or next(free)
        tokens = [point.mean_tokens for point in points]
        heights = [100 * point.accuracy for point in points]
        low, high = ([100 * point.ci95[end] for point in points] for end in (0, 1))
        width = 2.8 if row == DEFAULT_METHOD else 1.6
        axes.fill_between(tokens, low, high, color=colour, alpha=0.1, linewidth=0)
        axes.plot(tokens, heights, color=colour, marker=marker, markersize=5, linewidth=width, label=row)
        ends.append((row, tokens[-1], heights[-1], colour))
    drawn = [point for points in lines.values() for point in points]
    if all(point.keep == point.mean_tokens for point in drawn):
        ticks = sorted({point.mean_tokens for point in drawn})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
        axes.minorticks_off()
    axes.set_xlabel("visual tokens kept of a picture" + (", log scale" if axes.get_xscale() == "log" else ", mean"))
    ranked = all(share >= RANKED_FROM for share in unpruned.by_kind.values())
    which = f"kinds that the unpruned model answers in {100 * RANKED_FROM:.0f} % or more" if ranked else "all kinds"
    label = f"right answers to {unpruned.questions} questions of {which}: {', '.join(unpruned.by_kind)}"
    axes.set_ylabel(fill(label, 70), fontsize=LABEL_SIZE - 1)
    axes.yaxis.set_major_formatter("{x:.0f} %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(figure, axes, ends)
    return figure


def _label_ends(figure: Figure, axes: Axes, ends: Sequence[End]) -> None:
    """Put labels beside the axes, each joined to the end of its line."""
    figure.draw_without_rendering()  # fixes the layout, which `gap` depends on
    low, high = axes.get_ylim()
    gap = 1.3 * LABEL_SIZE / 72 * figure.dpi / axes.bbox.height * (high - low)
    label_heights = spread([height for _, _, height, _ in ends], gap)
    for (text, tokens, height, colour), label_height in zip(ends, label_heights, strict=True):
        axes.annotate(
            text,
            xy=(1 if tokens is None else tokens, height),
            xycoords=axes.get_yaxis_transform() if tokens is None else "data",
            xytext=(1.04, label_height),
            textcoords=axes.get_yaxis_transform(),
            fontsize=LABEL_SIZE,
            color=DARK,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.2, "relpos": (0, 0.5), "shrinkB": 0},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in the same order, at least ``gap`` apart, with the least sum of squared changes."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    # After subtracting rank * gap, heights need only be non-decreasing: isotonic regression, by the min-max formula.
    level = [heights[index] - rank * gap for rank, index in enumerate(order)]
    out = list(heights)
    for rank, index in enumerate(order):
        pooled = max(
            min(fmean(level[first : last + 1]) for last in range(rank, len(level))) for first in range(rank + 1)
        )
        out[index] = pooled + rank * gap
    return out


def plot_budgets(tokens: Mapping[int, Mapping[str, Sequence[float]]], file: Path) -> None:
    """Draw histograms of the tokens that energy budgets keep per picture.

    Args:
        tokens: kept tokens of each picture, by mean budget, then by density.
        file: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(tokens), 3.5), layout="constrained")
    axes = figure.subplots(1, len(tokens), squeeze=False)
    for axis, (mean, by_density) in zip(axes[0], sorted(tokens.items()), strict=True):
        names = sorted(by_density)
        axis.hist([by_density[name] for name in names], bins=25, stacked=True, label=names)
        axis.axvline(mean, color="black", linewidth=1)
        axis.set(title=f"mean {mean}", xlabel="visual tokens kept", ylabel="pictures")
        axis.legend(fontsize=7)
    save(figure, file)


def save(figure: Figure, file: Path, description: str | None = None) -> None:
    """Write a figure to a PNG file; ``description`` goes into the metadata."""
    figure.savefig(file, dpi=DPI, metadata={"Description": description} if description else None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_vtprune_evaluation.report", description="Draw accuracies from a file of results."
    )
    parser.add_argument("results", type=Path, help="results.json of `vtprune eval`")
    parser.add_argument("--out", type=Path, default=Path("accuracy.png"), metavar="FILE", help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        run = json.loads(args.results.read_text())
        unpruned, *others = (Result(**values) for values in run["ranked_results"] or run["results"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"results: {args.results} given ({error!r}); expected the results.json of `vtprune eval`")
    plot_accuracy(others, unpruned, args.out)


if __name__ == "__main__":
    main()
