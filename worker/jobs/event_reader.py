"""A client's reading of event streams: waiting, reconnecting, and what to do if nothing follows.

`reader.py` decides which events are new, `shared_reads.py` reads many streams over few connections.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import ParamSpec, TypeVar

from worker.errors import EventsLost, InvalidRequest, WorkerError
from worker.jobs.events import Event
from worker.jobs.keys import START, events_key, is_entry_id, next_id, split_id
from worker.jobs.payload import JOB_ID, JOB_ID_RULE
from worker.jobs.reader import Cursor, StreamEvent
from worker.jobs.shared_reads import SharedReads
from worker.jobs.streams import Disconnected, Record, Streams, retry_until_connected

P = ParamSpec("P")
T = TypeVar("T")

RECONNECT_TIMEOUT_S = 60.0
"""Exceeds an outage of 30 s, such as a failover or a restart that loads a large file."""
CHECK_MS = 2000
"""A reader without events looks at the job's state this often."""
CHECK_MS_PER_READER = 5
MAX_CHECK_MS = 20_000


class EventReader:
    """Reads streams for one client; an interrupted read is retried for `reconnect_timeout_s`."""

    def __init__(
        self, streams: Streams, is_queued: Callable[[str], Awaitable[bool]], reconnect_timeout_s: float
    ) -> None:
        self._streams = streams
        self._reads = SharedReads(streams)
        self._is_queued = is_queued
        self._reconnect_timeout_s = reconnect_timeout_s

    async def close(self) -> None:
        """End the reads: readers raise RuntimeError."""
        await self._reads.close()

    async def read(self, key: str, after: str, block_ms: float = CHECK_MS) -> Sequence[Record]:
        """Return entries above `after`, waiting up to `block_ms`. Raises Disconnected."""
        return await self._retry(self._reads.read, key, after, block_ms)

    async def pages(
        self, job_id: str, after: str, idle_s: float | None, next_i: int | None
    ) -> AsyncGenerator[list[StreamEvent], None]:
        """Yield what `Client.events` yields, in lists that are not empty."""
        check_position(job_id, after)
        idle_since, cursor = time.monotonic(), Cursor(after, next_i)
        if after != START and await self._is_over(job_id, cursor, terminal_seen=True):
            return
        while True:
            records = await self.read(events_key(job_id), cursor.after, self._block_ms(idle_s))
            page, error = _advance(cursor, records)
            if page:
                yield page
                if isinstance(page[-1].event, Event) and page[-1].event.terminal:
                    return
            if error is not None:
                raise error
            if records:
                idle_since = time.monotonic()
                continue
            position = cursor.after
            await self._is_over(job_id, cursor)
            if cursor.after == position and idle_s is not None and time.monotonic() - idle_since >= idle_s:
                raise TimeoutError(f"no event of job {job_id} for {idle_s} s")

    def _block_ms(self, idle_s: float | None) -> float:
        """Time until the job's state is looked at: longer and spread for many readers."""
        shared = CHECK_MS_PER_READER * self._reads.readers * random.uniform(0.75, 1.25)
        block_ms = min(max(CHECK_MS, shared), MAX_CHECK_MS)
        return block_ms if idle_s is None else min(block_ms, idle_s * 1000)

    async def _is_over(self, job_id: str, cursor: Cursor, *, terminal_seen: bool = False) -> bool:
        """Whether the job ended at or below the cursor, which only a resuming reader may accept.

        Rewinds the cursor if the server lost events that the reader received. A terminal event at
        or below the cursor counts as lost, unless `terminal_seen`.

        Raises:
            EventsLost: the terminal event will not follow: the job's keys or entries are gone.
        """
        state = await self._retry(self._streams.job_state, job_id)
        ended, tokens = "ended_ms" in state.fields, int(state.fields.get("tokens") or 0)
        if split_id(state.last_id) > split_id(cursor.after):
            if ended and not terminal_seen and not await self._has_entry(job_id, cursor.after):
                raise _lost(job_id)
            return False
        if not state.fields:
            if cursor.has_begun and not await self._is_queued(job_id):
                raise _lost(job_id)
            return False
        cut = split_id(state.last_id) < split_id(cursor.after)
        lost = cut or cursor.is_behind(tokens) or (ended and not terminal_seen)
        if (lost and cursor.rewind()) or not ended:
            return False
        if not terminal_seen:
            raise _lost(job_id)
        return True

    async def _has_entry(self, job_id: str, after: str) -> bool:
        return bool(await self._retry(self._streams.range, events_key(job_id), next_id(after), "+", 1))

    async def _retry(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Repeat the call while the server is not reachable, for a limited time."""
        try:
            return await call(*args, **kwargs)
        except Disconnected as error:
            first = error
        try:
            async with asyncio.timeout(self._reconnect_timeout_s):
                return await retry_until_connected(call, *args, **kwargs)
        except TimeoutError:
            raise Disconnected(f"{first}, for {self._reconnect_timeout_s:g} s", first.reply) from None


def check_position(job_id: str, after: str = START) -> None:
    """Raise InvalidRequest for a malformed job id or entry id."""
    if not JOB_ID.fullmatch(job_id):
        raise InvalidRequest.of(("job_id", JOB_ID_RULE, job_id[:128]))
    if not is_entry_id(after):
        raise InvalidRequest.of(("after", "an entry id, such as 1-5", after[:128]))


def _lost(job_id: str) -> EventsLost:
    return EventsLost(f"the events of job {job_id} have expired or were deleted before its last one was read")


def _advance(cursor: Cursor, records: Sequence[Record]) -> tuple[list[StreamEvent], WorkerError | None]:
    """Pass entries to the cursor: the new events, and the error after them, if any."""
    page: list[StreamEvent] = []
    try:
        for record in records:
            unseen = cursor.advance(record)
            if unseen is None:
                break
            page += unseen
    except WorkerError as error:
        return page, error
    return page, None
