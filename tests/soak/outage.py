"""Streams while the server is away, killed with its data kept, or suspended: nothing lost or repeated."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from redis.asyncio import Redis

from tests.chaos.clock import Clock
from tests.chaos.server import PersistentServer
from tests.soak.figures import Figure, none_of
from tests.soak.jobs import EchoJob, Reading, records_of, stream_problems
from tests.soak.processes import Programs, await_empty, await_ready, programs
from worker.jobs.client import Client
from worker.jobs.redis_streams import RedisStreams

WORKERS = 2
STEP_MS = 50.0
SETTLE_S = 30.0


@dataclass(frozen=True)
class Plan:
    """Streams, the length of an outage, the tokens of a short and a long answer, and a bound."""

    streams: int
    met: int
    """Least number of streams that have not ended when the outage begins."""
    running_s: float
    """Time between the first tokens and the outage."""
    outage_s: float
    short: int
    """These answers end during the outage."""
    long: int
    recovered_s: float


FULL = Plan(streams=64, met=64, running_s=3, outage_s=30, short=300, long=1000, recovered_s=10)
SHORT = Plan(streams=16, met=8, running_s=0.5, outage_s=3, short=40, long=100, recovered_s=30)


async def run(plan: Plan, folder: Path) -> list[Figure]:
    server = PersistentServer(folder, Clock(None, folder / "clock"))
    await server.start()
    try:
        with programs(folder, server.url) as running:
            for number in range(WORKERS):
                running.echo(f"outage{number}", plan.streams // WORKERS, STEP_MS)
            async with Client.from_url(server.url) as client:
                await await_ready(client, WORKERS)
                killed = await _measure(plan, server, client, running, "killed")
                suspended = await _measure(plan, server, client, running, "suspended")
            unaware = [each.name for each in running.started if not each.logged('"redis_back"')]
            ended = [each.name for each in running.started if each.child.ended]
            faults = running.faults()
    finally:
        server.stop()
    return [
        *killed,
        *suspended,
        none_of("workers that logged no outage", unaware),
        none_of("workers that ended", ended),
        none_of("faults logged", faults),
    ]


async def _measure(plan: Plan, server: PersistentServer, client: Client, running: Programs, how: str) -> list[Figure]:
    jobs = [EchoJob(f"{how}-{n}", plan.short if n % 2 else plan.long) for n in range(plan.streams)]
    readings = [Reading() for _ in jobs]
    following = [
        asyncio.create_task(reading.follow(client, job.job_id)) for job, reading in zip(jobs, readings, strict=True)
    ]
    await asyncio.gather(*(job.submit(client) for job in jobs))
    await asyncio.gather(*(reading.began.wait() for reading in readings))
    await asyncio.sleep(plan.running_s)
    met = sum(not each.done() for each in following)
    await _outage(server, how, plan.outage_s)
    back_s = time.monotonic()
    await asyncio.gather(*following)
    await await_empty(client, SETTLE_S)
    streams = RedisStreams.from_url(server.url)
    try:
        records = await records_of(streams, (job.job_id for job in jobs))
    finally:
        await streams.close()
    problems = [each for job, reading in zip(jobs, readings, strict=True) for each in reading.problems(job)]
    first = [min((at for at in reading.arrivals_s if at >= back_s), default=back_s) - back_s for reading in readings]
    title = f"server {how} for {plan.outage_s:g} s"
    return [
        Figure(f"{title}: streams that it met", met, least=plan.met),
        none_of(f"{title}: tokens lost, repeated or wrong at a reader", problems),
        none_of(f"{title}: streams that violate the protocol", stream_problems(records, jobs)),
        Figure(f"{title}: until every stream has its next token", max(first), "s", most=plan.recovered_s),
    ]


async def _outage(server: PersistentServer, how: str, seconds: float) -> None:
    """Kill or suspend the server, and bring it back after this time."""
    if how == "killed":
        server.kill()
        await asyncio.sleep(seconds)
        await server.start()
    else:
        async with Redis.from_url(server.url, protocol=2) as raw:
            pid = (await raw.info("server"))["process_id"]
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        os.kill(pid, signal.SIGCONT)
