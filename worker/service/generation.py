"""The middle of an attempt: tokens from the engine, decoded, to the job's stream in batches.

`SpeculativeStart` adds a job to the engine before its lease is confirmed. `Generation` then reads
the inbox, checks the limits and publishes, alone or through `FlushLoop`, with one batch in flight;
while the server is slow the engine continues and the next batch is larger. What precedes and
follows is in `attempt.py`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from worker.answer import Answer, AttemptStats
from worker.backend import MemoryUse
from worker.config import ServiceSection
from worker.errors import CudaError, Internal, VramOom, WorkerError, as_exception
from worker.jobs import events
from worker.jobs.lease import Lease
from worker.jobs.reader import History
from worker.jobs.transport import Transport
from worker.runtime import LoadedModel
from worker.service.engine_thread import EngineThread, Inbox, TimedToken
from worker.service.flush_loop import FlushLoop
from worker.service.prepared_job import AttemptLimits, PreparedJob, StopReason
from worker.service.recent_speed import RecentSpeed
from worker.service.renewal_loop import RenewalLoop
from worker.service.reporter import FirstTokenGate
from worker.telemetry import Log, Metrics, trace_of

if TYPE_CHECKING:
    from worker.tracing.otlp import Tracing


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What all attempts of a worker share."""

    transport: Transport
    engine: EngineThread
    model: LoadedModel
    section: ServiceSection
    metrics: Metrics
    log: Log
    memory: Callable[[], MemoryUse]
    """The last measured memory use; does not query the device."""
    first_token_gate: FirstTokenGate
    flush_loop: FlushLoop
    renewal_loop: RenewalLoop
    speed: RecentSpeed
    tracing: Tracing | None = None
    """None if no spans are sent."""


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

    def __init__(
        self, context: WorkerContext, limits: AttemptLimits, job: PreparedJob, sequence_id: str, *, paused: bool
    ) -> None:
        self.job = job
        self._sequence_id = sequence_id
        self.answer = self._with_own_id(job.answer(context.model, History()))
        self.inbox = Inbox(limits.wake.set)
        self.cached_tokens = 0
        """Prompt tokens that the engine found in the prefix cache and does not compute."""
        self._state: Literal["running", "paused", "discarded"] = "paused" if paused else "running"
        self._context = context
        self._limits = limits

    @classmethod
    async def begin(
        cls, context: WorkerContext, limits: AttemptLimits, job: PreparedJob, sequence_id: str, *, paused: bool
    ) -> SpeculativeStart:
        """Add the answer to the engine. Returns at its first launch or, if paused, at once.

        `sequence_id` is unique among the attempts of the worker: two may be at the same job, if it
        has two queue entries.

        Raises as `AttemptLimits.guard` does. The caller releases the job's sequence in the end.
        """
        start = cls(context, limits, job, sequence_id, paused=paused)
        added = context.engine.add(start.answer.sequence, start.inbox, paused=paused)
        start.cached_tokens = await limits.guard(added)
        return start

    def discard(self) -> None:
        """Remove the sequence from the engine, without waiting.

        Raises CudaError if the device was lost while the sequence ran; other errors do not matter.
        """
        self._state = "discarded"
        self._context.engine.release(self.answer.sequence.id)
        if isinstance(self.inbox.error, CudaError):
            raise self.inbox.error

    async def continue_from(self, history: History) -> Answer:
        """The answer that continues `history`; discards a running start with another history."""
        if history.started is None:
            return self.answer
        if self._state == "running":
            self.discard()
        model = self._context.model
        if history.tokens:  # detokenizing all published tokens would block the event loop
            answer = await self._limits.guard(asyncio.to_thread(self.job.answer, model, history))
        else:
            answer = self.job.answer(model, history)
        self.answer = self._with_own_id(answer)
        return self.answer

    def _with_own_id(self, answer: Answer) -> Answer:
        answer.sequence.id = self._sequence_id
        return answer

    async def confirm(self) -> None:
        """Have the engine compute the answer of `continue_from`, unless it does already."""
        if self._state == "paused":
            await self._context.engine.resume(self.answer.sequence)
        elif self._state == "discarded":
            self.inbox = Inbox(self._limits.wake.set)
            self.cached_tokens = await self._context.engine.add(self.answer.sequence, self.inbox)
        self._state = "running"


