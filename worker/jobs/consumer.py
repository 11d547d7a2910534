"""A worker's presence on the server: consumer of its queue's group, and entry in the registry.

`Consumer` claims queue entries, renews them and gives them back; `transport.py` turns entries into
jobs. `Registration` has heartbeat and status, the worker's own event stream, and commands to it.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, cast

from worker.config import LeaseSection
from worker.errors import Cancelled, ServerRefused
from worker.jobs.events import Envelope, ErrorEvent, Event, encode_event, now_ms
from worker.jobs.keys import CONTROL, START, worker_events_key
from worker.jobs.served_models import ServedModels
from worker.jobs.streams import (
    STATUS_TTL_MS,
    Disconnected,
    Entry,
    Ownership,
    PendingEntry,
    Streams,
    retry_until_connected,
)

T = TypeVar("T")

READ_BLOCK_MS = 1000
LAST_ERRORS = 5
"""Errors in a worker's status."""
MAX_MESSAGE = 300
"""Characters of their messages."""
MAX_EVENTS = 10_000
"""Approximate number of events kept on a worker's own stream."""
_DEAD_CONSUMER_MS = 3_600_000
"""A live worker polls or renews every second, so a consumer idle for this long is dead."""
_SCANNED = 10_000
"""Pending entries that a scan reads; each worker has one or two."""
_EQUAL_MS = 20
"""Two readings of one delivery time differ by less; a renewal follows the last after longer."""


