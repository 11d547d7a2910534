"""The queues that a client knows: which one serves a model, and which one has a job."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict

from worker.jobs.keys import queue_key
from worker.jobs.payload import job_id_of
from worker.jobs.streams import Record, Streams, repeat_briefly
from worker.queue_order import queues_of

SERVED_S = 2.0
"""Validity of the list of models and their queues."""
SEARCH_PAGE = 1000
MAX_SUBMITTED = 10_000
"""Submitted jobs whose entries are found without a search."""


class Queues:
    """The client's own queue and those of the living workers."""

    def __init__(self, streams: Streams, own: str) -> None:
        self.own = own
        self._streams = streams
        self._submitted: OrderedDict[str, tuple[str, str]] = OrderedDict()
        """Queue and entry id of the jobs that this client submitted last."""
        self._served: Counter[tuple[str, str]] = Counter()
        """Number of workers that take jobs, by model and queue."""
        self._served_s = -SERVED_S
        self._reading = asyncio.Lock()

    def submitted(self, job_id: str, queue: str, entry_id: str) -> None:
        """Remember the entry of a job."""
        self._submitted[job_id] = (queue, entry_id)
        if len(self._submitted) > MAX_SUBMITTED:
            self._submitted.popitem(last=False)

    async def of_model(self, model: str | None) -> str:
        """The queue for a job that names a model.

        The own one if its workers serve the model or no workers do, else that of the most workers.
        """
        if model is None:
            return self.own
        async with self._reading:
            if time.monotonic() - self._served_s >= SERVED_S:
                workers = (await repeat_briefly(self._streams.workers)).values()
                living = [status for status in workers if status.get("state") in ("ready", "busy")]
                self._served = Counter(
                    (status.get("model", ""), queue) for status in living for queue in queues_of(status)
                )
                self._served_s = time.monotonic()
        queues = {queue: count for (served, queue), count in self._served.items() if served == model}
        if not queues or self.own in queues:
            return self.own
        return max(sorted(queues), key=lambda queue: queues[queue])

    async def find(self, job_id: str) -> Record | None:
        """The job's entry, waiting or running, or None if no queue has one."""
        known = [self.own]
        if job_id in self._submitted:
            queue, entry_id = self._submitted[job_id]
            for record in await repeat_briefly(self._streams.range, queue_key(queue), entry_id, entry_id, 1):
                if _has_id(record, job_id):
                    return record
            known.insert(0, queue)
        for queue in dict.fromkeys(known):
            if (entry := await self._search(queue, job_id)) is not None:
                return entry
        workers = await repeat_briefly(self._streams.workers)
        for queue in sorted(frozenset().union(*map(queues_of, workers.values())) - set(known)):
            if (entry := await self._search(queue, job_id)) is not None:
                return entry
        return None

    async def _search(self, queue: str, job_id: str) -> Record | None:
        first: str | None = "-"
        while first is not None:
            first, found = await repeat_briefly(self._streams.find, queue, job_id, first, SEARCH_PAGE)
            for record in found:
                if _has_id(record, job_id):
                    return record
        return None


def _has_id(record: Record, job_id: str) -> bool:
    return job_id_of(record[1].get("p", b"")) == job_id
