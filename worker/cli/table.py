"""Tables of text from others: never read as markup, readable at 80 columns and in a pipe."""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from worker.cli.console import plain

_MIN_FOLDED = 16
"""The least width of a folded column."""


class PlainTable(Table):
    """A table without borders whose cells are text, not markup."""

    def __init__(self, *headings: str, show_header: bool = True) -> None:
        super().__init__(*headings, show_header=show_header, box=None, pad_edge=False)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; None is an empty cell."""
        super().add_row(*(Text("" if cell is None else plain(cell)) for cell in cells), **options)


def print_table(rows: Sequence[Mapping[str, Any]], required: int) -> None:
    """Print rows as a table; at a terminal the columns that fit, at least the `required` first.

    The last column is folded if it does not fit. In a pipe, columns are as wide as needed.
    """
    headings = list(rows[0])
    cells = [["" if value is None else plain(value) for value in row.values()] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(headings, *cells, strict=True)]
    needed = [sum(widths[:count]) + 2 * (count - 1) for count in range(1, len(widths) + 1)]
    room = shutil.get_terminal_size((0, 0)).columns or needed[-1]
    shown = max(required, sum(width <= room for width in needed))
    before = needed[shown - 1] - widths[shown - 1]
    for row in [headings, *cells]:
        first = "".join(set_cell_size(cell, width + 2) for cell, width in zip(row, widths[: shown - 1], strict=False))
        for line in _fold(row[shown - 1], max(room - before, _MIN_FOLDED)):
            print((first + line).rstrip())
            first = " " * before
    if missing := headings[shown:]:
        print(f"[not shown in {room} columns: {', '.join(missing)}; --json shows all]", file=sys.stderr)


def _fold(text: str, width: int) -> Iterator[str]:
    """Split text into lines of at most `width` cells, at spaces where there are some."""
    while cell_len(text) > width:
        end, used = 0, 0
        while used + cell_len(text[end]) <= width or end == 0:
            used, end = used + cell_len(text[end]), end + 1
        space = text.rfind(" ", 1, end + 1)
        end = space + 1 if space > 0 else end
        yield text[:end]
        text = text[end:]
    yield text
