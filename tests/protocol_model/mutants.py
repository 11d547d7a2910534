"""Servers that lack one rule of the protocol each: the explorer must find a counterexample.

Each is `MemoryStreams` with one method that differs, and bounds that suffice.
"""

from __future__ import annotations

from dataclasses import replace

from tests.jobs.memory_streams import Delivery, MemoryStreams
from tests.protocol_model.explorer import Bounds, Faults
from worker.jobs.keys import epoch_of, events_key, queue_key, state_key
from worker.jobs.streams import AppendCall, Fields, Ownership, TakeCall, TakeReply


class AppendsAnywhere(MemoryStreams):
    """`append` compares neither the last id nor the attempt: events go to the end of the stream."""

    async def append(self, job_id: str, call: AppendCall) -> str:
        now = await self.job_state(job_id)
        top, state = now.last_id, self._hashes[state_key(job_id)]
        state |= {"epoch": str(call.epoch), "worker": call.worker, "taken_ms": str(call.taken_ms)}
        epoch, first = epoch_of(top), int(top.partition("-")[2]) + 1
        events = [(f"{epoch}-{first + n}", event) for n, (_, event) in enumerate(call.events)]
        await super().append(job_id, call._replace(expected=top, events=events))
        return call.events[-1][0] if call.events else call.expected


class IgnoresTheAttempt(MemoryStreams):
    """`append` does not compare the attempt (`worker` and `taken_ms`), only the last id."""

    async def append(self, job_id: str, call: AppendCall) -> str:
        state = self._hashes.get(state_key(job_id))
        if state is not None:
            state |= {"worker": call.worker, "taken_ms": str(call.taken_ms)}
        return await super().append(job_id, call)


class AppendsByIdAlone(MemoryStreams):
    """`append` does not compare the attempt before the epoch whose first event it writes again."""

    async def append(self, job_id: str, call: AppendCall) -> str:
        return await super().append(job_id, call._replace(base_attempt=""))


class RepeatsAppends(MemoryStreams):
    """`append` does not detect that it was executed: a repetition writes the events again."""

    async def append(self, job_id: str, call: AppendCall) -> str:
        top = await self.last_id(events_key(job_id))
        if call.events and top == call.events[-1][0]:
            first = int(top.partition("-")[2]) + 1
            events = [(f"{call.epoch}-{first + n}", event) for n, (_, event) in enumerate(call.events)]
            call = call._replace(expected=top, events=events)
        return await super().append(job_id, call)


class SettlesUnverified(MemoryStreams):
    """`settle` does not verify that the job is over."""

    async def settle(self, queue: str, entry_id: str, dead: Fields | None, job_id: str | None = None) -> bool:
        return await super().settle(queue, entry_id, dead, None)


class KeepsEntries(MemoryStreams):
    """`settle` acknowledges the entry and does not delete it."""

    async def settle(self, queue: str, entry_id: str, dead: Fields | None, job_id: str | None = None) -> bool:
        entries = dict(self._streams[queue_key(queue)].entries)
        settled = await super().settle(queue, entry_id, dead, job_id)
        self._streams[queue_key(queue)].entries = entries
        return settled


class RenewSteals(MemoryStreams):
    """`renew` gives the entry to any caller, as a bare XCLAIM would."""

    async def renew(self, queue: str, consumer: str, entry_id: str) -> Ownership:
        pending = self._streams[queue_key(queue)].pending
        if entry_id in pending:
            pending[entry_id] = Delivery(consumer, self._now(), pending[entry_id].count)
        return await super().renew(queue, consumer, entry_id)


class TakesWithoutEpoch(MemoryStreams):
    """`take` compares neither the last id nor the epoch with what the caller has read."""

    async def take(self, job_id: str, call: TakeCall) -> TakeReply:
        now = await self.job_state(job_id)
        repeated = replace(call, expected=now.last_id, epoch=now.next_epoch, last_attempt=now.attempt)
        return await super().take(job_id, repeated)


class TakesByIdAlone(MemoryStreams):
    """`take` does not compare the last attempt, only the last id: events may be others by now."""

    async def take(self, job_id: str, call: TakeCall) -> TakeReply:
        return await super().take(job_id, replace(call, last_attempt=(await self.job_state(job_id)).attempt))


class GivesBackOthers(MemoryStreams):
    """`give_back` does not check that the entry is the caller's."""

    async def give_back(self, queue: str, consumer: str, entry_id: str, idle_ms: int, deliveries: int) -> bool:
        pending = self._streams[queue_key(queue)].pending
        if entry_id in pending:
            pending[entry_id] = Delivery(pending[entry_id].consumer, self._now() - idle_ms, deliveries)
        return True


MUTANTS: dict[type[MemoryStreams], Bounds] = {
    AppendsAnywhere: Bounds(1, Faults(pauses=1)),
    IgnoresTheAttempt: Bounds(2, Faults(lost_seconds=1)),
    RepeatsAppends: Bounds(1, Faults(lost_replies=1)),
    SettlesUnverified: Bounds(1, Faults(lost_seconds=1)),
    KeepsEntries: Bounds(1, Faults()),
    RenewSteals: Bounds(1, Faults(pauses=1)),
    TakesWithoutEpoch: Bounds(1, Faults(pauses=1)),
    GivesBackOthers: Bounds(1, Faults(pauses=1)),
}
"""With bounds within which a counterexample exists."""
SLOW_MUTANTS: dict[type[MemoryStreams], Bounds] = {
    AppendsByIdAlone: Bounds(2, Faults(pauses=1, lost_seconds=1, in_all=2)),
    TakesByIdAlone: Bounds(2, Faults(pauses=1, lost_seconds=1, in_all=2)),
}
"""Those that take a minute or more; `tests/jobs/test_lost_writes.py` has what they find."""
