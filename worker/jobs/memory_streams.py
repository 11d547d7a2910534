"""The in-memory side of seam 1: one process, no server. It is the definition of what each Lua script does.

Nothing here awaits between reading and writing, so each method is atomic as a script is. The keys and streams below it
are `memory_keyspace.py`'s; what the calls mean is in `streams.py`. The same tests run over this side and over Redis.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from worker.jobs.events import TERMINAL_KINDS
from worker.jobs.keys import START, dead_key, events_key, order_of, queue_key, state_key
from worker.jobs.memory_keyspace import Delivery, Keyspace, Stream
from worker.jobs.streams import AppendCall, CancelCall, Entry, Fields, JobState, Pending, TakeCall, TakeReply


class MemoryStreams(Keyspace):
    """`Streams` over a keyspace of this process."""

    async def open_queue(self, queue: str) -> None:
        """The group is part of the stream here."""
        self._streams.setdefault(queue_key(queue), Stream())

    async def enqueue(self, queue: str, fields: Fields, bound: int) -> str | None:
        """Length and addition in one step."""
        stream = self._stream(queue_key(queue))
        if stream is not None and len(stream.entries) >= bound:
            return None
        return self._add(queue_key(queue), None, fields)

    async def read_new(self, queue: str, consumer: str, block_ms: int) -> Entry | None:
        """The first entry above the group's last delivered one."""
        until = time.monotonic() + block_ms / 1000
        while True:
            stream = self._seen(queue, consumer)
            for entry_id, fields in stream.above(stream.delivered):
                stream.delivered = entry_id
                stream.pending[entry_id] = Delivery(consumer, self._now(), 1)
                return Entry(entry_id, fields, 1)
            left = int((until - time.monotonic()) * 1000)
            if left <= 0 or not await self._until_added(left):
                return None

    def _seen(self, queue: str, consumer: str) -> Stream:
        stream = self._stream(queue_key(queue)) or self._streams.setdefault(queue_key(queue), Stream())
        stream.consumers[consumer] = self._now()
        return stream

    async def read_own(self, queue: str, consumer: str, above: str) -> Entry | None:
        """A look at what is pending."""
        stream = self._seen(queue, consumer)
        for entry_id, delivery in sorted(stream.pending.items(), key=lambda row: order_of(row[0])):
            if order_of(entry_id) > order_of(above) and delivery.consumer == consumer:
                return Entry(entry_id, stream.entries.get(entry_id, {}), delivery.count)
        return None

    def _deliver(self, stream: Stream, entry_id: str, consumer: str) -> Entry:
        count = stream.pending[entry_id].count + 1
        stream.pending[entry_id] = Delivery(consumer, self._now(), count)
        return Entry(entry_id, stream.entries.get(entry_id, {}), count)

    async def reclaim(self, queue: str, consumer: str, min_idle_ms: int, cursor: str) -> tuple[str, Entry | None]:
        """All pending entries are one page; a deleted entry is forgotten."""
        stream = self._seen(queue, consumer)
        for entry_id in sorted(stream.pending, key=order_of):
            idle = self._now() - stream.pending[entry_id].at_ms
            if order_of(entry_id) < order_of(cursor) or idle < min_idle_ms:
                continue
            if entry_id not in stream.entries:
                del stream.pending[entry_id]
                continue
            ms, seq = order_of(entry_id)
            return f"{ms}-{seq + 1}", self._deliver(stream, entry_id, consumer)
        return START, None

    async def renew(self, queue: str, consumer: str, entry_id: str) -> bool:
        """The idle time starts again; the count stays."""
        stream = self._stream(queue_key(queue))
        delivery = stream.pending.get(entry_id) if stream else None
        if stream is None or delivery is None or delivery.consumer != consumer or entry_id not in stream.entries:
            return False
        delivery.at_ms = stream.consumers[consumer] = self._now()
        return True

    async def give_back(self, queue: str, consumer: str, entry_id: str, idle_ms: int, deliveries: int) -> bool:
        """As `renew`, then as if it had been idle."""
        if not await self.renew(queue, consumer, entry_id):
            return False
        self._streams[queue_key(queue)].pending[entry_id] = Delivery(consumer, self._now() - idle_ms, deliveries)
        return True

    async def settle(self, queue: str, entry_id: str, dead: Fields | None) -> bool:
        """Only the call that acknowledges does the rest."""
        stream = self._stream(queue_key(queue))
        if stream is None or stream.pending.pop(entry_id, None) is None:
            return False
        if dead:
            self._add(dead_key(queue), None, dead)
        stream.entries.pop(entry_id, None)
        return True

    async def remove_consumers(self, queue: str, name: str | None, min_idle_ms: int) -> int:
        """Those that hold nothing."""
        stream = self._stream(queue_key(queue)) or Stream()
        held = {delivery.consumer for delivery in stream.pending.values()}
        idle = {n for n, seen in stream.consumers.items() if self._now() - seen >= min_idle_ms and name in (None, n)}
        for each in idle - held:
            del stream.consumers[each]
        return len(idle - held)

    async def pending(self, queue: str, count: int) -> list[Pending]:
        """In the order of their ids."""
        stream = self._stream(queue_key(queue)) or Stream()
        rows = sorted(stream.pending.items(), key=lambda row: order_of(row[0]))
        return [Pending(i, d.consumer, self._now() - d.at_ms, d.count) for i, d in rows[:count]]

    async def job_state(self, job_id: str) -> JobState:
        """A copy."""
        return JobState(await self.last_id(events_key(job_id)), dict(self._hash(state_key(job_id))))

    async def take(self, job_id: str, call: TakeCall) -> TakeReply:
        """`take.lua`, line by line."""
        now = await self.job_state(job_id)
        state = now.fields
        if state.get("state") in TERMINAL_KINDS:
            return TakeReply("OVER", state.get("error", ""), state.get("entry", ""))
        if state.get("entry", call.entry_id) != call.entry_id:
            return TakeReply("DUPLICATE", "", state["entry"])
        mine = (state.get("worker"), state.get("base")) == (call.worker, call.expected)
        if mine and now.top == f"{call.epoch}-0":
            return TakeReply("TAKEN")
        if now.top != call.expected or now.next_epoch != call.epoch:
            return TakeReply("RETRY")
        tokens, barren = state.get("tokens", "0"), int(state.get("barren", 0))
        if state.get("state") == "running" and tokens == state.get("tokens_before"):
            barren += 1
        event, code = call.opening, call.opening_code
        if "cancel" in state:
            event, code = call.cancelled, "CANCELLED"
        elif barren >= call.max_barren or call.deliveries > call.max_deliveries:
            event, code = call.poisoned, "DEAD_LETTERED"
        self._add(events_key(job_id), f"{call.epoch}-0", {"type": event.kind.encode(), "p": event.packed})
        written: dict[str, str | int] = {
            "state": event.kind if code else "running",
            "epoch": call.epoch,
            "worker": call.worker,
        }
        written |= {"entry": call.entry_id, "base": call.expected, "tokens": tokens, "tokens_before": tokens}
        written |= {"barren": barren, "taken_ms": call.now_ms, "updated_ms": call.now_ms}
        self._put(job_id, call.ttl_ms, written | ({"error": code, "ended_ms": call.now_ms} if code else {}))
        return TakeReply("CLOSED" if code else "TAKEN", code)

    def _put(self, job_id: str, ttl_ms: int, fields: Mapping[str, str | int]) -> None:
        state = self._hashes.setdefault(state_key(job_id), {})
        state.update((name, str(value)) for name, value in fields.items())
        self._ends[state_key(job_id)] = self._ends[events_key(job_id)] = self._now() + ttl_ms

    async def append(self, job_id: str, call: AppendCall) -> str:
        """`append.lua`, line by line."""
        stream = self._stream(events_key(job_id))
        state = self._hash(state_key(job_id))
        if stream is None or (state.get("epoch") == str(call.epoch) and state.get("worker") != call.worker):
            return START
        if stream.top != call.expected:
            return stream.top
        for entry_id, event in call.events:
            self._add(events_key(job_id), entry_id, {"type": event.kind.encode(), "p": event.packed})
        over = call.state in TERMINAL_KINDS
        written: dict[str, str | int] = {
            "epoch": call.epoch,
            "worker": call.worker,
            "state": call.state,
            "tokens": call.tokens,
        }
        written |= {"updated_ms": call.now_ms} | ({"ended_ms": call.now_ms} if over else {})
        written |= {"error" if over else "last_error": call.code} if call.code else {}
        self._put(job_id, call.ttl_ms, written)
        return stream.top

    async def cancel(self, job_id: str, call: CancelCall) -> str:
        """`cancel.lua`, line by line."""
        now = await self.job_state(job_id)
        if now.fields.get("state") in TERMINAL_KINDS:
            return "CANCELLED" if now.fields.get("error") == "CANCELLED" else "OVER"
        if now.fields.get("state") == "running":
            self._hashes[state_key(job_id)]["cancel"] = str(call.now_ms)
            return "REQUESTED"
        if now.top != call.expected or now.next_epoch != call.epoch:
            return "RETRY"
        self._add(events_key(job_id), f"{call.epoch}-0", {"type": call.event.kind.encode(), "p": call.event.packed})
        written: dict[str, str | int] = {"state": call.event.kind, "error": "CANCELLED", "epoch": call.epoch}
        self._put(job_id, call.ttl_ms, written | {"cancel": call.now_ms, "ended_ms": call.now_ms})
        return "CANCELLED"
