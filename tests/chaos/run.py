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
from tests.chaos.clock import Clock, build_library
from tests.chaos.network import Network
from tests.chaos.orchestrator import Orchestrator
from tests.chaos.plan import Plan
from tests.chaos.run_log import RunLog
from tests.chaos.schedule import SERVER_FAULTS, Fault
from tests.chaos.server import PersistentServer
from tests.chaos.worker_pool import LEASE_S, STEPS_S, WorkerPool
from tests.chaos.workload import QUEUES, echo_cases, tiny_cases
from worker.jobs.events import Resumed, decode_event
from worker.jobs.keys import events_key, queue_key
from worker.jobs.redis_streams import RedisStreams

DRAIN_S = 120.0
"""Maximum time of the last jobs after the last fault."""
SETTLE_S = 60.0


@dataclass
class Outcome:
    """Result of a run."""

    run_log: RunLog
    worker_pool: WorkerPool
    network: Network
    findings: list[list[str]] = field(default_factory=list)
    resumed: Counter[str] = field(default_factory=Counter)
    logged: Counter[str] = field(default_factory=Counter)
    unknown_events: int = 0
    """Events of types that this release does not know."""
    clocks: bool = True
    """Whether wall clocks could be set."""
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
    library = build_library(folder)
    server, run_log = PersistentServer(folder, Clock(library, folder / "server.clock")), RunLog()
    network = Network(server.port, plan.names(), plan.seed)
    await network.open()
    outcome = Outcome(run_log, WorkerPool(folder, network, plan, library), network, clocks=library is not None)
    orchestrators = [
        Orchestrator(
            name, queue, network.links[name].url, cases[queue], run_log, max(plan.concurrency, plan.max_running)
        )
        for queue in QUEUES
        for name in plan.orchestrator_names(queue)
    ]
    faults = Faults(plan, server, outcome, report)
    try:
        await server.start()
        async with _in_background(outcome.worker_pool.supervise(), _mark(server)):
            await _run_load(plan, outcome, orchestrators, faults)
            await _wait_until_settled(server)
        await outcome.worker_pool.stop()
        await _check(plan, server, outcome)
    finally:
        for orchestrator in orchestrators:
            await orchestrator.close()
        outcome.worker_pool.kill()
        server.stop()
        await network.close()
    outcome.seconds = time.monotonic() - began
    return outcome


async def _mark(server: PersistentServer) -> None:
    while True:
        server.mark()
        await asyncio.sleep(1.0)


@contextlib.asynccontextmanager
async def _in_background(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `works` in the background of the block; the block is cancelled if one of them fails."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in works]
        yield
        for task in tasks:
            task.cancel()


async def _run_load(plan: Plan, outcome: Outcome, orchestrators: list[Orchestrator], faults: Faults) -> None:
    """Run jobs and inject faults for the plan's time, then wait for the running jobs."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(plan.seconds + DRAIN_S), asyncio.TaskGroup() as group:
            for orchestrator in orchestrators:
                group.create_task(orchestrator.run(began + plan.seconds))
            group.create_task(faults.inject_into_network(began))
            await faults.inject(began)
    except TimeoutError:
        problem = f"jobs are still running {DRAIN_S:.0f} s after the last one was submitted"
        outcome.worker_pool.counts.problems.append(problem)


class Faults:
    """Injects the faults of a plan."""

    def __init__(self, plan: Plan, server: PersistentServer, outcome: Outcome, report: Callable[[str], None]) -> None:
        self._plan = plan
        self._server = server
        self._outcome = outcome
        self._report = report
        self._random = Random(f"server {plan.seed}")

    async def inject(self, began: float) -> None:
        """Inject the faults of processes, each at its time or when the one before is done."""
        for fault in self._plan.faults:
            await asyncio.sleep(max(0.0, began + fault.at - time.monotonic()))
            if time.monotonic() - began > self._plan.seconds:  # earlier faults waited for a worker with a job
                break
            await self._inject(fault)
            ended = sum(job.last is not None for job in self._outcome.run_log.jobs)
            self._report(f"{time.monotonic() - began:4.0f} s  {fault.kind:16} {ended} jobs ended")

    async def inject_into_network(self, began: float) -> None:
        """Inject the faults of links, each at its time."""
        for fault in self._plan.network_faults:
            await asyncio.sleep(max(0.0, began + fault.at - time.monotonic()))
            self._outcome.network.inject(fault.kind, not fault.busy, fault.pause * LEASE_S)
            self._report(f"{time.monotonic() - began:4.0f} s  {fault.kind}{'' if fault.busy else ', everywhere'}")

    async def _inject(self, fault: Fault) -> None:
        server, pool, seconds = self._server, self._outcome.worker_pool, fault.pause * LEASE_S
        if fault.kind not in SERVER_FAULTS:
            async with _streams(server) as streams:
                await pool.inject(fault.kind, QUEUES[fault.queue], fault.busy, seconds, streams)
            return
        pool.counts.faults[fault.kind] += 1
        match fault.kind:
            case "server" | "lost second" | "loading":
                await self._restart(lossy=fault.kind == "lost second", load_s=seconds if fault.kind == "loading" else 0)
            case "fail over":
                former = await server.fail_over(seconds)
                self._outcome.network.redirect(server.port)
                former.stop()
            case "flush":
                with self._outcome.run_log.losing_writes():
                    await server.flush()
            case "close clients":
                await server.close_clients()
            case "server clock":
                server.clock.set(0 if server.clock.ahead_s else self._random.choice(STEPS_S))
            case _:
                await server.refuse(fault.kind, seconds)

    async def _restart(self, lossy: bool, load_s: float) -> None:
        downtime_s = self._random.uniform(0, 1.5)
        self._server.kill()
        if lossy:
            lost = self._server.lose_last_second()
            if lost.size:
                self._outcome.run_log.lose_writes(lost.since)
            self._outcome.lost_bytes += lost.size
        await asyncio.sleep(downtime_s)
        await self._server.start(load_s)


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


async def _check(plan: Plan, server: PersistentServer, outcome: Outcome) -> None:
    """Check what is left on the server, and count takeovers and log lines."""
    async with _streams(server) as streams, Redis.from_url(server.url, protocol=2) as raw:
        outcome.findings = await check_run(streams, raw, outcome.run_log, plan.other_release is None)
        outcome.findings.append(outcome.worker_pool.counts.problems)
        for job in outcome.run_log.jobs:
            for _, fields in await streams.range(events_key(job.job_id), "-", "+", 1_000_000):
                decoded = decode_event(fields["type"].decode(), fields["p"])
                outcome.unknown_events += decoded is None
                if decoded and isinstance(decoded[0], Resumed):
                    outcome.resumed[decoded[0].reason] += 1
    for line in outcome.worker_pool.logged():
        outcome.logged[f"{line.get('event')} {line.get('outcome', '')}".strip()] += 1
