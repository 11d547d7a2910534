"""A worker's side of the protocol: claim, take, append, finish, settle; renew, release, abandon.

Exactly once on the event stream, at least once on the job: every event has the id `<epoch>-<seq>`,
and a write takes effect only if the stream's last id is the one that the writer expects. This
module decides which calls to make and repeats them after lost replies; `streams.py` defines what
each call does on the server.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from worker.config import LeaseSection
from worker.errors import Cancelled, DeadLettered, Internal, ServerRefused, WorkerError
from worker.jobs.consumer import Consumer, Registration
from worker.jobs.consumers import Consumers
from worker.jobs.events import ErrorEvent, Event, now_ms
from worker.jobs.lease import Claim, Closed, Fenced, Lease, Renewal
from worker.jobs.payload import encoding_of, job_id_of
from worker.jobs.protocol import Trace
from worker.jobs.reader import History, read_history
from worker.jobs.streams import (
    AppendCall,
    Disconnected,
    JobState,
    QueueDepth,
    ServerClock,
    Streams,
    TakeCall,
    TakeReply,
    retry_until_connected,
)
from worker.queue_order import queues_of

ENTRY_DELETED = "the job's queue entry was deleted"
"""Message of the error that ends such a job."""


Opening = Callable[[History], Event]
"""Returns the first event of an attempt: `Started` for an empty history, otherwise `Resumed`; or an
`ErrorEvent` that refuses the job."""


def _entry_deleted(_: History) -> Event:
    return ErrorEvent.of(Cancelled(ENTRY_DELETED))


class Transport:
    """One worker's connection to its queues, which are written as for `QueueOrder`.

    `worker_id` is its consumer name, host-pid-random, and must never be reused. Every method except
    `claim` waits for the server without a limit; `claim` returns after about `scan_s`.
    """

    def __init__(
        self,
        streams: Streams,
        worker_id: str,
        queues: Sequence[str] = ("default",),
        lease: LeaseSection | None = None,
    ) -> None:
        self.worker_id = worker_id
        self._streams = streams
        self._settings = lease or LeaseSection()
        self._unsettled_ms = int(self._settings.unsettled_s * 1000)
        self._consumers = Consumers(streams, queues, worker_id, self._settings)
        self._server_clock = ServerClock(streams)
        self.registration = Registration(streams, worker_id, self._settings)
        self._taken_ms = 0
        """Time of the last call of `take`. Each call has another, which identifies the attempt."""
        self._settling: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Create the queues, delete dead consumers, and accept commands from now on."""
        await self._consumers.open()
        await self.registration.open()
        self._streams.waits_for_access = True

    async def close(self) -> None:
        """Unregister, delete the consumers without pending entries, and disconnect."""
        if self._settling:
            await asyncio.wait(self._settling)
        with contextlib.suppress(Disconnected, ServerRefused):
            await self._consumers.close()
            await self.registration.close()
        await self._streams.close()

    @property
    def seconds_since_contact(self) -> float:
        """Seconds since the last successful poll or renewal; /readyz fails above 3 × `scan_s`.

        While the server has refused a call for longer than a lease, as a full server does, at least
        the seconds since the first refusal.
        """
        silent_s, refused_s = time.monotonic() - self._consumers.last_contact_s, self._streams.contact.refused_for_s
        return max(silent_s, refused_s) if refused_s > self._settings.lease_s else silent_s

    async def other_workers(self) -> list[Mapping[str, str]]:
        """The status of the other living workers that serve a queue of this one."""
        workers = await retry_until_connected(self._streams.workers)
        others = (status for name, status in workers.items() if name != self.worker_id)
        return [status for status in others if not queues_of(status).isdisjoint(self._consumers.names)]

    async def queue_depths(self) -> dict[str, QueueDepth]:
        """The jobs of each queue. Raises Disconnected and ServerRefused: nothing waits for it."""
        lease_ms = int(self._settings.lease_s * 1000)
        return {name: await self._streams.depth(name, lease_ms) for name in self._consumers.names}

    @property
    def queue_refusal(self) -> ServerRefused | None:
        """Why one of several queues could not be read last, while others were."""
        return self._consumers.refusal

    async def server_time_ms(self) -> int:
        """The server's clock, by which deadlines count."""
        return await self._server_clock.now_ms()

    async def claim(self) -> Claim | None:
        """The next queue entry, or None after about `scan_s`. Do not cancel it: let it return.

        An entry with more than `max_deliveries` deliveries is dead-lettered here, unparsed.
        """
        found = await self._consumers.next()
        if found is None:
            await self._server_clock.refresh()  # while no job waits for it
            return None
        queue, entry = found
        traceparent = entry.fields.get("traceparent", b"")[:256].decode(errors="replace") or None
        claim = Claim(queue, entry.id, entry.fields.get("p", b""), traceparent, entry.deliveries)
        if entry.deliveries <= self._settings.max_deliveries:
            return claim
        await self._give_up(claim, DeadLettered(f"delivered {entry.deliveries} times"))
        return None

    def _consumer_of(self, claim: Claim) -> Consumer:
        return self._consumers[claim.queue]

    async def _give_up(self, claim: Claim, error: DeadLettered) -> None:
        """End the job of an entry that was delivered too often, and dead-letter the entry."""
        job_id = job_id_of(claim.payload)
        try:
            if job_id is None:
                await self.dead_letter(claim, error)
            else:
                trace = Trace.of(job_id, claim.entry_id, None, claim.traceparent, encoding_of(claim.payload))
                await self.take(claim, job_id, trace, lambda _: ErrorEvent.of(error))
        except ServerRefused as refused:  # its keys can't be written, which may be why no attempt ended
            await self.dead_letter(claim, refused, job_id or "")
        finally:
            self.forget(claim)

    async def take(self, claim: Claim, job_id: str, trace: Trace, opening: Opening) -> Lease | Closed:
        """Begin an epoch of the job by writing `opening(history)` as `<epoch>-0`.

        `opening` must have no side effects: it may be called more than once. The first call assumes
        an empty history. If that is wrong, the job is read, the entry is renewed, and only then is
        the call repeated, so that a consumer that lost the entry cannot fence its owner.
        """
        state, history = JobState(), History()
        while True:
            event = opening(history) if history.intact else ErrorEvent.of(Internal("published events are missing"))
            errors = self._terminal_errors(claim, state, event)
            call = self._take_call(claim, job_id, trace, state, event, errors)
            reply = await retry_until_connected(self._streams.take, job_id, call)
            if reply.outcome == "TAKEN":
                taken = (call.expected, call.last_attempt, call.now_ms, [call.opening], f"{history.epoch}-0")
                return Lease(claim, job_id, trace, history, *taken, len(history.tokens))
            if reply.outcome != "RETRY":
                closed = await self._close_job(claim, job_id, trace, call.epoch, reply, errors)
                if closed is not None:
                    return closed
            state, history = await read_history(self._streams, job_id)
            ownership = await self._consumer_of(claim).renew(claim.entry_id)
            if ownership == "lost":
                return Closed("lost")
            if ownership == "deleted":  # no other worker will receive the job
                opening = _entry_deleted

    async def append(self, lease: Lease, *events: Event) -> None:
        """Publish events atomically. If cancelled, the next call writes them.

        Raises:
            Fenced: another worker owns the job, or its keys are gone.
        """
        await self._publish(lease, events, "running", "")

    def stage(self, lease: Lease, events: Sequence[Event]) -> None:
        """Encode events for the next write of the lease. Raises as `Lease.stage` does."""
        for event in events:
            lease.stage(event, self.worker_id)

    async def append_staged(self, leases: Sequence[Lease]) -> list[bool]:
        """Publish the staged events of several leases, each atomically, in one round trip.

        Returns for each whether they are written now. If not, `append` must be called: it writes
        them, or raises. No append of these leases may be in flight or waiting.
        """
        for lease in leases:
            await lease.writing.acquire()  # free: returns without a wait
        try:
            return await self._append_together(leases)
        finally:
            for lease in leases:
                lease.writing.release()

    async def _append_together(self, leases: Sequence[Lease]) -> list[bool]:
        calls = [self._append_call(lease, "running", "") for lease in leases]
        # A call without events would set the state of a job that has ended to `running`.
        pending = [(lease, call) for lease, call in zip(leases, calls, strict=True) if call.events]
        if pending:
            try:
                replies = await self._streams.append_many([(lease.job_id, call) for lease, call in pending])
            except (Disconnected, ServerRefused):
                replies = [None] * len(pending)
            for (lease, call), last_id in zip(pending, replies, strict=True):
                if last_id == call.events[-1][0]:
                    lease.last_id = call.events[-1][0]
        return [
            not call.events or lease.last_id == call.events[-1][0] for lease, call in zip(leases, calls, strict=True)
        ]

    async def finish(self, lease: Lease, *events: Event) -> None:
        """Publish events, the last of which is terminal; call `settle` next. Raises Fenced."""
        last = events[-1]
        if not last.terminal:
            raise ValueError(f"{last.kind} is not a terminal event")
        lease.ending = (last.kind, last.code if isinstance(last, ErrorEvent) else "")
        await self._publish(lease, events, *lease.ending)
        if isinstance(last, ErrorEvent):
            await self.registration.publish(last, lease.trace.envelope(lease.job_id, lease.epoch, self.worker_id))

    async def settle(self, lease: Lease) -> None:
        """Acknowledge a finished job and let its keys expire after `retention_s`.

        Writes its last events again if the server has lost them meanwhile: without its entry no
        worker would end the job.

        Raises:
            Fenced: the server has lost the attempt. The entry is left, and the job begins again.
        """
        consumer = self._consumer_of(lease.claim)
        while not await consumer.settle(lease.claim.entry_id, None, lease.job_id):
            try:
                async with lease.writing:
                    await self._write(lease, *lease.ending)
            except Fenced:
                await self.release(lease.claim)
                raise
        await self._expire_keys(lease.job_id)

    def begin_settling(self, lease: Lease) -> None:
        """Start `settle` in the background: the next job need not wait. `close` awaits it."""
        self._consumer_of(lease.claim).share(lease.claim.entry_id)  # the attempt may end earlier or later
        task = asyncio.create_task(self.settle(lease))
        self._settling.add(task)
        task.add_done_callback(lambda done: self._settled(lease.claim, done))

    def _settled(self, claim: Claim, task: asyncio.Task[None]) -> None:
        self._settling.discard(task)
        self.forget(claim)
        if not task.cancelled() and (error := task.exception()):  # the next worker that claims it settles it
            logging.getLogger(__name__).warning("job not settled: %s", error)

    def forget(self, claim: Claim) -> None:
        """Stop regarding the entry as this worker's: call it once on every way out of an attempt.

        Until then this worker does not claim the entry again, even if the server delivers it again.
        One that is still pending is claimed after its lease, here or elsewhere.
        """
        self._consumer_of(claim).forget(claim.entry_id)

    async def renew(self, held: Lease | Claim) -> Renewal:
        """Renew the lease, once per `renew_s`. Also reports whether a cancel was requested."""
        claim = held.claim if isinstance(held, Lease) else held
        ownership = await self._consumer_of(claim).renew(claim.entry_id)
        if ownership != "held":
            return Renewal(ownership)
        if isinstance(held, Lease):
            state = await retry_until_connected(self._streams.job_state, held.job_id)
            if "cancel" in state.fields:
                return Renewal.CANCEL_REQUESTED
        return Renewal.HELD

    async def renew_many(self, held: Sequence[Lease | Claim]) -> list[Renewal | None]:
        """Renew several leases in one round trip; None for one for which `renew` must be called."""
        calls: list[tuple[str, str, str | None]] = []
        for each in held:
            claim, job_id = (each.claim, each.job_id) if isinstance(each, Lease) else (each, None)
            calls.append((claim.queue, claim.entry_id, job_id))
        try:
            replies = await self._streams.renew_many(self.worker_id, calls)
        except (Disconnected, ServerRefused):
            return [None] * len(calls)
        renewals: list[Renewal | None] = []
        for (queue, _, _), reply in zip(calls, replies, strict=True):
            if reply is None:
                renewals.append(None)
                continue
            ownership, cancelled = reply
            self._consumers[queue].renewed(ownership)
            cancelled = cancelled and ownership == "held"
            renewals.append(Renewal.CANCEL_REQUESTED if cancelled else Renewal(ownership))
        return renewals

    async def is_served_elsewhere(self, claim: Claim, model: str) -> bool:
        """Whether another living worker of the entry's queue serves the model."""
        other_models = self._consumer_of(claim).other_models
        await other_models.refresh()
        return model in other_models

    async def pass_on(self, claim: Claim, model: str) -> None:
        """Leave the job to the workers of the model that it names, as `release` does.

        This worker does not claim it again while one of them lives.
        """
        await self._consumer_of(claim).give_back(claim.entry_id, claim.deliveries - 1, model=model)

    async def release(self, held: Lease | Claim, avoid_s: float = 0.0) -> None:
        """Make the job claimable at once. Counts neither as a delivery nor as a failed attempt.

        This worker does not claim it for `avoid_s` seconds, so that another one may.
        """
        claim = held.claim if isinstance(held, Lease) else held
        if isinstance(held, Lease):
            with contextlib.suppress(Fenced):
                async with held.writing:
                    await self._write(held, "handed_back", "")
        await self._consumer_of(claim).give_back(claim.entry_id, claim.deliveries - 1, avoid_s)

    async def abandon(self, held: Lease | Claim, error: WorkerError) -> None:
        """Make the job claimable at once after a failure of this worker: a failed attempt.

        This worker does not claim it for a lease, so that another one may.
        """
        claim = held.claim if isinstance(held, Lease) else held
        if isinstance(held, Lease):
            with contextlib.suppress(Fenced, ServerRefused):  # give it back nevertheless
                async with held.writing:
                    await self._write(held, "running", error.code)
        await self._consumer_of(claim).give_back(claim.entry_id, claim.deliveries, self._settings.lease_s)

    async def dead_letter(self, claim: Claim, error: WorkerError, job_id: str = "") -> None:
        """Move an entry to the dead letters: its job id or its job's keys are unusable."""
        counts = (claim.deliveries, error.code) if job_id else (0, "")
        await self._consumer_of(claim).settle(claim.entry_id, claim.dead_letter(job_id, error.message, *counts))
        if job_id:
            await self._expire_keys(job_id)
        await self.registration.publish(ErrorEvent.of(error))

    def _terminal_errors(self, claim: Claim, state: JobState, opening: Event) -> dict[str, ErrorEvent]:
        """The terminal events that `take` may write, by code."""
        attempts = state.next_epoch - 1
        counts = {"attempts": attempts, "deliveries": claim.deliveries}
        poisoned = DeadLettered(f"given up after {attempts} attempts and {claim.deliveries} deliveries", counts)
        errors = [ErrorEvent.of(Cancelled("cancelled by request")), ErrorEvent.of(poisoned)]
        if isinstance(opening, ErrorEvent):
            errors.append(opening)
        return {error.code: error for error in errors}

    def _take_call(
        self, claim: Claim, job_id: str, trace: Trace, state: JobState, opening: Event, errors: Mapping[str, ErrorEvent]
    ) -> TakeCall:
        envelope = trace.envelope(job_id, state.next_epoch, self.worker_id)
        self._taken_ms = max(envelope.ts_ms, self._taken_ms + 1)
        return TakeCall(
            entry_id=claim.entry_id,
            worker=self.worker_id,
            expected=state.last_id,
            epoch=state.next_epoch,
            last_attempt=state.attempt,
            opening=trace.encode(opening, envelope),
            opening_code=opening.code if isinstance(opening, ErrorEvent) else "",
            cancelled=trace.encode(errors[Cancelled.code], envelope),
            poisoned=trace.encode(errors[DeadLettered.code], envelope),
            deliveries=claim.deliveries,
            max_deliveries=self._settings.max_deliveries,
            max_attempts=self._settings.max_attempts,
            now_ms=self._taken_ms,
            ttl_ms=self._unsettled_ms,
        )

    async def _close_job(
        self, claim: Claim, job_id: str, trace: Trace, epoch: int, reply: TakeReply, errors: Mapping[str, ErrorEvent]
    ) -> Closed | None:
        """Settle an entry that has nothing to run; None if the server has lost the job's end."""
        dead: dict[str, bytes] | None = None
        own = reply.outcome != "DUPLICATE" and reply.entry_id in ("", claim.entry_id)  # else another entry of the job
        if own and reply.code == DeadLettered.code:
            state = await retry_until_connected(self._streams.job_state, job_id)
            attempts, last_error = state.next_epoch - 2, state.fields.get("last_error", "")
            reason = "attempts without one new token, or too many deliveries"
            dead = claim.dead_letter(job_id, reason, attempts, last_error)
        if not await self._consumer_of(claim).settle(claim.entry_id, dead, job_id):
            return None
        if reply.outcome == "DUPLICATE":
            return Closed("duplicate")
        if own:
            await self._expire_keys(job_id)
        if reply.outcome == "OVER":
            return Closed("over", cancelled_before=reply.code == Cancelled.code and not reply.entry_id)
        error = errors[reply.code]
        await self.registration.publish(error, trace.envelope(job_id, epoch, self.worker_id))
        return Closed("dead_lettered" if dead else "cancelled" if reply.code == Cancelled.code else "refused", error)

    async def _publish(self, lease: Lease, events: Sequence[Event], state: str, code: str) -> None:
        async with lease.writing:
            self.stage(lease, events)
            await self._write(lease, state, code)

    def _append_call(self, lease: Lease, state: str, code: str) -> AppendCall:
        owner, events = (lease.last_id, lease.epoch, self.worker_id, lease.taken_ms), lease.unwritten()
        base_attempt = lease.base_attempt if lease.last_id == lease.base else ""
        return AppendCall(*owner, state, lease.tokens, code, events, now_ms(), self._unsettled_ms, base_attempt)

    async def _write(self, lease: Lease, state: str, code: str) -> None:
        """Append the lease's unwritten events, repeatedly if the server has lost earlier writes."""
        while True:
            call = self._append_call(lease, state, code)
            last_id = await retry_until_connected(self._streams.append, lease.job_id, call)
            if not lease.owns(last_id):
                raise Fenced(f"job {lease.job_id}: epoch {lease.epoch} ended at {last_id}")
            lease.last_id = last_id
            if not lease.unwritten():
                return

    async def _expire_keys(self, job_id: str) -> None:
        await retry_until_connected(self._streams.expire_job, job_id, int(self._settings.retention_s * 1000))
