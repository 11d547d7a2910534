"""Seam 1: what a server of job streams offers, each method atomic, in one slot, and safe to repeat.

Two sides stand behind it: `redis_streams.py` with its Lua scripts, and `memory_streams.py`, which is their definition
in plain Python. The protocol that a worker speaks over it is `transport.py`'s, an orchestrator's `client.py`'s.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, Protocol, TypeVar

from worker.jobs.keys import START, epoch_of

P = ParamSpec("P")
T = TypeVar("T")

FIRST_PAUSE_S = 0.05

Fields = Mapping[str, bytes]
Record = tuple[str, Fields]
"""One entry of any stream: its id and fields."""


class Disconnected(ConnectionError):
    """The server can't be reached, or its reply was lost: what was asked may have been done. Ask again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A queue entry that was delivered to a consumer. Without fields it was deleted since."""

    id: str
    fields: Fields
    deliveries: int


@dataclass(frozen=True, slots=True)
class Written:
    """An event as the stream holds it: plain type and msgpack."""

    kind: str
    packed: bytes


@dataclass(frozen=True, slots=True)
class TakeCall:
    """What `take` is asked: write `opening` as `<epoch>-0` if the stream's top is still `expected`.

    In place of `opening` it writes `cancelled` where a cancel was requested, and `poisoned` after `max_barren` attempts
    that ended without a give-back and without one new token, or more than `max_deliveries` deliveries.
    """

    entry_id: str
    worker: str
    expected: str
    epoch: int
    opening: Written
    opening_code: str
    """The error code if `opening` is the terminal error, else empty."""
    cancelled: Written
    poisoned: Written
    deliveries: int
    max_deliveries: int
    max_barren: int
    now_ms: int
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class TakeReply:
    """How it went.

    TAKEN: the epoch is the caller's. RETRY: the top or the epoch is another; nothing was written. DUPLICATE: the job
    belongs to another queue entry. CLOSED: a terminal error of this `code` was written. OVER: the stream had its
    terminal event before; `code` says which error, if any, and `entry_id` which queue entry it was bound to, if any.
    """

    outcome: str
    code: str = ""
    entry_id: str = ""


@dataclass(frozen=True, slots=True)
class AppendCall:
    """What `append` is asked: write `events`, all or none, if the stream exists and its top is `expected`."""

    expected: str
    epoch: int
    worker: str
    state: str
    """`running`, `handed_back`, or the type of the terminal event."""
    tokens: int
    """Published after this batch."""
    code: str
    """The last error's code, or empty."""
    events: Sequence[tuple[str, Written]]
    """With their ids, `<epoch>-<seq>`."""
    now_ms: int
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class CancelCall:
    """What `cancel` is asked: flag a running job; else end it with `event` as `<epoch>-0` if `expected` is the top."""

    expected: str
    epoch: int
    event: Written
    now_ms: int
    ttl_ms: int


@dataclass(frozen=True, slots=True)
class Pending:
    """A delivered entry and who holds it."""

    entry_id: str
    consumer: str
    idle_ms: int
    deliveries: int


@dataclass(frozen=True, slots=True)
class JobState:
    """The job's hash and its stream's top, as last seen; empty for an unknown job."""

    top: str = START
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def next_epoch(self) -> int:
        """One above the state's and the stream's."""
        return max(int(self.fields.get("epoch", 0)), epoch_of(self.top)) + 1


class Streams(Protocol):
    """Every method may raise Disconnected; asking again is harmless. Times are ms."""

    @property
    def reconnects(self) -> int:
        """How often a connection was lost and made again: each time, replies may have been lost."""
        ...

    async def open_queue(self, queue: str) -> None:
        """Make the stream and its group, from id 0, unless they are there."""
        ...

    async def enqueue(self, queue: str, fields: Fields, bound: int) -> str | None:
        """Add an entry unless the queue holds `bound`; its id, or None. Not safe to repeat: the job id is the guard."""
        ...

    async def read_new(self, queue: str, consumer: str, block_ms: int) -> Entry | None:
        """The next entry that nobody had, waiting for at most block_ms."""
        ...

    async def read_own(self, queue: str, consumer: str, above: str) -> Entry | None:
        """The consumer's own next pending entry above that id; neither its idle time nor its deliveries change."""
        ...

    async def reclaim(self, queue: str, consumer: str, min_idle_ms: int, cursor: str) -> tuple[str, Entry | None]:
        """Look at one page of pending entries and take over at most one that was idle so long; the next cursor."""
        ...

    async def renew(self, queue: str, consumer: str, entry_id: str) -> bool:
        """Restart the entry's idle time if it is pending for `consumer`; else False, and nothing changes."""
        ...

    async def give_back(self, queue: str, consumer: str, entry_id: str, idle_ms: int, deliveries: int) -> bool:
        """Make the consumer's entry look idle for `idle_ms` and delivered `deliveries` times; guarded as `renew`."""
        ...

    async def settle(self, queue: str, entry_id: str, dead: Fields | None) -> bool:
        """Acknowledge; the first time, add `dead` to the dead letters, if given, and delete the entry."""
        ...

    async def remove_consumers(self, queue: str, name: str | None, min_idle_ms: int) -> int:
        """Delete the consumers, or the one of that name, unseen for so long and with nothing pending; how many.

        A consumer with pending entries stays: its entries would be lost.
        """
        ...

    async def pending(self, queue: str, count: int) -> list[Pending]:
        """The first `count` delivered entries."""
        ...

    async def job_state(self, job_id: str) -> JobState:
        """Its stream's top and its state, of one moment."""
        ...

    async def take(self, job_id: str, call: TakeCall) -> TakeReply:
        """Begin an epoch."""
        ...

    async def append(self, job_id: str, call: AppendCall) -> str:
        """The top after the call: the last new id if all was written; START where the stream is not the caller's."""
        ...

    async def cancel(self, job_id: str, call: CancelCall) -> str:
        """CANCELLED (it is over as cancelled), REQUESTED (running), OVER (it ended otherwise) or RETRY."""
        ...

    async def expire(self, key: str, ttl_ms: int) -> None:
        """Let a key live for at most ttl_ms from now; a key that is gone stays gone."""
        ...

    async def add(self, key: str, fields: Fields, keep: int, ttl_ms: int | None) -> str:
        """Add to a stream that keeps about its `keep` newest entries, not to a job's or a queue."""
        ...

    async def read(self, key: str, after: str, block_ms: int, count: int = 100) -> list[Record]:
        """Entries above `after`, waiting for the first for at most block_ms."""
        ...

    async def range(self, key: str, first: str, last: str, count: int) -> list[Record]:
        """Entries from `first` to `last`, both included; `-` and `+` are the ends."""
        ...

    async def last_id(self, key: str) -> str:
        """The newest id that the stream has generated."""
        ...

    async def delete(self, key: str, entry_id: str) -> bool:
        """Delete one entry."""
        ...

    async def put_status(self, worker: str, status: Mapping[str, str], ttl_ms: int) -> None:
        """Register the worker and write its status hash, which ends after ttl_ms without another."""
        ...

    async def drop_status(self, worker: str) -> None:
        """Unregister the worker."""
        ...

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """The registered workers whose status lives, by name."""
        ...

    async def time_ms(self) -> int:
        """The server's clock."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


async def retry_until_connected(ask: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Ask until there is an answer, with growing pauses up to a second. Each call must be safe to repeat."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await ask(*args, **kwargs)
        except Disconnected:
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(1.0, 2 * pause_s)
