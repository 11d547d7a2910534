"""What a worker tells about itself: its own event stream, its entry in the registry, its memory, residency of weights.

Nothing waits for it, and what can't be sent is lost; it stands back while a job waits for its first token. It says how
the worker is; `health.py` knows it, and `quiet.py` when to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import NoReturn

from worker import __version__
from worker.backend import MemoryUse
from worker.config import ServiceSection
from worker.jobs.events import Event, LoadProgress, Ready, Residency, Starting, Vram
from worker.jobs.registry import Registration
from worker.runtime import LoadedModel
from worker.service.engine_thread import EngineThread
from worker.service.health import Health
from worker.service.quiet import Quiet
from worker.telemetry import Log, Metrics

_STEPS = (0, 25, 50, 75, 100)
_NOTABLE_BYTES = 32 * 2**20
"""A change of free memory below it is other people's noise."""
_FASTEST_HEARTBEAT_S = 0.25


class Reporter:
    """Speaks for one worker. Its loops are run by `service.py`."""

    def __init__(
        self, registration: Registration, health: Health, section: ServiceSection, meters: Metrics, log: Log
    ) -> None:
        self.quiet = Quiet()
        """While a job waits for its first token, nothing is told."""
        self._facts: dict[str, str] = {}
        self._registration = registration
        self._health = health
        self._section = section
        self._meters = meters
        self._log = log
        self._news: asyncio.Queue[Event] = asyncio.Queue()
        self._edge = asyncio.Event()
        self._loaded_percent = -1

    def tell(self, event: Event) -> None:
        """Put an event on the worker's own stream, soon and in order."""
        self._news.put_nowait(event)

    def announce(self, model: str, backend: str, name: str, queue: str, http_port: int) -> None:
        """The process is up and begins to load what was asked for."""
        pid, host = os.getpid(), socket.gethostname()
        self.tell(Starting(model=model, backend=backend, version=__version__, pid=pid, host=host))
        self._facts = {
            "name": name,
            "host": host,
            "pid": str(pid),
            "version": __version__,
            "model": model,
            "queue": queue,
            "http_port": str(http_port),
            "started_ms": str(int(time.time() * 1000)),
        }

    def introduce(self, served: LoadedModel, load_s: float) -> None:
        """The model is loaded and the worker about to take jobs."""
        self._facts |= {
            "model": served.name,
            "fingerprint": served.fingerprint,
            "context": str(served.engine.context),
            "device": served.device.device,
        }
        self.tell(
            Ready(
                model=served.name,
                fingerprint=served.fingerprint,
                context=served.engine.context,
                load_ms=round(load_s * 1000, 3),
            )
        )

    def busy(self) -> None:
        """A job is under way."""
        self._health.enter("busy")
        self.memory_moved()

    def memory_moved(self) -> None:
        """Something began or ended, a load or a job: memory is worth a look."""
        self._edge.set()

    def load_progress(self, done: int, total: int) -> None:
        """Tell of every quarter of the weights that is done, once."""
        percent = 100 if total <= 0 else 100 * done // total
        for step in _STEPS:
            if self._loaded_percent < step <= percent:
                self.tell(LoadProgress(percent=float(step), bytes_done=total * step // 100, bytes_total=total))
        self._loaded_percent = max(percent, self._loaded_percent)

    async def publish(self) -> NoReturn:
        """Send what is told, one after another."""
        while True:
            event = await self._news.get()
            await self.quiet.over()
            await self._registration.publish(event)
            self._news.task_done()

    async def flush(self, timeout_s: float) -> None:
        """Wait until everything told so far is sent, for at most so long; `publish` must be running."""
        self.quiet.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.join()

    async def heartbeat(self) -> NoReturn:
        """Keep the registry's entry alive, and current when the state changes."""
        while True:
            await self.quiet.over()
            self._health.changed.clear()
            await self._registration.heartbeat(self._status())
            await asyncio.sleep(_FASTEST_HEARTBEAT_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._section.heartbeat_s - _FASTEST_HEARTBEAT_S):
                    await self._health.changed.wait()

    def _status(self) -> Mapping[str, str]:
        health = self._health
        return self._facts | {
            "state": health.state,
            "degraded": str(int(health.degraded)),
            "jobs": str(health.jobs),
            "vram_used": str(health.memory.used),
            "vram_free": str(health.memory.free),
            "seen_ms": str(int(time.time() * 1000)),
        }

    async def watch_memory(self, engine: EngineThread, served: LoadedModel) -> NoReturn:
        """Look at the memory at each job's edge and every few seconds; tell of it at edges and while it changes."""
        told = MemoryUse()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._section.vram_s):
                    await self._edge.wait()
            await self.quiet.over()
            at_edge = self._edge.is_set()
            self._edge.clear()
            use, kv_blocks = await engine.call(lambda: (served.device.memory(), served.engine.kv_blocks))
            self._health.memory = use
            purposes = asdict(use)
            del purposes["free"]  # what is left over is no purpose: the others add up to what is taken
            self._meters.memory(purposes, kv_blocks)
            if at_edge or use.used != told.used or abs(use.free - told.free) > _NOTABLE_BYTES:
                working = use.activations + use.workspace
                self.tell(Vram(weights=use.weights, kv=use.kv, activations=working, free=use.free))
                told = use

    async def check_residency(self, engine: EngineThread, served: LoadedModel) -> NoReturn:
        """Make sure that weights lie where they should, at the start and every minute."""
        while True:
            await self.quiet.over()
            checked, non_resident = await engine.call(served.device.non_resident)
            self.tell(Residency(ok=not non_resident, checked=checked, strays=non_resident[:16]))
            if non_resident:
                self._log.error("weights_astray", count=len(non_resident), first=non_resident[0])
            await asyncio.sleep(self._section.residency_s)
