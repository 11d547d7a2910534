"""A worker's reports about itself: event stream, registry entry, memory, residency of weights.

No job waits for a report, and a report that can't be sent is lost. Reports wait while a job waits
for its first token (`FirstTokenGate`): a few tenths of a millisecond on the event loop or on the
engine's thread would delay that token by as much. `health.py` holds the state that is reported.
"""

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, astuple
from typing import NoReturn

from worker import __version__
from worker.backend import MemoryUse
from worker.config import ServiceSection
from worker.errors import ServerRefused
from worker.jobs.consumer import Registration
from worker.jobs.events import Event, LoadProgress, Ready, Residency, Starting, Vram
from worker.jobs.streams import Disconnected, QueueDepth
from worker.runtime import LoadedModel
from worker.service.engine_thread import EngineThread
from worker.service.health import EngineLoad, Health
from worker.service.recent_speed import RecentSpeed
from worker.telemetry import Log, Metrics, Refusals

_LOAD_PERCENTS = (0, 25, 50, 75, 100)
_MIN_CHANGE_BYTES = 32 * 2**20
"""Smaller changes of free memory come from other processes."""
_MIN_HEARTBEAT_S = 0.25
_BUSY_HEARTBEAT_S = 1.0
"""Interval while jobs run: their speed changes."""
_MAX_CLOSED_S = 1.0
"""With a long prompt the worker must not look dead."""


