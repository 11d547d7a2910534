"""One attempt at one job: from the claimed queue entry to its terminal event, or to where it is let go.

    decode, tokenize ─┬─► take ───────┬─► append … append ─► finish ─► settle
                      └─► head start ─┘                      first delivery: the engine computes beside `take`
    decode, tokenize ───► take ─► engine ─► append …         later ones: `take` first, as it counts failed attempts

One coroutine walks this road; another renews the lease. What may end it early is `bounds.py`'s, the head start is
`head_start.py`'s, the stretch from engine to append `answering.py`'s, and the rules that keep two workers apart
`worker/jobs/transport.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from worker.errors import CudaError, Internal, WorkerError
from worker.jobs.events import End, ErrorEvent, Event
from worker.jobs.lease import Claim, Closed, Fenced, History, Lease, Renewal
from worker.jobs.protocol import Job, Trace, decode_job
from worker.service.answering import Answering
from worker.service.bounds import Bounds, Stop, Stopped
from worker.service.head_start import HeadStart
from worker.service.outbox import Figures
from worker.service.question import Question
from worker.service.workbench import Workbench
from worker.telemetry import frames_of

_LAST_WORDS_S = 2.0
_SMALL_BYTES = 4096
"""A payload that is read and tokenized in less time than a thread takes to wake."""

T = TypeVar("T")

Reading = tuple[Question, None] | tuple[None, WorkerError]


class Attempt:
    """One attempt at the job of `claim`. `run` it once."""

    def __init__(self, bench: Workbench, claim: Claim) -> None:
        self.job_id: str | None = None
        """None until the payload has been read."""
        self.bounds = Bounds(bench.section.inference_timeout_s)
        self._bench = bench
        self._claim = claim
        self._held: Claim | Lease = claim
        self._head_start: HeadStart | None = None
        self._renewals: asyncio.Task[None] | None = None
        self._log = bench.log
        self._over = asyncio.Event()
        self._claimed = time.monotonic()
        self._server_lead_ms = 0.0
        self._trace = Trace.of("", claim.entry_id, None, claim.traceparent)

    async def run(self) -> str:
        """Carry the job to its end; how it ended: `completed`, an error's code in lower case, or why it was let go.

        Raises CudaError when the device is lost; the job is left to another worker then.
        """
        renewals = self._renewals = asyncio.create_task(self._renew())
        try:
            return await self._carry()
        except Fenced:
            return self._let_go("fenced")
        except Stopped as stopped:
            return await self._give_up(stopped.why)
        finally:
            self._over.set()
            if self.job_id is not None:
                self._bench.engine.release(self.job_id)
            await renewals

    async def _renew(self) -> None:
        """Renew the lease until the attempt is over. No call under way is cut off: its connection would be lost."""
        while self.bounds.stop not in (Stop.LOST, Stop.STALLED):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._bench.renew_s):
                    await self._over.wait()
            if self._over.is_set():
                return
            renewal = await self._bench.transport.renew(self._held)
            if renewal is not Renewal.HELD:
                self.bounds.interrupt(Stop.LOST if renewal is Renewal.LOST else Stop.CANCEL)

    async def _carry(self) -> str:
        claim, bench = self._claim, self._bench
        self._server_lead_ms = await bench.transport.server_time_ms() - time.monotonic() * 1000
        question, refusal = await self._read()
        if claim.deliveries == 1:
            waited_ms = self._claimed * 1000 + self._server_lead_ms - claim.enqueued_ms
            bench.meters.queue_wait.observe(max(0.0, waited_ms) / 1000)
        if self.job_id is None:
            await bench.transport.dead_letter(claim, refusal or Internal("the payload names no job"))
            return self._let_go("dead_lettered")

        def opening(history: History) -> Event:
            error = refusal or self.bounds.too_late()
            if question is None or error is not None:
                return ErrorEvent.of(error or Internal("the job was not read"))
            return question.opening(bench.served, history, int(self._server_ms()))

        lease = await bench.transport.take(claim, self.job_id, self._trace, opening)
        if isinstance(lease, Closed):
            if self._head_start is not None:
                self._head_start.drop(bench.engine)
            return self._closed(lease)
        self._held = lease
        assert question is not None, "a refusal leaves nothing to take"
        return await self._answer(lease, question)

    async def _read(self) -> Reading:
        """The question, or why it is refused; notes the job's id, trace and deadline as soon as they are known.

        From here on the answer is begun or, from the second delivery on, what the prefix cache has of its prompt is
        reserved: the job's stream opens with the count.
        """
        claim, bench = self._claim, self._bench
        limit = bench.section.max_payload_bytes
        try:
            job = await self._worked(lambda: decode_job(claim.payload, limit))
            self._know(job.job_id, job)
            question = await self._worked(lambda: Question.of(job, bench.served, claim.entry_id, claim.enqueued_ms))
            if claim.deliveries == 1:
                self._head_start = await HeadStart.of(question, bench.served, bench.engine, self.bounds)
                cached = self._head_start.cached_tokens
            else:
                cached = await self.bounds.guard(bench.engine.reserve(job.job_id, question.prompt))
        except WorkerError as error:
            if self.job_id is None and "job_id" in error.details:
                self._know(error.details["job_id"])
            return None, error
        except Stopped:
            raise
        except Exception as error:
            self._log.error("job_fault", frames=frames_of(error))
            return None, Internal(f"{type(error).__name__} while the job was read")
        return replace(question, cached_tokens=cached), None

    async def _worked(self, work: Callable[[], T]) -> T:
        """The result of work on the payload: at once where it is small, else on a thread, so that the loop goes on."""
        if len(self._claim.payload) <= _SMALL_BYTES:
            return work()
        return await self.bounds.guard(asyncio.to_thread(work))

    def _know(self, job_id: str, job: Job | None = None) -> None:
        self.job_id = job_id
        self._trace = Trace.of(job_id, self._claim.entry_id, job, self._claim.traceparent)
        self._log = self._bench.log.bind(job_id=job_id, correlation_id=self._trace.correlation_id)
        if job is not None and job.deadline_ms is not None:
            self.bounds.expire_in((self._claim.enqueued_ms + job.deadline_ms - self._server_ms()) / 1000)

    async def _answer(self, lease: Lease, question: Question) -> str:
        transport = self._bench.transport
        answering = Answering(self._bench, self.bounds, lease, question, self._claimed, self._head_start)
        self._log = self._log.bind(epoch=lease.epoch, prompt_sha256=question.prompt_hash)
        published, prompt_tokens = len(lease.history.tokens), len(question.prompt)
        self._log.info("job_started", published=published, prompt_tokens=prompt_tokens)
        last: End | ErrorEvent
        try:
            await answering.run()
            last = answering.end()
        except Stopped as stopped:
            if stopped.why is not Stop.LOST:
                await self._say_last(lease, answering)
            raise
        except CudaError as error:
            await self._say_last(lease, answering)
            await self._abandon(lease, error)
            raise
        except Fenced:
            raise
        except WorkerError as error:
            last = ErrorEvent.of(error)
        except Exception as error:
            self._log.error("job_fault", frames=frames_of(error))
            last = ErrorEvent.of(Internal(f"{type(error).__name__} while the answer was written"))
        await transport.finish(lease, *answering.rest(), last)
        await transport.settle(lease)
        return self._ended(last, answering.figures)

    def _ended(self, last: End | ErrorEvent, figures: Figures) -> str:
        facts = {"tokens": figures.tokens, "text_chars": figures.chars, "text_sha256": figures.text_sha256}
        if isinstance(last, ErrorEvent):
            self._log.warning("job_failed", code=last.code, **facts)
            return last.code.lower()
        self._bench.meters.inference.observe(figures.total_s)
        self._log.info("job_completed", finish_reason=last.finish_reason, ttft_ms=last.ttft_ms, **facts)
        return "completed"

    def _closed(self, closed: Closed) -> str:
        """There was nothing to run, and the transport has settled it."""
        if closed.error is None:
            return self._let_go(closed.reason)
        fields = [fault["field"].partition(".")[0] for fault in closed.error.details.get("errors", ())]
        known = sorted({field if field in Job.model_fields else "unknown" for field in fields})
        self._log.warning("job_refused", code=closed.error.code, fields=known)
        return closed.error.code.lower()

    async def _give_up(self, why: Stop) -> str:
        """The job goes on elsewhere."""
        if why is Stop.DRAIN:
            await self._renew_no_more()
            await self._bench.transport.release(self._held)
            return self._let_go("handed_back")
        if why is Stop.STALLED and isinstance(self._held, Lease):
            await self._abandon(self._held, Internal("the engine made no step"))
        return self._let_go(why.name.lower())

    async def _say_last(self, lease: Lease, answering: Answering) -> None:
        """Publish what is drawn before the job goes on elsewhere; what can't be said in time is drawn again there."""
        if rest := answering.rest():
            with contextlib.suppress(TimeoutError, Fenced):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._bench.transport.append(lease, *rest)

    async def _abandon(self, lease: Lease, error: WorkerError) -> None:
        """Leave the job to another worker at once; if the server is away, the end of the lease does the same."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._renew_no_more()
                await self._bench.transport.abandon(lease, error)

    async def _renew_no_more(self) -> None:
        """Before an entry is handed over: a renewal that came after it would make it look held, for a whole lease."""
        self._over.set()
        if self._renewals is not None:
            await asyncio.wait([self._renewals])  # which cuts no call off, whatever happens to us

    def _let_go(self, outcome: str) -> str:
        self._log.info("job_let_go", outcome=outcome)
        return outcome

    def _server_ms(self) -> float:
        """The server's clock, by its lead over ours when the job was claimed."""
        return time.monotonic() * 1000 + self._server_lead_ms
