"""Workers inside the test's own event loop, over any harness of the transport's tests, with any runner."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.jobs.harness import Harness, wait_until
from worker.backend import MemoryUse
from worker.config import EngineSection, HttpSection, LeaseSection, LogSection, ModelSection, ServiceSection
from worker.echo_model import load_echo
from worker.engine import Engine
from worker.engine.kv_blocks import KvBlocks
from worker.jobs.client import Client
from worker.jobs.events import Event, Token
from worker.jobs.keys import events_key, worker_events_key
from worker.jobs.reader import StreamEvent, decode_entry
from worker.jobs.streams import Streams
from worker.jobs.transport import Transport
from worker.runtime import LoadedModel, load
from worker.sampling import Draw
from worker.service import Assignment, Service
from worker.telemetry import open_log

QUICK = LeaseSection(lease_s=0.6, renew_s=0.1, scan_s=0.05)
"""Short enough for tests to wait for, long enough for a busy machine."""


class Model:
    """A loaded model, of which each worker gets an engine of its own. Only one of them may run at a time."""

    def __init__(self, served: LoadedModel) -> None:
        self.served = served
        self.runner = served.engine._runner

    @classmethod
    def from_file(cls, path: Path, **engine: Any) -> Model:
        section = EngineSection(backend="cpu", **engine)
        return cls(load(path, ModelSection(), section, lambda done, total: None))

    @classmethod
    def echo(cls, context: int = 4096) -> Model:
        return cls(load_echo(context, 64, 0.0, lambda done, total: None))

    def fresh(self, runner: Any = None, **changes: Any) -> LoadedModel:
        """Serve it with a new engine over `runner`, by default the model's own."""
        runner = runner or self.runner
        engine = Engine(runner, self.served.engine.settings, KvBlocks(runner.kv_blocks))
        return replace(self.served, engine=engine, **changes)


class Scripted:
    """A runner that does what `script` says of each step while its device is at work: it may sleep, wait or raise.

    `launch` says the same of the time before.
    """

    def __init__(
        self, runner: Any, script: Callable[[int], None], launch: Callable[[int], None] = lambda step: None
    ) -> None:
        self.vocab_size, self.kv_blocks = runner.vocab_size, runner.kv_blocks
        self.steps = 0
        self._runner, self._script, self._launch = runner, script, launch

    def run(self, batch: Any, requests: Any, on_launched: Callable[[], None]) -> list[Draw]:
        step, self.steps = self.steps, self.steps + 1
        self._launch(step)
        on_launched()
        self._script(step)
        return self._runner.run(batch, requests)


class Gate:
    """Holds the engine before step `at` until it is opened; `script` is for `Scripted`."""

    def __init__(self, at: int) -> None:
        self.reached, self._open, self._at = threading.Event(), threading.Event(), at

    def script(self, step: int) -> None:
        if step == self._at:
            self.reached.set()
            assert self._open.wait(30), "nobody opened the gate"

    async def until_reached(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 10), "the engine never came to the gate"

    def open(self) -> None:
        self._open.set()


@dataclass
class Worker:
    """A service that runs."""

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

    async def stop(self) -> int:
        self.service.signal("test")
        return await asyncio.wait_for(self.task, 10)

    def kill(self) -> None:
        """As SIGKILL does, as far as one process can: its tasks end where they are."""
        self.task.cancel()


@contextlib.asynccontextmanager
async def serving(
    harness: Harness,
    served: LoadedModel | Callable[[Any], LoadedModel],
    *,
    name: str = "w1",
    lease: LeaseSection = QUICK,
    streams: Streams | None = None,
    ready: bool = True,
    patience_s: float = 5.0,
    **section: Any,
) -> AsyncIterator[Worker]:
    """A worker of this name over `harness`, ready to take jobs; drained at the end."""
    transport = Transport(streams or harness.connect(), name, lease=lease)
    output = io.StringIO()

    def load(progress: Any) -> LoadedModel:
        if callable(served):
            return served(progress)
        progress(1, 2)
        progress(2, 2)
        return served

    service = Service(
        Assignment("test", "cpu", "default", name.partition("-")[0], patience_s),
        ServiceSection(**{"grace_s": 5.0, "metrics_ms": 250, **section}),
        lease,
        HttpSection(port=0),
        transport,
        load,
        open_log(LogSection(format="json"), name, output),
    )
    task = asyncio.create_task(service.run())
    worker = Worker(service, transport, task, output, None if callable(served) else served.engine)
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


@dataclass
class Story:
    """A job's whole event stream, a `tokens` entry token by token."""

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

    def of(self, kind: str) -> list[Any]:
        return [item.event for item in self.items if item.kind == kind]


async def story(client: Client, job_id: str, idle_s: float = 20.0) -> Story:
    """The job's events to the terminal one."""
    return Story([item async for item in client.events(job_id, idle_s=idle_s)])


async def ask(client: Client, **fields: Any) -> Story:
    """Submit a job and wait for its end."""
    return await story(client, await client.submit(**fields))


async def published(harness: Harness, job_id: str) -> Story:
    """What the job's stream holds now."""
    records = await harness.connect().range(events_key(job_id), "-", "+", 10_000)
    return Story([item for record in records for item in decode_entry(record, "0-0")])


async def own_events(harness: Harness, name: str) -> list[Event]:
    """What the worker's own stream holds now."""
    records = await harness.connect().range(worker_events_key(name), "-", "+", 10_000)
    return [item.event for record in records for item in decode_entry(record, "0-0") if isinstance(item.event, Event)]


class FixedDevice:
    """A device whose memory stays as it is."""

    device = "fake"

    def __init__(self, use: MemoryUse) -> None:
        self._use = use

    def memory(self) -> MemoryUse:
        return self._use

    def non_resident(self) -> tuple[int, list[str]]:
        return 3, []
