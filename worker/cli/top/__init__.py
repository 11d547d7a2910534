"""`worker top`: a live view of queues, workers, jobs, dead letters and errors in a terminal.

`source.py` reads a server into a `Snapshot`; `app.py` shows snapshots with Textual, which only the
modules `app`, `table`, `dialogs`, `views` and `ascii_driver` import.
"""

import asyncio
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Annotated

import typer

from worker.cli.console import print_json
from worker.cli.remote import ConfigOption, UrlOption, connect
from worker.cli.top.source import ServerSource
from worker.config import Settings, load_settings
from worker.errors import ConfigInvalid, WorkerError
from worker.jobs.streams import Contact
from worker.queue_order import QUEUE_NAME
from worker.redis_url import RedisUrl

QueuesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--queue",
        help="Only this queue and its workers; may be repeated. By default all queues of live workers.",
        rich_help_panel="Server and queue",
    ),
]


class NoTerminal(WorkerError):
    """The view needs a terminal."""

    code = "NO_TERMINAL"
    exit_code = 2


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one reading as a JSON object, without a view.")] = False,
    interval: Annotated[float, typer.Option(min=0.25, max=60, help="Seconds between two readings.")] = 1.0,
    ascii: Annotated[bool, typer.Option("--ascii", help="Write ASCII only; by default if the locale does.")] = False,
    config: ConfigOption = None,
    redis_url: UrlOption = None,
    queue: QueuesOption = None,
) -> None:
    """Show queues, workers, jobs, dead letters and errors, live.

    Keys drain a worker, cancel a job and retry a dead letter; `?` shows all. Needs the extra `top`
    (`pip install 'worker-orcd[top]'`) and a terminal as stdin, stdout and stderr: the view is
    drawn on stderr, so `2>FILE` is refused. NO_COLOR is respected.
    """
    settings = load_settings(config, {"redis.url": redis_url})
    if not once:
        _require_view()
    code = asyncio.run(_run(settings, queue or [], once=once, interval_s=interval, ascii=ascii))
    raise typer.Exit(code)


def _require_view() -> None:
    """Raise unless Textual is installed and the view has a terminal."""
    if find_spec("textual") is None:
        raise ConfigInvalid("the live view needs textual; pip install 'worker-orcd[top]', or use --once")
    if not all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise NoTerminal("stdin, stdout and stderr must be a terminal; use `worker top --once` for one reading as JSON")


async def _run(settings: Settings, queues: Sequence[str], *, once: bool, interval_s: float, ascii: bool) -> int:
    """Read once, so that a server that is unreachable or refuses ends the command, then show."""
    for name in queues:
        if not re.fullmatch(QUEUE_NAME, name):
            raise ConfigInvalid(f"--queue: {name!r} must be 1 to 128 letters, digits and - _ . :")
    section = settings.redis
    streams = connect(section, Contact(lambda _: None, lambda _: None))
    address = str(RedisUrl.parse(section.url))
    named, lease_s = list(dict.fromkeys(queues)), settings.lease.lease_s
    source = ServerSource(streams, address, section.queue, named, section.queue_bound, lease_s)
    try:
        snapshot = await source.read()
        if once:
            print_json(asdict(snapshot))
            return 0
        from worker.cli.top.app import TopApp  # noqa: PLC0415  # of the extra `top`
        from worker.cli.top.ascii_driver import AsciiDriver, shows_utf8  # noqa: PLC0415

        app = TopApp(source, snapshot, interval_s, AsciiDriver if ascii or not shows_utf8() else None)
        await app.run_async()
        return app.return_code or 0
    finally:
        await streams.close()
