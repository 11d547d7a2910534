"""The protocol as a worker speaks it: claim, take, append, finish, settle; renew, release, abandon, dead_letter.

Exactly once on the event stream, at least once on the job: every event has the id `<epoch>-<seq>`, and a write counts
only while the stream's top is the one that the writer knows. What each call does on the server is `streams.py`'s; this
module decides what to ask, and asks again when an answer was lost. It knows nothing of engines or devices.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from worker.errors import Cancelled, DeadLettered, Internal, WorkerError
from worker.jobs.events import ErrorEvent, Event, encode_event
from worker.jobs.intake import Intake
from worker.jobs.keys import after, events_key, state_key
from worker.jobs.lease import Claim, Closed, Fenced, History, Lease, Policy, Renewal
from worker.jobs.payload import job_id_of
from worker.jobs.presence import Presence
from worker.jobs.protocol import Trace
from worker.jobs.server_clock import ServerClock
from worker.jobs.streams import (
    AppendCall,
    Disconnected,
    JobState,
    Record,
    Streams,
    TakeCall,
    TakeReply,
    Written,
    retry_until_connected,
)

Opening = Callable[[History], Event]
"""The event that opens an attempt: `Started` on an empty history, else `Resumed`; or a refusal's `ErrorEvent`."""

_PAGE = 1000
_REASONS: Mapping[str, Literal["cancelled", "dead_lettered"]] = {
    Cancelled.code: "cancelled",
    DeadLettered.code: "dead_lettered",
}


