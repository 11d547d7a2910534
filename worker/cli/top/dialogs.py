"""Screens above the view of `worker top`: a confirmation, the details of a row, and the help."""

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Static

HELP = """\
q, Ctrl-C     quit
d             drain the selected worker: it takes no more jobs, finishes
              the running ones in its grace period, and ends
c             cancel the selected job, waiting or running
r             retry the selected dead letter under a new id
Tab           next table; arrows, page keys and the mouse move the cursor
1, 2, 3       jobs, dead letters, errors
Enter         details of the selected row, as a second click

OLDEST        age of the oldest waiting job
JOBS          running jobs of a worker, and how many it may run
TOK/S         tokens per second of all its jobs, over the last 10 s
TTFT50, 95    median and 95th percentile of the time from claim to first
              token, over the last 5 minutes
KV            used blocks of the KV cache
VRAM          by purpose: weights, kv, activations, workspace, runtime
stale         a heartbeat is overdue: the worker has probably died
orphaned      a job not renewed for a lease: it waits for another worker
"""


class Dialog(ModalScreen[bool]):
    """Base class: a titled box in the middle, which Escape closes."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "dismiss(False)", "Close")]
    DEFAULT_CSS = """
    Dialog { align: center middle; }
    Dialog #box {
        width: 78; max-width: 100%; height: auto; max-height: 100%; padding: 0 1;
        border: solid $primary; background: $surface;
    }
    Dialog #text { height: auto; max-height: 1fr; scrollbar-size-vertical: 1; }
    Dialog #buttons { height: 1; margin-top: 1; align-horizontal: center; }
    Dialog Button { margin: 0 2; }
    """

    def __init__(self, title: str, text: Text) -> None:
        super().__init__()
        self._title = title
        self._text = text

    def compose(self) -> ComposeResult:
        """The box, with the text and the buttons."""
        box = Vertical(id="box")
        box.border_title = self._title
        with box:
            with VerticalScroll(id="text"):
                yield Static(self._text, markup=False)
            with Horizontal(id="buttons"):
                yield from self.buttons()

    def buttons(self) -> ComposeResult:
        """The buttons below the text."""
        yield Button("Close", id="no", compact=True)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Close with the button's meaning."""
        self.dismiss(event.button.id == "yes")


class Confirm(Dialog):
    """A question; the result is True only for `y` or the button Yes."""

    AUTO_FOCUS = "#no"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", "Yes"),
        Binding("n", "dismiss(False)", "No"),
    ]

    def buttons(self) -> ComposeResult:
        """No has the focus: Enter alone changes nothing."""
        yield Button("No (n)", id="no", compact=True)
        yield Button("Yes (y)", id="yes", variant="error", compact=True)
