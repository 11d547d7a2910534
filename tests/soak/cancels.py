"""Time from a cancel to its `error` event at the job's reader, with many jobs running."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from tests.soak.figures import Figure, none_of, percentile
from tests.soak.jobs import EchoJob, Reading
from tests.soak.processes import await_ready, stack, timer_delays
from worker.jobs.client import Client

TOKENS = 6000
CONTEXT = 8192
STEP_MS = 20.0
"""Of all sequences of a worker, about as for a model of 8 billion parameters."""


@dataclass(frozen=True)
class Plan:
    """Numbers of workers to measure with; running jobs of all workers, cancels, and bounds."""

    workers: tuple[int, ...]
    running: int
    single: int
    at_once: int
    single_p99_ms: float
    at_once_s: float


FULL = Plan(workers=(1, 4), running=64, single=300, at_once=200, single_p99_ms=100, at_once_s=2)
SHORT = Plan(workers=(2,), running=16, single=20, at_once=30, single_p99_ms=1500, at_once_s=15)


@dataclass
class _Jobs:
    """Jobs that run until they are cancelled."""

    client: Client
    name: str
    numbers: count[int] = field(default_factory=count)
    opened: deque[tuple[EchoJob, Reading, asyncio.Task[None]]] = field(default_factory=deque)
    cancelled: list[tuple[EchoJob, Reading]] = field(default_factory=list)

    async def open(self) -> Reading:
        """Submit one more and read it."""
        job, reading = EchoJob(f"{self.name}-{next(self.numbers)}", TOKENS), Reading()
        self.opened.append((job, reading, asyncio.create_task(reading.follow(self.client, job.job_id))))
        await job.submit(self.client)
        return reading

    async def cancel(self) -> float:
        """Cancel the oldest; return the time until its reader has its end, ms."""
        job, reading, following = self.opened.popleft()
        self.cancelled.append((job, reading))
        began = time.monotonic()
        await self.client.cancel(job.job_id)
        await following
        return (reading.ended_s - began) * 1000

    def problems(self) -> list[str]:
        """What is wrong with the jobs that were cancelled."""
        return [problem for job, reading in self.cancelled for problem in reading.problems(job, "CANCELLED")]


async def run(plan: Plan, folder: Path) -> list[Figure]:
    figures: list[Figure] = []
    for workers in plan.workers:
        (folder / str(workers)).mkdir()
        figures += await _measure(plan, folder / str(workers), workers, plan.running // workers)
    return figures


async def _measure(plan: Plan, folder: Path, workers: int, max_running: int) -> list[Figure]:
    async with stack(folder) as (programs, client, _):
        for number in range(workers):
            programs.echo(f"cancels{number}", max_running, STEP_MS, CONTEXT)
        await await_ready(client, workers)
        jobs = _Jobs(client, "cancel")
        readings = await asyncio.gather(*(jobs.open() for _ in range(plan.running)))
        await asyncio.gather(*(reading.began.wait() for reading in readings))
        single: list[float] = []
        async with timer_delays() as timers_ms:
            for _ in range(plan.single):
                single.append(await jobs.cancel())
                await (await jobs.open()).began.wait()
        await asyncio.gather(*(jobs.open() for _ in range(plan.at_once - plan.running)))
        at_once = await asyncio.gather(*(jobs.cancel() for _ in range(plan.at_once)))
        faults = programs.faults()
    problems = [none_of("jobs that did not end as cancelled", jobs.problems()), none_of("faults logged", faults)]
    return _named(f"{workers} × {max_running} running", problems + _times(plan, single, at_once, timers_ms))


def _times(plan: Plan, single: list[float], at_once: list[float], timers_ms: list[float]) -> list[Figure]:
    waiting = plan.at_once - plan.running
    return [
        Figure(f"{plan.single} cancels of running jobs, one at a time, median", percentile(single, 50), "ms"),
        Figure("the same, p99", percentile(single, 99), "ms", most=plan.single_p99_ms),
        Figure("timers of the cancelling process meanwhile, p99 of their delays", percentile(timers_ms, 99), "ms"),
        Figure(f"{plan.at_once} cancels at once, {waiting} of waiting jobs, median", percentile(at_once, 50), "ms"),
        Figure("the same, the last one", max(at_once) / 1000, "s", most=plan.at_once_s),
    ]


def _named(setting: str, figures: list[Figure]) -> list[Figure]:
    return [replace(figure, name=f"{setting}: {figure.name}") for figure in figures]
