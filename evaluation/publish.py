"""Write the documentation's tables from the committed results.

    python -m vllm_vtprune_evaluation.publish

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; its numbers come from ``docs/benchmarks``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vllm_vtprune_evaluation.ablations import ABLATIONS, SOLVERS
from vllm_vtprune_evaluation.report import budget_table, difference_table, plotted_lines
from vllm_vtprune_evaluation.results import Difference, Result, comparable
from vllm_vtprune_evaluation.tables import markdown, percent

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/evaluation.md")
TABLE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Json = Mapping[str, Any]


def kinds(demo: Json) -> str:
    """Accuracy of the unpruned model, by kind of question."""
    by_kind = Result(**demo["results"][0]).by_kind
    ordered = sorted(by_kind, key=lambda kind: -by_kind[kind])
    return markdown(["kind of question", "unpruned"], ([kind, percent(by_kind[kind])] for kind in ordered))


def summary(demo: Json) -> str:
    """The methods of the plot (`plotted_lines`) at every fixed budget."""
    lines = plotted_lines(_ranked(demo))
    return budget_table([result for points in lines.values() for result in points])


def ranking(demo: Json) -> str:
    """Every method at every fixed budget."""
    return budget_table(comparable(_ranked(demo)))


def paired(demo: Json) -> str:
    """The default method minus each other method."""
    return difference_table([Difference(**values) for values in demo["paired"]])


def adaptive(demo: Json) -> str:
    """Each "+E" arm minus the fixed budget of equal mean."""
    return difference_table([Difference(**values) for values in demo["adaptive_less_fixed"]])


def presets(results: Json) -> str:
    """Accuracy of each preset: all questions, reading, counting."""
    rows = []
    for values in results["results"]:
        result = Result(**values)
        name = {"unpruned": "off"}.get(result.arm, result.arm)
        kept = "" if result.retained is None else f" ({percent(result.retained)} of unpruned)"
        shares = [result.by_kind[kind] for kind in ("reading", "count")]
        rows.append([f"`{name}`", f"{result.mean_tokens:.1f}", percent(result.accuracy) + kept, *map(percent, shares)])
    return markdown(["preset", "visual tokens of 576", "all nine kinds of question", "reading", "count"], rows)


def ablation(tables: Json, name: str) -> str:
    """An ablation: variants in rows, budgets in columns."""
    rows: dict[str, list[str]] = {}
    keeps: list[str] = []
    for values in tables[name]["ranked_results"][1:]:
        result = Result(**values)
        tokens = [f"{result.mean_tokens:.1f}"] if result.adaptive else []
        cells = [*tokens, f"{percent(result.accuracy)} ({100 * result.difference:+.1f})"]
        rows.setdefault(result.method, []).extend(cells)
        heads = ["mean tokens", "right"] if result.adaptive else [f"{result.keep} tokens"]
        keeps += [head for head in heads if head not in keeps]
    return markdown(["", *keeps], ([row, *cells] for row, cells in rows.items()))


def merged(tables: Json, kind: str) -> str:
    """Accuracy on one kind of question, or on ``"all"``: ablations in rows, budgets in columns.

    Also the difference from the first row of the same ablation, with its interval.
    """
    rows: dict[str, list[str]] = {}
    keeps: list[str] = []
    for name, table in tables.items():
        first_less = {values["less"]: Difference(**values) for values in table["paired_by_kind"][kind]}
        for result in (Result(**values) for values in table["results"][1:]):
            cell = percent(result.accuracy if kind == "all" else result.by_kind[kind])
            if result.arm in first_less:
                low, high = (0 - 100 * end for end in reversed(first_less[result.arm].ci95))
                points = f"{0 - 100 * first_less[result.arm].difference:+.1f} ({low:+.1f} to {high:+.1f})"
                cell += f", {points}" if low <= 0 <= high else f", **{points}**"
            rows.setdefault(f"`{ABLATIONS[name].method}`, {result.method}", []).append(cell)
            keeps += [head for head in [f"{result.keep} tokens"] if head not in keeps]
    return markdown(["", *keeps], ([row, *cells] for row, cells in rows.items()))


def in_llm(table: Json) -> str:
    """The methods inside the language model."""
    results = [Result(**values) for values in table["results"]]
    rows = (
        [
            f"`{result.arm}`",
            f"{result.mean_tokens:.1f}",
            percent(result.accuracy),
            f"{percent(result.ci95[0])} to {percent(result.ci95[1])}",
        ]
        for result in results
    )
    return markdown(["", "mean tokens", "accuracy", "95 % interval"], rows)


def energies(tables: Json, name: str) -> str:
    """A table of `vllm_vtprune_evaluation.energies`."""
    head, *rows = tables[name]
    return markdown(head, rows)


TABLES: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "kinds": ("eval-demo.json", kinds),
    "summary": ("eval-demo.json", summary),
    "ranking": ("eval-demo.json", ranking),
    "paired": ("eval-demo.json", paired),
    "adaptive": ("eval-adaptive.json", adaptive),
    "energies-by-density": ("eval-energies.json", partial(energies, name="density")),
    "energies-by-spectrum": ("eval-energies.json", partial(energies, name="spectra")),
    "presets": ("eval-presets.json", presets),
    "in-llm": ("eval-in-llm.json", in_llm),
    **{f"merged-{kind}": ("eval-merged.json", partial(merged, kind=kind)) for kind in ("reading", "all")},
    **{name: ("eval-ablations.json", partial(ablation, name=name)) for name in (*ABLATIONS, SOLVERS)},
}
"""Name of a table: file of results, and the function that makes the table."""


def rendered(page: str, results: Path) -> str:
    """Render a page: replace every table by the one made from the results.

    Args:
        page: text of the page.
        results: folder of the committed results.

    Raises:
        ValueError: a marker is not closed, or names an unknown table.
    """
    opened, closed = page.count("<!-- table:"), page.count("<!-- end -->")
    names = [match["name"] for match in TABLE.finditer(page)]
    if not opened == closed == len(names) or not set(names) <= set(TABLES):
        expected = f"each to end, and its name to be one of {', '.join(TABLES)}"
        raise ValueError(f"{opened} tables begin, {closed} end, {names} were read; expected {expected}")

    def table(match: re.Match[str]) -> str:
        file, make = TABLES[match["name"]]
        return match[1] + "\n" + make(json.loads((results / file).read_text())) + "\n" + match[3]

    return TABLE.sub(table, page)


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m vllm_vtprune_evaluation.publish", description="Write the tables of the documentation."
    ).parse_args()
    fresh = {name: rendered((ROOT / name).read_text(), ROOT / "docs/benchmarks") for name in PAGES}
    for name, text in fresh.items():
        (ROOT / name).write_text(text)


def _ranked(run: Json) -> list[Result]:
    return [Result(**values) for values in run["ranked_results"][1:]]


if __name__ == "__main__":
    main()
