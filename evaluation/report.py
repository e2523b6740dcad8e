"""Results for people: tables in Markdown, and plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evaluation.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cells = Sequence[str]


def markdown(head: Cells, rows: Iterable[Cells]) -> str:
    """A table whose first column is text, and all others numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def accuracy_table(results: Sequence[Result]) -> str:
    """One line for each arm: tokens, accuracy with its interval, and what is left of the unpruned accuracy."""
    head = ["", "mean tokens", "accuracy", "95 % interval", "against unpruned", "95 % interval", "retained"]
    rows = [
        [
            result.arm,
            f"{result.mean_tokens:.1f}",
            _percent(result.accuracy),
            f"{_percent(result.ci95[0])} to {_percent(result.ci95[1])}",
            f"{100 * result.difference:+.1f}",
            f"{100 * result.difference_ci95[0]:+.1f} to {100 * result.difference_ci95[1]:+.1f}",
            "-" if result.retained is None else _percent(result.retained),
        ]
        for result in results
    ]
    return markdown(head, rows)


def budget_table(results: Sequence[Result]) -> str:
    """Methods in rows, best first, budgets in columns: accuracy, with its distance from unpruned in brackets.

    Methods inside the language model are left out: their first layers read more.
    """
    keeps = sorted({result.keep for result in results if result.keep is not None}, reverse=True)
    rows: dict[str, dict[int, Result]] = {}
    for result in results:
        if result.keep is not None and not result.inside:
            rows.setdefault(result.row, {})[result.keep] = result

    def cell(result: Result | None) -> str:
        if result is None:
            return ""
        tokens = f", {result.mean_tokens:.0f} tokens" if result.adaptive else ""
        return f"{_percent(result.accuracy)} ({100 * result.difference:+.1f}{tokens})"

    def rank(row: Mapping[int, Result]) -> tuple[float, ...]:
        return tuple(-row[keep].accuracy if keep in row else 0.0 for keep in reversed(keeps[-2:]))

    ordered = sorted(rows.items(), key=lambda item: rank(item[1]))
    return markdown(
        ["", *(f"{keep} tokens" for keep in keeps)],
        ([name, *(cell(row.get(k)) for k in keeps)] for name, row in ordered),
    )


def split_table(results: Sequence[Result], by: Literal["kind", "density"]) -> str:
    """Arms in rows; kinds of question (``by="kind"``) or densities of pictures (``by="density"``) in columns."""
    tables = [result.by_kind if by == "kind" else result.by_density for result in results]
    names = sorted({name for table in tables for name in table})
    rows = (
        [result.arm, *(_percent(table[name]) if name in table else "" for name in names)]
        for result, table in zip(results, tables, strict=True)
    )
    return markdown(["", *names], rows)


def plot_accuracy(results: Sequence[Result], unpruned: Result, file: Path) -> None:
    """Accuracy against mean tokens, a line for each method; "+E" is dashed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    lines: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        if result.keep is not None:
            lines.setdefault((result.method, result.adaptive), []).append(result)
    colours = {method: f"C{index % 10}" for index, method in enumerate(sorted({method for method, _ in lines}))}
    markers = {method: "osv^D*XP<>"[index // 10 % 10] for index, method in enumerate(sorted(colours))}
    for (method, adaptive), points in sorted(lines.items()):
        points = sorted(points, key=lambda result: result.mean_tokens)
        axes.plot(
            [result.mean_tokens for result in points],
            [100 * result.accuracy for result in points],
            color=colours[method],
            marker=markers[method],
            linestyle="--" if adaptive else "-",
            label=points[0].row,
        )
    axes.axhline(100 * unpruned.accuracy, color="black", linewidth=1, label=f"unpruned ({unpruned.mean_tokens:.0f})")
    ticks = sorted({result.keep for result in results if result.keep is not None and not result.inside})
    axes.set(xscale="log", xlabel="visual tokens kept, mean", ylabel="accuracy (%)")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    save(figure, file)


def plot_budgets(tokens: Mapping[int, Mapping[str, Sequence[float]]], file: Path) -> None:
    """How many tokens energy budgets keep of each picture.

    Args:
        tokens: of pictures, by the budget's mean and by the pictures' density.
        file: where it goes.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tokens), figsize=(4.5 * len(tokens), 3.5), squeeze=False)
    for axis, (mean, by_density) in zip(axes[0], sorted(tokens.items()), strict=True):
        names = sorted(by_density)
        axis.hist([by_density[name] for name in names], bins=25, stacked=True, label=names)
        axis.axvline(mean, color="black", linewidth=1)
        axis.set(title=f"mean {mean}", xlabel="visual tokens kept", ylabel="pictures")
        axis.legend(fontsize=7)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Write a figure to a file, and forget it."""
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
