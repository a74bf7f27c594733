"""Markdown tables; imports nothing big."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys -> a markdown table on stdout; None is an empty cell."""
    names = list(rows[0])
    cells = [[name.replace("_", " ") for name in names]]
    cells += [["" if row[name] is None else str(row[name]).replace("|", "\\|") for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |", flush=True)
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
