"""The middle of an attempt: tokens from the engine, decoded, to the job's stream in batches.

`SpeculativeStart` adds a job to the engine before its lease is confirmed. `Generation` then reads
the inbox, checks the limits and publishes, with one batch in flight; while the server is slow the
engine continues and the next batch is larger. What precedes and follows is in `attempt.py`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from worker.answer import Answer, AttemptStats
from worker.backend import MemoryUse
from worker.config import ServiceSection
from worker.errors import CudaError, Internal, VramOom, WorkerError
from worker.jobs import events
from worker.jobs.reader import History
from worker.jobs.transport import Lease, Transport
from worker.runtime import LoadedModel
from worker.service.engine_thread import EngineThread, Inbox, TimedToken
from worker.service.prepared_job import AttemptLimits, PreparedJob, StopReason
from worker.service.reporter import FirstTokenGate
from worker.telemetry import Log, Metrics, trace_of


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What all attempts of a worker share."""

    transport: Transport
    engine: EngineThread
    model: LoadedModel
    section: ServiceSection
    renew_s: float
    metrics: Metrics
    log: Log
    memory: Callable[[], MemoryUse]
    """The last measured memory use; does not query the device."""
    first_token_gate: FirstTokenGate


class SpeculativeStart:
    """A job's answer, added to the engine while the lease is not confirmed.

    | delivery of the entry | sequence | reason |
    | --- | --- | --- |
    | first, at once | runs at once | `take` and prefill overlap |
    | first, after a wait | paused | the job may be cancelled or doubled by now: no step for it |
    | later | paused | `take` counts failed attempts: it precedes a step that may kill the worker |

    In both cases the cached prefix is held, whose length the job's stream opens with. Drawn tokens
    are not read before `take` has granted the lease.
    """

    def __init__(self, context: WorkerContext, limits: AttemptLimits, job: PreparedJob, *, paused: bool) -> None:
        self.job = job
        self.answer = job.answer(context.model, History())
        self.inbox = Inbox(limits.wake.set)
        self.cached_tokens = 0
        """Prompt tokens that the engine found in the prefix cache and does not compute."""
        self._state: Literal["running", "paused", "discarded"] = "paused" if paused else "running"
        self._context = context
        self._limits = limits

    @classmethod
    async def begin(
        cls, context: WorkerContext, limits: AttemptLimits, job: PreparedJob, *, paused: bool
    ) -> SpeculativeStart:
        """Add the answer to the engine. Returns at its first launch or, if paused, at once.

        Raises as `AttemptLimits.guard` does. The caller releases the job's sequence in the end.
        """
        start = cls(context, limits, job, paused=paused)
        added = context.engine.add(start.answer.sequence, start.inbox, paused=paused)
        start.cached_tokens = await limits.guard(added)
        return start

    def discard(self) -> None:
        """Remove the sequence from the engine, without waiting.

        Raises CudaError if the device was lost while the sequence ran; other errors do not matter.
        """
        self._state = "discarded"
        self._context.engine.release(self.answer.sequence.id)
        for item in self.inbox.take():
            if isinstance(item, CudaError):
                raise item

    async def continue_from(self, history: History) -> Answer:
        """The answer that continues `history`; discards a running start with another history."""
        if history.started is None:
            return self.answer
        if self._state == "running":
            self.discard()
        model = self._context.model
        if history.tokens:  # detokenizing all published tokens would block the event loop
            self.answer = await self._limits.guard(asyncio.to_thread(self.job.answer, model, history))
        else:
            self.answer = self.job.answer(model, history)
        return self.answer

    async def confirm(self) -> None:
        """Have the engine compute the answer of `continue_from`, unless it does already."""
        if self._state == "paused":
            await self._context.engine.resume(self.answer.sequence)
        elif self._state == "discarded":
            self.inbox = Inbox(self._limits.wake.set)
            self.cached_tokens = await self._context.engine.add(self.answer.sequence, self.inbox)
        self._state = "running"


class TokenBuffer:
    """One attempt's unpublished tokens: the first is due at once, the others a few at a time.

    An entry has at most `flush_tokens` tokens. Times are of `time.monotonic`.
    """

    def __init__(self, section: ServiceSection) -> None:
        self.due = math.inf
        """When to call `take` next; infinite while the buffer is empty."""
        self._size = section.flush_tokens
        self._delay_s = section.flush_ms / 1000
        self._tokens: list[events.Token] = []
        self._first = True

    def add(self, token: events.Token, now: float) -> None:
        """Add a token that was received at `now`."""
        self._tokens.append(token)
        if self._first or len(self._tokens) >= self._size:
            self.due = now
        elif len(self._tokens) == 1:
            self.due = now + self._delay_s
        self._first = False

    def take(self) -> list[events.Event]:
        """Remove all tokens and return them as events."""
        tokens, self._tokens, self.due = self._tokens, [], math.inf
        starts = range(0, len(tokens), self._size)
        return [events.Tokens(tokens=tuple(tokens[start : start + self._size])) for start in starts]


