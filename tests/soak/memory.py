"""Size of worker and server over many jobs of all kinds; what is left when their keys have expired."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from redis.asyncio import Redis

from tests.soak.figures import Figure, none_of
from tests.soak.jobs import EchoJob, Reading
from tests.soak.processes import Census, Growth, Program, await_empty, await_ready, stack
from worker.jobs.client import Client
from worker.jobs.keys import queue_key
from worker.jobs.payload import pack

MAX_RUNNING = 64
STEP_MS = 1.0
EXPIRY_S = 60.0
"""Within which the server deletes keys that have expired."""
OTHER_KEYS = 6
"""Queue, dead letters, registry, the worker's status and its events, commands."""
TOKENS, CANCELLED_TOKENS = 16, 8000
"""The cancel of a running job arrives before its answer ends, 8 s later."""
CYCLE = 50
"""Jobs after which the kinds repeat."""
KINDS = {7: "cancel running", 17: "cancel waiting", 27: "invalid", 37: "overdue", 47: "twice"}
"""Kinds of the other jobs by their number modulo CYCLE; the rest are plain."""


@dataclass(frozen=True)
class Plan:
    """Jobs before the first and the second census, jobs at once, and bounds of growth."""

    first: int
    last: int
    parallel: int
    retention_s: float
    quiet_s: float
    """After which the server has released the buffers of connections that no call uses."""
    worker: Growth
    server_mb: float


FULL = Plan(
    first=10_000,
    last=50_000,
    parallel=96,
    retention_s=10,
    quiet_s=6,
    worker=Growth(rss_mb=4, objects=3000, connections=40),
    server_mb=1,
)
SHORT = Plan(
    first=300,
    last=600,
    parallel=32,
    retention_s=3,
    quiet_s=1,
    worker=Growth(rss_mb=16, objects=5000, connections=40),
    server_mb=8,
)


@dataclass(frozen=True)
class Server:
    """What the server holds at one time."""

    memory_mb: float
    job_keys: int
    other_keys: int
    connections: int


async def run(plan: Plan, folder: Path) -> list[Figure]:
    async with stack(folder, f"[lease]\nretention_s = {plan.retention_s}\n") as (programs, client, raw):
        worker = programs.echo("memory", MAX_RUNNING, STEP_MS, context=8192)
        await await_ready(client, 1)
        problems: list[str] = []
        numbers, began = count(), time.monotonic()
        await _run_jobs(client, raw, numbers, plan.first, plan.parallel, problems)
        first, first_server = await _at_rest(plan, client, raw, worker)
        await _run_jobs(client, raw, numbers, plan.last - plan.first, plan.parallel, problems)
        last, last_server = await _at_rest(plan, client, raw, worker)
        seconds, faults = time.monotonic() - began, programs.faults()
    between = f"jobs {plan.first:,} to {plan.last:,}"
    memory_mb = last_server.memory_mb - first_server.memory_mb
    connections = last_server.connections - first_server.connections
    return [
        none_of(f"of {plan.last:,} jobs, those that did not end as expected", problems),
        none_of("faults logged", faults),
        Figure("time, two waits for the retention included", seconds, "s"),
        *plan.worker.figures(between, first, last),
        Figure(f"server: growth of used_memory, {between}", memory_mb, "MiB", most=plan.server_mb),
        Figure(f"server: keys of jobs after a retention of {plan.retention_s:.0f} s", last_server.job_keys, most=0),
        Figure("server: other keys", last_server.other_keys, most=OTHER_KEYS),
        Figure("server: more connections", connections, most=2 * plan.worker.connections),  # the client has a pool too
    ]


async def _run_jobs(
    client: Client, raw: Redis, numbers: count[int], jobs: int, parallel: int, problems: list[str]
) -> None:
    """Run the next jobs, `parallel` at once."""
    left = iter(range(jobs))

    async def run_some() -> None:
        for _ in left:
            number = next(numbers)
            problems.extend(await _run_job(client, raw, number, KINDS.get(number % CYCLE, "plain")))

    async with asyncio.TaskGroup() as group:
        for _ in range(parallel):
            group.create_task(run_some())


async def _run_job(client: Client, raw: Redis, number: int, kind: str) -> list[str]:
    """Run one job to its end; return what is wrong with it."""
    job = EchoJob(f"memory-{number}", CANCELLED_TOKENS if kind == "cancel running" else TOKENS)
    fields = {"job_id": job.job_id, "prompt": job.prompt, "max_tokens": job.tokens}
    reading = Reading()
    following = asyncio.create_task(reading.follow(client, job.job_id))
    if kind == "invalid":
        await raw.xadd(queue_key("default"), {"p": pack(fields | {"temperature": 9})})
    else:
        await client.submit(**fields, deadline_ms=1 if kind == "overdue" else None)
    if kind == "twice":
        await client.submit(**fields)
    if kind == "cancel running":
        await reading.began.wait()
    if kind.startswith("cancel"):
        await client.cancel(job.job_id)
    await following
    allowed = {
        "cancel running": ("CANCELLED",),
        "cancel waiting": ("CANCELLED", "end"),  # it may have begun, and ended, before the call
        "invalid": ("INVALID_REQUEST",),
        "overdue": ("INFERENCE_TIMEOUT", "end"),
    }.get(kind, ("end",))
    if reading.ending not in allowed:
        return [f"{job.job_id} ({kind}) ended with {reading.ending}"]
    return reading.problems(job, reading.ending)


async def _at_rest(plan: Plan, client: Client, raw: Redis, worker: Program) -> tuple[Census, Server]:
    """Wait until nothing runs and the keys of all jobs have expired; count what is left."""
    await await_empty(client, EXPIRY_S)
    until = time.monotonic() + plan.retention_s + EXPIRY_S
    while (keys := await _keys(raw))[0] and time.monotonic() < until:
        await asyncio.sleep(0.5)
    census = await worker.census()
    await asyncio.sleep(plan.quiet_s)
    info = await raw.info()
    return census, Server(info["used_memory"] / 2**20, *keys, info["connected_clients"])


async def _keys(raw: Redis) -> tuple[int, int]:
    """Number of keys of jobs, and of others."""
    keys = [key async for key in raw.scan_iter(count=1000)]
    of_jobs = sum(key.startswith(b"inf:{job:") for key in keys)
    return of_jobs, len(keys) - of_jobs
