"""Workers inside the test's own event loop, over any harness of the transport's tests."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.jobs.harness import Harness, LossyStreams, wait_until
from worker.config import HttpSection, LeaseSection, LogSection, ServiceSection
from worker.engine import Engine
from worker.jobs.client import Client
from worker.jobs.events import Event, Token
from worker.jobs.keys import events_key, worker_events_key
from worker.jobs.reader import StreamEvent, decode_entry
from worker.jobs.streams import Streams
from worker.jobs.transport import Transport
from worker.runtime import LoadedModel
from worker.service import Assignment, Service
from worker.telemetry import open_log

SHORT_LEASE = LeaseSection(lease_s=0.6, renew_s=0.1, scan_s=0.05)
"""Short enough for tests to wait for, long enough for a busy machine."""

LONG_LEASE = LeaseSection(lease_s=60, renew_s=0.1, scan_s=0.05)
"""Expires in no test, so no worker gets a job by its expiry."""


@dataclass
class Worker:
    """A running service."""

    service: Service
    transport: Transport
    task: asyncio.Task[int]
    output: io.StringIO
    engine: Engine

    @property
    def name(self) -> str:
        return self.transport.worker_id

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.output.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]

    async def wait_until_logged(self, event: str) -> None:
        async def logged() -> bool:
            return bool(self.logged(event))

        await wait_until(logged)

    async def stop(self) -> int:
        self.service.signal("test")
        return await asyncio.wait_for(self.task, 10)


@contextlib.asynccontextmanager
async def serving(
    harness: Harness,
    model: LoadedModel | Callable[[Any], LoadedModel],
    *,
    name: str = "w1",
    lease: LeaseSection = SHORT_LEASE,
    streams: Streams | None = None,
    ready: bool = True,
    patience_s: float = 5.0,
    tracing: Any = None,
    **section: Any,
) -> AsyncIterator[Worker]:
    """A worker of this name over `harness`, ready to take jobs; drained at the end."""
    transport = Transport(streams or harness.connect(), name, lease=lease)
    output = io.StringIO()

    def load(progress: Any) -> LoadedModel:
        if callable(model):
            return model(progress)
        progress(1, 2)
        progress(2, 2)
        return model

    service = Service(
        Assignment("test", "cpu", "default", name.partition("-")[0], patience_s),
        ServiceSection(**{"grace_s": 5.0, "metrics_ms": 250, **section}),
        lease,
        HttpSection(port=0),
        transport,
        load,
        open_log(LogSection(format="json"), name, output),
        tracing,
    )
    task = asyncio.create_task(service.run())
    worker = Worker(service, transport, task, output, None if callable(model) else model.engine)
    try:
        if ready:
            await wait_until(lambda: _ready(worker))
        yield worker
    finally:
        if not task.done():
            service.signal("test")
            service.signal("test")
        with contextlib.suppress(BaseException):
            await asyncio.wait_for(task, 10)
        assert service.join_engine(10), "the engine's thread did not end"


async def _ready(worker: Worker) -> bool:
    if worker.task.done():
        worker.task.result()
    return bool(worker.logged("worker_ready"))


class HeldTake:
    """A connection whose `take` waits for `go` before it calls the server."""

    def __init__(self, harness: Harness) -> None:
        self.called, self.go = asyncio.Event(), asyncio.Event()
        self.streams = LossyStreams(harness.connect(), lambda name: False, self._before)

    async def _before(self, name: str) -> None:
        if name == "take":
            self.called.set()
            await self.go.wait()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition while `take` is held."""
        await asyncio.wait_for(self.called.wait(), 10)

        async def holds() -> bool:
            return condition()

        await wait_until(holds)


@dataclass
class JobEvents:
    """A job's event stream, a `tokens` entry token by token."""

    items: list[StreamEvent] = field(default_factory=list)

    @property
    def kinds(self) -> list[str]:
        """The events' kinds, each run of tokens once and without the metrics."""
        kinds = [item.kind for item in self.items if item.kind != "metrics"]
        return [kind for at, kind in enumerate(kinds) if kind != "token" or at == 0 or kinds[at - 1] != "token"]

    @property
    def tokens(self) -> list[Token]:
        return [item.event for item in self.items if isinstance(item.event, Token)]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.t for token in self.tokens)

    @property
    def last(self) -> Any:
        return self.items[-1].event

    @property
    def cached_tokens(self) -> int:
        return self.of("started")[0].cached_tokens

    def of(self, kind: str) -> list[Any]:
        return [item.event for item in self.items if item.kind == kind]


async def read_job(client: Client, job_id: str, idle_s: float = 20.0) -> JobEvents:
    """The job's events to the terminal one."""
    return JobEvents([item async for item in client.events(job_id, idle_s=idle_s)])


async def run_job(client: Client, **fields: Any) -> JobEvents:
    """Submit a job and read its events to the terminal one."""
    return await read_job(client, await client.submit(**fields))


async def published_events(harness: Harness, job_id: str) -> JobEvents:
    """The current content of the job's stream."""
    records = await harness.connect().range(events_key(job_id), "-", "+", 10_000)
    return JobEvents([item for record in records for item in decode_entry(record, "0-0")])


async def worker_events(harness: Harness, name: str) -> list[Event]:
    """The current content of the worker's own stream."""
    records = await harness.connect().range(worker_events_key(name), "-", "+", 10_000)
    return [item.event for record in records for item in decode_entry(record, "0-0") if isinstance(item.event, Event)]


async def wait_until_queue_is_empty(client: Client) -> None:
    async def empty() -> bool:
        return not await client.queue()

    await wait_until(empty)


async def http_get(port: int, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and body of one request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body.decode()
