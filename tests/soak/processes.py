"""The processes of a scenario, and what the system accounts to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from redis.asyncio import Redis

from tests.soak.figures import Figure
from worker.embedded import Child, embedded_server
from worker.jobs.client import Client

READY_S = 120.0
CENSUS_S = 30.0
COUNTS = 8
TIMER_S = 0.01
SETTINGS = """
[http]
port = 0

[log]
format = "json"
"""


BRIEF_TASKS = 2
"""Tasks that last for a moment, which all counts may find on a loaded machine. One of each cycle of
jobs that never ended would be more."""


@dataclass(frozen=True)
class Census:
    """What a process holds at one time."""

    rss_mb: float
    descriptors: int
    threads: int
    tasks: int
    objects: Counter[str]
    """Objects that the garbage collector tracks, by type."""


@dataclass(frozen=True)
class Growth:
    """Bounds of what a process may hold more than at an earlier time with as much work in progress."""

    rss_mb: float
    objects: int
    connections: int
    """A connection pool may grow until as many calls as it holds connections were made at once."""

    def figures(self, between: str, first: Census, last: Census) -> list[Figure]:
        """The differences of two counts."""
        grown = last.objects - first.objects  # types of which there are more
        most = ", ".join(f"{count} {kind}" for kind, count in grown.most_common(2))
        return [
            Figure(f"RSS at the end of {between}", last.rss_mb, "MiB"),
            Figure(f"growth of RSS, {between}", last.rss_mb - first.rss_mb, "MiB", most=self.rss_mb),
            Figure(f"growth in objects, {between} ({most})", grown.total(), most=self.objects),
            Figure(f"more file descriptors, {between}", last.descriptors - first.descriptors, most=self.connections),
            Figure(f"more threads, {between}", last.threads - first.threads, most=0),
            Figure(f"more tasks, {between}", last.tasks - first.tasks, most=BRIEF_TASKS),
        ]


class Program:
    """A process of this package: `worker COMMAND`. Started from the main thread."""

    def __init__(self, folder: Path, name: str, command: str, *options: object) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._census = folder / f"{name}.json"
        line = [sys.executable, "-m", "tests.soak.worker", self._census, command, *map(str, options)]
        with self.log.open("ab") as output:
            self.child = Child(line, output)

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.child.process.pid)

    @property
    def cpu_s(self) -> float:
        """Processor time so far, of user and system."""
        times = self.process.cpu_times()
        return times.user + times.system

    async def census(self) -> Census:
        """Count what the process holds: the fewest tasks of several times, since some last for a moment."""
        counts = [await self._count() for _ in range(COUNTS)]
        process, tasks = self.process, min(each["tasks"] for each in counts)
        held = process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()
        return Census(*held, tasks, Counter(counts[-1]["objects"]))

    async def _count(self) -> dict[str, Any]:
        """Have the process write its census; see `tests/soak/worker.py`."""
        self._census.unlink(missing_ok=True)
        self.child.process.send_signal(signal.SIGUSR1)
        async with asyncio.timeout(CENSUS_S):
            while not self._census.exists():
                await asyncio.sleep(0.05)
        return json.loads(self._census.read_text())

    def kill(self) -> None:
        """SIGKILL, also to a suspended process."""
        self.child.process.kill()
        self.child.stop()

    def logged(self, text: str) -> list[str]:
        """Lines of the log that contain the text."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if text in line]


class Programs:
    """Workers and gateways of one server. `close` kills those that still run."""

    def __init__(self, folder: Path, url: str, settings: str = "") -> None:
        self.url = url
        self._folder = folder
        self._config = folder / "soak.toml"
        self._config.write_text(SETTINGS + settings)
        self.started: list[Program] = []

    def start(self, name: str, command: str, *options: object) -> Program:
        common = ("--config", self._config, "--redis-url", self.url)
        program = Program(self._folder, name, command, *common, *options)
        self.started.append(program)
        return program

    def echo(self, name: str, max_running: int = 1, step_ms: float = 1.0, context: int = 8192) -> Program:
        """A worker with the echo model."""
        options = ("--max-running", max_running, "--echo-step-ms", step_ms, "--context", context)
        return self.start(name, "run", "--name", name, "--echo", *options)

    def faults(self) -> list[str]:
        """Lines of all logs that report a fault of a worker."""
        return [line for program in self.started for line in program.logged('fault"')]

    def close(self) -> None:
        for program in self.started:
            program.kill()


@contextlib.contextmanager
def programs(folder: Path, url: str, settings: str = "") -> Iterator[Programs]:
    """Programs of the server at `url`, which end with the block; `settings` is TOML."""
    running = Programs(folder, url, settings)
    try:
        yield running
    finally:
        running.close()


@contextlib.asynccontextmanager
async def stack(folder: Path, settings: str = "") -> AsyncIterator[tuple[Programs, Client, Redis]]:
    """A server without persistence, a client of it, and a plain connection to it."""
    with embedded_server() as url, programs(folder, url, settings) as running:
        async with Client.from_url(url) as client, Redis.from_url(url, protocol=2) as raw:
            yield running, client, raw


@contextlib.asynccontextmanager
async def timer_delays() -> AsyncIterator[list[float]]:
    """Delays of timers of this event loop during the block, ms: what a busy machine adds to each wait."""
    delays_ms: list[float] = []

    async def measure() -> None:
        while True:
            due = time.monotonic() + TIMER_S
            await asyncio.sleep(TIMER_S)
            delays_ms.append((time.monotonic() - due) * 1000)

    task = asyncio.create_task(measure())
    try:
        yield delays_ms
    finally:
        task.cancel()


async def await_ready(client: Client, count: int) -> None:
    """Wait until `count` workers take jobs."""
    async with asyncio.timeout(READY_S):
        while sum(each["state"] in ("ready", "busy") for each in (await client.workers()).values()) < count:
            await asyncio.sleep(0.05)


async def await_empty(client: Client, timeout_s: float) -> None:
    """Wait until the queue has no entry, waiting or running."""
    async with asyncio.timeout(timeout_s):
        while await client.queue_length():
            await asyncio.sleep(0.1)