class RenewalWatch:
    """Since when each pending entry was not renewed, by this process's monotonic clock.

    The server's clock may jump. If it goes back, the idle time of an entry is 0 until the clock
    has caught up; if it goes forward, every idle time is too long. So the idle time counts only
    when an entry is first seen or was renewed; later scans compare its delivery time.
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[PendingEntry, float]] = {}

    def overdue(self, rows: Sequence[PendingEntry], lease_s: float) -> list[PendingEntry]:
        """The entries that were not renewed for `lease_s`; `rows` are all that are pending now."""
        now_s, before = time.monotonic(), self._seen
        self._seen = {}
        for row in rows:
            seen, renewed_s = before.get(row.entry_id, (row, now_s - row.idle_ms / 1000))
            if _renewed(seen, row):
                seen, renewed_s = row, now_s - row.idle_ms / 1000
            self._seen[row.entry_id] = (seen, renewed_s)
        return [row for row in rows if now_s - self._seen[row.entry_id][1] >= lease_s]


def _renewed(before: PendingEntry, row: PendingEntry) -> bool:
    """Whether the entry was renewed or delivered between the two readings.

    An idle time of 0 is no proof: the clock may have gone back before the delivery time. An entry
    that is still renewed has another idle time when it is read again.
    """
    if (before.consumer, before.deliveries) != (row.consumer, row.deliveries):
        return True
    return row.idle_ms > 0 and abs(row.delivered_ms - before.delivered_ms) > _EQUAL_MS


class Consumer:
    """The consumer `worker_id` of one queue."""

    def __init__(self, streams: Streams, queue: str, worker_id: str, lease: LeaseSection) -> None:
        self._held: dict[str, int] = {}
        """Ids of the entries that this worker is processing, and how many tasks have each."""
        self._avoided_until_s: dict[str, float] = {}
        """Ids of entries that this worker leaves to others, and how long."""
        self._model_of: dict[str, str] = {}
        """Ids of entries that this worker leaves to the workers of another model."""
        self._overdue: deque[PendingEntry] = deque()
        """Entries without a lease that the last scan has found and this worker has not tried."""
        self.other_models = ServedModels(streams, queue, worker_id)
        self._watch = RenewalWatch()
        self.last_contact_s = time.monotonic()
        """Monotonic time of the last successful poll or renewal."""
        self._streams = streams
        self._queue = queue
        self._worker_id = worker_id
        self._lease = lease
        self._own_after: str | None = START
        """Where to continue reading this consumer's pending entries; None if all are read."""
        self._reconnects = streams.reconnects
        self._next_scan_s = 0.0
        self._no_scan_until_s = 0.0

    async def open(self) -> None:
        """Create the queue and delete dead consumers."""
        await retry_until_connected(self._streams.open_queue, self._queue)
        await retry_until_connected(self._streams.remove_consumers, self._queue, None, _DEAD_CONSUMER_MS)

    async def close(self) -> None:
        """Delete this consumer if it has no pending entries."""
        await self._streams.remove_consumers(self._queue, self._worker_id, 0)

    async def next(self, block_ms: int) -> Entry | None:
        """Claim an entry; None if there is none within `block_ms`, or without a connection.

        In this order: pending entries whose delivery was lost with a reply, entries of dead
        consumers, new entries. Hold what it returns.
        """
        if self._streams.reconnects != self._reconnects:
            self._reconnects = self._streams.reconnects
            self.reply_lost()
        try:
            entry = await self._read_own() or await self._reclaim()
            if entry is None:
                entry = (await self._streams.read_new([self._queue], self._worker_id, block_ms)).get(self._queue)
        except Disconnected:
            self.reply_lost()
            await asyncio.sleep(random.uniform(0.1, 0.5) * self._lease.scan_s)
            return None
        except asyncio.CancelledError:
            self._own_after = START
            raise
        self.last_contact_s = time.monotonic()
        return entry if entry is not None and self.hold(entry.id) else None

    def hold(self, entry_id: str) -> bool:
        """Regard the entry as one that this worker is processing, until `forget`.

        Returns False if it is already. Then the server has lost the delivery and repeated it: the
        attempt in progress keeps the entry, and no second one may begin beside it.
        """
        if entry_id in self._held:
            return False
        self._held[entry_id] = 1
        return True

    def share(self, entry_id: str) -> None:
        """Let another task have a held entry, which then is held until each has called `forget`."""
        self._held[entry_id] = self._held.get(entry_id, 0) + 1

    def forget(self, entry_id: str) -> None:
        """End the hold of one task. Call it once for each `hold` and `share`."""
        self._held[entry_id] = self._held.get(entry_id, 0) - 1
        if self._held[entry_id] <= 0:
            del self._held[entry_id]

    async def renew(self, entry_id: str) -> Ownership:
        """Reset the idle time of an entry, if it is still pending here."""
        ownership = await retry_until_connected(self._streams.renew, self._queue, self._worker_id, entry_id)
        self.renewed(ownership)
        return ownership

    def renewed(self, ownership: Ownership) -> None:
        """Note the result of a renewal."""
        if ownership == "held":
            self.last_contact_s = time.monotonic()

    async def give_back(self, entry_id: str, deliveries: int, avoid_s: float = 0.0, model: str | None = None) -> None:
        """Make the entry claimable at once, with this delivery count.

        Here only after `avoid_s`, and only once no worker serves `model`, which the job names.
        """
        self._avoided_until_s[entry_id] = time.monotonic() + avoid_s
        if model is not None:
            self._model_of[entry_id] = model
        args = (entry_id, int(self._lease.lease_s * 1000) + 1, max(0, deliveries))
        await retry_until_connected(self._streams.give_back, self._queue, self._worker_id, *args)

    async def settle(self, entry_id: str, dead: dict[str, bytes] | None, job_id: str | None = None) -> bool:
        """Acknowledge and delete the entry, moving it to the dead letters if `dead` is given.

        Returns False, and does nothing, if a job `job_id` is given and has no terminal event.
        """
        return await retry_until_connected(self._streams.settle, self._queue, entry_id, dead, job_id)

    def _is_free(self, entry_id: str) -> bool:
        """Whether this worker may claim the entry: not processing it, nor leaving it to others."""
        if entry_id in self._held or time.monotonic() < self._avoided_until_s.get(entry_id, 0.0):
            return False
        return entry_id not in self._model_of or self._model_of[entry_id] not in self.other_models

    def reply_lost(self) -> None:
        """Reread own pending entries: replies may be lost. Others get one lease to renew theirs."""
        self._own_after = START
        self._overdue.clear()
        self._no_scan_until_s = time.monotonic() + self._lease.lease_s

    async def _read_own(self) -> Entry | None:
        while self._own_after is not None:
            entry = await self._streams.read_own(self._queue, self._worker_id, self._own_after)
            self._own_after = entry.id if entry else None
            if entry is None or not self._is_free(entry.id):
                continue
            if not entry.fields:  # deleted by an operator while it was pending
                await self._streams.settle(self._queue, entry.id, None)
            elif await self._streams.renew(self._queue, self._worker_id, entry.id) == "held":
                return entry
        return None

    async def _reclaim(self) -> Entry | None:
        """Claim an entry whose lease has expired; look for such entries once per `scan_s`."""
        now_s = time.monotonic()
        if not self._overdue and now_s >= max(self._next_scan_s, self._no_scan_until_s):
            self._next_scan_s = now_s + self._lease.scan_s
            overdue = await self._scan()
            if any(row.idle_ms < self._lease.lease_s * 1000 for row in overdue):
                await asyncio.sleep(_EQUAL_MS / 1000)  # the clock went back, or it is renewed at this millisecond
                overdue = await self._scan()
            self._overdue.extend(overdue)
        while self._overdue:
            row = self._overdue.popleft()
            if self._is_free(row.entry_id):
                entry = await self._streams.reclaim(self._queue, self._worker_id, row)
                if entry is not None:
                    return entry
        return None

    async def _scan(self) -> list[PendingEntry]:
        rows = await self._streams.pending(self._queue, _SCANNED)
        self._avoided_until_s = {row.entry_id: self._avoided_until_s.get(row.entry_id, 0.0) for row in rows}
        self._model_of = {row.entry_id: self._model_of[row.entry_id] for row in rows if row.entry_id in self._model_of}
        if self._model_of:
            await self.other_models.refresh()
        return self._watch.overdue(rows, self._lease.lease_s)


