"""Shared by the commands that connect to a server: options, a client, events as JSON or text."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from worker.cli.console import clock, json_text, plain
from worker.config import RedisSection, load_settings
from worker.jobs.client import Client, SyncClient
from worker.jobs.reader import StreamEvent
from worker.jobs.streams import Contact, Streams

_server = partial(typer.Option, rich_help_panel="Server and queue")
ConfigOption = Annotated[Path | None, _server("--config", metavar="FILE", help="Settings file of worker run.")]
UrlOption = Annotated[str | None, _server("--redis-url", help="For example redis://127.0.0.1:6379/0.")]
QueueOption = Annotated[str | None, _server("--queue", help="Name of the queue.")]


def redis_section(config: Path | None, url: str | None, queue: str | None) -> RedisSection:
    """The server and queue from flags, environment and settings file."""
    return load_settings(config, {"redis.url": url, "redis.queue": queue}).redis


def connect(section: RedisSection, contact: Contact | None = None) -> Streams:
    """Create the streams of a server; they connect on first use. Raises ConfigInvalid.

    Without `contact`, stderr reports when a connected server is lost, and when it is back.
    """
    from worker.jobs.redis_streams import RedisStreams  # noqa: PLC0415  # `worker health` needs no redis

    def report(line: str) -> None:
        print(f"worker: {line}", file=sys.stderr)

    on_stderr = Contact(
        lambda reason: report(f"{reason}; trying again"),
        lambda seconds: report(f"connected again after {seconds:.1f} s"),
        from_start=False,
    )
    return RedisStreams.from_url(section.server, contact or on_stderr)


@contextmanager
def client(config: Path | None, url: str | None, queue: str | None) -> Iterator[SyncClient]:
    """A client whose server has replied once. Raises Disconnected if it does not."""
    section = redis_section(config, url, queue)
    with SyncClient(Client(connect(section), section.queue, section.queue_bound)) as connected:
        connected.server_time_ms()
        yield connected


def as_json(item: StreamEvent) -> dict[str, Any]:
    """One event as a JSON object: its own fields, entry id, resume id, envelope."""
    ids = {"entry": item.entry_id, "resume": item.resume}
    return {"event": item.kind, **item.event.to_fields(), **ids, **asdict(item.envelope)}


def as_line(item: StreamEvent) -> str:
    """One event as a line of text: time, job or worker, entry id, type, fields."""
    fields = " ".join(f"{name}={_format(value)}" for name, value in item.event.to_fields().items())
    source = item.envelope.job_id or item.envelope.worker_id
    return plain(f"{clock(item.envelope.ts_ms)}  {source}  {item.entry_id}  {item.kind:<13} {fields}".rstrip())


def _format(value: Any) -> str:
    return value if isinstance(value, str) and value.isalnum() else json_text(value)
