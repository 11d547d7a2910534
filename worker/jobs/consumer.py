"""A worker as a consumer of its queue's group: claims entries, renews them, gives them back.

Knows queue entries and their consumers, not jobs; `transport.py` turns entries into claims.
"""

from __future__ import annotations

import asyncio
import random
import time

from worker.config import LeaseSection
from worker.jobs.keys import START
from worker.jobs.streams import Disconnected, Entry, Streams, retry_until_connected

_DEAD_CONSUMER_MS = 3_600_000
"""A live worker polls or renews every second, so a consumer idle for this long is dead."""


class Consumer:
    """The consumer `worker_id` of one queue."""

    def __init__(self, streams: Streams, queue: str, worker_id: str, lease: LeaseSection) -> None:
        self.held: set[str] = set()
        """Ids of the entries that this worker is processing."""
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

    async def next(self) -> Entry | None:
        """Claim an entry; None after about `scan_s`.

        In this order: pending entries whose delivery was lost with a reply, entries of dead
        consumers, new entries.
        """
        if self._streams.reconnects != self._reconnects:
            self._reconnects = self._streams.reconnects
            self._connection_lost()
        try:
            entry = await self._read_own() or await self._reclaim() or await self._read_new()
        except Disconnected:
            self._connection_lost()
            await asyncio.sleep(random.uniform(0.1, 0.5) * self._lease.scan_s)
            return None
        except asyncio.CancelledError:
            self._own_after = START
            raise
        self.last_contact_s = time.monotonic()
        if entry is not None:
            self.held.add(entry.id)
        return entry

    async def renew(self, entry_id: str) -> bool:
        """Reset the idle time of an entry. Returns False if it is no longer pending here."""
        if await retry_until_connected(self._streams.renew, self._queue, self._worker_id, entry_id):
            self.last_contact_s = time.monotonic()
            return True
        self.held.discard(entry_id)
        return False

    async def give_back(self, entry_id: str, deliveries: int) -> None:
        """Make the entry claimable at once by any worker, with this delivery count."""
        idle_ms = int(self._lease.lease_s * 1000) + 1
        await retry_until_connected(
            self._streams.give_back, self._queue, self._worker_id, entry_id, idle_ms, max(0, deliveries)
        )
        self.held.discard(entry_id)

    async def settle(self, entry_id: str, dead: dict[str, bytes] | None) -> None:
        """Acknowledge and delete the entry, moving it to the dead letters if `dead` is given."""
        await retry_until_connected(self._streams.settle, self._queue, entry_id, dead)
        self.held.discard(entry_id)

    def _connection_lost(self) -> None:
        """Reread own pending entries: replies may be lost. Others get one lease to renew theirs."""
        self._own_after = START
        self._no_scan_until_s = time.monotonic() + self._lease.lease_s

    async def _read_own(self) -> Entry | None:
        while self._own_after is not None:
            entry = await self._streams.read_own(self._queue, self._worker_id, self._own_after)
            self._own_after = entry.id if entry else None
            if entry is None or entry.id in self.held:
                continue
            if not entry.fields:  # deleted by an operator while it was pending
                await self._streams.settle(self._queue, entry.id, None)
            elif await self._streams.renew(self._queue, self._worker_id, entry.id):
                return entry
        return None

    async def _reclaim(self) -> Entry | None:
        now_s = time.monotonic()
        if now_s < max(self._next_scan_s, self._no_scan_until_s):
            return None
        lease_ms, cursor = int(self._lease.lease_s * 1000), START
        while True:
            cursor, entry = await self._streams.reclaim(self._queue, self._worker_id, lease_ms, cursor)
            if entry is not None and entry.id not in self.held:
                return entry
            if cursor == START:
                self._next_scan_s = now_s + self._lease.scan_s
                return None

    async def _read_new(self) -> Entry | None:
        return await self._streams.read_new(self._queue, self._worker_id, int(self._lease.scan_s * 1000))
