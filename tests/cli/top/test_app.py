"""The view over a fake source: what is shown, what keys and clicks do, at several sizes."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Button, Footer

from tests.cli.top.fake_source import FakeSource, jobs, letter, snapshot, worker
from worker.cli.top.app import TopApp
from worker.cli.top.dialogs import HELP, Confirm, Dialog
from worker.cli.top.format import STATE_COLORS
from worker.cli.top.snapshot import ErrorRow, QueueRow, Snapshot
from worker.cli.top.table import LiveTable
from worker.errors import InvalidRequest, ServerRefused
from worker.jobs.streams import Disconnected

NARROW = (80, 24)


def app_of(source: FakeSource) -> TopApp:
    """Refreshes only where a test calls `refresh_now`."""
    return TopApp(source, source.shown, interval_s=3600)


def view(source: FakeSource) -> AbstractAsyncContextManager[Pilot[None]]:
    """The view at 80 × 24."""
    return app_of(source).run_test(notifications=True, size=NARROW)


def lines(app: TopApp) -> list[str]:
    """The text of the screen."""
    return [strip.text.rstrip() for strip in app.screen._compositor.render_strips()]


def line_with(app: TopApp, text: str) -> str:
    found = [line for line in lines(app) if text in line]
    assert found, f"{text!r} is not on the screen:\n" + "\n".join(lines(app))
    return found[0]


def footer_key(app: TopApp, description: str) -> Any:
    return next(key for key in app.query_one(Footer).children if key.description == description)


async def show(pilot: Pilot[None], source: FakeSource, shown: Snapshot) -> None:
    source.shown = shown
    await pilot.app.refresh_now()  # type: ignore[attr-defined]
    await pilot.pause()


async def test_queues_workers_and_jobs_are_shown_at_80_columns() -> None:
    source = FakeSource(snapshot(jobs=jobs(5, running=2)))
    async with view(source) as pilot:
        await pilot.pause()
        shown = line_with(pilot.app, "gpu-0 ")
        assert shown.split()[:8] == ["gpu-0", "busy", "llama", "3/8", "1,234", "12ms", "250ms", "25%"]
        assert "63.0 GB" in shown
        assert line_with(pilot.app, "default   ").split() == ["default", "3", "2", "1m40s", "0"]
        assert line_with(pilot.app, "job-0").split() == ["job-0", "running", "1m40s", "gpu-0", "default", "0"]
        assert line_with(pilot.app, "1 Jobs").split() == [
            "1",
            "Jobs",
            "5",
            "2",
            "Dead",
            "letters",
            "0",
            "3",
            "Errors",
            "0",
        ]
        assert "1 worker, 1,234 tokens/s  redis://fake:6379" in line_with(pilot.app, "worker top")
        footer = lines(pilot.app)[-1]
        assert all(key in footer for key in ("q Quit", "? Help", "d Drain", "c Cancel", "r Retry"))
        assert max(map(len, lines(pilot.app))) <= 80


async def test_states_and_dead_letters_have_colors_and_all_columns_fit_beside_a_scroll_bar() -> None:
    source = FakeSource(snapshot(workers=[worker(f"gpu-{n}") for n in range(40)], letters=[letter("a")]))
    async with view(source) as pilot:
        await pilot.pause()
        table = pilot.app.query_one("#workers", LiveTable)
        assert table.show_vertical_scrollbar
        assert "VRAM" in line_with(pilot.app, "WORKER")
        styles = {segment.text.strip(): segment.style for segment in table.render_line(1)}
        assert styles["busy"].color.name == STATE_COLORS["busy"]
        queues = pilot.app.query_one("#queues", LiveTable).render_line(1)
        assert next(s for s in queues if s.text == "1").style.color.name == STATE_COLORS["failed"]


async def test_a_wide_screen_shows_more_columns_and_the_memory_of_the_selected_worker() -> None:
    source = FakeSource(snapshot(workers=[worker("gpu-0"), worker("gpu-1", vram_weights=33 * 10**9)]))
    async with app_of(source).run_test(notifications=True, size=(180, 50)) as pilot:
        await pilot.pause()
        assert "UP" in line_with(pilot.app, "WORKER ")
        assert "20.0 GB" in line_with(pilot.app, " weights ")
        await pilot.press("down")
        await pilot.pause()
        assert "33.0 GB" in line_with(pilot.app, " weights ")
        await pilot.resize_terminal(*NARROW)
        await pilot.pause()
        assert not any(" weights " in line for line in lines(pilot.app))
        assert "gpu-1" in line_with(pilot.app, "gpu-1")


@pytest.mark.parametrize("size", [(1, 1), (20, 5), (40, 12), (300, 100)])
async def test_any_size_of_the_terminal_is_drawn(size: tuple[int, int]) -> None:
    source = FakeSource(snapshot(jobs=jobs(50), letters=[letter("a")]))
    async with app_of(source).run_test(notifications=True, size=size) as pilot:
        await pilot.pause()
        for keys in ("2", "question_mark", "escape", "end", "d", "y"):
            await pilot.press(keys)
        await pilot.pause()
        assert source.commands == [("drain", "gpu-0")]
        assert len(lines(pilot.app)) == size[1]


async def test_drain_needs_a_confirmation() -> None:
    source = FakeSource(snapshot(workers=[worker("gpu-0"), worker("gpu-1")]))
    async with view(source) as pilot:
        await pilot.press("down", "d")
        assert isinstance(pilot.app.screen, Confirm)
        assert "gpu-1" in line_with(pilot.app, "Drain the worker")
        await pilot.press("n")
        assert source.commands == []
        await pilot.press("d", "enter")
        assert source.commands == [], "No has the focus"
        await pilot.press("d", "escape", "d", "y")
        await pilot.pause()
        assert source.commands == [("drain", "gpu-1")]


async def test_the_mouse_does_what_the_keys_do() -> None:
    source = FakeSource(snapshot(jobs=jobs(5), letters=[letter("a"), letter("bb")]))
    async with view(source) as pilot:
        await pilot.pause()
        await pilot.click("#jobs", offset=(3, 3))
        await pilot.click(footer_key(pilot.app, "Cancel job"))
        assert "job-2" in line_with(pilot.app, "Cancel the waiting job")
        await pilot.click("#yes")
        await pilot.pause()
        assert source.commands == [("cancel", "default", "job-2")]
        await pilot.click("#tabs", offset=(lines(pilot.app)[6].index("Dead letters"), 0))
        await pilot.pause()
        await pilot.click("#letters", offset=(3, 2))
        await pilot.click(footer_key(pilot.app, "Retry letter"))
        await pilot.click("#no")
        assert len(source.commands) == 1
        await pilot.click("#letters", offset=(3, 2), times=2)
        await pilot.pause()
        assert "bb" in line_with(pilot.app, "job  ")


async def test_cancel_and_retry_name_the_row_that_was_selected_also_after_a_refresh() -> None:
    source = FakeSource(snapshot(jobs=jobs(100), letters=[letter("a"), letter("bb"), letter("ccc")]))
    async with view(source) as pilot:
        await pilot.press("1")
        pilot.app.query_one("#jobs", LiveTable).action_move(30)
        await show(pilot, source, snapshot(jobs=jobs(80, first=20), letters=source.shown.letters))
        await pilot.press("c")
        await show(pilot, source, snapshot(jobs=jobs(10, first=90), letters=source.shown.letters))
        assert "job-30" in line_with(pilot.app, "Cancel the waiting job")
        await pilot.press("y")
        await pilot.press("r")
        assert source.commands == [("cancel", "default", "job-30")], "the first r shows the dead letters"
        await pilot.press("down", "r", "y")
        assert source.commands[1:] == [("retry", "default", "2-0")]


async def test_a_dead_letter_without_a_job_id_cannot_be_retried() -> None:
    source = FakeSource(snapshot(letters=[letter("")]))
    async with view(source) as pilot:
        await pilot.press("2", "r")
        await pilot.pause()
        assert not isinstance(pilot.app.screen, Confirm)
        (notice,) = pilot.app._notifications
        assert notice.message == "the dead letter 0-0 has no job id and cannot be retried"
        await pilot.press("y")
        assert source.commands == []


async def test_the_selected_row_keeps_its_place_on_the_screen_while_others_leave() -> None:
    source = FakeSource(snapshot(jobs=jobs(1000)))
    async with view(source) as pilot:
        pilot.app.query_one("#jobs", LiveTable).action_page(10)
        await pilot.pause()
        before = lines(pilot.app)
        table = pilot.app.query_one("#jobs", LiveTable)
        name = table.selected.job_id
        await show(pilot, source, snapshot(jobs=jobs(950, first=50)))
        assert table.selected.job_id == name
        at = [n for n, line in enumerate(before) if line.startswith(f"{name} ")]
        assert [n for n, line in enumerate(lines(pilot.app)) if line.startswith(f"{name} ")] == at
        await show(pilot, source, snapshot(jobs=jobs(3, first=990)))
        assert line_with(pilot.app, "job-992")
        await show(pilot, source, snapshot())
        assert table.selected is None
        assert line_with(pilot.app, "no jobs")


async def test_a_refresh_with_1000_running_and_1000_waiting_jobs_takes_under_100_ms_of_cpu() -> None:
    source = FakeSource(snapshot(jobs=jobs(2000, running=1000), workers=[worker(f"gpu-{n}") for n in range(50)]))
    async with app_of(source).run_test(notifications=True, size=(200, 60)) as pilot:
        await pilot.pause()
        times = []
        for _ in range(5):
            began = time.process_time()
            await show(pilot, source, replace(source.shown, now_ms=source.shown.now_ms + 1000))
            times.append(time.process_time() - began)
        assert min(times) < 0.1


HOSTILE = "\x1b]0;owned\x07\x1b[31m[bold red]x[/] [@click=app.quit]y[/]\n\u202eevil\u200b\x9b"


async def test_texts_of_others_are_neither_control_sequences_nor_markup() -> None:
    source = FakeSource(
        snapshot(
            workers=[worker(HOSTILE, model=HOSTILE, state=HOSTILE, host=HOSTILE, queue=HOSTILE, device=HOSTILE)],
            queues=[QueueRow(HOSTILE, 1, 1, 1.0, 1)],
            jobs=[replace(jobs(1)[0], job_id=HOSTILE, worker=HOSTILE, queue=HOSTILE)],
            letters=[replace(letter(HOSTILE, HOSTILE), reason=HOSTILE)],
            errors=[ErrorRow(1, HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
        )
    )
    source.outcome = lambda: HOSTILE
    async with app_of(source).run_test(notifications=True, size=(300, 50)) as pilot:
        shown: list[str] = []
        for keys in ("d", "escape", "1", "c", "y", "enter", "escape", "2", "r", "y", "enter"):
            await pilot.press(keys)
            await pilot.pause()
            shown += lines(pilot.app)
        source.error = ServerRefused(HOSTILE)
        await pilot.app.refresh_now()  # type: ignore[attr-defined]
        await pilot.pause()
        shown += lines(pilot.app)
    everything = "".join(shown)
    assert everything.isprintable()
    assert "[bold red]x[/]" in everything
    assert "\\x1b]0;owned" in everything
    assert len(source.commands) == 2


async def test_the_banner_shows_an_outage_until_it_is_over() -> None:
    source = FakeSource(snapshot(jobs=jobs(3)))
    async with view(source) as pilot:
        source.error = Disconnected("cannot reach redis://fake:6379 (connection refused)")
        await show(pilot, source, source.shown)
        assert line_with(pilot.app, "server unreachable since")
        assert line_with(pilot.app, "job-2"), "the last state stays"
        source.error = Disconnected("redis://fake:6379 refuses for now: it is loading its data (LOADING)", "LOADING")
        await show(pilot, source, source.shown)
        assert line_with(pilot.app, "server refuses since")
        source.error = None
        await show(pilot, source, snapshot(jobs=jobs(2)))
        assert not any("server" in line for line in lines(pilot.app))


async def test_a_failed_command_is_reported_with_its_code_and_the_view_goes_on() -> None:
    source = FakeSource(snapshot(jobs=jobs(1), letters=[letter("a")]))

    def refuse() -> Any:
        raise errors.pop()

    source.outcome = refuse
    async with app_of(source).run_test(notifications=True, size=(120, 40)) as pilot:
        for keys, error, code in (
            (("1", "c", "y"), ServerRefused("the user lacks a right: 'xadd'"), "REDIS_REFUSED"),
            (("d", "y"), Disconnected("cannot reach it"), "REDIS_UNREACHABLE"),
            (("2", "r", "y"), InvalidRequest.of(("prompt", "required", None)), "INVALID_REQUEST"),
        ):
            errors = [error]
            await pilot.press(*keys)
            await pilot.pause()
            assert line_with(pilot.app, code)
        source.outcome = lambda: "over"
        await pilot.press("1", "c", "y")
        await pilot.pause()
        assert line_with(pilot.app, "had ended before")


async def test_rows_that_are_missing_are_named() -> None:
    source = FakeSource(snapshot(workers=[], jobs=[replace(jobs(1)[0], job_id=None)]))
    async with app_of(source).run_test(notifications=True, size=(120, 40)) as pilot:
        for keys, text in (
            (("d",), "no worker is selected"),
            (("1", "c"), "no readable id"),
            (("2", "r"), "there are no"),
        ):
            await pilot.press(*keys)
            await pilot.pause()
            assert line_with(pilot.app, text)
        assert line_with(pilot.app, "no live workers")
    assert source.commands == []


async def test_a_stale_worker_and_its_jobs_are_marked() -> None:
    source = FakeSource(snapshot(workers=[worker("dead", silent_s=8.0), worker("alive", silent_s=2.0)]))
    async with view(source) as pilot:
        await pilot.pause()
        assert "stale" in line_with(pilot.app, "dead ")
        assert "busy" in line_with(pilot.app, "alive ")
        assert "1,234 tokens/s" in lines(pilot.app)[0], "without the stale worker's"


async def test_no_line_of_the_help_is_broken_at_80_columns() -> None:
    app = app_of(FakeSource(snapshot()))
    async with app.run_test(notifications=True, size=NARROW) as pilot:
        await pilot.press("question_mark")
        await pilot.pause()
        shown = "\n".join(lines(app))
        assert [line for line in HELP.splitlines() if line not in shown] == []


@pytest.mark.parametrize(("key", "code"), [("q", 0), ("ctrl+c", 130)])
@pytest.mark.parametrize("dialog", [False, True])
async def test_q_and_ctrl_c_quit(key: str, code: int, dialog: bool) -> None:
    app = app_of(FakeSource(snapshot()))
    async with app.run_test(notifications=True, size=NARROW) as pilot:
        if dialog:
            await pilot.press("question_mark")
            assert isinstance(app.screen, Dialog)
            assert line_with(app, "cancel the selected job")
            if key == "q":
                await pilot.press("q")
                assert not isinstance(app.screen, Dialog), "it closes the dialog first"
        await pilot.press(key)
        await pilot.pause()
    assert app.return_code == code


async def test_a_reading_that_ends_after_the_view_was_closed_is_dropped() -> None:
    source = FakeSource(snapshot())
    app = app_of(source)
    async with app.run_test(size=NARROW) as pilot:
        await pilot.pause()
        before = app.refreshed
    await app.refresh_now()
    source.error = Disconnected("cannot reach it")
    await app.refresh_now()
    assert app.refreshed == before


async def test_buttons_of_a_confirmation_have_text() -> None:
    app = app_of(FakeSource(snapshot()))
    async with app.run_test(notifications=True, size=NARROW) as pilot:
        await pilot.press("d")
        assert [str(button.label) for button in app.screen.query(Button)] == ["No (n)", "Yes (y)"]
        assert line_with(app, "Yes (y)")
        await pilot.press("tab", "enter")
        await pilot.pause()
        assert app._source.commands == [("drain", "gpu-0")]