class FirstTokenGate:
    """Closed while a job waits for its first token. Used on the event loop."""

    def __init__(self) -> None:
        self._opened = asyncio.Event()
        self._opened.set()
        self._timer: asyncio.TimerHandle | None = None
        self._on_open: Callable[[], None] | None = None

    def close(self, on_open: Callable[[], None] | None = None) -> None:
        """Close the gate for at most a second. `on_open` is called once when it opens."""
        self.open()
        self._opened.clear()
        self._on_open = on_open
        self._timer = asyncio.get_running_loop().call_later(_MAX_CLOSED_S, self.open)

    def open(self) -> None:
        """Open the gate: the first token is published, or the job has ended. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._opened.set()
        on_open, self._on_open = self._on_open, None
        if on_open is not None:
            on_open()

    async def wait_open(self) -> None:
        """Block until the gate opens."""
        await self._opened.wait()


class Reporter:
    """Reports for one worker. `service.py` runs its loops."""

    def __init__(
        self, registration: Registration, health: Health, section: ServiceSection, metrics: Metrics, log: Log
    ) -> None:
        self.first_token_gate = FirstTokenGate()
        self.refusals = Refusals(log)
        """Of all calls that the worker repeats."""
        self.speed = RecentSpeed()
        self._registry_fields: dict[str, str] = {}
        self._registration = registration
        registration.on_reply = self.refusals.replied
        self._health = health
        self._section = section
        self._metrics = metrics
        self._log = log
        self._queued: asyncio.Queue[Event] = asyncio.Queue()
        self._job_edge = asyncio.Event()
        self._loaded_percent = -1

    def send(self, event: Event) -> None:
        """Queue an event for the worker's own stream."""
        self._queued.put_nowait(event)

    def starting(self, model: str, backend: str, name: str, queue: str, http_port: int) -> None:
        """Report that the process is up and begins to load the requested model."""
        pid, host = os.getpid(), socket.gethostname()
        self.send(Starting(model=model, backend=backend, version=__version__, pid=pid, host=host))
        fields = self._registry_fields
        fields.update(name=name, host=host, pid=str(pid), version=__version__, model=model, queue=queue)
        fields.update(http_port=str(http_port), started_ms=str(int(time.time() * 1000)))

    def loading(self, done: int, total: int) -> None:
        """Report each quarter of the weights once, when it is loaded."""
        percent = 100 if total <= 0 else 100 * done // total
        for step in _LOAD_PERCENTS:
            if self._loaded_percent < step <= percent:
                self.send(LoadProgress(percent=float(step), bytes_done=total * step // 100, bytes_total=total))
        self._loaded_percent = max(percent, self._loaded_percent)

    def ready(self, model: LoadedModel, load_s: float) -> None:
        """Report that the model is loaded and the worker takes jobs."""
        name, fingerprint, context = model.name, model.fingerprint, model.engine.context
        fields = self._registry_fields
        fields.update(model=name, fingerprint=fingerprint, context=str(context), device=model.device.device)
        self._metrics.set_model(name, model.device.device, __version__)
        fields.update(max_running=str(model.engine.settings.max_running))
        self.send(Ready(model=name, fingerprint=fingerprint, context=context, load_ms=round(load_s * 1000, 3)))
        self.job_edge()

    def busy(self) -> None:
        """Report that a job is running."""
        self._health.enter("busy")
        self.job_edge()

    def job_edge(self) -> None:
        """Have `watch_memory` report: a load or a job has begun or ended."""
        self._job_edge.set()

    async def publish(self) -> NoReturn:
        """Publish the queued events in order."""
        while True:
            event = await self._queued.get()
            try:
                await self.first_token_gate.wait_open()
                await self._registration.publish(event)
            finally:  # `watch_memory` waits for it
                self._queued.task_done()

    async def flush(self, timeout_s: float) -> None:
        """Wait until all queued events are published. `publish` must be running."""
        self.first_token_gate.open()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._queued.join()

    async def heartbeat(self) -> NoReturn:
        """Renew the registry entry periodically and when the state changes."""
        while True:
            await self.first_token_gate.wait_open()
            self._health.changed.clear()
            await self._registration.heartbeat(self._registry_fields | self._status())
            await asyncio.sleep(_MIN_HEARTBEAT_S)
            often = self._health.running or self._registration.refused
            limit_s = _BUSY_HEARTBEAT_S if often else self._section.heartbeat_s
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(limit_s, self._section.heartbeat_s) - _MIN_HEARTBEAT_S):
                    await self._health.changed.wait()

    def _status(self) -> dict[str, str]:
        """The fields of the status hash that change; docs/protocol.md describes them."""
        health, load = self._health, asdict(self._health.load)
        del load["running"]  # the status has the number of jobs
        status: dict[str, object] = {
            "state": health.state,
            "degraded": int(health.degraded),
            "jobs": health.jobs,
            "running": health.running,
            "tokens_per_second": round(self.speed.tokens_per_second, 3),
            "vram_used": health.memory.used,
            "seen_ms": int(time.time() * 1000),
            "heartbeat_s": self._section.heartbeat_s,
            "last_errors": json.dumps(list(self._registration.last_errors)),
        }
        if quantiles := self.speed.ttft_quantiles(0.5, 0.95):
            status |= zip(("ttft_p50_s", "ttft_p95_s"), (round(value, 6) for value in quantiles), strict=True)
        status |= {f"vram_{purpose}": count for purpose, count in asdict(health.memory).items()} | load
        return {name: str(value) for name, value in status.items()}

    async def watch_memory(self, engine: EngineThread, model: LoadedModel) -> NoReturn:
        """Measure memory at each job's edges and periodically; report at edges and on a change."""
        reported = MemoryUse()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._section.vram_s):
                    await self._job_edge.wait()
            await self.first_token_gate.wait_open()
            at_edge = self._job_edge.is_set()
            self._job_edge.clear()
            use, kv_blocks, sequences, drafts = await engine.call(
                lambda: (
                    *(model.device.memory(), model.engine.kv_blocks, model.engine.sequences),
                    model.engine.draft_tokens,
                )
            )
            self._health.memory = use
            load = EngineLoad(*sequences, kv_blocks["used"], sum(kv_blocks.values()))
            if load != self._health.load:
                self._health.load = load
                self._health.changed.set()
            purposes = asdict(use)
            del purposes["free"]  # not a purpose: the sum of all purposes is the memory in use
            self._metrics.set_memory(purposes, kv_blocks)
            self._metrics.set_sequences(*sequences, engine.steps)
            self._metrics.set_draft_tokens(*drafts)
            if at_edge or use.used != reported.used or abs(use.free - reported.free) > _MIN_CHANGE_BYTES:
                activations = use.activations + use.workspace
                memory = {"weights": use.weights, "kv": use.kv, "activations": activations, "free": use.free}
                self.send(Vram(**memory, **asdict(load)))
                reported = use
                await self._queued.join()  # jobs may begin and end faster than the server takes reports

    async def watch_queues(self, read: Callable[[], Awaitable[Mapping[str, QueueDepth]]]) -> NoReturn:
        """Read the depths of the worker's queues periodically, for /metrics."""
        while True:
            await self.first_token_gate.wait_open()
            depths: Mapping[str, QueueDepth] = {}
            try:
                depths = await read()
                self.refusals.succeeded("depth")
            except (Disconnected, ServerRefused) as error:
                if isinstance(error, ServerRefused) or error.reply:
                    self.refusals.failed("depth", error)
            self._metrics.queues.clear()
            for queue, depth in depths.items():
                self._metrics.queues.set(queue, *astuple(depth))
            await asyncio.sleep(self._section.queue_s)

    async def check_residency(self, engine: EngineThread, model: LoadedModel) -> NoReturn:
        """Check at the start and periodically that all weights are in device memory."""
        while True:
            await self.first_token_gate.wait_open()
            checked, non_resident = await engine.call(model.device.non_resident)
            self.send(Residency(ok=not non_resident, checked=checked, strays=non_resident[:16]))
            if non_resident:
                self._log.error("weights_non_resident", count=len(non_resident), first=non_resident[0])
            await asyncio.sleep(self._section.residency_s)