class TokenBuffer:
    """One attempt's unpublished tokens. An event has at most `flush_tokens` of them."""

    def __init__(self, section: ServiceSection) -> None:
        self._size = section.flush_tokens
        self._tokens: list[events.Token] = []
        self._first = True

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def full(self) -> bool:
        """Whether the tokens are to be published at once."""
        return len(self._tokens) >= self._size

    @property
    def has_first(self) -> bool:
        """Whether the attempt's first token is in the buffer."""
        return self._first and bool(self._tokens)

    def add(self, tokens: Iterable[events.Token]) -> None:
        """Add tokens with consecutive indices."""
        self._tokens += tokens

    def take(self) -> list[events.Event]:
        """Remove all tokens and return them as events."""
        tokens, self._tokens = self._tokens, []
        self._first = self._first and not tokens
        starts = range(0, len(tokens), self._size)
        return [events.Tokens(tokens=tuple(tokens[start : start + self._size])) for start in starts]


class Generation:
    """One epoch of one answer. Call `run`, then finish the job with `unpublished` and `end`."""

    def __init__(
        self,
        context: WorkerContext,
        limits: AttemptLimits,
        lease: Lease,
        start: SpeculativeStart,
        claimed: float,
        submitted: float,
    ) -> None:
        self.stats = AttemptStats(claimed)
        self._wait_s = claimed - submitted
        self.lease = lease
        self._context = context
        self._limits = limits
        self._start = start
        self._answer = start.answer
        self.unpublished = TokenBuffer(context.section)
        """The tokens that are drawn and not published."""
        self._published = len(lease.history.tokens)
        self._replayed = 0
        self._left_engine = False
        """Whether the engine itself has ended the sequence."""
        self._metrics_at = math.inf
        self._error: Exception | None = None
        """What ends the attempt, found outside of its task."""
        self._append_requested = False
        self._appending = False

    async def run(self) -> None:
        """Draw and publish until the answer or the attempt ends.

        Raises what `AttemptLimits.check` raises, the engine's WorkerError, Internal for another
        fault of the engine, and Fenced. The engine has removed the sequence then, unless it hangs.
        """
        context, start = self._context, self._start
        answer = self._answer = await start.continue_from(self.lease.history)
        if answer.finish_reason is not None:  # the published tokens are the whole answer
            return
        self._limits.start_timeout()
        await start.confirm()
        context.metrics.tokens_in.inc(len(start.job.prompt))
        if context.model.engine.settings.prefix_cache:
            context.metrics.prefix_queries.inc(len(start.job.prompt))
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
            stop_token=self._answer.stop_token,
        )

    async def _follow(self, answer: Answer) -> None:
        """Wait for the end. Most tokens are read and published by `FlushLoop`."""
        context, inbox = self._context, self._start.inbox
        self._metrics_at = time.monotonic() + context.section.metrics_ms / 1000
        inbox.wake = self._on_items
        try:
            while True:
                self._read_inbox()
                if self._error is not None:
                    raise self._error
                if answer.finish_reason is not None:
                    return
                self._limits.check(self._replaying)
                late = self._metrics_at + 2 * context.section.flush_ms / 1000  # usually published with tokens
                if self._append_requested or self.unpublished.has_first or late <= time.monotonic():
                    await self._append()
                else:
                    await self._limits.wait(late, self._replaying)
        finally:
            inbox.wake = self._limits.wake.set
            context.flush_loop.discard(self)

    def _on_items(self) -> None:
        """Read the inbox at once if it is urgent, else within `flush_ms`."""
        if not self._start.inbox.urgent:
            self._context.flush_loop.add(self)
            return
        self._read_inbox()
        if self._ended or self.unpublished.has_first:
            self._limits.wake.set()
        elif self.unpublished:
            self._context.flush_loop.add(self, at_once=self.unpublished.full)

    async def _append(self) -> None:
        self._append_requested, self._appending = False, True
        try:
            await self._context.transport.append(self.lease, *self._take_due())
        finally:
            self._appending = False
        if self.stats.tokens:  # during a long prefill, metrics precede the first token
            self._context.first_token_gate.open()

    def _take_due(self) -> list[events.Event]:
        due, now = self.unpublished.take(), time.monotonic()
        if self._metrics_at <= now:
            self._metrics_at = now + self._context.section.metrics_ms / 1000
            due.append(self._metrics())
        return due

    @property
    def _ended(self) -> bool:
        return self._error is not None or self._answer.finish_reason is not None

    @property
    def idle(self) -> bool:
        """See `TokenSource.idle`."""
        return not (self._appending or self._append_requested or self.lease.writing.locked())

    def stage(self) -> bool:
        """See `TokenSource.stage`. The last tokens are left to the task: they precede `end`."""
        self._read_inbox()
        try:
            if not self._ended:
                self._context.transport.stage(self.lease, self._take_due())
                return True
        except BaseException as error:
            self._fail(as_exception(error))
        self._limits.wake.set()
        return False

    def request_append(self) -> None:
        """See `TokenSource.request_append`."""
        self._append_requested = True
        self._limits.wake.set()

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._limits.wake.set()

    @property
    def _replaying(self) -> bool:
        return 0 < self._replayed < self._published

    def _read_inbox(self) -> None:
        """Decode the drawn tokens into `unpublished`, and note the end of the sequence."""
        inbox, answer = self._start.inbox, self._answer
        error = inbox.error
        try:
            self._push(answer, inbox.take())
        except BaseException as fault:  # also a panic of a native library
            self._fail(as_exception(fault))
        if error is not None and (answer.finish_reason is None or isinstance(error, CudaError)):
            self._left_engine = True
            self._fail(self._job_error(error))

    def _push(self, answer: Answer, items: Iterable[TimedToken]) -> None:
        tokens: list[events.Token] = []
        times: list[float] = []
        try:
            for drawn, at in items:
                if drawn.finish is not None:
                    self._left_engine = True
                if drawn.replayed:
                    self._replayed += 1
                    self._limits.exclude_replay(at, last=self._replayed == self._published)
                elif (token := answer.push(drawn)) is not None:
                    tokens.append(token)
                    times.append(at)
        finally:
            if tokens:
                self._add(tokens, times)

    def _add(self, tokens: Sequence[events.Token], times: Sequence[float]) -> None:
        """Count the tokens and buffer them for their publication."""
        metrics, first = self._context.metrics, not self.stats.tokens
        metrics.inter_token.observe(self.stats.count("".join([token.t for token in tokens]), times))
        metrics.tokens_generated.inc(len(tokens))
        self._context.speed.count_tokens(len(tokens))
        if first:
            self._context.speed.first_token(self.stats.ttft_s)
            metrics.first_token.observe([self.stats.ttft_s])
            if not self._published:
                metrics.request_first_token.observe(self._wait_s + self.stats.ttft_s)
            if not self._answer.stops_at_text:
                self._start.inbox.limit = self._context.section.flush_tokens
        self.unpublished.add(tokens)

    def _job_error(self, error: Exception) -> WorkerError:
        """The job's error after a failed step."""
        if isinstance(error, WorkerError):
            return error
        if isinstance(error, MemoryError):
            return VramOom("an allocation failed while the job ran")
        self._context.log.error("engine_fault", job_id=self.lease.job_id, trace=trace_of(error))
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
