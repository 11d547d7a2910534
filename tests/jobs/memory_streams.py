"""`Streams` in memory: one process, no server. The definition of what each Lua script does.

No method awaits between reading and writing: each is atomic, as a script is. `Keyspace` has
streams, hashes, expiry and blocking reads; `MemoryStreams` adds jobs. The calls are documented in
`worker/jobs/streams.py`, and the same tests run over this implementation and over Redis.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker.jobs.events import TERMINAL_KINDS
from worker.jobs.keys import START, dead_key, events_key, next_id, queue_key, split_id, state_key, worker_key
from worker.jobs.streams import (
    STATUS_TTL_MS,
    AppendCall,
    CancelCall,
    Contact,
    Entry,
    Fields,
    JobState,
    Ownership,
    PendingEntry,
    QueueDepth,
    QueueOverview,
    Record,
    TakeCall,
    TakeReply,
)


@dataclass(slots=True)
class Delivery:
    """A pending entry: its consumer, when it was delivered last, and how often."""

    consumer: str
    at_ms: int
    count: int


@dataclass(slots=True)
class Stream:
    """A stream, with the one consumer group that a queue has."""

    entries: dict[str, Fields] = field(default_factory=dict)
    last_id: str = START
    delivered: str = START
    pending: dict[str, Delivery] = field(default_factory=dict)
    consumers: dict[str, int] = field(default_factory=dict)
    """Time of the last command of each consumer, ms."""

    def add(self, entry_id: str, fields: Fields) -> str:
        """XADD with an explicit id, which must be above the last one."""
        if split_id(entry_id) <= split_id(self.last_id):
            raise ValueError(f"{entry_id} is not above {self.last_id}")
        self.entries[entry_id] = dict(fields)
        self.last_id = entry_id
        return entry_id

    def above(self, after: str) -> list[Record]:
        """The entries above that id."""
        return [(i, f) for i, f in self.entries.items() if split_id(i) > split_id(after)]

    def pending_rows(self) -> list[tuple[str, Delivery]]:
        """Pending entries in the order of their ids."""
        return sorted(self.pending.items(), key=lambda row: split_id(row[0]))


class Keyspace:
    """Streams and hashes of one process; `clock` returns seconds."""

    reconnects = 0
    max_separate_reads = 0

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.contact = Contact()
        self._clock = clock
        self._streams: dict[str, Stream] = {}
        self._hashes: dict[str, dict[str, str]] = {}
        self._expiry_ms: dict[str, int] = {}
        """Keys that expire, and when."""
        self._added = asyncio.Event()

    def keys(self) -> dict[str, int | None]:
        """Every key with its time to live in ms, None if it does not expire."""
        self._expire()
        now = self._now()
        return {
            key: self._expiry_ms[key] - now if key in self._expiry_ms else None
            for key in [*self._streams, *self._hashes]
        }

    def drop(self, key: str) -> None:
        """Delete a key, as its expiry does."""
        for table in (self._streams, self._hashes, self._expiry_ms):
            table.pop(key, None)

    def _now(self) -> int:
        return int(self._clock() * 1000)

    def _expire(self) -> None:
        for key in [key for key, at_ms in self._expiry_ms.items() if at_ms <= self._now()]:
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
            entry_id = f"{self._now()}-0" if self._now() > split_id(stream.last_id)[0] else next_id(stream.last_id)
        self._added.set()
        self._added = asyncio.Event()
        return stream.add(entry_id, fields)

    async def _wait_for_add(self, block_ms: int) -> bool:
        try:
            async with asyncio.timeout(block_ms / 1000):
                await self._added.wait()
        except TimeoutError:
            return False
        return True

    async def add(self, key: str, fields: Fields, keep: int, ttl_ms: int | None) -> str:
        entry_id = self._add(key, None, fields)
        entries = self._streams[key].entries
        for old in list(entries)[:-keep]:
            del entries[old]
        if ttl_ms is not None:
            self._expiry_ms[key] = self._now() + ttl_ms
        return entry_id

    async def read(self, key: str, after: str, block_ms: int, count: int = 100) -> list[Record]:
        until = time.monotonic() + block_ms / 1000
        while True:
            stream = self._stream(key)
            records = stream.above(after)[:count] if stream else []
            left = int((until - time.monotonic()) * 1000)
            if records or left <= 0 or not await self._wait_for_add(left):
                return records

    async def read_many(self, after: Mapping[str, str], block_ms: int, count: int) -> dict[str, list[Record]]:
        until = time.monotonic() + block_ms / 1000
        while True:
            streams = {key: self._stream(key) for key in after}
            found = {key: stream.above(after[key])[:count] for key, stream in streams.items() if stream}
            records = {key: entries for key, entries in found.items() if entries}
            left = int((until - time.monotonic()) * 1000)
            if records or left <= 0 or not await self._wait_for_add(left):
                return records

    async def depth(self, queue: str, lease_ms: int) -> QueueDepth:
        """`depth.lua`."""
        stream = self._stream(queue_key(queue)) or Stream()
        running = {i for i, delivery in stream.pending.items() if self._now() - delivery.at_ms < lease_ms}
        waiting = [split_id(i)[0] for i in stream.entries if i not in running]
        oldest_ms = min(waiting, default=self._now())
        dead = await self.length(dead_key(queue))
        return QueueDepth(len(waiting), len(running), max(0, self._now() - oldest_ms), dead)

    async def length(self, key: str) -> int:
        stream = self._stream(key)
        return len(stream.entries) if stream else 0

    async def range(self, key: str, first: str, last: str, count: int) -> list[Record]:
        stream = self._stream(key)
        low = (0, 0) if first == "-" else split_id(first)
        high = (2**64, 0) if last == "+" else split_id(last)
        return [r for r in stream.above(START) if low <= split_id(r[0]) <= high][:count] if stream else []

    async def last_id(self, key: str) -> str:
        stream = self._stream(key)
        return stream.last_id if stream else START

    async def delete(self, key: str, entry_id: str) -> bool:
        stream = self._stream(key)
        return stream is not None and stream.entries.pop(entry_id, None) is not None

    async def put_status(self, worker: str, status: Mapping[str, str], ttl_ms: int) -> None:
        """Write the hash, which is the registration as well."""
        self._hashes[worker_key(worker)] = dict(status)
        self._expiry_ms[worker_key(worker)] = self._now() + ttl_ms

    async def check_writes(self) -> None:
        pass

    async def drop_status(self, worker: str) -> None:
        self.drop(worker_key(worker))

    async def workers(self) -> dict[str, Mapping[str, str]]:
        """A time to live above STATUS_TTL_MS is a dead worker's: the clock went back."""
        self._expire()
        prefix, until_ms = worker_key(""), self._now() + STATUS_TTL_MS
        keys = [key for key in self._hashes if key.startswith(prefix) and self._expiry_ms[key] <= until_ms]
        return {key.removeprefix(prefix): dict(self._hashes[key]) for key in keys}

    async def time_ms(self) -> int:
        return self._now()

    async def close(self) -> None:
        pass


