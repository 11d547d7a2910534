"""A run from its first process to its verdict."""

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

from tests.chaos.checker import judge
from tests.chaos.fleet import LEASE_S, Fleet
from tests.chaos.ledger import Ledger
from tests.chaos.orchestrator import Orchestrator
from tests.chaos.questions import POOLS, echo_questions, tiny_questions
from tests.chaos.schedule import Blow
from tests.chaos.server import KeepingServer
from worker.jobs.events import Resumed, decode_event
from worker.jobs.keys import events_key, queue_key
from worker.jobs.redis_streams import RedisStreams

DRAIN_S = 120.0
"""How long the last jobs may take once nobody disturbs them any more."""
SETTLE_S = 20.0


@dataclass(frozen=True)
class Plan:
    """What a run does."""

    seed: int
    seconds: float
    blows: list[Blow]
    fenced: bool = True
    workers: int = 2
    """For each pool."""
    orchestrators: int = 2
    at_once: int = 6
    """Jobs that each orchestrator has under way."""
    questions: int = 12


@dataclass
class Outcome:
    """What came of it."""

    ledger: Ledger
    fleet: Fleet
    verdicts: list[list[str]] = field(default_factory=list)
    resumed: Counter[str] = field(default_factory=Counter)
    logged: Counter[str] = field(default_factory=Counter)
    lost_bytes: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> list[str]:
        """Every breach."""
        return [wrong for verdict in self.verdicts for wrong in verdict]


async def run(plan: Plan, folder: Path, say: Callable[[str], None]) -> Outcome:
    """Everything is ended and closed when it returns or raises; the folder is the caller's."""
    began = time.monotonic()
    questions = {
        "tiny": tiny_questions(folder, plan.seed, plan.questions),
        "echo": echo_questions(plan.seed, plan.questions),
    }
    say(f"{plan.questions} undisturbed answers for each model in {time.monotonic() - began:.0f} s")
    server, ledger = KeepingServer(folder), Ledger()
    fleet = Fleet(folder, server.url, plan.seed, plan.workers, plan.fenced)
    outcome = Outcome(ledger, fleet)
    orchestrators = [
        Orchestrator(f"{pool}{plan.seed}o{n}", pool, server.url, questions[pool], ledger, plan.at_once)
        for pool in POOLS
        for n in range(plan.orchestrators)
    ]
    try:
        await server.start()
        async with _beside(fleet.keep_up()):
            await _disturb(plan, server, outcome, orchestrators, say)
            await _settled(server)
        await fleet.stop()
        await _conclude(server, outcome)
    finally:
        for orchestrator in orchestrators:
            await orchestrator.close()
        fleet.kill()
        server.stop()
    outcome.seconds = time.monotonic() - began
    return outcome


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` goes on while the block runs, and the block ends if `work` fails."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)
        yield
        task.cancel()


async def _disturb(
    plan: Plan,
    server: KeepingServer,
    outcome: Outcome,
    orchestrators: list[Orchestrator],
    say: Callable[[str], None],
) -> None:
    """Jobs and blows, until the plan's time is over; then the jobs that are under way."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(plan.seconds + DRAIN_S), asyncio.TaskGroup() as group:
            for orchestrator in orchestrators:
                group.create_task(orchestrator.work(began + plan.seconds))
            await _strike(plan, began, server, outcome, say)
    except TimeoutError:
        outcome.fleet.tally.wrong.append(f"jobs are under way {DRAIN_S:.0f} s after the last one was submitted")


async def _strike(
    plan: Plan, began: float, server: KeepingServer, outcome: Outcome, say: Callable[[str], None]
) -> None:
    """The plan's blows, each at its time or when the one before is done."""
    random = Random(f"server {plan.seed}")
    async with _streams(server) as streams:
        for blow in plan.blows:
            await asyncio.sleep(max(0.0, began + blow.at - time.monotonic()))
            if time.monotonic() - began > plan.seconds:  # earlier ones had to wait for a worker with a job
                break
            if blow.kind in ("server", "lost second"):
                await _restart(server, outcome, random.uniform(0, 1.5), lossy=blow.kind == "lost second")
            else:
                pause_s = blow.pause * LEASE_S
                await outcome.fleet.strike(blow.kind, POOLS[blow.pool], blow.busy, pause_s, streams)
            over = sum(job.last is not None for job in outcome.ledger.jobs)
            say(f"{time.monotonic() - began:4.0f} s  {blow.kind:12} {over} jobs over")


async def _restart(server: KeepingServer, outcome: Outcome, away_s: float, lossy: bool) -> None:
    outcome.fleet.tally.blows["lost second" if lossy else "server"] += 1
    server.kill()
    if lossy:
        outcome.ledger.lose_last_second()
        outcome.lost_bytes += server.lose_last_second()
    await asyncio.sleep(away_s)
    await server.start()


async def _settled(server: KeepingServer) -> None:
    """Wait until the queues are empty, a while at most: a job is settled after its last event."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_S), _streams(server) as streams:
            for pool in POOLS:
                while await streams.range(queue_key(pool), "-", "+", 1):
                    await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def _streams(server: KeepingServer) -> AsyncIterator[RedisStreams]:
    streams = RedisStreams.from_url(server.url)
    try:
        yield streams
    finally:
        await streams.close()


async def _conclude(server: KeepingServer, outcome: Outcome) -> None:
    """Judge what is left on the server, and count what it tells."""
    async with _streams(server) as streams, Redis.from_url(server.url, protocol=2) as raw:
        outcome.verdicts = await judge(streams, raw, outcome.ledger)
        outcome.verdicts.append(outcome.fleet.tally.wrong)
        for job in outcome.ledger.jobs:
            for _, fields in await streams.range(events_key(job.job_id), "-", "+", 1_000_000):
                decoded = decode_event(fields["type"].decode(), fields["p"])
                if decoded and isinstance(decoded[0], Resumed):
                    outcome.resumed[decoded[0].reason] += 1
    for line in outcome.fleet.logged():
        outcome.logged[f"{line.get('event')} {line.get('outcome', '')}".strip()] += 1
