"""The middle of an attempt: the engine draws tokens, the answer turns them into text, the stream gets them in batches.

One coroutine hears, checks the bounds and publishes, with one batch in flight; while the server is slow the engine goes
on and the next batch is larger. What happens before and after stands in `attempt.py`.
"""

from __future__ import annotations

import asyncio
import time

from worker.answer import Answer
from worker.errors import CudaError, Internal, VramOom, WorkerError
from worker.jobs.events import End, Event, Metrics
from worker.jobs.lease import Lease
from worker.service.bounds import Bounds, Stop
from worker.service.engine_thread import Drawn, Inbox
from worker.service.head_start import HeadStart
from worker.service.outbox import Figures, Outbox
from worker.service.question import Question
from worker.service.workbench import Workbench
from worker.telemetry import trace_of


class Answering:
    """One epoch of one answer. `run` it, then finish the job with `rest` and `end`."""

    def __init__(
        self,
        bench: Workbench,
        bounds: Bounds,
        lease: Lease,
        question: Question,
        claimed: float,
        head_start: HeadStart | None = None,
    ) -> None:
        self.figures = Figures(claimed)
        self._bench = bench
        self._bounds = bounds
        self._lease = lease
        self._question = question
        self._head_start = head_start
        self._answer: Answer | None = None
        self._inbox = Inbox(bounds.wake.set)
        self._outbox = Outbox(bench.section)
        self._replay = len(lease.history.tokens)
        self._replayed = 0
        self._released = False
        """Whether the engine itself has ended the sequence."""

    async def run(self) -> None:
        """Draw and publish until the answer ends, or until something ends it before.

        Raises what `Bounds.check` raises, the engine's WorkerError, Internal for another fault of the engine, and
        Fenced. The engine has let go of the sequence then, unless it hangs.
        """
        bench = self._bench
        begun = self._begun()
        self._answer = answer = begun or await self._made()
        if answer.finish_reason is not None:  # what was published meets an end already
            return
        self._bounds.start_engine()
        if begun is None:
            await bench.engine.add(answer.sequence, self._inbox)
        bench.meters.tokens_in.inc(len(self._question.prompt))
        bench.meters.prefix_hits.inc(self._question.cached_tokens)
        try:
            await self._follow(answer)
        finally:
            if not self._released and self._bounds.stop is not Stop.STALLED:
                await bench.engine.abort(answer.sequence.id)

    def rest(self) -> list[Event]:
        """What is drawn and not published yet."""
        return self._outbox.take()

    def end(self) -> End:
        """The event that ends a complete answer. Times are this attempt's own: from its claim to its first token."""
        assert self._answer is not None, "`run` comes first"
        assert self._answer.finish_reason is not None, "the answer goes on"
        return End(
            finish_reason=self._answer.finish_reason,
            tokens_out=self._replay + self.figures.tokens,
            prompt_tokens=len(self._question.prompt),
            ttft_ms=round(self.figures.ttft_s * 1000, 3),
            decode_ms=round(self.figures.decode_s * 1000, 3),
            stop_sequence=self._answer.stop_sequence,
        )

    def _begun(self) -> Answer | None:
        """The answer that the engine is at already, if it is the one that the lease's history asks for."""
        start = self._head_start
        if start is None:
            return None
        if start.serves(self._lease.history):
            self._inbox = start.inbox
            return start.answer
        start.drop(self._bench.engine)
        return None

    async def _made(self) -> Answer:
        served, history = self._bench.served, self._lease.history
        if not self._replay:
            return self._question.answer(served, history)
        # Every published token goes through the detokenizer again: not on the loop.
        return await self._bounds.guard(asyncio.to_thread(self._question.answer, served, history))

    async def _follow(self, answer: Answer) -> None:
        pause_s = self._bench.section.metrics_ms / 1000
        metrics_at = time.monotonic() + pause_s
        while True:
            self._hear(answer)
            if answer.finish_reason is not None:
                return
            self._bounds.check(self._replaying)
            now = time.monotonic()
            events = self._outbox.take() if self._outbox.due <= now else []
            if metrics_at <= now:
                metrics_at = now + pause_s
                events.append(self._metrics())
            if events:
                await self._bench.transport.append(self._lease, *events)
                if self.figures.tokens:  # figures of a long prefill may come before the first one
                    self._bench.quiet.end()
            else:
                await self._bounds.wait(min(self._outbox.due, metrics_at), self._replaying)

    @property
    def _replaying(self) -> bool:
        return 0 < self._replayed < self._replay

    def _hear(self, answer: Answer) -> None:
        for item in self._inbox.take():
            if isinstance(item, Drawn):
                self._take(answer, item)
            elif answer.finish_reason is None or isinstance(item, CudaError):
                self._released = True
                raise self._fault(item)

    def _take(self, answer: Answer, drawn: Drawn) -> None:
        self._released = self._released or drawn.token.finish is not None
        if drawn.token.replayed:
            self._replayed += 1
            self._bounds.replayed(drawn.at, last=self._replayed == self._replay)
            return
        token = answer.push(drawn.token)
        if token is None:
            return
        since = self.figures.count(token.t, drawn.at)
        meters = self._bench.meters
        meters.tokens_generated.inc()
        if since is None:
            meters.first_token.observe(self.figures.ttft_s)
        else:
            meters.inter_token.observe(since)
        self._outbox.add(token, time.monotonic())

    def _fault(self, error: Exception) -> WorkerError:
        """What a failed step means for the job."""
        if isinstance(error, WorkerError):
            return error
        if isinstance(error, MemoryError):
            return VramOom("an allocation failed while the job ran")
        self._bench.log.error("engine_fault", job_id=self._lease.job_id, trace=trace_of(error))
        return Internal(f"{type(error).__name__} in the engine")

    def _metrics(self) -> Metrics:
        memory = self._bench.memory()
        return Metrics(
            tokens_out=self._replay + self.figures.tokens,
            tokens_per_second=round(self.figures.rate, 3),
            decode_ms=round(self.figures.decode_s * 1000, 3),
            vram_used=memory.used,
            vram_free=memory.free,
        )
