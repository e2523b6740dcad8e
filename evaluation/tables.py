"""Tables of text, and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Cells = Sequence[str]


def markdown(head: Cells, rows: Iterable[Cells]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def aligned(table: str) -> str:
    """A table of `markdown` with its cells padded, for a terminal."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    text, *numbers = [max(map(len, column)) for column in zip(*rows, strict=True)]
    out = []
    for first, *others in rows:
        blank = "-" if first == "---" else " "
        cells = [first.ljust(text, blank), *(cell.rjust(n, blank) for cell, n in zip(others, numbers, strict=True))]
        out.append(f"| {' | '.join(cells)} |\n")
    return "".join(out)


def table(head: Cells, rows: Iterable[Cells], texts: int = 1) -> str:
    """A table without lines; its first ``texts`` columns are aligned to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [cell.ljust(width) if index < texts else cell.rjust(width) for index, (cell, width) in enumerate(columns)]
        for columns in (zip(line, widths, strict=True) for line in lines)
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def written(value: float | None, style: str) -> str:
    """A number in a format; a dash for what was not measured."""
    return "-" if value is None else format(value, style)


def percent(share: float) -> str:
    """A share in percent, with one decimal."""
    return f"{100 * share:.1f} %"
