"""The consumers of a worker, one for each of its queues, and the choice of the next entry."""

import asyncio
from collections.abc import Sequence

from worker.config import LeaseSection
from worker.errors import ServerRefused
from worker.jobs.consumer import Consumer
from worker.jobs.streams import Disconnected, Entry, Streams
from worker.queue_order import QueueOrder


class Consumers:
    """The consumers named `worker_id` of one or more queues; see `QueueOrder` for `queues`."""

    def __init__(self, streams: Streams, queues: Sequence[str], worker_id: str, lease: LeaseSection) -> None:
        self._streams = streams
        self._worker_id = worker_id
        self._block_ms = int(lease.scan_s * 1000)
        self._order = QueueOrder(queues)
        self.names = self._order.names
        self._of = {name: Consumer(streams, name, worker_id, lease) for name in self.names}
        self._refusals: dict[str, ServerRefused] = {}
        """The refusal of each queue that was refused when it was last read."""

    def __getitem__(self, queue: str) -> Consumer:
        return self._of[queue]

    @property
    def last_contact_s(self) -> float:
        """Monotonic time of the last successful poll or renewal."""
        return max(consumer.last_contact_s for consumer in self._of.values())

    async def open(self) -> None:
        """Create the queues and delete dead consumers."""
        for consumer in self._of.values():
            await consumer.open()

    async def close(self) -> None:
        """Delete the consumers that have no pending entries."""
        for consumer in self._of.values():
            await consumer.close()

    @property
    def refusal(self) -> ServerRefused | None:
        """Why a queue cannot be read, such as a key of another type."""
        return next(iter(self._refusals.values()), None)

    async def next(self) -> tuple[str, Entry] | None:
        """Claim an entry of the first queue that has one; None after about `scan_s`.

        Raises: ServerRefused if a queue is refused and no other one has an entry.
        """
        order = self._order.next_order()
        if len(order) == 1:
            entry = await self._of[order[0]].next(self._block_ms)
            return None if entry is None else (order[0], entry)
        for tried, name in enumerate(order):
            try:
                entry = await self._of[name].next(0)
            except ServerRefused as error:
                self._refusals[name] = error
                continue
            self._refusals.pop(name, None)
            if entry is not None:
                self._order.claimed(name, order[:tried])
                return name, entry
        if self.refusal is not None:
            raise self.refusal
        return await self._wait(order)

    async def _wait(self, order: list[str]) -> tuple[str, Entry] | None:
        """Wait for a new entry of any queue.

        One read of several queues may return an entry of each: the first in order is kept, the
        others are given back uncounted.
        """
        try:
            found = await self._streams.read_new(order, self._worker_id, self._block_ms)
        except (Disconnected, asyncio.CancelledError) as error:
            for consumer in self._of.values():
                consumer.reply_lost()
            if isinstance(error, Disconnected):
                return None
            raise
        claimed = [(name, found[name]) for name in order if name in found and self._of[name].hold(found[name].id)]
        for name, entry in claimed[1:]:
            await self._of[name].give_back(entry.id, entry.deliveries - 1)
            self._of[name].forget(entry.id)
        if claimed:
            self._order.claimed(claimed[0][0], [])
        return claimed[0] if claimed else None
