"""A table of which only the visible rows are rendered; its cursor follows a row's key.

A refresh replaces the rows as a whole, in a time that does not depend on their number. Textual's
DataTable needs an update for each changed cell, and the age of every row changes each second.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Column(Generic[R]):
    """A column. `text` returns the cell of a row, given its width; never markup."""

    title: str
    width: int
    """Its least width in cells, without the space that follows it."""
    text: Callable[[R, int], str | Text]
    grows: int = 0
    """Its share of the room that is left."""
    right: bool = False
    """Whether it is aligned to the right."""
    rank: int = 0
    """Columns of the highest rank are left out first if there is no room."""


class LiveTable(ScrollView, Generic[R], can_focus=True):
    """Rows with a header and a cursor; arrow keys, page keys and the mouse move it."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"table--header", "table--cursor", "table--focused"}
    DEFAULT_CSS = """
    LiveTable { overflow-x: hidden; scrollbar-size-vertical: 1; }
    LiveTable > .table--header { text-style: bold; color: $text-muted; background: $panel; }
    LiveTable > .table--cursor { background: $boost; }
    LiveTable > .table--focused { background: $primary-background; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home", "move(-1000000)", show=False),
        Binding("end", "move(1000000)", show=False),
        Binding("enter", "open", "Details", key_display="enter"),
    ]

    @dataclass
    class Opened(Message):
        """The details of the row under the cursor are requested."""

        table: "LiveTable[Any]"

    class Moved(Message):
        """Another row was selected."""

    def __init__(
        self, columns: Sequence[Column[R]], key: Callable[[R], Hashable], empty: str, *, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self.rows: Sequence[R] = ()
        self.cursor = 0
        """Index of the selected row."""
        self._columns = columns
        self._key = key
        self._empty = empty
        self._fitted: tuple[int, list[tuple[Column[R], int]]] = (-1, [])

    @property
    def selected(self) -> R | None:
        """The row under the cursor."""
        return self.rows[self.cursor] if self.rows else None

    def set_rows(self, rows: Sequence[R]) -> None:
        """Show these rows. The cursor stays on its row, and that row at its place on the screen.

        At the first row, the cursor stays there.
        """
        before, count = self.selected, len(self.rows)
        self.rows = rows
        moved_to = self.cursor
        if before is not None and self.cursor > 0:
            key = self._key(before)
            moved_to = next((index for index, row in enumerate(rows) if self._key(row) == key), self.cursor)
        moved_to = max(0, min(moved_to, len(rows) - 1))
        shift, self.cursor = moved_to - self.cursor, moved_to
        if len(rows) != count:
            self.virtual_size = Size(self.size.width, len(rows) + 1)
            if self.styles.height is not None and self.styles.height.is_auto:
                self.refresh(layout=True)
        if shift:
            self.scroll_to(y=self.scroll_offset.y + shift, animate=False)
        self.refresh()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """All rows and the header; one line says so if there are no rows."""
        return max(2, len(self.rows) + 1)

    def on_resize(self) -> None:
        """Keep the virtual size as wide as the widget, and the cursor visible."""
        self.virtual_size = Size(self.size.width, len(self.rows) + 1)
        self._show_cursor()

    def action_move(self, by: int) -> None:
        """Move the cursor by a number of rows."""
        self.cursor = max(0, min(self.cursor + by, len(self.rows) - 1))
        self._show_cursor()
        self.refresh()
        self.post_message(self.Moved())

    def action_page(self, pages: int) -> None:
        """Move the cursor by a number of pages."""
        self.action_move(pages * max(1, self.scrollable_content_region.height - 2))

    def action_open(self) -> None:
        """Request the details of the selected row."""
        if self.rows:
            self.post_message(self.Opened(self))

    def _show_cursor(self) -> None:
        top, height = self.scroll_offset.y, max(1, self.scrollable_content_region.height - 1)
        if not top <= self.cursor < top + height:
            self.scroll_to(y=self.cursor if self.cursor < top else self.cursor - height + 1, animate=False)

    def on_click(self, event: events.Click) -> None:
        """Select the clicked row; a second click requests its details."""
        index = event.y - 1 + self.scroll_offset.y
        if event.y >= 1 and index < len(self.rows):
            self.action_move(index - self.cursor)
            if event.chain == 2:
                self.action_open()

    def render_line(self, y: int) -> Strip:
        """A line of the widget: the header first, then the rows from the scroll position on."""
        width = self.scrollable_content_region.width
        if y == 0:
            titles = [(Text(column.title), column, room) for column, room in self._fit(width)]
            return self._line(titles, self.get_component_rich_style("table--header"), width)
        index = y - 1 + self.scroll_offset.y
        if index >= len(self.rows):
            text = self._empty if y == 1 and not self.rows else ""
            return Strip([Segment(text, self.rich_style + Style(dim=True))]).adjust_cell_length(width, self.rich_style)
        row, style = self.rows[index], self.rich_style
        if index == self.cursor:
            style += self.get_component_rich_style(f"table--{'focused' if self.has_focus else 'cursor'}")
        cells = [(_as_text(column.text(row, room)), column, room) for column, room in self._fit(width)]
        return self._line(cells, style, width)

    def _line(self, cells: Sequence[tuple[Text, Column[R], int]], style: Style, width: int) -> Strip:
        segments: list[Segment] = []
        for text, column, room in cells:
            if cell_len(text.plain) > room:
                text.truncate(room, overflow="ellipsis")
            pad = " " * (room - cell_len(text.plain))
            own = style + self.app.console.get_style(text.style)
            segments += [Segment(pad if column.right else "", style)]
            segments += [Segment(s.text, own + s.style if s.style else own) for s in text.render(self.app.console)]
            segments += [Segment("" if column.right else pad, style), Segment(" ", style)]
        return Strip(segments).adjust_cell_length(width, style)

    def _fit(self, width: int) -> list[tuple[Column[R], int]]:
        """The columns that fit into `width` cells, each with its own width."""
        if self._fitted[0] != width:
            shown = list(self._columns)
            while len(shown) > 1 and sum(column.width + 1 for column in shown) - 1 > width:
                shown.remove(max(reversed(shown), key=lambda column: column.rank))
            spare = max(0, width + 1 - sum(column.width + 1 for column in shown))
            shares = sum(column.grows for column in shown) or 1
            fitted = [(column, column.width + spare * column.grows // shares) for column in shown]
            self._fitted = (width, fitted)
        return self._fitted[1]


def _as_text(value: str | Text) -> Text:
    return Text(value, end="") if isinstance(value, str) else value
