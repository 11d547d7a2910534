"""A queue of many jobs, drained by several workers: each ends once, none is overtaken by many."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.soak.figures import Figure, none_of
from tests.soak.jobs import EchoJob, records_of, stream_problems
from tests.soak.processes import await_empty, await_ready, stack
from worker.jobs.events import decode_event
from worker.jobs.keys import queue_key
from worker.jobs.payload import job_id_of
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Record


@dataclass(frozen=True)
class Plan:
    """Size and bounds."""

    jobs: int
    workers: int
    max_running: int
    tokens: int
    drain_s: float
    """Bound of the drain's time."""
    share: float
    """Least share of the jobs of a worker, in parts of an equal one."""


FULL = Plan(jobs=10_000, workers=4, max_running=16, tokens=32, drain_s=120, share=0.5)
SHORT = Plan(jobs=400, workers=2, max_running=16, tokens=16, drain_s=60, share=0.02)


async def run(plan: Plan, folder: Path) -> list[Figure]:
    jobs = [EchoJob(f"backlog-{number:05}", plan.tokens) for number in range(plan.jobs)]
    async with stack(folder) as (programs, client, raw):
        for first in range(0, plan.jobs, 100):
            await asyncio.gather(*(job.submit(client) for job in jobs[first : first + 100]))
        queued = [job_id_of(fields[b"p"]) for _, fields in await raw.xrange(queue_key("default"))]
        workers = [programs.echo(f"backlog{number}", plan.max_running) for number in range(plan.workers)]
        await await_ready(client, plan.workers)
        await await_empty(client, 3 * plan.drain_s)
        cpu_s = sum(worker.cpu_s for worker in workers)
        streams = RedisStreams.from_url(programs.url)
        try:
            records = await records_of(streams, (job.job_id for job in jobs))
        finally:
            await streams.close()
        dead, faults = await client.dead_letter_count(), programs.faults()
    starts, last_ms, of_workers = _starts(records)
    seconds = (last_ms - min(at for at, _ in starts.values())) / 1000
    fewest = min(of_workers.values(), default=0) if len(of_workers) == plan.workers else 0
    return [
        Figure("jobs queued", len(queued), least=plan.jobs),
        none_of("jobs that did not end once with their answer", stream_problems(records, jobs)),
        Figure("dead letters", dead, most=0),
        none_of("faults logged", faults),
        Figure("time to drain", seconds, "s", most=plan.drain_s),
        Figure("jobs/s", plan.jobs / seconds, least=plan.jobs / plan.drain_s),
        Figure("worker CPU a job, start included", cpu_s / plan.jobs * 1000, "ms"),
        Figure("places by which a job was overtaken", _overtaken(queued, starts), most=_reordering(plan)),
        Figure("fewest jobs of a worker", fewest, least=int(plan.share * plan.jobs / plan.workers)),
    ]


def _reordering(plan: Plan) -> int:
    """Each running job, and the one claimed next, may start after jobs that were queued later.

    Twice as many are allowed, since a worker that waits for a core delays the jobs that it has.
    """
    return 4 * plan.workers * plan.max_running


def _starts(records: dict[str, list[Record]]) -> tuple[dict[str, tuple[int, str]], int, Counter[str]]:
    """When each job started, the time of the last event, and the jobs that each worker started."""
    starts: dict[str, tuple[int, str]] = {}
    of_workers: Counter[str] = Counter()
    last_ms = 0
    for job_id, events in records.items():
        envelopes = [found[1] for _, fields in events if (found := decode_event(fields["type"].decode(), fields["p"]))]
        if envelopes:
            starts[job_id] = (envelopes[0].ts_ms, job_id)
            of_workers[envelopes[0].worker_id] += 1
            last_ms = max(last_ms, envelopes[-1].ts_ms)
    return starts, last_ms, of_workers


def _overtaken(queued: Sequence[str | None], starts: dict[str, tuple[int, str]]) -> int:
    """The largest number of places between a job's rank in the queue and that of its start.

    Starts within one millisecond are ordered as queued.
    """
    rank = {job_id: place for place, job_id in enumerate(queued)}
    started = sorted(starts, key=lambda job_id: (starts[job_id][0], rank[job_id]))
    return max(place - rank[job_id] for place, job_id in enumerate(started))
