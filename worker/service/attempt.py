"""One attempt at one job: from the claimed queue entry to its terminal event, or to its release.

    delivered at once: decode, tokenize ─► engine ─┬─► append … append ─► finish ─► settle
                                        └► take ───┘
    later, or again:   decode, tokenize ─► engine (paused) ─► take ─► engine (resumed) ─► append …

`renewal_loop.py` renews the lease meanwhile. Read next: `prepared_job.py` (tokenizing, what ends
an attempt early), `generation.py` (from the engine to `append`), and `worker/jobs/transport.py`
(what keeps two workers apart).
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from worker.answer import AttemptStats
from worker.errors import CudaError, Internal, InvalidRequest, ServerRefused, WorkerError, as_exception
from worker.jobs.events import End, ErrorEvent, Event, Resumed, Started
from worker.jobs.lease import Claim, Closed, Fenced, Lease, Renewal
from worker.jobs.payload import encoding_of
from worker.jobs.protocol import Job, Trace, decode_job
from worker.jobs.reader import History
from worker.service.attempt_spans import AttemptRecord, trace_attempt
from worker.service.continuation import CannotContinue, can_continue, end_of
from worker.service.generation import Generation, SpeculativeStart, WorkerContext
from worker.service.prepared_job import (
    AttemptInterrupted,
    AttemptLimits,
    PreparedJob,
    StopReason,
    enqueued_at,
    needs_thread,
)
from worker.telemetry import Log, frames_of

if TYPE_CHECKING:
    from worker.tracing.otlp import Tracing

T = TypeVar("T")

_HAND_OVER_S = 2.0
_AVOID_S = 4.0
"""For which a job that only another worker can continue is left to that one."""
_STOP_REASONS = {
    Renewal.LOST: StopReason.LOST,
    Renewal.DELETED: StopReason.DELETED,
    Renewal.CANCEL_REQUESTED: StopReason.CANCEL,
}
_WAITED_MS = 50
"""An entry that is claimed within this time was not waiting. Above any delay of a reply."""
_SMALL_PAYLOAD_BYTES = 4096
"""Such a payload is decoded and tokenized in less time than a thread takes to wake."""


class Attempt:
    """One attempt at the job of `claim`. Call `run` once.

    `on_generated` is called when the engine is free and the last events are not yet published.
    """

    def __init__(self, context: WorkerContext, claim: Claim, on_generated: Callable[[], None]) -> None:
        self.job_id: str | None = None
        """None until the payload is decoded."""
        self.limits = AttemptLimits(context.section.inference_timeout_s)
        self._context = context
        self._claim = claim
        self._job: Job | None = None
        self._on_generated = on_generated
        self._held: Claim | Lease = claim
        self._sequence_id = f"{claim.queue} {claim.entry_id}"
        self._log = context.log
        self._claimed = self._submitted = time.monotonic()
        self._server_lead_ms = 0.0
        self._other_model = ""
        self._trace = Trace.of("", claim.entry_id, None, claim.traceparent)
        self._record = AttemptRecord(claim, self._claimed)

    async def run(self) -> str:
        """Run the job to its end; returns the outcome for the metrics.

        The outcome is `completed`, an error's code in lower case, or the reason of the release.
        Raises CudaError if the device is lost; the job is left to another worker then. However it
        ends, the entry is settled, given back, or another worker's, or its lease expires.
        """
        outcome = "fault"
        try:
            outcome = await self._run()
            return outcome
        except CudaError:
            outcome = "cuda_error"
            raise
        finally:
            if self._context.tracing is not None:
                self._trace_attempt(self._context.tracing, outcome)

    def _trace_attempt(self, tracing: "Tracing", outcome: str) -> None:
        try:
            trace_attempt(tracing, self._record, self._context.model.name, outcome)
        except Exception as error:  # no job depends on its spans
            self._log.error("tracing_fault", frames=frames_of(error))

    async def _run(self) -> str:
        self._context.renewal_loop.add(self)
        try:
            return await self._process()
        except Fenced:
            return await self._leave_to_owner("fenced")
        except AttemptInterrupted as interrupted:
            return await self._hand_over(interrupted.reason)
        except CudaError:
            raise
        except BaseException as error:  # also a panic of a native library
            return await self._fail(as_exception(error))
        finally:
            self._context.engine.release(self._sequence_id)
            await self._context.renewal_loop.remove(self)
            self._context.transport.forget(self._claim)

    @property
    def held(self) -> Claim | Lease:
        """See `Renewed.held`."""
        return self._held

    @property
    def keeps(self) -> bool:
        """See `Renewed.keeps`."""
        return self.limits.stop_reason not in (StopReason.LOST, StopReason.STALLED)

    @property
    def log(self) -> Log:
        """See `Renewed.log`."""
        return self._log

    def on_renewal(self, renewal: Renewal) -> None:
        """See `Renewed.on_renewal`."""
        if reason := _STOP_REASONS.get(renewal):
            self.limits.interrupt(reason)

    async def _process(self) -> str:
        claim, context = self._claim, self._context
        self._server_lead_ms = await context.transport.server_time_ms() - time.monotonic() * 1000
        self._record.server_lead_ms = self._server_lead_ms
        start = await self._start()
        waited_s = max(0.0, self._claimed * 1000 + self._server_lead_ms - claim.enqueued_ms) / 1000
        self._submitted = self._claimed - waited_s
        if claim.deliveries == 1:
            context.metrics.queue_wait.observe(waited_s)
        if self.job_id is None:
            assert isinstance(start, WorkerError), "a decoded payload has a job id"
            await context.transport.dead_letter(claim, start)
            return self._released("unreadable")

        def opening(history: History) -> Event:
            if isinstance(start, InvalidRequest) and history.started is not None:
                raise CannotContinue(start, history)  # the worker that began it has accepted it
            if isinstance(start, WorkerError):
                return ErrorEvent.of(start)
            if error := self.limits.deadline_error():
                return ErrorEvent.of(error)
            return start.job.opening(context.model, history, int(self._server_ms()), start.cached_tokens)

        try:
            lease = await context.transport.take(claim, self.job_id, self._trace, opening)
        except CannotContinue as unable:
            if isinstance(start, SpeculativeStart):
                start.discard()
            return await self._end_or_pass_on(unable)
        if isinstance(lease, Closed):
            if isinstance(start, SpeculativeStart):
                start.discard()
            return self._closed(lease)
        self._held = lease
        assert isinstance(start, SpeculativeStart), "`take` grants no lease for an error"
        return await self._generate(lease, start)

    async def _start(self) -> SpeculativeStart | WorkerError:
        """Decode and tokenize the payload and add it to the engine; or return the job's error."""
        claim, context = self._claim, self._context
        try:
            job = await self._off_loop(lambda: decode_job(claim.payload, context.section.max_payload_bytes))
            self._identify(job.job_id, job)
            await self._check_model(job)
            if error := self.limits.deadline_error():
                return error
            prepared = await self._off_loop(
                lambda: PreparedJob.of(job, context.model, claim.entry_id, claim.enqueued_ms),
                slow=needs_thread(job),
            )
            waited = self._server_ms() - claim.enqueued_ms > _WAITED_MS
            paused = claim.deliveries > 1 or waited
            self._record.prompt_tokens, self._record.prefill_s = (
                len(prepared.prompt),
                None if paused else time.monotonic(),
            )
            return await SpeculativeStart.begin(context, self.limits, prepared, self._sequence_id, paused=paused)
        except WorkerError as error:
            if self.job_id is None and "job_id" in error.details:
                self._identify(error.details["job_id"])
            return error
        except AttemptInterrupted:
            raise
        except BaseException as raised:
            as_exception(raised)  # raises a cancellation
            self._log.error("job_fault", frames=frames_of(raised))
            return Internal(f"{type(raised).__name__} while the job was read")

    async def _check_model(self, job: Job) -> None:
        """Raise AttemptInterrupted if another worker serves the model that the job names."""
        if job.model is None or job.model == self._context.model.name:
            return
        if await self._context.transport.is_served_elsewhere(self._claim, job.model):
            self._other_model = job.model
            raise AttemptInterrupted(StopReason.OTHER_MODEL)

    async def _off_loop(self, work: Callable[[], T], *, slow: bool = False) -> T:
        """Run `work` on the payload: in place if it is not slow and the payload is small, else on
        another thread.
        """
        if not slow and len(self._claim.payload) <= _SMALL_PAYLOAD_BYTES:
            return work()
        return await self.limits.guard(asyncio.to_thread(work))

    def _identify(self, job_id: str, job: Job | None = None) -> None:
        """Set the job's id, trace, log fields and deadline."""
        self.job_id, self._job = job_id, job
        encoding = "msgpack" if job else encoding_of(self._claim.payload)
        self._trace = Trace.of(job_id, self._claim.entry_id, job, self._claim.traceparent, encoding)
        self._record.job_id, self._record.job, self._record.trace = job_id, job, self._trace
        self._log = self._context.log.bind(job_id=job_id, correlation_id=self._trace.correlation_id)
        if job is not None and job.deadline_ms is not None:
            self.limits.set_deadline((self._claim.enqueued_ms + job.deadline_ms - self._server_ms()) / 1000)

    async def _generate(self, lease: Lease, start: SpeculativeStart) -> str:
        generation = Generation(self._context, self.limits, lease, start, self._claimed, self._submitted)
        self._record.lease, self._record.stats = lease, generation.stats
        self._record.prefill_s = self._record.prefill_s or time.monotonic()
        self._log = self._log.bind(epoch=lease.epoch, prompt_sha256=start.job.prompt_hash)
        published, prompt_tokens = len(lease.history.tokens), len(start.job.prompt)
        self._log.info("job_started", published=published, prompt_tokens=prompt_tokens)
        last: End | ErrorEvent
        try:
            await generation.run()
            last = generation.end()
        except AttemptInterrupted as interrupted:
            if interrupted.reason is not StopReason.LOST:
                await self._publish_rest(lease, generation)
            raise
        except CudaError as error:
            await self._publish_rest(lease, generation)
            await self._abandon(lease, error)
            raise
        except (Fenced, ServerRefused):
            raise
        except WorkerError as error:
            last = ErrorEvent.of(error)
        except BaseException as raised:
            as_exception(raised)  # raises a cancellation
            self._log.error("job_fault", frames=frames_of(raised))
            last = ErrorEvent.of(Internal(f"{type(raised).__name__} while the answer was written"))
        return await self._finish(lease, [*generation.unpublished.take(), last], generation.stats)

    async def _finish(self, lease: Lease, rest: Sequence[Event], stats: AttemptStats) -> str:
        """Publish the last events; what follows them happens while the next job runs."""
        self._on_generated()
        await self._context.transport.finish(lease, *rest)
        self._record.lease, self._record.stats, self._record.last = lease, stats, rest[-1]
        self._context.transport.begin_settling(lease)
        return self._ended(rest[-1], stats)

    async def _end_or_pass_on(self, unable: CannotContinue) -> str:
        """End a job whose answer is complete or which no worker can continue, else give it back."""
        context, claim, history = self._context, self._claim, unable.history
        assert self.job_id is not None
        assert history.started is not None, "only what has started is continued"
        enqueued, end = enqueued_at(claim.enqueued_ms), None
        if self._job is not None:
            end = await asyncio.to_thread(end_of, self._job, context.model, history, enqueued)
        if end is None and await self._is_continued_elsewhere(history.started):
            await self._stop_renewing()
            await context.transport.release(claim, _AVOID_S)
            return self._released("other_worker")

        def opening(history: History) -> Event:
            if end is None or history.started is None:
                return ErrorEvent.of(unable.error)
            return Resumed(from_i=len(history.tokens), reason=history.reason, exact=history.exact)

        lease = await context.transport.take(claim, self.job_id, self._trace, opening)
        if isinstance(lease, Closed):
            return self._closed(lease)
        assert end is not None, "`take` grants no lease for an error"
        return await self._finish(lease, [end], AttemptStats(self._claimed))

    async def _is_continued_elsewhere(self, started: Started) -> bool:
        """Whether another worker can continue the job, or may while the registry is unreadable."""
        try:
            others = await self._context.transport.other_workers()
        except ServerRefused:
            return True
        return any(can_continue(status, started) for status in others)

    def _ended(self, last: Event, stats: AttemptStats) -> str:
        fields = {"tokens": stats.tokens, "text_chars": stats.chars, "text_sha256": stats.text_digest.hexdigest()}
        if isinstance(last, ErrorEvent):
            self._log.warning("job_failed", code=last.code, **fields)
            return last.code.lower()
        assert isinstance(last, End), "the last event is terminal"
        metrics, inference_s = self._context.metrics, stats.ttft_s + stats.decode_s
        metrics.inference.observe(inference_s)
        metrics.request.observe(self._claimed - self._submitted + inference_s)
        metrics.success.labels(last.finish_reason).inc()
        self._log.info("job_completed", finish_reason=last.finish_reason, ttft_ms=last.ttft_ms, **fields)
        return "completed"

    def _closed(self, closed: Closed) -> str:
        """The outcome of an entry that had nothing to run; the transport has settled it."""
        self._record.last, self._record.cancelled_before = closed.error, closed.cancelled_before
        if closed.error is None:
            return self._released(closed.reason)
        names = [fault["field"].partition(".")[0] for fault in closed.error.details.get("errors", ())]
        fields = sorted({name if name in Job.model_fields else "unknown" for name in names})
        self._log.warning("job_refused", code=closed.error.code, fields=fields)
        return closed.error.code.lower()

    async def _hand_over(self, reason: StopReason) -> str:
        """Release the job, for another worker to continue."""
        if reason is StopReason.DRAIN:
            await self._stop_renewing()
            await self._context.transport.release(self._held)
            return self._released("handed_back")
        if reason is StopReason.LOST:
            return await self._leave_to_owner("lost")
        if reason is StopReason.OTHER_MODEL:
            await self._stop_renewing()
            await self._context.transport.pass_on(self._claim, self._other_model)
        if reason is StopReason.STALLED:
            await self._abandon(self._held, Internal("the engine made no step"))
        return self._released(reason.name.lower())

    async def _leave_to_owner(self, outcome: str) -> str:
        """Release the entry if it is still pending here: the server may have lost the attempt."""
        await self._stop_renewing()
        await self._context.transport.release(self._claim)
        return self._released(outcome)

    async def _fail(self, error: Exception) -> str:
        """End an attempt that raised: after a bug another one begins, at most `max_attempts`.

        A key of the job that holds another type stops every attempt: the entry is dead-lettered.
        """
        if isinstance(error, ServerRefused) and error.details["reply"] == "WRONGTYPE":
            await self._context.transport.dead_letter(self._claim, error, self.job_id or "")
            self._log.warning("job_failed", code=error.code, reason=error.message)
            return "dead_lettered"
        self._log.error("attempt_fault", job_id=self.job_id, frames=frames_of(error))
        await self._abandon(self._held, Internal(f"{type(error).__name__} in the attempt"))
        return "fault"

    async def _publish_rest(self, lease: Lease, generation: Generation) -> None:
        """Publish the drawn tokens before the release; what is not in time is drawn again."""
        if rest := generation.unpublished.take():
            with contextlib.suppress(TimeoutError, Fenced):
                async with asyncio.timeout(_HAND_OVER_S):
                    await self._context.transport.append(lease, *rest)

    async def _abandon(self, held: Claim | Lease, error: WorkerError) -> None:
        """Leave the job to another worker at once. Without a server its lease expires instead."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HAND_OVER_S):
                await self._stop_renewing()
                await self._context.transport.abandon(held, error)

    async def _stop_renewing(self) -> None:
        """Stop renewing the lease, and wait for a call in flight.

        A renewal after the release would block the entry for a whole lease.
        """
        await self._context.renewal_loop.remove(self)

    def _released(self, outcome: str) -> str:
        self._log.info("job_released", outcome=outcome)
        return outcome

    def _server_ms(self) -> float:
        """The server's clock, from its lead over the local one when the job was claimed."""
        return time.monotonic() * 1000 + self._server_lead_ms
