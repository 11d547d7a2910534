"""The view of `worker top`: tables that follow a `Source`, and the operator's commands.

`TopApp` reads the source each second. While that fails it shows a banner and the last state. The
tables are in `table.py`, their columns in `views.py`, the dialogs in `dialogs.py`.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.driver import Driver
from textual.filter import LineFilter, NoColor
from textual.widgets import ContentSwitcher, Footer, Static

from worker.cli.console import plain
from worker.cli.top import views
from worker.cli.top.dialogs import HELP, Confirm, Dialog
from worker.cli.top.format import cell, count
from worker.cli.top.snapshot import ErrorRow, JobRow, LetterRow, QueueRow, Snapshot, WorkerRow
from worker.cli.top.source import Source
from worker.cli.top.table import LiveTable
from worker.errors import ServerRefused, WorkerError
from worker.jobs.streams import Disconnected

INTERVAL_S = 1.0
_INTERRUPTED, _TERMINATED = 130, 143
_PANES = {"jobs": "Jobs", "letters": "Dead letters", "errors": "Errors"}
_PANEL_WIDTH = 52
_WIDE = 140
"""Columns from which on the panel is shown."""
_OUTCOMES = {
    "cancelled": "was cancelled before it ran",
    "requested": "is being cancelled: its worker stops at the next token",
    "over": "had ended before",
    "unknown": "is not known any more",
}


class TopApp(App[None]):
    """The live view. `return_code` is that of the command."""

    ENABLE_COMMAND_PALETTE = False
    TITLE = "worker top"
    CSS = f"""
    #title {{ height: 1; background: $primary-background; color: $text; text-style: bold; }}
    #banner {{ height: auto; max-height: 3; display: none; background: $error; color: $text; padding: 0 1; }}
    .-failing #banner {{ display: block; }}
    .-failing LiveTable, .-failing #panel {{ opacity: 60%; }}
    #queues {{ height: auto; max-height: 6; }}
    #middle {{ height: auto; max-height: 45%; min-height: 3; }}
    #workers {{ width: 1fr; height: auto; max-height: 100%; }}
    #panel {{ width: {_PANEL_WIDTH}; height: 10; padding: 0 1; display: none; background: $boost; }}
    .-wide #panel {{ display: block; }}
    #tabs {{ height: 1; }}
    .-wide #middle, .-wide #tabs {{ margin-top: 1; }}
    #panes, #panes LiveTable {{ height: 1fr; }}
    TopApp:nocolor .table--header {{ text-style: bold underline; }}
    TopApp:nocolor .table--focused {{ text-style: reverse; }}
    TopApp:nocolor #title, TopApp:nocolor #banner {{ text-style: reverse; }}
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("question_mark,h", "help", "Help", key_display="?"),
        Binding("d", "drain", "Drain worker"),
        Binding("c", "cancel", "Cancel job"),
        Binding("r", "retry", "Retry letter"),
        Binding("1", "show('jobs')", show=False),
        Binding("2", "show('letters')", show=False),
        Binding("3", "show('errors')", show=False),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
        Binding("ctrl+z", "suspend_process", show=False),
    ]

    def __init__(
        self,
        source: Source,
        first: Snapshot,
        interval_s: float = INTERVAL_S,
        driver_class: type[Driver] | None = None,
    ) -> None:
        super().__init__(driver_class=driver_class)
        self.snapshot = first
        self.refreshed = 0
        """Number of successful readings."""
        self._source = source
        self._interval_s = interval_s
        self._failing_since: datetime | None = None
        self._title, self._banner = Static(id="title", markup=False), Static(id="banner", markup=False)
        self._panel, self._tabs = Static(id="panel", markup=False), Static(id="tabs")
        self._panes = ContentSwitcher(id="panes", initial="jobs")
        color = not self.no_color
        self._queue_table: LiveTable[QueueRow] = LiveTable(views.QUEUE_COLUMNS, lambda row: row.name, "", id="queues")
        self._worker_table: LiveTable[WorkerRow] = LiveTable(
            views.worker_columns(color=color), lambda row: row.id, "no live workers", id="workers"
        )
        self._job_table: LiveTable[JobRow] = LiveTable(
            views.job_columns(), lambda row: (row.queue, row.entry_id), "no jobs", id="jobs"
        )
        self._letter_table: LiveTable[LetterRow] = LiveTable(
            views.letter_columns(), lambda row: (row.queue, row.entry_id), "no dead letters", id="letters"
        )
        self._error_table: LiveTable[ErrorRow] = LiveTable(
            views.error_columns(), lambda row: row, "no errors", id="errors"
        )

    def get_line_filters(self) -> Sequence[LineFilter]:
        """With NO_COLOR the terminal's own colors, where Textual alone would use shades of gray."""
        filters = super().get_line_filters()
        return [*filters, NoColor()] if self.no_color else filters

    def compose(self) -> ComposeResult:
        """From top to bottom: queues, workers, and one of jobs, dead letters and errors."""
        yield self._title
        yield self._banner
        yield self._queue_table
        with Horizontal(id="middle"):
            yield self._worker_table
            yield self._panel
        yield self._tabs
        with self._panes:
            yield self._job_table
            yield self._letter_table
            yield self._error_table
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Focus the workers, and follow the source until the end."""
        self._worker_table.focus()
        self._show_snapshot()
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not in a thread, not on Windows
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, lambda: self.exit(return_code=_TERMINATED))
        self.run_worker(self._follow(), name="follow")

    async def _follow(self) -> None:
        while True:
            began_s = time.monotonic()
            await self.refresh_now()
            await asyncio.sleep(max(0.1, self._interval_s - (time.monotonic() - began_s)))

    async def refresh_now(self) -> None:
        """Read the source once and show what it returned, or why it did not."""
        try:
            self.snapshot = await self._source.read()
        except (Disconnected, ServerRefused) as error:
            if not self.screen_stack:
                return
            self._failing_since = self._failing_since or datetime.now()
            self._show_failure(error)
        else:
            if not self.screen_stack:  # the view was closed during the reading
                return
            self.refreshed += 1
            self._failing_since = None
            self.screen_stack[0].remove_class("-failing")
            self._show_snapshot()

    def _show_failure(self, error: Disconnected | ServerRefused) -> None:
        assert self._failing_since is not None, "a reading has failed"
        refused = isinstance(error, ServerRefused) or bool(error.reply)
        what = "server refuses" if refused else "server unreachable"
        banner = f"{what} since {self._failing_since:%H:%M:%S}; trying again. {plain(str(error))}"
        self._banner.update(Text(banner))
        self.screen_stack[0].add_class("-failing")

    def _show_snapshot(self) -> None:
        shown = self.snapshot
        self._queue_table.set_rows(shown.queues)
        self._worker_table.set_rows(shown.workers)
        self._job_table.set_rows(shown.jobs)
        self._letter_table.set_rows(shown.letters)
        self._error_table.set_rows(shown.errors)
        speed = sum(worker.tokens_per_second or 0 for worker in shown.workers if not worker.stale)
        hidden = f", {shown.hidden_queues} more queues (--queue NAME)" if shown.hidden_queues else ""
        workers = f"{len(shown.workers)} worker{'s' * (len(shown.workers) != 1)}"
        title = f" worker top  {views.time_of_day(shown.now_ms)}  {workers}, {count(speed)} tokens/s"
        self._title.update(Text(f"{title}{hidden}  {plain(self._source.address)}"))
        self._show_panel()
        self._show_tabs()

    def _show_tabs(self) -> None:
        """One line that names the three tables, each a link, with the numbers of their rows."""
        shown, parts = self.snapshot, []
        numbers = {
            "jobs": _of(len(shown.jobs), shown.jobs_total),
            "letters": _of(len(shown.letters), shown.letters_total),
            "errors": f"{len(shown.errors):,}",
        }
        current = self._panes.current
        for number, (pane, name) in enumerate(_PANES.items(), 1):
            style = "reverse" if pane == current else "none"
            parts.append(f"[{style}][@click=app.show('{pane}')] {number} {name} {numbers[pane]} [/][/]")
        self._tabs.update(" ".join(parts))

    def _show_panel(self) -> None:
        if self._panel.display:
            self._panel.update(
                views.worker_panel(self._worker_table.selected, _PANEL_WIDTH - 2, color=not self.no_color)
            )

    def on_resize(self, event: events.Resize) -> None:
        """Show the panel if there is room for it."""
        self.screen_stack[0].set_class(event.size.width >= _WIDE, "-wide")
        self.call_after_refresh(self._show_panel)

    def on_live_table_moved(self) -> None:
        """Show the newly selected worker."""
        self._show_panel()

    def on_live_table_opened(self, event: "LiveTable.Opened") -> None:
        """Show the details of a row."""
        title, text = views.details_of(event.table.selected, 72, color=not self.no_color)
        self.push_screen(Dialog(title, text))

    def action_help(self) -> None:
        """Show the keys and the meaning of the columns."""
        self.push_screen(Dialog("Help", Text(HELP)))

    def action_interrupt(self) -> None:
        """Quit as a command that Ctrl-C has interrupted."""
        self.exit(return_code=_INTERRUPTED)

    def action_show(self, pane: str) -> None:
        """Show the jobs, the dead letters or the errors."""
        self._panes.current = pane
        self.set_focus(self.query_one(f"#{pane}", LiveTable))  # at once: the next key is for this table
        self._show_tabs()

    def action_drain(self) -> None:
        """Drain the selected worker, after a confirmation."""
        if (row := self._worker_table.selected) is None:
            self.notify("no worker is selected", severity="warning")
            return

        async def drain() -> str:
            await self._source.drain(row.id)
            return f"worker {row.id} was requested to drain"

        jobs = f" It has {row.running} running jobs, which it finishes in its grace period." if row.running else ""
        question = Text.assemble("Drain the worker ", cell(row.id, "bold"), f"?{jobs}")
        self._confirm("Drain", question, drain)

    def action_cancel(self) -> None:
        """Cancel the selected job, after a confirmation."""
        row = self._selected(self._job_table, "jobs")
        if row is None:
            return
        if row.job_id is None:
            self.notify("this job has no readable id", severity="warning")
            return
        job_id = row.job_id

        async def cancel() -> str:
            outcome = await self._source.cancel(row.queue, job_id)
            return f"job {job_id} {_OUTCOMES.get(outcome, outcome)}"

        question = Text.assemble(f"Cancel the {row.state} job ", cell(job_id, "bold"), "?")
        self._confirm("Cancel", question, cancel)

    def action_retry(self) -> None:
        """Resubmit the job of the selected dead letter, after a confirmation."""
        row = self._selected(self._letter_table, "letters")
        if row is None:
            return
        if not row.job_id:
            self.notify(f"the dead letter {row.entry_id} has no job id and cannot be retried", severity="warning")
            return

        async def retry() -> str:
            new = await self._source.retry(row.queue, row.entry_id)
            return f"job {row.job_id} was submitted again as {new}"

        question = Text.assemble("Submit the job ", cell(row.job_id, "bold"), " again, and delete its dead letter?")
        self._confirm("Retry", question, retry)

    def _selected(self, table: LiveTable[Any], pane: str) -> Any:
        """The selected row of a table; None, with a message, if it is not shown or empty."""
        if self._panes.current != pane:
            self.action_show(pane)
            self.notify(f"select one of the {_PANES[pane].lower()}, then press the key again")
            return None
        if table.selected is None:
            self.notify(f"there are no {_PANES[pane].lower()}", severity="warning")
        return table.selected

    def _confirm(self, title: str, question: Text, command: Callable[[], Coroutine[Any, Any, str]]) -> None:
        async def run() -> None:
            try:
                self.notify(plain(await command()), markup=False)
            except (Disconnected, WorkerError) as error:
                self.notify(plain(f"{error.code}: {error}"), severity="error", markup=False, timeout=10)
            await self.refresh_now()

        def answered(confirmed: bool | None) -> None:
            if confirmed:
                self.run_worker(run(), name="command")

        self.push_screen(Confirm(title, question), answered)


def _of(listed: int, total: int) -> str:
    return f"{total:,}" if listed >= total else f"{listed:,} of {total:,}"
