"""Blocking reads of any number of streams over a few connections: one XREAD serves many readers.

A reader that waits in `SharedReads.read` is part of the next XREAD. It is not part of another
before it calls `read` again, so a slow reader holds at most one page and delays no other.

Up to `SLOTS` calls are in flight. A call that blocks cannot be changed, so a new reader needs a
free slot. Therefore calls block for `POLL_MS` only while no slot is free to wait: if all others
block for long, or if another polls and can be merged with this one.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from worker.errors import ServerRefused
from worker.jobs.keys import split_id
from worker.jobs.streams import Record, Streams

SLOTS = 4
BLOCK_MS = 2000
POLL_MS = 20
"""The longest time before the streams of a new reader are read while all other slots are busy."""
MAX_COUNT = 100
"""Entries of one stream in one reply."""
MAX_ENTRIES = 5000
"""Entries of one reply, about."""
MS_PER_READER = 0.5
"""Readers' time-outs are rounded up to this much for each reader, so that they expire together."""


@dataclass(eq=False, slots=True)
class _Waiter:
    """A reader that waits for entries of `key` above `after`, until `deadline` of the loop."""

    key: str
    after: str
    deadline: float
    records: asyncio.Future[Sequence[Record]]


class SharedReads:
    """Reads of one event loop. Errors of a call are raised by all readers that it served."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._pool: list[_Waiter] = []
        """Readers that are in no call."""
        self._slots: set[asyncio.Task[None]] = set()
        self._starting = False
        self._blocking = 0
        self._polling = 0
        self._readers = 0
        self._separate = 0
        """Readers that wait in a call of their own."""
        self._closed = False
        self._together = True
        """False if the server refuses keys of several hash slots in one call."""

    @property
    def readers(self) -> int:
        """Number of readers that wait."""
        return self._readers

    async def read(self, key: str, after: str, block_ms: float) -> Sequence[Record]:
        """Return entries above `after`, waiting up to about `block_ms` for the first.

        Raises RuntimeError after `close`.
        """
        if self._closed:
            raise RuntimeError(_CLOSED)
        if not self._together or self._separate < self._streams.max_separate_reads:
            return await self._read_separately(key, after, block_ms)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(key, after, loop.time() + block_ms / 1000, loop.create_future())
        self._pool.append(waiter)
        self._start_slot()
        self._readers += 1
        try:
            return await waiter.records
        finally:
            self._readers -= 1

    async def _read_separately(self, key: str, after: str, block_ms: float) -> Sequence[Record]:
        self._separate += 1
        self._readers += 1
        try:
            return await self._streams.read(key, after, int(min(block_ms, BLOCK_MS)))
        finally:
            self._separate -= 1
            self._readers -= 1

    async def close(self) -> None:
        """End the calls; readers that wait raise RuntimeError."""
        self._closed = True
        slots = list(self._slots)
        for slot in slots:
            slot.cancel()
        await asyncio.gather(*slots, return_exceptions=True)
        _fail(self._pool, RuntimeError(_CLOSED))

    def _start_slot(self) -> None:
        """Start a slot for the pool, once for all readers that join in this turn of the loop."""
        if not self._starting and len(self._slots) < SLOTS:
            self._starting = True
            self._slots.add(asyncio.create_task(self._run_slot(), name="shared-reads"))

    async def _run_slot(self) -> None:
        self._starting = False
        try:
            while batch := self._take_pool():
                polls = self._blocking >= SLOTS - 1 or self._polling > 0
                await self._serve(batch, POLL_MS if polls else BLOCK_MS)
                if polls and self._polling:
                    return  # that slot takes the pool within POLL_MS, and may then block for long
        finally:
            self._slots.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    async def _serve(self, batch: Sequence[_Waiter], most_ms: float) -> None:
        """Make one call for the batch; several if one of its keys is refused."""
        try:
            replies = await self._call(batch, most_ms)
        except asyncio.CancelledError:
            self._pool += batch
            raise
        except ServerRefused as error:
            if len({waiter.key for waiter in batch}) == 1:
                _fail(batch, error)
            elif error.details.get("reply") == "CROSSSLOT":
                self._together = False
                self._deliver(batch, {}, math.inf)
            else:
                middle = len(batch) // 2
                await self._serve(batch[:middle], 1.0)
                await self._serve(batch[middle:], 1.0)
        except Exception as error:
            _fail(batch, error)
        else:
            self._deliver(batch, replies, asyncio.get_running_loop().time())

    def _take_pool(self) -> list[_Waiter]:
        batch, self._pool = [waiter for waiter in self._pool if not waiter.records.done()], []
        return batch

    async def _call(self, batch: Sequence[_Waiter], most_ms: float) -> dict[str, list[Record]]:
        """Read the streams of a batch. Of several positions in one stream, start at the first."""
        after: dict[str, str] = {}
        for waiter in batch:
            after[waiter.key] = min(after.get(waiter.key, waiter.after), waiter.after, key=split_id)
        left_ms = 1000 * (min(waiter.deadline for waiter in batch) - asyncio.get_running_loop().time())
        block_ms = max(1.0, min(most_ms, max(left_ms, MS_PER_READER * len(batch))))
        count = max(1, min(MAX_COUNT, MAX_ENTRIES // len(after)))
        polls = int(most_ms <= POLL_MS)
        self._polling += polls
        self._blocking += 1 - polls
        try:
            return await self._streams.read_many(after, int(block_ms), count)
        finally:
            self._polling -= polls
            self._blocking -= 1 - polls

    def _deliver(self, batch: Sequence[_Waiter], replies: dict[str, list[Record]], now: float) -> None:
        """Wake readers with entries or a passed deadline; return the others to the pool."""
        for waiter in batch:
            records = replies.get(waiter.key, [])
            if records and split_id(records[0][0]) <= split_id(waiter.after):
                records = [record for record in records if split_id(record[0]) > split_id(waiter.after)]
            if waiter.records.done():
                continue
            if records or waiter.deadline <= now:
                waiter.records.set_result(records)
            else:
                self._pool.append(waiter)


_CLOSED = "the client is closed"


def _fail(waiters: Sequence[_Waiter], error: Exception) -> None:
    for waiter in waiters:
        if not waiter.records.done():
            waiter.records.set_exception(error)
