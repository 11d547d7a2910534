"""An orchestrator of a run: submits, cancels and duplicates jobs, and reads their events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

from tests.chaos.run_log import Garbage, Job, ReadPass, RunLog
from tests.chaos.workload import POISON, Case
from worker.errors import EventsLost
from worker.jobs.client import Client, SyncClient
from worker.jobs.events import Event
from worker.jobs.keys import START
from worker.jobs.reader import StreamEvent
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected, retry_until_connected

KINDS = {
    "plain": 108,
    "json": 12,  # JSON payload, as with redis-cli
    "synchronous": 12,  # read with SyncClient
    "cancelled": 24,
    "deadline": 16,  # with a deadline that may pass
    "duplicate": 16,  # two entries, one job
    "poison": 2,
    "invalid": 6,
    "garbage": 6,  # payload without a job id
}
IDLE_S = 6.0


class Orchestrator:
    """Keeps up to `concurrency` jobs of one queue running."""

    def __init__(self, name: str, queue: str, url: str, cases: list[Case], run_log: RunLog, concurrency: int) -> None:
        self.name = name
        self._queue = queue
        self._url = url
        self._cases = cases
        self._run_log = run_log
        self._concurrency = concurrency
        self._random = Random(name)
        self._streams = RedisStreams.from_url(url)
        self._client = Client(self._streams, queue=queue)
        self._running: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(concurrency)
        self._in_threads: set[SyncClient] = set()
        """Clients of the threads. A thread cannot be cancelled: after `close` of its client it ends by itself."""

    async def run(self, until: float) -> None:
        """Submit jobs until the monotonic time `until`, then wait for the running ones."""
        while time.monotonic() < until:
            if len(self._running) < self._concurrency:
                self._begin(f"{self.name}-{len(self._run_log.jobs)}")
            else:
                await asyncio.wait(self._running, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
        while self._running:
            await asyncio.wait(self._running)

    @property
    def reading_in_threads(self) -> int:
        """Number of synchronous readers."""
        return len(self._in_threads)

    async def close(self) -> None:
        """Stop reading and disconnect."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for client in list(self._in_threads):
            client.close()
        await asyncio.to_thread(self._threads.shutdown)
        await self._client.close()

    def _begin(self, job_id: str) -> None:
        kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
        job = Job(job_id, self._queue, kind, self._choose_case(kind))
        if kind != "garbage":
            self._run_log.jobs.append(job)
        task = asyncio.create_task(self._garbage() if kind == "garbage" else self._run_job(job))
        self._running.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._run_log.problems.append(f"{self.name}: {error!r}")

    def _choose_case(self, kind: str) -> Case:
        case = self._random.choice(self._cases)
        if kind == "poison":
            return Case({"prompt_tokens": list(POISON), "max_tokens": 50}, (), (), "", None)
        if kind == "invalid":
            return Case({**case.fields, "temperature": 3.5}, (), (), "", None)
        if kind == "deadline":
            fields = {**case.fields, "deadline_ms": self._random.randint(1, 3000)}
            return Case(fields, case.ids, case.texts, case.finish_reason, case.stop_sequence)
        return case

    async def _run_job(self, job: Job) -> None:
        await self._submit(job)
        concurrent = []
        if job.kind == "duplicate":
            concurrent.append(asyncio.create_task(self._later(self._submit(job))))
        elif job.kind == "cancelled":
            concurrent.append(asyncio.create_task(self._later(retry_until_connected(self._client.cancel, job.job_id))))
        if job.kind == "synchronous":
            client = SyncClient.from_url(self._url, queue=self._queue)
            self._in_threads.add(client)
            thread = self._threads.submit(self._read_in_thread, client, job)
            thread.add_done_callback(lambda _: self._in_threads.discard(client))
            await asyncio.wrap_future(thread)
        else:
            await self._read(job)
        await asyncio.gather(*concurrent)

    async def _later(self, work: Any) -> None:
        await asyncio.sleep(self._random.choice([0.0, 0.05, 0.3, 1.0, 4.0]))
        await work

    async def _submit(self, job: Job) -> None:
        """Enqueue, repeating after a lost reply: two entries with one job id are one job."""
        if job.kind in ("json", "invalid"):
            payload = json.dumps({"job_id": job.job_id, **job.case.fields}).encode()
            await retry_until_connected(self._streams.enqueue, self._queue, {"p": payload}, 1_000_000)
        else:
            await retry_until_connected(self._client.submit, job_id=job.job_id, **job.case.fields)
        job.sent = time.time()

    async def _garbage(self) -> None:
        payload = b"\xc1" + self._random.randbytes(self._random.randint(0, 40))
        garbage = Garbage(self._queue, payload)
        self._run_log.garbage.append(garbage)

        async def enqueue() -> None:
            garbage.entries += 1
            await self._streams.enqueue(self._queue, {"p": payload}, 1_000_000)

        await retry_until_connected(enqueue)
        garbage.sent = time.time()

    async def _read(self, job: Job) -> None:
        """Read to the end, sometimes going back to an earlier entry."""
        after: str | None = START
        while after is not None:
            if after == START:
                resumes, losses = [START], self._run_log.losses
            try:
                after = await self._pass(job, after, resumes, losses)
            except TimeoutError:
                await self._submit_if_lost(job)
            except Disconnected:
                continue

    async def _pass(self, job: Job, after: str, resumes: list[str], losses: int) -> str | None:
        """Read from `after`; return the id to continue at, or None at the end."""
        reading = ReadPass(job, self._run_log, losses)
        with contextlib.suppress(EventsLost):
            async for item in self._client.events(job.job_id, after, IDLE_S):
                if not reading.receive(item):
                    return self._restart()
                if _is_terminal(item):
                    return None if reading.end(item) else self._restart()
                if item.resume not in resumes[-1:]:
                    resumes.append(item.resume)
                if self._random.random() < 0.01:
                    self._run_log.rewinds += 1
                    return self._random.choice(resumes)
        reading.ended_early()
        await asyncio.sleep(0.2)
        return START

    def _read_in_thread(self, client: SyncClient, job: Job) -> None:
        """Read to the end with the synchronous client, and close it. Raises RuntimeError if it is closed before."""
        with client:
            while True:
                reading = ReadPass(job, self._run_log, self._run_log.losses)
                try:
                    for item in client.events(job.job_id, idle_s=IDLE_S):
                        if not reading.receive(item):
                            break
                        if _is_terminal(item):
                            if reading.end(item):
                                return
                            break
                    else:
                        reading.ended_early()
                except EventsLost:
                    reading.ended_early()
                except TimeoutError:
                    with contextlib.suppress(Disconnected):
                        if (
                            self._run_log.losses
                            and "ended_ms" not in client.state(job.job_id)
                            and job.job_id not in [entry.job_id for entry in client.queue(1000)]
                        ):
                            client.submit(job_id=job.job_id, **job.case.fields)
                            job.sent = time.time()
                            self._run_log.submitted_again += 1
                except Disconnected:
                    continue

    def _restart(self) -> str:
        """Where a reader goes on that must restart because of lost writes."""
        self._run_log.reread += 1
        return START

    async def _submit_if_lost(self, job: Job) -> None:
        """Resubmit a job that has not ended if the server has lost its entry.

        Its worker may have written its events again and died before it noticed that.
        """
        if not self._run_log.losses:
            return
        if "ended_ms" not in await retry_until_connected(self._client.state, job.job_id):
            queued = await retry_until_connected(self._client.queue, 1000)
            if job.job_id not in [entry.job_id for entry in queued]:
                self._run_log.submitted_again += 1
                await self._submit(job)


def _is_terminal(item: StreamEvent) -> bool:
    return isinstance(item.event, Event) and item.event.terminal
