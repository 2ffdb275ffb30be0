"""Tables that can be read as they stand, too. No torch here: the GPU report's parent process uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a head and its rows: first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


class Table(NamedTuple):
    """A title, a sentence that says how to read the numbers, and rows of text with the head first."""

    title: str
    caption: str
    rows: list[list[str]]

    def markdown(self, level: int = 2) -> str:
        parts = (f"{'#' * level} {self.title}", self.caption, table(self.rows))
        return "\n\n".join(filter(None, parts)) + "\n"