class Transport:
    """One worker's side of the protocol. `worker_id` is its consumer name: host-pid-random, never used again.

    Every call but `claim` waits for the server as long as it takes; `claim` gives up after about `scan_s`.
    """

    def __init__(
        self,
        streams: Streams,
        worker_id: str,
        queue: str = "default",
        policy: Policy | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.worker_id = worker_id
        self.policy = policy or Policy()
        self.presence = Presence(streams, worker_id, self.policy, clock)
        self._intake = Intake(streams, queue, worker_id, self.policy)
        self._streams = streams
        self._queue = queue
        self._clock = clock
        self._server_clock = ServerClock(streams)

    async def open(self) -> None:
        """Make the queue, sweep out dead consumers, and hear commands from now on."""
        await self._intake.open()
        await self.presence.open()

    async def close(self) -> None:
        """Unregister, remove our consumer if nothing is pending for it, and disconnect."""
        with contextlib.suppress(Disconnected):
            await self._intake.close()
            await self.presence.close()
        await self._streams.close()

    @property
    def silence_s(self) -> float:
        """Seconds since a claim poll or a renewal last succeeded: /livez fails above three scan periods."""
        return time.monotonic() - self._intake.contact

    async def server_ms(self) -> int:
        """The server's clock, by which deadlines count."""
        return await self._server_clock.ms()

    async def claim(self) -> Claim | None:
        """The next queue entry, or None after about `scan_s`: let it return rather than cancel it.

        What was delivered too often ends here, before anybody looks into it again.
        """
        entry = await self._intake.next()
        if entry is None:
            await self._server_clock.keep()  # now nobody waits for it
            return None
        traceparent = entry.fields.get("traceparent", b"")[:256].decode(errors="replace") or None
        claim = Claim(entry.id, entry.fields.get("p", b""), traceparent, entry.deliveries)
        if entry.deliveries <= self.policy.max_deliveries:
            return claim
        job_id, worn_out = job_id_of(claim.payload), DeadLettered(f"delivered {entry.deliveries} times")
        if job_id is None:
            await self.dead_letter(claim, worn_out)
        else:
            trace = Trace.of(job_id, entry.id, None, traceparent)
            await self.take(claim, job_id, trace, lambda _: ErrorEvent.of(worn_out))
        return None

    async def take(self, claim: Claim, job_id: str, trace: Trace, opening: Opening) -> Lease | Closed:
        """Begin an epoch of the job: write `opening(history)` as `<epoch>-0`, unless there is nothing to run.

        `opening` may be called more than once and must not act. The first guess is a job that nobody has begun; where
        that is wrong, we look, prove that the entry is still ours, and only then ask again: a late claimer can't fence
        the rightful owner.
        """
        state, history = JobState(), History()
        while True:
            event = opening(history) if history.intact else ErrorEvent.of(Internal("published events are missing"))
            errors = self._errors(claim, state, event)
            call = self._take_call(claim, job_id, trace, state, event, errors)
            reply = await retry_until_connected(self._streams.take, job_id, call)
            if reply.outcome == "TAKEN":
                return Lease(claim, job_id, trace, history, call.expected, call.opening)
            if reply.outcome != "RETRY":
                return await self._close_out(claim, job_id, trace, call.epoch, reply, errors)
            state, history = await self._look(job_id)
            if not await self._intake.renew(claim.entry_id):
                return Closed("lost")

    async def append(self, lease: Lease, *events: Event) -> None:
        """Publish events in one step. A call that was cancelled leaves them for the next one to write.

        Raises:
            Fenced: the job is somebody else's, or its keys are gone.
        """
        async with lease.writing:
            self._stage(lease, events)
            await self._write(lease, "running", "")

    async def finish(self, lease: Lease, *events: Event) -> None:
        """Publish events, the last of which is terminal; then `settle`. Raises Fenced as `append` does."""
        last = events[-1]
        if not last.terminal:
            raise ValueError(f"{last.kind} ends no job")
        async with lease.writing:
            self._stage(lease, events)
            await self._write(lease, last.kind, last.code if isinstance(last, ErrorEvent) else "")
        if isinstance(last, ErrorEvent):
            await self.presence.publish(last, lease.job_id, lease.epoch, lease.trace)

    async def settle(self, lease: Lease) -> None:
        """Acknowledge a finished job and let its keys expire after `retention_s`."""
        await self._settle(lease.claim, None)
        await self._retire(lease.job_id)

    async def renew(self, held: Lease | Claim) -> Renewal:
        """Restart the lease: once a second is the habit. Also sees whether the job is to be cancelled."""
        claim = held.claim if isinstance(held, Lease) else held
        if not await self._intake.renew(claim.entry_id):
            return Renewal.LOST
        if isinstance(held, Lease):
            state = await retry_until_connected(self._streams.job_state, held.job_id)
            if "cancel" in state.fields:
                return Renewal.CANCEL_REQUESTED
        return Renewal.HELD

    async def release(self, held: Lease | Claim) -> None:
        """Hand the job back for another worker to claim at once: no delivery is counted, and no failed attempt."""
        claim = held.claim if isinstance(held, Lease) else held
        with contextlib.suppress(Fenced):
            if isinstance(held, Lease):
                async with held.writing:
                    await self._write(held, "handed_back", "")
            await self._intake.give_back(claim.entry_id, claim.deliveries - 1)

    async def abandon(self, lease: Lease, error: WorkerError) -> None:
        """Leave the job to another worker because this one is failing: as a crash does, but at once, with a reason."""
        with contextlib.suppress(Fenced):
            async with lease.writing:
                await self._write(lease, "running", error.code)
            await self._intake.give_back(lease.claim.entry_id, lease.claim.deliveries)

    async def dead_letter(self, claim: Claim, error: WorkerError) -> None:
        """Move an entry whose payload names no job to the dead letters."""
        await self._settle(claim, claim.dead_letter("", error.message, 0, ""))
        await self.presence.publish(ErrorEvent.of(error))

    def _errors(self, claim: Claim, state: JobState, opening: Event) -> dict[str, ErrorEvent]:
        """The terminal events that `take` may write, by code."""
        attempts = state.next_epoch - 1
        counts = {"attempts": attempts, "deliveries": claim.deliveries}
        worn_out = DeadLettered(f"given up after {attempts} attempts and {claim.deliveries} deliveries", counts)
        errors = [ErrorEvent.of(Cancelled("cancelled by request")), ErrorEvent.of(worn_out)]
        if isinstance(opening, ErrorEvent):
            errors.append(opening)
        return {error.code: error for error in errors}

    def _take_call(
        self, claim: Claim, job_id: str, trace: Trace, state: JobState, opening: Event, errors: Mapping[str, ErrorEvent]
    ) -> TakeCall:
        epoch = state.next_epoch

        def written(event: Event) -> Written:
            return Written(*encode_event(event, self.presence.envelope(job_id, epoch, trace)))

        return TakeCall(
            entry_id=claim.entry_id,
            worker=self.worker_id,
            expected=state.top,
            epoch=epoch,
            opening=written(opening),
            opening_code=opening.code if isinstance(opening, ErrorEvent) else "",
            cancelled=written(errors[Cancelled.code]),
            poisoned=written(errors[DeadLettered.code]),
            deliveries=claim.deliveries,
            max_deliveries=self.policy.max_deliveries,
            max_barren=self.policy.max_attempts,
            now_ms=self._now(),
            ttl_ms=int(self.policy.unsettled_s * 1000),
        )

    async def _look(self, job_id: str) -> tuple[JobState, History]:
        """The job as it is now; what changes afterwards moves its top, and `take` sees that."""
        state = await retry_until_connected(self._streams.job_state, job_id)
        records: list[Record] = []
        page: list[Record] = []
        while not records or len(page) == _PAGE:
            first = "-" if not records else after(records[-1][0])
            page = await retry_until_connected(self._streams.range, events_key(job_id), first, state.top, _PAGE)
            records += page
            if not page:
                break
        return state, History.read(records, state.next_epoch, state.fields.get("state") == "handed_back")

    async def _close_out(
        self, claim: Claim, job_id: str, trace: Trace, epoch: int, reply: TakeReply, errors: Mapping[str, ErrorEvent]
    ) -> Closed:
        """Settle an entry that has nothing to run."""
        dead: Mapping[str, bytes] | None = None
        if reply.code == DeadLettered.code:
            state = await retry_until_connected(self._streams.job_state, job_id)
            attempts, last_error = state.next_epoch - 2, state.fields.get("last_error", "")
            dead = claim.dead_letter(
                job_id, "attempts without one new token, or too many deliveries", attempts, last_error
            )
        await self._settle(claim, dead)
        if reply.outcome == "DUPLICATE":
            return Closed("duplicate")
        if reply.entry_id in ("", claim.entry_id):
            await self._retire(job_id)
        if reply.outcome == "OVER":
            return Closed("over")
        error = errors[reply.code]
        await self.presence.publish(error, job_id, epoch, trace)
        return Closed(_REASONS.get(reply.code, "refused"), error)

    def _stage(self, lease: Lease, events: Sequence[Event]) -> None:
        envelope = self.presence.envelope(lease.job_id, lease.epoch, lease.trace)
        for event in events:
            lease.stage(event, Written(*encode_event(event, envelope)))

    async def _write(self, lease: Lease, state: str, code: str) -> None:
        """Bring the stream up to the lease's log: at once, or again where the server has lost a part of it."""
        while True:
            call = AppendCall(
                expected=lease.top,
                epoch=lease.epoch,
                worker=self.worker_id,
                state=state,
                tokens=lease.tokens,
                code=code,
                events=lease.unwritten(),
                now_ms=self._now(),
                ttl_ms=int(self.policy.unsettled_s * 1000),
            )
            top = await retry_until_connected(self._streams.append, lease.job_id, call)
            if not lease.owns(top):
                self._intake.held.discard(lease.claim.entry_id)
                raise Fenced(f"job {lease.job_id}: epoch {lease.epoch} ended at {top}")
            lease.top = top
            if not lease.unwritten():
                return

    async def _settle(self, claim: Claim, dead: Mapping[str, bytes] | None) -> None:
        await retry_until_connected(self._streams.settle, self._queue, claim.entry_id, dead)
        self._intake.held.discard(claim.entry_id)

    async def _retire(self, job_id: str) -> None:
        for key in (events_key(job_id), state_key(job_id)):
            await retry_until_connected(self._streams.expire, key, int(self.policy.retention_s * 1000))

    def _now(self) -> int:
        return int(self._clock() * 1000)
