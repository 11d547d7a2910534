"""A keyspace in memory, as far as the protocol needs one: streams, a consumer group, hashes, expiry, blocking reads.

It knows nothing of jobs. `memory_streams.py` is built on it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from worker.jobs.keys import START, order_of, worker_key
from worker.jobs.streams import Fields, Record


@dataclass(slots=True)
class Delivery:
    """An entry that a consumer holds."""

    consumer: str
    at_ms: int
    count: int


@dataclass(slots=True)
class Stream:
    """A stream, and the one consumer group that a queue has."""

    entries: dict[str, Fields] = field(default_factory=dict)
    top: str = START
    delivered: str = START
    pending: dict[str, Delivery] = field(default_factory=dict)
    consumers: dict[str, int] = field(default_factory=dict)
    """Name to when it was last seen, ms."""

    def add(self, entry_id: str, fields: Fields) -> str:
        """Refuses an id that is not above all before it, as Redis does."""
        if order_of(entry_id) <= order_of(self.top):
            raise ValueError(f"{entry_id} is not above {self.top}")
        self.entries[entry_id] = dict(fields)
        self.top = entry_id
        return entry_id

    def above(self, after: str) -> list[Record]:
        """The entries after that id."""
        return [(i, f) for i, f in self.entries.items() if order_of(i) > order_of(after)]


class Keyspace:
    """Keys of one process; `clock` gives seconds."""

    reconnects = 0

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._streams: dict[str, Stream] = {}
        self._hashes: dict[str, dict[str, str]] = {}
        self._ends: dict[str, int] = {}
        """Keys with an expiry, ms."""
        self._added = asyncio.Event()

    def keys(self) -> dict[str, int | None]:
        """Every live key, with the ms that it has to live."""
        self._expire()
        now = self._now()
        return {key: self._ends[key] - now if key in self._ends else None for key in [*self._streams, *self._hashes]}

    def drop(self, key: str) -> None:
        """End a key's life, as an expiry does."""
        for kept in (self._streams, self._hashes, self._ends):
            kept.pop(key, None)

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _expire(self) -> None:
        for key in [key for key, end in self._ends.items() if end <= self._now()]:
            self.drop(key)

    def _stream(self, key: str) -> Stream | None:
        self._expire()
        return self._streams.get(key)

    def _hash(self, key: str) -> dict[str, str]:
        self._expire()
        return self._hashes.get(key, {})

    def _add(self, key: str, entry_id: str | None, fields: Fields) -> str:
        stream = self._stream(key) or self._streams.setdefault(key, Stream())
        if entry_id is None:
            ms, seq = order_of(stream.top)
            entry_id = f"{self._now()}-0" if self._now() > ms else f"{ms}-{seq + 1}"
        self._added.set()
        self._added = asyncio.Event()
        return stream.add(entry_id, fields)

    async def _until_added(self, block_ms: int) -> bool:
        try:
            async with asyncio.timeout(block_ms / 1000):
                await self._added.wait()
        except TimeoutError:
            return False
        return True

    async def expire(self, key: str, ttl_ms: int) -> None:
        """Only ever sooner."""
        if key in self._streams or key in self._hashes:
            end = self._now() + ttl_ms
            self._ends[key] = min(end, self._ends.get(key, end))

    async def add(self, key: str, fields: Fields, keep: int, ttl_ms: int | None) -> str:
        """Keeps exactly `keep`."""
        entry_id = self._add(key, None, fields)
        entries = self._streams[key].entries
        for old in list(entries)[:-keep]:
            del entries[old]
        if ttl_ms is not None:
            self._ends[key] = self._now() + ttl_ms
        return entry_id

    async def read(self, key: str, after: str, block_ms: int, count: int = 100) -> list[Record]:
        """Waits for an addition, to any stream, and looks again."""
        until = time.monotonic() + block_ms / 1000
        while True:
            stream = self._stream(key)
            records = stream.above(after)[:count] if stream else []
            left = int((until - time.monotonic()) * 1000)
            if records or left <= 0 or not await self._until_added(left):
                return records

    async def range(self, key: str, first: str, last: str, count: int) -> list[Record]:
        """Both ends included."""
        stream = self._stream(key)
        low = (0, 0) if first == "-" else order_of(first)
        high = (2**64, 0) if last == "+" else order_of(last)
        return [r for r in stream.above(START) if low <= order_of(r[0]) <= high][:count] if stream else []

    async def last_id(self, key: str) -> str:
        """Whether or not that entry is still there."""
        stream = self._stream(key)
        return stream.top if stream else START

    async def delete(self, key: str, entry_id: str) -> bool:
        """The entry alone."""
        stream = self._stream(key)
        return stream is not None and stream.entries.pop(entry_id, None) is not None

    async def put_status(self, worker: str, status: Mapping[str, str], ttl_ms: int) -> None:
        """The hash is the registration."""
        self._hashes[worker_key(worker)] = dict(status)
        self._ends[worker_key(worker)] = self._now() + ttl_ms

    async def drop_status(self, worker: str) -> None:
        """At once."""
        self.drop(worker_key(worker))

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """Those with a live hash."""
        self._expire()
        prefix = worker_key("")
        return {key.removeprefix(prefix): dict(h) for key, h in self._hashes.items() if key.startswith(prefix)}

    async def time_ms(self) -> int:
        """This process's clock."""
        return self._now()

    async def close(self) -> None:
        """Nothing to close."""
