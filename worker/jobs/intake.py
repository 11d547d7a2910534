"""Where a worker's next queue entry comes from: its own lost replies, dead workers, the queue; in this order.

It knows no job, only entries and who holds them. `transport.py` turns what it finds into claims.
"""

from __future__ import annotations

import asyncio
import random
import time

from worker.jobs.keys import START
from worker.jobs.lease import Policy
from worker.jobs.streams import Disconnected, Entry, Streams, retry_until_connected

_GONE_CONSUMER_MS = 3_600_000
"""A live worker polls or renews every second: a consumer unseen for an hour is dead."""


class Intake:
    """The consumer `worker_id` of one queue."""

    def __init__(self, streams: Streams, queue: str, worker_id: str, policy: Policy) -> None:
        self.held: set[str] = set()
        """Entries that the worker knows to be its own."""
        self.contact = time.monotonic()
        """When a poll or a renewal last succeeded, on the monotonic clock."""
        self._streams = streams
        self._queue = queue
        self._worker_id = worker_id
        self._policy = policy
        self._own_after: str | None = START
        """Where to go on reading our own pending entries; None when all are read."""
        self._reconnects = streams.reconnects
        self._next_scan = 0.0
        self._quiet_until = 0.0

    async def open(self) -> None:
        """Make the queue and sweep out dead consumers."""
        await retry_until_connected(self._streams.open_queue, self._queue)
        await retry_until_connected(self._streams.remove_consumers, self._queue, None, _GONE_CONSUMER_MS)

    async def next(self) -> Entry | None:
        """An entry that is now ours, or None after about `scan_s`."""
        if self._streams.reconnects != self._reconnects:
            self._reconnects = self._streams.reconnects
            self._after_loss()
        try:
            entry = await self._own() or await self._abandoned() or await self._new()
        except Disconnected:
            self._after_loss()
            await asyncio.sleep(random.uniform(0.1, 0.5) * self._policy.scan_s)
            return None
        except asyncio.CancelledError:
            self._own_after = START
            raise
        self.contact = time.monotonic()
        if entry is not None:
            self.held.add(entry.id)
        return entry

    async def renew(self, entry_id: str) -> bool:
        """Restart the lease of an entry; False, and it is no longer held, where somebody else has it."""
        if await retry_until_connected(self._streams.renew, self._queue, self._worker_id, entry_id):
            self.contact = time.monotonic()
            return True
        self.held.discard(entry_id)
        return False

    async def give_back(self, entry_id: str, deliveries: int) -> None:
        """Let the next scan of any worker find the entry, delivered `deliveries` times."""
        idle_ms = int(self._policy.lease_s * 1000) + 1
        await retry_until_connected(
            self._streams.give_back, self._queue, self._worker_id, entry_id, idle_ms, max(0, deliveries)
        )
        self.held.discard(entry_id)

    async def close(self) -> None:
        """Remove the consumer, if nothing is pending for it."""
        await self._streams.remove_consumers(self._queue, self._worker_id, 0)

    def _after_loss(self) -> None:
        """Replies may be lost, and nobody could renew: ask for our own first, and leave others one lease to renew."""
        self._own_after = START
        self._quiet_until = time.monotonic() + self._policy.lease_s

    async def _own(self) -> Entry | None:
        while self._own_after is not None:
            entry = await self._streams.read_own(self._queue, self._worker_id, self._own_after)
            self._own_after = entry.id if entry else None
            if entry is None or entry.id in self.held:
                continue
            if not entry.fields:  # deleted by hand while it was pending
                await self._streams.settle(self._queue, entry.id, None)
            elif await self._streams.renew(self._queue, self._worker_id, entry.id):
                return entry
        return None

    async def _abandoned(self) -> Entry | None:
        now = time.monotonic()
        if now < max(self._next_scan, self._quiet_until):
            return None
        lease_ms, cursor = int(self._policy.lease_s * 1000), START
        while True:
            cursor, entry = await self._streams.reclaim(self._queue, self._worker_id, lease_ms, cursor)
            if entry is not None and entry.id not in self.held:
                return entry
            if cursor == START:
                self._next_scan = now + self._policy.scan_s
                return None

    async def _new(self) -> Entry | None:
        return await self._streams.read_new(self._queue, self._worker_id, int(self._policy.scan_s * 1000))