@dataclass(frozen=True, slots=True)
class Command:
    """An entry of the control stream: cancel the job, or drain the worker, named `target`."""

    do: Literal["cancel", "drain"]
    target: str


class Registration:
    """The worker in the registry. No job waits for its writes; those that fail are dropped."""

    def __init__(self, streams: Streams, worker_id: str, lease: LeaseSection) -> None:
        self.on_reply: Callable[[str, ServerRefused | None], None] | None = None
        """Receives the name of each call that was answered, and the error if it was refused."""
        self._streams = streams
        self._worker_id = worker_id
        self._lease = lease
        self._last_command_id = START
        self.last_errors: deque[dict[str, object]] = deque(maxlen=LAST_ERRORS)
        """The newest errors that were published, other than cancellations, for the status."""

    async def open(self) -> None:
        """Start at the end of the control stream: earlier commands are ignored."""
        self._last_command_id = await retry_until_connected(self._streams.last_id, CONTROL)

    @property
    def refused(self) -> bool:
        """Whether the server refuses calls, such as heartbeats, for now."""
        return self._streams.contact.refused_for_s > 0

    async def close(self) -> None:
        """Unregister."""
        await self._streams.drop_status(self._worker_id)

    async def publish(self, event: Event, envelope: Envelope | None = None) -> None:
        """Append to the worker's own stream; pass the envelope to copy a job's event."""
        envelope = envelope or Envelope(None, 0, now_ms(), self._worker_id)
        if isinstance(event, ErrorEvent) and event.code != Cancelled.code:
            error = {"code": event.code, "message": event.message[:MAX_MESSAGE]}
            self.last_errors.append({"ts_ms": envelope.ts_ms, "job_id": envelope.job_id, **error})
        kind, packed = encode_event(event, envelope)
        key, ttl_ms = worker_events_key(self._worker_id), int(self._lease.retention_s * 1000)
        await self._attempt("publish", self._streams.add(key, {"type": kind.encode(), "p": packed}, MAX_EVENTS, ttl_ms))

    async def heartbeat(self, status: Mapping[str, str]) -> None:
        """Register, and write the status hash, which expires after STATUS_TTL_MS."""
        await self._attempt("heartbeat", self._streams.put_status(self._worker_id, status, STATUS_TTL_MS))

    async def commands(self) -> AsyncIterator[Command]:
        """Yield commands to any worker that were sent since `open`. Never ends."""
        while True:
            read = self._streams.read(CONTROL, self._last_command_id, READ_BLOCK_MS)
            records = await self._attempt("commands", read)
            if records is None:
                await asyncio.sleep(self._lease.scan_s)
                continue
            for self._last_command_id, fields in records:
                do, target = (fields.get(name, b"").decode(errors="replace") for name in ("do", "target"))
                if do in ("cancel", "drain"):
                    yield Command(cast("Literal['cancel', 'drain']", do), target)

    async def _attempt(self, name: str, call: Awaitable[T]) -> T | None:
        """The reply to a call, None if it failed."""
        reply = refusal = None
        try:
            reply = await call
        except Disconnected:
            return None
        except ServerRefused as error:
            refusal = error
        if self.on_reply is not None:
            self.on_reply(name, refusal)
        return reply
