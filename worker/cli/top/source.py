"""Readings of a server for `worker top`, and the operator's commands to it.

A reading is two calls for the registry of workers and two for each queue, whatever the numbers of
jobs. `QueueTracker` keeps what it has read, so that each payload is read once.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from worker.cli.top.snapshot import ErrorRow, JobRow, LetterRow, QueueRow, Snapshot, WorkerRow
from worker.errors import ServerRefused, WorkerError
from worker.jobs.client import Client
from worker.jobs.keys import START, dead_key, next_id, split_id
from worker.jobs.payload import job_id_of
from worker.jobs.queue_entries import DeadLetter, entry_state
from worker.jobs.streams import QueueOverview, Streams
from worker.queue_order import queues_of

LISTED = 1000
"""Jobs of a queue that are listed."""
LETTERS = 100
"""Dead letters of a queue that are listed. They are read again when their number changes …"""
LETTER_READINGS = 15
"""… and after so many readings."""
LETTER_BYTES = 2**20
"""Size of payloads after which no further dead letters are listed."""
MAX_QUEUES = 32
"""Queues that are read if the command names none."""
ERRORS = 200
"""Errors that are kept, those of workers that have ended included."""


class Gone(WorkerError):
    """The dead letter does not exist any more."""

    code = "NOT_FOUND"


class Source(Protocol):
    """What the view reads and commands. Methods raise Disconnected and ServerRefused."""

    address: str
    """The server's URL without secrets."""

    async def read(self) -> Snapshot:
        """Return the current state."""

    async def drain(self, worker: str) -> None:
        """Request that a worker drains."""

    async def cancel(self, queue: str, job_id: str) -> str:
        """Cancel a job; return the outcome as `Client.cancel` does."""

    async def retry(self, queue: str, entry_id: str) -> str:
        """Resubmit a dead letter; return the new job's id. Raises Gone, or as `Client.submit`."""


class QueueTracker:
    """The listed jobs and dead letters of one queue, kept current by `read`."""

    def __init__(self, streams: Streams, name: str, lease_ms: int) -> None:
        self._streams = streams
        self._name = name
        self._lease_ms = lease_ms
        self._job_ids: dict[str, str | None] = {}
        """By entry id, in the order of the queue."""
        self._letters: list[DeadLetter] = []
        self._letters_read = (0, 0)
        """Number of dead letters, and of readings since, when they were read."""

    async def read(self) -> tuple[QueueOverview, int]:
        """Read the queue, and its dead letters if they may have changed; return their number too.

        Payloads of dead letters are transferred, but not kept.
        """
        above = None if len(self._job_ids) >= LISTED else next(reversed(self._job_ids), START)
        found = await self._streams.overview(self._name, self._lease_ms, above, LISTED)
        dead = await self._streams.length(dead_key(self._name))
        count, readings = self._letters_read
        if dead != count or readings >= LETTER_READINGS:
            self._letters, readings = await self._read_letters(), 0
        self._letters_read = (dead, readings + bool(dead))
        return found, dead

    async def _read_letters(self) -> list[DeadLetter]:
        letters: list[DeadLetter] = []
        first, size = "-", 0
        while len(letters) < LETTERS and size < LETTER_BYTES:
            page = [DeadLetter.of(row) for row in await self._streams.range(dead_key(self._name), first, "+", 10)]
            letters += [replace(letter, payload=b"") for letter in page]
            size += sum(len(letter.payload) for letter in page)
            if len(page) < 10:
                break
            first = next_id(page[-1].entry_id)
        return letters

    def update(self, found: QueueOverview, dead: int) -> tuple[QueueRow, list[JobRow], list[LetterRow]]:
        """Apply a reading; return the queue, its jobs and its dead letters."""
        self._job_ids |= {entry_id: job_id_of(payload) for entry_id, payload in found.entries}
        pending = {row.entry_id: row for row in found.pending}
        delivered, undelivered = split_id(found.delivered), max(0, found.length - found.pending_count)
        known_to = split_id(found.pending[-1].entry_id) if found.pending_count > len(pending) else delivered
        self._job_ids = {
            entry_id: job_id
            for entry_id, job_id in self._job_ids.items()
            if entry_id in pending or split_id(entry_id) > known_to
        }
        jobs = []
        for entry_id, job_id in self._job_ids.items():
            row = pending.get(entry_id)
            if row is None and split_id(entry_id) <= delivered:
                continue  # delivered, but not among the pending entries that were read
            state = entry_state(row.idle_ms if row else None, self._lease_ms)
            worker, deliveries = (row.consumer, row.deliveries) if row else ("", 0)
            jobs.append(JobRow(self._name, entry_id, job_id, state, worker, _age_s(entry_id, found.now_ms), deliveries))
        if sum(job.state == "waiting" for job in jobs) > undelivered:  # entries were deleted: read them again
            self._job_ids = {}
        oldest_s = _age_s(found.first_waiting, found.now_ms) if found.first_waiting else None
        running = min(found.length, found.running)
        queue = QueueRow(self._name, found.length - running, running, oldest_s, dead)
        return queue, jobs, [self._letter(letter, found.now_ms) for letter in self._letters]

    def _letter(self, letter: DeadLetter, now_ms: int) -> LetterRow:
        texts = (letter.job_id, letter.reason, letter.attempts, letter.last_error)
        return LetterRow(self._name, letter.entry_id, *texts, _age_s(letter.entry_id, now_ms))


