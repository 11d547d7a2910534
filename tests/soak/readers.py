"""Many readers of running jobs in one client: few connections, each token once, and how late."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.soak.figures import Figure, none_of, percentile
from tests.soak.jobs import EchoJob, Reading, records_of, stream_problems
from tests.soak.processes import await_ready, stack, timer_delays
from worker.jobs.client import Client
from worker.jobs.redis_streams import RedisStreams

NAME = "readers"
"""Of the connections of the client that reads."""
STEP_MS = 200.0
"""Each job has 5 tokens a second, so that the client's process is not the bottleneck."""


@dataclass(frozen=True)
class Plan:
    """Readers, tokens of each job, and bounds."""

    readers: int
    workers: int
    tokens: int
    connections: int
    p99_ms: float
    restarts: int
    """Readers that stop in the middle and continue from the last entry that they received."""


FULL = Plan(readers=500, workers=4, tokens=100, connections=40, p99_ms=250, restarts=100)
SHORT = Plan(readers=60, workers=2, tokens=15, connections=40, p99_ms=3000, restarts=12)


async def run(plan: Plan, folder: Path) -> list[Figure]:
    jobs = [EchoJob(f"reader-{number}", plan.tokens) for number in range(plan.readers)]
    readings = [Reading() for _ in jobs]
    async with stack(folder) as (programs, submitting, raw):
        for number in range(plan.workers):
            programs.echo(f"readers{number}", -(-plan.readers // plan.workers), STEP_MS)
        await await_ready(submitting, plan.workers)
        async with Client.from_url(f"{programs.url}?client_name={NAME}") as client:
            following = [
                asyncio.create_task(_follow(client, job.job_id, reading, restarts=number < plan.restarts))
                for number, (job, reading) in enumerate(zip(jobs, readings, strict=True))
            ]
            for first in range(0, plan.readers, 50):
                await asyncio.gather(*(job.submit(submitting) for job in jobs[first : first + 50]))
            await asyncio.gather(*(reading.began.wait() for reading in readings))
            began, cpu = time.monotonic(), psutil.Process().cpu_times()
            connections = sum(each["name"] == NAME for each in await raw.client_list())
            async with timer_delays() as timers_ms:
                await asyncio.gather(*following)
            seconds, now = time.monotonic() - began, psutil.Process().cpu_times()
        streams = RedisStreams.from_url(programs.url)
        try:
            records = await records_of(streams, (job.job_id for job in jobs))
        finally:
            await streams.close()
        faults = programs.faults()
    problems = [each for job, reading in zip(jobs, readings, strict=True) for each in reading.problems(job)]
    delays_ms = [delay_ms for reading in readings for delay_ms in reading.delays_ms]
    cpu_share = (now.user + now.system - cpu.user - cpu.system) / max(seconds, 0.1)
    return [
        none_of(f"of {plan.readers} readers, tokens lost, repeated or wrong", problems),
        none_of("streams that violate the protocol", stream_problems(records, jobs)),
        none_of("faults logged", faults),
        Figure("connections of the client that reads", connections, most=plan.connections),
        Figure("events received", len(delays_ms)),
        Figure("from writing to arrival, median", percentile(delays_ms, 50), "ms"),
        Figure("from writing to arrival, p99", percentile(delays_ms, 99), "ms", most=plan.p99_ms),
        Figure("timers of the reading process, p99 of their delays", percentile(timers_ms, 99), "ms"),
        Figure("CPU of the client's process", 100 * cpu_share, "% of a core"),
    ]


async def _follow(client: Client, job_id: str, reading: Reading, *, restarts: bool) -> None:
    """Read a job; with `restarts` stop after the first tokens, and continue there."""
    if restarts:
        first = asyncio.create_task(reading.follow(client, job_id))
        await reading.began.wait()
        first.cancel()
        await asyncio.wait([first])
    await reading.follow(client, job_id)
