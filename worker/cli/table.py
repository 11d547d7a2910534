"""Tables of text from others: never read as markup, readable at 80 columns and in a pipe."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.cli.console import plain

_MIN_FOLDED = 16
"""Width of a folded column below which the others are folded as well."""


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
    table = PlainTable(*headings[:shown])
    keep = needed[shown - 1] - widths[shown - 1] + _MIN_FOLDED <= room
    for index, column in enumerate(table.columns):
        column.overflow = "fold"
        column.min_width = widths[index] if keep and index < shown - 1 else None
    for row in cells:
        table.add_row(*row[:shown])
    Console(width=room, highlight=False).print(table)
    if missing := headings[shown:]:
        print(f"[not shown in {room} columns: {', '.join(missing)}; --json shows all]", file=sys.stderr)
