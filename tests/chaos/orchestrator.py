"""One of several programs that ask and read: it submits, cancels, submits twice, and reads with changes of mind."""

from __future__ import annotations

import asyncio
import json
import time
from random import Random
from typing import Any

from tests.chaos.ledger import Garbage, Job, Ledger, Pass
from tests.chaos.questions import POISON, Asked
from worker.jobs.client import Client, SyncClient
from worker.jobs.events import Event
from worker.jobs.keys import START
from worker.jobs.reader import StreamEvent
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Disconnected, retry_until_connected

KINDS = {
    "plain": 108,
    "json": 12,  # as redis-cli would submit it
    "synchronous": 12,  # read by the client without `await`
    "cancelled": 24,
    "hurried": 16,  # with a deadline that it may miss
    "doubled": 16,  # two entries, one job
    "poison": 2,
    "invalid": 6,
    "garbage": 6,  # names no job
}
IDLE_S = 6.0


class Orchestrator:
    """Keeps up to `at_once` jobs of one pool under way."""

    def __init__(self, name: str, pool: str, url: str, questions: list[Asked], ledger: Ledger, at_once: int) -> None:
        self.name = name
        self._pool = pool
        self._url = url
        self._questions = questions
        self._ledger = ledger
        self._at_once = at_once
        self._random = Random(name)
        self._streams = RedisStreams.from_url(url)
        self._client = Client(self._streams, queue=pool)
        self._under_way: set[asyncio.Task[None]] = set()

    async def work(self, until: float) -> None:
        """Ask until the monotonic clock says `until`, then hear out what is under way."""
        while time.monotonic() < until:
            if len(self._under_way) < self._at_once:
                self._begin(f"{self.name}-{len(self._ledger.jobs)}")
            else:
                await asyncio.wait(self._under_way, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def close(self) -> None:
        """Stop reading and disconnect."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self._client.close()

    def _begin(self, job_id: str) -> None:
        kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
        job = Job(job_id, self._pool, kind, self._question(kind))
        if kind != "garbage":
            self._ledger.jobs.append(job)
        task = asyncio.create_task(self._garbage() if kind == "garbage" else self._carry(job))
        self._under_way.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and task.exception() is not None:
            raise RuntimeError("an orchestrator failed") from task.exception()

    def _question(self, kind: str) -> Asked:
        asked = self._random.choice(self._questions)
        if kind == "poison":
            return Asked({"prompt_tokens": list(POISON), "max_tokens": 50}, (), (), "", None)
        if kind == "invalid":
            return Asked({**asked.fields, "temperature": 3.5}, (), (), "", None)
        if kind == "hurried":
            fields = {**asked.fields, "deadline_ms": self._random.randint(1, 3000)}
            return Asked(fields, asked.ids, asked.texts, asked.finish_reason, asked.stop_sequence)
        return asked

    async def _carry(self, job: Job) -> None:
        await self._submit(job)
        beside = []
        if job.kind == "doubled":
            beside.append(asyncio.create_task(self._later(self._submit(job))))
        elif job.kind == "cancelled":
            beside.append(asyncio.create_task(self._later(retry_until_connected(self._client.cancel, job.job_id))))
        if job.kind == "synchronous":
            await asyncio.to_thread(self._follow_in_a_thread, job)
        else:
            await self._follow(job)
        await asyncio.gather(*beside)

    async def _later(self, work: Any) -> None:
        await asyncio.sleep(self._random.choice([0.0, 0.05, 0.3, 1.0, 4.0]))
        await work

    async def _submit(self, job: Job) -> None:
        """Enqueue; again where the answer was lost: two entries of one job are one job."""
        if job.kind in ("json", "invalid"):
            payload = json.dumps({"job_id": job.job_id, **job.asked.fields}).encode()
            await retry_until_connected(self._streams.enqueue, self._pool, {"p": payload}, 1_000_000)
        else:
            await retry_until_connected(self._client.submit, job_id=job.job_id, **job.asked.fields)
        job.sent = time.monotonic()

    async def _garbage(self) -> None:
        payload = b"\xc1" + self._random.randbytes(self._random.randint(0, 40))
        garbage = Garbage(self._pool, payload)
        self._ledger.garbage.append(garbage)
        await retry_until_connected(self._streams.enqueue, self._pool, {"p": payload}, 1_000_000)
        garbage.sent = time.monotonic()

    async def _follow(self, job: Job) -> None:
        """Read to the end, now and then from an earlier entry again."""
        after: str | None = START
        while after is not None:
            if after == START:
                resumes, losses = [START], self._ledger.losses
            try:
                after = await self._pass(job, after, resumes, losses)
            except TimeoutError:
                await self._submit_if_lost(job)
            except Disconnected:
                continue

    async def _pass(self, job: Job, after: str, resumes: list[str], losses: int) -> str | None:
        """Read from `after` on; where to go on reading, None at the end."""
        heard = Pass(job, self._ledger, losses)
        async for item in self._client.events(job.job_id, after, IDLE_S):
            if not heard.hear(item):
                self._ledger.reread += 1
                return START
            if self._is_last(job, item):
                return None
            if item.resume not in resumes[-1:]:
                resumes.append(item.resume)
            if self._random.random() < 0.01:
                self._ledger.rewinds += 1
                return self._random.choice(resumes)
        heard.over_unheard()
        await asyncio.sleep(0.2)
        return START

    def _follow_in_a_thread(self, job: Job) -> None:
        """The same with the synchronous client, in one go."""
        with SyncClient.from_url(self._url, queue=self._pool) as client:
            while True:
                heard = Pass(job, self._ledger, self._ledger.losses)
                try:
                    for item in client.events(job.job_id, idle_s=IDLE_S):
                        if not heard.hear(item):
                            break
                        if self._is_last(job, item):
                            return
                    else:
                        heard.over_unheard()
                except TimeoutError:
                    if client.state(job.job_id) == {} and self._ledger.losses:
                        client.submit(job_id=job.job_id, **job.asked.fields)
                        job.sent = time.monotonic()
                        self._ledger.submitted_again += 1
                except Disconnected:
                    continue

    def _is_last(self, job: Job, item: StreamEvent) -> bool:
        if not isinstance(item.event, Event) or not item.event.terminal:
            return False
        job.last = item
        if sorted(job.heard) != list(range(len(job.heard))):
            job.wrong.append(f"its reader heard tokens {sorted(job.heard)}")
        return True

    async def _submit_if_lost(self, job: Job) -> None:
        """Nothing for a while: where the server has lost writes, the job itself may be among them."""
        if self._ledger.losses and not await retry_until_connected(self._client.state, job.job_id):
            queued = await retry_until_connected(self._client.queue, 1000)
            if job.job_id not in [entry.job_id for entry in queued]:
                self._ledger.submitted_again += 1
                await self._submit(job)