class MemoryStreams(Keyspace):
    """`Streams` over a keyspace of this process."""

    async def open_queue(self, queue: str) -> None:
        self._streams.setdefault(queue_key(queue), Stream())

    async def enqueue(self, queue: str, fields: Fields, bound: int) -> str | None:
        stream = self._stream(queue_key(queue))
        if stream is not None and len(stream.entries) >= bound:
            return None
        return self._add(queue_key(queue), None, fields)

    async def find(self, queue: str, job_id: str, first: str, count: int) -> tuple[str | None, list[Record]]:
        """`find.lua`."""
        page = await self.range(queue_key(queue), first, "+", count)
        found = [(entry_id, fields) for entry_id, fields in page if job_id.encode() in fields.get("p", b"")]
        return next_id(page[-1][0]) if len(page) == count else None, found

    async def position(self, queue: str, text: str, count: int) -> tuple[int, int] | None:
        """`position.lua`."""
        stream = self._stream(queue_key(queue)) or Stream()
        entries = await self.range(queue_key(queue), "-", "+", count)
        waiting = [entry_id for entry_id, _ in entries if entry_id not in stream.pending]
        for entry_id, fields in entries:
            if text.encode() in fields.get("p", b""):
                total = len(await self.range(queue_key(queue), "-", "+", 1_000_000)) - len(stream.pending)
                return (waiting.index(entry_id) + 1, total) if entry_id in waiting else None
        return None

    async def overview(self, queue: str, lease_ms: int, above: str | None, limit: int) -> QueueOverview:
        """`overview.lua`, without its bound on bytes."""
        stream = self._stream(queue_key(queue)) or Stream()
        overdue = [i for i, delivery in stream.pending_rows() if self._now() - delivery.at_ms >= lease_ms]
        waiting = overdue + [i for i, _ in stream.above(stream.delivered)]
        return QueueOverview(
            now_ms=self._now(),
            length=len(stream.entries),
            delivered=stream.delivered,
            pending_count=len(stream.pending),
            running=len(stream.pending) - len(overdue),
            pending=await self.pending(queue, limit),
            first_waiting=next((i for i in waiting if i in stream.entries), ""),
            entries=[(i, fields.get("p", b"")) for i, fields in stream.above(above)[:limit]] if above else [],
        )

    async def read_new(self, queues: Sequence[str], consumer: str, block_ms: int) -> dict[str, Entry]:
        until = time.monotonic() + block_ms / 1000
        while True:
            found = {queue: entry for queue in queues if (entry := self._deliver(queue, consumer))}
            left = int((until - time.monotonic()) * 1000)
            if found or left <= 0 or not await self._wait_for_add(left):
                return found

    def _deliver(self, queue: str, consumer: str) -> Entry | None:
        stream = self._used_by(queue, consumer)
        for entry_id, fields in stream.above(stream.delivered):
            stream.delivered = entry_id
            stream.pending[entry_id] = Delivery(consumer, self._now(), 1)
            return Entry(entry_id, fields, 1)
        return None

    def _used_by(self, queue: str, consumer: str) -> Stream:
        stream = self._stream(queue_key(queue)) or self._streams.setdefault(queue_key(queue), Stream())
        stream.consumers[consumer] = self._now()
        return stream

    async def read_own(self, queue: str, consumer: str, above: str) -> Entry | None:
        stream = self._used_by(queue, consumer)
        for entry_id, delivery in stream.pending_rows():
            if split_id(entry_id) > split_id(above) and delivery.consumer == consumer:
                return Entry(entry_id, stream.entries.get(entry_id, {}), delivery.count)
        return None

    async def reclaim(self, queue: str, consumer: str, row: PendingEntry) -> Entry | None:
        """`reclaim.lua`, line by line."""
        stream = self._used_by(queue, consumer)
        delivery = stream.pending.get(row.entry_id)
        if delivery is None or (delivery.consumer, delivery.count) != (row.consumer, row.deliveries):
            return None
        if self._idle(delivery) < row.idle_ms:
            return None
        if row.entry_id not in stream.entries:
            del stream.pending[row.entry_id]
            return None
        stream.pending[row.entry_id] = Delivery(consumer, self._now(), delivery.count + 1)
        return Entry(row.entry_id, stream.entries[row.entry_id], delivery.count + 1)

    def _idle(self, delivery: Delivery) -> int:
        return max(0, self._now() - delivery.at_ms)

    async def renew(self, queue: str, consumer: str, entry_id: str) -> Ownership:
        """`renew.lua`, line by line."""
        stream = self._stream(queue_key(queue))
        if stream is None:
            return "deleted"
        delivery = stream.pending.get(entry_id)
        if delivery is not None and delivery.consumer != consumer:
            return "lost"
        if entry_id not in stream.entries:
            stream.pending.pop(entry_id, None)
            return "deleted"
        if delivery is None and split_id(entry_id) > split_id(stream.delivered):
            return "lost"
        count = delivery.count if delivery else 1
        stream.pending[entry_id] = Delivery(consumer, self._now(), count)
        stream.consumers[consumer] = self._now()
        return "held"

    async def renew_many(
        self, consumer: str, calls: Sequence[tuple[str, str, str | None]]
    ) -> list[tuple[Ownership, bool] | None]:
        results: list[tuple[Ownership, bool] | None] = []
        for queue, entry_id, job_id in calls:
            ownership = await self.renew(queue, consumer, entry_id)
            results.append((ownership, job_id is not None and "cancel" in (await self.job_state(job_id)).fields))
        return results

    async def give_back(self, queue: str, consumer: str, entry_id: str, idle_ms: int, deliveries: int) -> bool:
        if await self.renew(queue, consumer, entry_id) != "held":
            return False
        self._streams[queue_key(queue)].pending[entry_id] = Delivery(consumer, self._now() - idle_ms, deliveries)
        return True

    async def settle(self, queue: str, entry_id: str, dead: Fields | None, job_id: str | None = None) -> bool:
        """`state.lua` and `settle.lua`."""
        state = self._hash(state_key(job_id)) if job_id is not None else {"state": "end"}
        if state.get("state") not in TERMINAL_KINDS and state.get("entry", entry_id) == entry_id:
            return False
        stream = self._stream(queue_key(queue))
        if stream is None:
            return True
        pending = stream.pending.pop(entry_id, None) is not None
        if dead and pending:
            self._add(dead_key(queue), None, dead)
        if pending or split_id(entry_id) <= split_id(stream.delivered):
            stream.entries.pop(entry_id, None)
        return True

    async def remove_consumers(self, queue: str, name: str | None, min_idle_ms: int) -> int:
        stream = self._stream(queue_key(queue)) or Stream()
        busy = {delivery.consumer for delivery in stream.pending.values()}
        idle = {n for n, seen in stream.consumers.items() if self._now() - seen >= min_idle_ms and name in (None, n)}
        for each in idle - busy:
            del stream.consumers[each]
        return len(idle - busy)

    async def pending(self, queue: str, count: int) -> list[PendingEntry]:
        stream = self._stream(queue_key(queue)) or Stream()
        idle = [(entry_id, delivery, self._idle(delivery)) for entry_id, delivery in stream.pending_rows()[:count]]
        return [PendingEntry(i, d.consumer, idle_ms, d.count, self._now() - idle_ms) for i, d, idle_ms in idle]

    async def expire_job(self, job_id: str, ttl_ms: int) -> None:
        at_ms = self._now() + ttl_ms
        for key in (events_key(job_id), state_key(job_id)):
            if key in self._streams or key in self._hashes:
                self._expiry_ms[key] = min(at_ms, self._expiry_ms.get(key, at_ms))

    async def job_state(self, job_id: str) -> JobState:
        return JobState(await self.last_id(events_key(job_id)), dict(self._hash(state_key(job_id))))

    async def take(self, job_id: str, call: TakeCall) -> TakeReply:
        """`take.lua`, line by line."""
        now = await self.job_state(job_id)
        state = now.fields
        if state.get("state") in TERMINAL_KINDS:
            return TakeReply("OVER", state.get("error", ""), state.get("entry", ""))
        if state.get("entry", call.entry_id) != call.entry_id:
            return TakeReply("DUPLICATE", "", state["entry"])
        call_of = (state.get("worker"), state.get("taken_ms"), state.get("base"))
        if call_of == (call.worker, str(call.now_ms), call.expected) and now.last_id == f"{call.epoch}-0":
            return TakeReply("TAKEN")
        if now.last_id != call.expected or now.attempt != call.last_attempt or now.next_epoch != call.epoch:
            return TakeReply("RETRY")
        tokens, barren = state.get("tokens", "0"), int(state.get("barren", 0))
        if state.get("state") == "running" and tokens == state.get("tokens_before"):
            barren += 1
        event, code = call.opening, call.opening_code
        if "cancel" in state:
            event, code = call.cancelled, "CANCELLED"
        elif barren >= call.max_attempts or call.deliveries > call.max_deliveries:
            event, code = call.poisoned, "DEAD_LETTERED"
        self._add(events_key(job_id), f"{call.epoch}-0", {"type": event.kind.encode(), "p": event.packed})
        fields: dict[str, str | int] = {
            "state": event.kind if code else "running",
            "epoch": call.epoch,
            "worker": call.worker,
        }
        fields |= {"entry": call.entry_id, "base": call.expected, "tokens": tokens, "tokens_before": tokens}
        fields |= {"barren": barren, "taken_ms": call.now_ms, "updated_ms": call.now_ms}
        self._put(job_id, call.ttl_ms, fields | ({"error": code, "ended_ms": call.now_ms} if code else {}))
        return TakeReply("CLOSED" if code else "TAKEN", code)

    def _put(self, job_id: str, ttl_ms: int, fields: Mapping[str, str | int]) -> None:
        state = self._hashes.setdefault(state_key(job_id), {})
        state.update((name, str(value)) for name, value in fields.items())
        self._expiry_ms[state_key(job_id)] = self._expiry_ms[events_key(job_id)] = self._now() + ttl_ms

    async def append(self, job_id: str, call: AppendCall) -> str:
        """`append.lua`, line by line."""
        stream = self._stream(events_key(job_id))
        state = self._hash(state_key(job_id))
        owner, caller = (state.get("worker"), state.get("taken_ms")), (call.worker, str(call.taken_ms))
        if stream is None or (state.get("epoch") == str(call.epoch) and owner != caller):
            return START
        if stream.last_id != call.expected:
            return stream.last_id
        if call.base_attempt not in ("", JobState(fields=state).attempt):
            return START
        for entry_id, event in call.events:
            self._add(events_key(job_id), entry_id, {"type": event.kind.encode(), "p": event.packed})
        over = call.state in TERMINAL_KINDS
        fields: dict[str, str | int] = {
            "epoch": call.epoch,
            "worker": call.worker,
            "taken_ms": call.taken_ms,
            "state": call.state,
            "tokens": call.tokens,
        }
        fields |= {"updated_ms": call.now_ms} | ({"ended_ms": call.now_ms} if over else {})
        fields |= {"error" if over else "last_error": call.code} if call.code else {}
        self._put(job_id, call.ttl_ms, fields)
        return stream.last_id

    async def append_many(self, calls: Sequence[tuple[str, AppendCall]]) -> list[str | None]:
        return [await self.append(job_id, call) for job_id, call in calls]

    async def cancel(self, job_id: str, call: CancelCall) -> str:
        """`cancel.lua`, line by line."""
        now = await self.job_state(job_id)
        if now.fields.get("state") in TERMINAL_KINDS:
            return "CANCELLED" if now.fields.get("error") == "CANCELLED" else "OVER"
        if now.fields.get("state") == "running":
            self._hashes[state_key(job_id)]["cancel"] = str(call.now_ms)
            return "REQUESTED"
        if now.last_id != call.expected or now.next_epoch != call.epoch:
            return "RETRY"
        self._add(events_key(job_id), f"{call.epoch}-0", {"type": call.event.kind.encode(), "p": call.event.packed})
        fields: dict[str, str | int] = {"state": call.event.kind, "error": "CANCELLED", "epoch": call.epoch}
        self._put(job_id, call.ttl_ms, fields | {"cancel": call.now_ms, "ended_ms": call.now_ms})
        return "CANCELLED"
