"""What the commands that talk to a server share: their options, a connected client, events as lines."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.config import RedisSection, load_settings
from worker.errors import ConfigInvalid

if TYPE_CHECKING:
    from worker.jobs.received import Received
    from worker.jobs.redis_streams import RedisStreams
    from worker.jobs.sync_client import SyncClient

_SERVER = "Server and queue"

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings, as of worker run.", rich_help_panel=_SERVER)
]
UrlOption = Annotated[
    str | None, typer.Option("--redis-url", help="Such as redis://127.0.0.1:6379/0.", rich_help_panel=_SERVER)
]
QueueOption = Annotated[str | None, typer.Option("--queue", help="The queue's name.", rich_help_panel=_SERVER)]


def redis_section(config: Path | None, url: str | None, queue: str | None) -> RedisSection:
    """The server and queue that flags, environment and file name together."""
    return load_settings(config, {"redis.url": url, "redis.queue": queue}).redis


def connect(url: str) -> RedisStreams:
    """The streams of a server, not connected yet. Raises ConfigInvalid for a URL that can't be."""
    from worker.jobs.redis_streams import RedisStreams  # noqa: PLC0415  # `worker generate` doesn't wait for redis

    try:
        return RedisStreams.from_url(url)
    except ValueError as error:
        raise ConfigInvalid(f"redis.url: {error}; expected redis://HOST:PORT/DB") from None


@contextmanager
def client(section: RedisSection) -> Iterator[SyncClient]:
    """A client whose server has answered once. Raises ConnectionError where it does not."""
    from worker.jobs.client import Client  # noqa: PLC0415  # as above
    from worker.jobs.sync_client import SyncClient  # noqa: PLC0415

    streams = connect(section.url)
    with SyncClient(lambda: Client(streams, section.queue, section.queue_bound)) as connected:
        connected.state("")
        yield connected


def as_json(item: Received) -> dict[str, Any]:
    """One event as a JSON line has it: its own fields, its entry's id, the id to resume at, the envelope."""
    envelope = item.envelope
    return {
        "event": item.kind,
        **item.event.to_fields(),
        "entry": item.entry_id,
        "resume": item.resume,
        "job_id": envelope.job_id,
        "epoch": envelope.epoch,
        "ts_ms": envelope.ts_ms,
        "worker_id": envelope.worker_id,
        "correlation_id": envelope.correlation_id,
        "traceparent": envelope.traceparent,
        "v": envelope.v,
    }


def as_line(item: Received) -> str:
    """One event for people: when, whose, where to resume, what."""
    at = datetime.fromtimestamp(item.envelope.ts_ms / 1000, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
    facts = " ".join(f"{name}={_shown(value)}" for name, value in item.event.to_fields().items())
    whose = item.envelope.job_id or item.envelope.worker_id
    return f"{at}  {whose}  {item.entry_id}  {item.kind:<13} {facts}".rstrip()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value.isalnum() else jsonlib.dumps(value, ensure_ascii=False)