class Generation:
    """One epoch of one answer. Call `run`, then finish the job with `unpublished` and `end`."""

    def __init__(
        self, context: WorkerContext, limits: AttemptLimits, lease: Lease, start: SpeculativeStart, claimed: float
    ) -> None:
        self.stats = AttemptStats(claimed)
        self._context = context
        self._limits = limits
        self._lease = lease
        self._start = start
        self._answer = start.answer
        self.unpublished = TokenBuffer(context.section)
        """The tokens that are drawn and not published."""
        self._published = len(lease.history.tokens)
        self._replayed = 0
        self._left_engine = False
        """Whether the engine itself has ended the sequence."""

    async def run(self) -> None:
        """Draw and publish until the answer or the attempt ends.

        Raises what `AttemptLimits.check` raises, the engine's WorkerError, Internal for another
        fault of the engine, and Fenced. The engine has removed the sequence then, unless it hangs.
        """
        context, start = self._context, self._start
        answer = self._answer = await start.continue_from(self._lease.history)
        if answer.finish_reason is not None:  # the published tokens are the whole answer
            return
        self._limits.start_timeout()
        await start.confirm()
        context.metrics.tokens_in.inc(len(start.job.prompt))
        context.metrics.prefix_hits.inc(start.cached_tokens)
        try:
            await self._follow(answer)
        finally:
            if not self._left_engine and self._limits.stop_reason is not StopReason.STALLED:
                await context.engine.abort(answer.sequence.id)

    def end(self) -> events.End:
        """The event that ends a complete answer, with this attempt's own times."""
        assert self._answer.finish_reason is not None, "the answer is not complete"
        return events.End(
            finish_reason=self._answer.finish_reason,
            tokens_out=self._published + self.stats.tokens,
            prompt_tokens=len(self._start.job.prompt),
            ttft_ms=round(self.stats.ttft_s * 1000, 3),
            decode_ms=round(self.stats.decode_s * 1000, 3),
            stop_sequence=self._answer.stop_sequence,
        )

    async def _follow(self, answer: Answer) -> None:
        interval_s = self._context.section.metrics_ms / 1000
        metrics_at = time.monotonic() + interval_s
        while True:
            self._read_inbox(answer)
            if answer.finish_reason is not None:
                return
            self._limits.check(self._replaying)
            now = time.monotonic()
            due = self.unpublished.take() if self.unpublished.due <= now else []
            if metrics_at <= now:
                metrics_at = now + interval_s
                due.append(self._metrics())
            if due:
                await self._context.transport.append(self._lease, *due)
                if self.stats.tokens:  # during a long prefill, metrics precede the first token
                    self._context.first_token_gate.open()
            else:
                await self._limits.wait(min(self.unpublished.due, metrics_at), self._replaying)

    @property
    def _replaying(self) -> bool:
        return 0 < self._replayed < self._published

    def _read_inbox(self, answer: Answer) -> None:
        for item in self._start.inbox.take():
            if isinstance(item, TimedToken):
                self._push(answer, item)
            elif answer.finish_reason is None or isinstance(item, CudaError):
                self._left_engine = True
                raise self._job_error(item)

    def _push(self, answer: Answer, drawn: TimedToken) -> None:
        self._left_engine = self._left_engine or drawn.token.finish is not None
        if drawn.token.replayed:
            self._replayed += 1
            self._limits.exclude_replay(drawn.at, last=self._replayed == self._published)
            return
        token = answer.push(drawn.token)
        if token is None:
            return
        since = self.stats.count(token.t, drawn.at)
        metrics = self._context.metrics
        metrics.tokens_generated.inc()
        if since is None:
            metrics.first_token.observe(self.stats.ttft_s)
        else:
            metrics.inter_token.observe(since)
        self.unpublished.add(token, time.monotonic())

    def _job_error(self, error: Exception) -> WorkerError:
        """The job's error after a failed step."""
        if isinstance(error, WorkerError):
            return error
        if isinstance(error, MemoryError):
            return VramOom("an allocation failed while the job ran")
        self._context.log.error("engine_fault", job_id=self._lease.job_id, trace=trace_of(error))
        return Internal(f"{type(error).__name__} in the engine")

    def _metrics(self) -> events.Metrics:
        memory = self._context.memory()
        return events.Metrics(
            tokens_out=self._published + self.stats.tokens,
            tokens_per_second=round(self.stats.tokens_per_second, 3),
            decode_ms=round(self.stats.decode_s * 1000, 3),
            vram_used=memory.used,
            vram_free=memory.free,
        )