class ServerSource:
    """`Source` over a server. With `queues`, only these and the workers that serve them.

    `lease_s` is the setting of the workers.
    """

    def __init__(
        self, streams: Streams, address: str, own: str, queues: Sequence[str], bound: int, lease_s: float = 4.0
    ) -> None:
        self.address = address
        self._streams = streams
        self._own = own
        self._queues = queues
        self._bound = bound
        self._lease_ms = int(lease_s * 1000)
        self._trackers: dict[str, QueueTracker] = {}
        self._heartbeats: dict[str, tuple[Mapping[str, str], float]] = {}
        """The last status of each worker, and when it was new by this process's clock."""
        self._errors: dict[ErrorRow, None] = {}
        self._refused: dict[str, ErrorRow] = {}
        """The first error of each queue that the server refuses to read."""

    async def read(self) -> Snapshot:
        """Return the current state. Calls are not repeated: the next reading is."""
        statuses = await self._streams.workers()
        if self._queues:
            statuses = {name: status for name, status in statuses.items() if queues_of(status) & {*self._queues}}
            names, hidden = list(self._queues), 0
        else:
            served = sorted(frozenset({self._own}).union(*map(queues_of, statuses.values())))
            names, hidden = served[:MAX_QUEUES], max(0, len(served) - MAX_QUEUES)
        self._trackers = {
            name: self._trackers.get(name) or QueueTracker(self._streams, name, self._lease_ms) for name in names
        }
        found = await self._read_queues()
        now_ms = next(iter(found.values()))[0].now_ms
        views = [self._trackers[name].update(*each) for name, each in found.items()]
        jobs = sorted((job for _, each, _ in views for job in each), key=_job_order)
        letters = sorted((row for _, _, each in views for row in each), key=lambda row: -row.age_s)
        workers = self._workers(statuses, now_ms)
        return Snapshot(
            now_ms, [queue for queue, _, _ in views], hidden, workers, jobs, letters, self._newest(statuses)
        )

    async def _read_queues(self) -> dict[str, tuple[QueueOverview, int]]:
        """Read all queues. One that is refused, such as a key of another type, becomes an error.

        Raises ServerRefused if all are refused.
        """
        readings = await asyncio.gather(*map(self._read_queue, self._trackers))
        found = {name: each for name, each in zip(self._trackers, readings, strict=True) if isinstance(each, tuple)}
        refused = {name: str(each) for name, each in zip(self._trackers, readings, strict=True) if name not in found}
        if not found:
            raise next(each for each in readings if isinstance(each, ServerRefused))
        for name in [name for name, error in self._refused.items() if refused.get(name) != error.message]:
            del self._refused[name]
        now_ms = next(iter(found.values()))[0].now_ms
        for name, message in refused.items():
            row = self._refused.setdefault(name, ErrorRow(now_ms, "", "", ServerRefused.code, message))
            self._errors[row] = None
        return found

    async def _read_queue(self, name: str) -> tuple[QueueOverview, int] | ServerRefused:
        try:
            return await self._trackers[name].read()
        except ServerRefused as error:
            return error

    def _workers(self, statuses: Mapping[str, Mapping[str, str]], now_ms: int) -> list[WorkerRow]:
        now_s, before = time.monotonic(), self._heartbeats
        self._heartbeats = {
            name: before[name] if name in before and before[name][0] == status else (status, now_s)
            for name, status in statuses.items()
        }
        rows = self._heartbeats.items()
        return [WorkerRow.of(name, status, now_ms, now_s - at_s) for name, (status, at_s) in sorted(rows)]

    def _newest(self, statuses: Mapping[str, Mapping[str, str]]) -> list[ErrorRow]:
        for worker, status in statuses.items():
            self._errors |= dict.fromkeys(ErrorRow.all_of(worker, status))
        newest = sorted(self._errors, key=lambda error: -error.ts_ms)[:ERRORS]
        self._errors = dict.fromkeys(newest)
        return newest

    async def drain(self, worker: str) -> None:
        """See `Source.drain`."""
        await self._client(self._own).drain(worker)

    async def cancel(self, queue: str, job_id: str) -> str:
        """See `Source.cancel`."""
        return await self._client(queue).cancel(job_id)

    async def retry(self, queue: str, entry_id: str) -> str:
        """See `Source.retry`."""
        client = self._client(queue)
        letter = await client.dead_letter(entry_id)
        if letter is None:
            raise Gone(f"the queue {queue} has no dead letter {entry_id} any more")
        return await client.retry_dead_letter(letter)

    def _client(self, queue: str) -> Client:
        return Client(self._streams, queue, self._bound)


def _age_s(entry_id: str, now_ms: int) -> float:
    """Seconds since an entry was added, by the server's clock."""
    return max(0.0, (now_ms - split_id(entry_id)[0]) / 1000)


def _job_order(job: JobRow) -> tuple[bool, float]:
    return job.state == "waiting", -job.age_s
