"""One run: start the processes, inject faults under load, check the result."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from redis.asyncio import Redis

from tests.chaos.checker import check_run
from tests.chaos.orchestrator import Orchestrator
from tests.chaos.run_log import RunLog
from tests.chaos.schedule import REFUSALS, Fault
from tests.chaos.server import PersistentServer
from tests.chaos.worker_pool import LEASE_S, WorkerPool
from tests.chaos.workload import QUEUES, echo_cases, tiny_cases
from worker.jobs.events import Resumed, decode_event
from worker.jobs.keys import events_key, queue_key
from worker.jobs.redis_streams import RedisStreams

DRAIN_S = 120.0
"""Maximum time of the last jobs after the last fault."""
SETTLE_S = 20.0


@dataclass(frozen=True)
class Plan:
    """Parameters of a run."""

    seed: int
    seconds: float
    faults: list[Fault]
    fenced: bool = True
    workers: int = 2
    """For each queue."""
    orchestrators: int = 2
    concurrency: int = 6
    """Running jobs of each orchestrator."""
    cases: int = 12
    max_running: int = 1
    """Jobs that a worker runs at once."""


@dataclass
class Outcome:
    """Result of a run."""

    run_log: RunLog
    worker_pool: WorkerPool
    findings: list[list[str]] = field(default_factory=list)
    resumed: Counter[str] = field(default_factory=Counter)
    logged: Counter[str] = field(default_factory=Counter)
    lost_bytes: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> list[str]:
        """All violations."""
        return [problem for finding in self.findings for problem in finding]


async def run(plan: Plan, folder: Path, report: Callable[[str], None]) -> Outcome:
    """Execute a run in `folder`. All processes have ended when it returns or raises."""
    began = time.monotonic()
    cases = {
        "tiny": tiny_cases(folder, plan.seed, plan.cases),
        "echo": echo_cases(plan.seed, plan.cases),
    }
    report(f"{plan.cases} reference answers for each model in {time.monotonic() - began:.0f} s")
    server, run_log = PersistentServer(folder), RunLog()
    worker_pool = WorkerPool(folder, server.url, plan.seed, plan.workers, plan.fenced, plan.max_running)
    outcome = Outcome(run_log, worker_pool)
    orchestrators = [
        Orchestrator(
            f"{queue}{plan.seed}o{n}", queue, server.url, cases[queue], run_log, max(plan.concurrency, plan.max_running)
        )
        for queue in QUEUES
        for n in range(plan.orchestrators)
    ]
    try:
        await server.start()
        async with _in_background(worker_pool.supervise()):
            await _run_load(plan, server, outcome, orchestrators, report)
            await _wait_until_settled(server)
        await worker_pool.stop()
        await _check(server, outcome)
    finally:
        for orchestrator in orchestrators:
            await orchestrator.close()
        worker_pool.kill()
        server.stop()
    outcome.seconds = time.monotonic() - began
    return outcome


@contextlib.asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` in the background of the block; the block is cancelled if `work` fails."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)
        yield
        task.cancel()


async def _run_load(
    plan: Plan,
    server: PersistentServer,
    outcome: Outcome,
    orchestrators: list[Orchestrator],
    report: Callable[[str], None],
) -> None:
    """Run jobs and inject faults for the plan's time, then wait for the running jobs."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(plan.seconds + DRAIN_S), asyncio.TaskGroup() as group:
            for orchestrator in orchestrators:
                group.create_task(orchestrator.run(began + plan.seconds))
            await _inject_faults(plan, began, server, outcome, report)
    except TimeoutError:
        problem = f"jobs are still running {DRAIN_S:.0f} s after the last one was submitted"
        outcome.worker_pool.counts.problems.append(problem)


async def _inject_faults(
    plan: Plan, began: float, server: PersistentServer, outcome: Outcome, report: Callable[[str], None]
) -> None:
    """Inject the plan's faults, each at its time or when the one before is done."""
    random = Random(f"server {plan.seed}")
    async with _streams(server) as streams:
        for fault in plan.faults:
            await asyncio.sleep(max(0.0, began + fault.at - time.monotonic()))
            if time.monotonic() - began > plan.seconds:  # earlier faults waited for a worker with a job
                break
            if fault.kind in ("server", "lost second"):
                await _restart(server, outcome, random.uniform(0, 1.5), lossy=fault.kind == "lost second")
            elif fault.kind in REFUSALS:
                outcome.worker_pool.counts.faults[fault.kind] += 1
                await server.refuse(fault.kind, fault.pause * LEASE_S)
            else:
                pause_s = fault.pause * LEASE_S
                await outcome.worker_pool.inject(fault.kind, QUEUES[fault.queue], fault.busy, pause_s, streams)
            ended = sum(job.last is not None for job in outcome.run_log.jobs)
            report(f"{time.monotonic() - began:4.0f} s  {fault.kind:12} {ended} jobs ended")


async def _restart(server: PersistentServer, outcome: Outcome, downtime_s: float, lossy: bool) -> None:
    outcome.worker_pool.counts.faults["lost second" if lossy else "server"] += 1
    server.kill()
    if lossy:
        lost = server.lose_last_second()
        outcome.run_log.lose_writes(lost.since)
        outcome.lost_bytes += lost.size
    await asyncio.sleep(downtime_s)
    await server.start()


async def _wait_until_settled(server: PersistentServer) -> None:
    """Wait up to SETTLE_S until the queues are empty: jobs are settled after their last event."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_S), _streams(server) as streams:
            for queue in QUEUES:
                while await streams.range(queue_key(queue), "-", "+", 1):
                    await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def _streams(server: PersistentServer) -> AsyncIterator[RedisStreams]:
    streams = RedisStreams.from_url(server.url)
    try:
        yield streams
    finally:
        await streams.close()


async def _check(server: PersistentServer, outcome: Outcome) -> None:
    """Check what is left on the server, and count takeovers and log lines."""
    async with _streams(server) as streams, Redis.from_url(server.url, protocol=2) as raw:
        outcome.findings = await check_run(streams, raw, outcome.run_log)
        outcome.findings.append(outcome.worker_pool.counts.problems)
        for job in outcome.run_log.jobs:
            for _, fields in await streams.range(events_key(job.job_id), "-", "+", 1_000_000):
                decoded = decode_event(fields["type"].decode(), fields["p"])
                if decoded and isinstance(decoded[0], Resumed):
                    outcome.resumed[decoded[0].reason] += 1
    for line in outcome.worker_pool.logged():
        outcome.logged[f"{line.get('event')} {line.get('outcome', '')}".strip()] += 1
