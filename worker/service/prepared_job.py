"""A job ready for the engine, and the conditions that end its attempt early.

`PreparedJob` is a payload decoded, checked against the model and tokenized, with the grammar of its
answer. It decides which event opens the job's stream, from what earlier attempts published.
`AttemptLimits` holds a stop request, the job's deadline and the inference timeout. Neither uses a
server or a device; `attempt.py` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from functools import cached_property
from typing import TypeVar

import numpy as np

from worker.answer import Answer, job_grammar, tokenize_job
from worker.errors import Cancelled, InferenceTimeout, InvalidRequest
from worker.jobs.events import Event, Resumed, Started
from worker.jobs.protocol import Job, Resolved
from worker.jobs.reader import History
from worker.jobs.transport import ENTRY_DELETED
from worker.runtime import LoadedModel
from worker.sampling import Grammar
from worker.service.continuation import CannotContinue

T = TypeVar("T")

_MAX_ENQUEUED_MS = 253_402_300_799_000
"""The end of the year 9999: an entry's id may contain any time."""


def enqueued_at(enqueued_ms: int) -> datetime:
    """The time of submission, which chat templates may print."""
    return datetime.fromtimestamp(min(enqueued_ms, _MAX_ENQUEUED_MS) / 1000, UTC)


def needs_thread(job: Job) -> bool:
    """Whether preparing the job may wait for a child process, which the event loop must not do.

    Such a process renders chats and compiles grammars.
    """
    return job.messages is not None or job.response_format is not None


@dataclass(frozen=True)
class PreparedJob:
    """A job that this worker's model can answer."""

    job: Job
    prompt: list[int]
    resolved: Resolved
    enqueued_ms: int
    grammar: Grammar | None = None

    @classmethod
    def of(cls, job: Job, model: LoadedModel, entry_id: str, enqueued_ms: int) -> PreparedJob:
        """Tokenize the job, resolve its parameters and compile its grammar. Raises InvalidRequest.

        A job with a chat or a grammar takes up to seconds, see `needs_thread`.
        """
        prompt, resolved = tokenize_job(job, model, enqueued_at(enqueued_ms), entry_id)
        return cls(job, prompt, resolved, enqueued_ms, job_grammar(job, model.tokenizer, prompt))

    @cached_property
    def prompt_hash(self) -> str:
        """SHA-256 of the ids as little-endian uint32, in hex; the engine starts without it."""
        return hashlib.sha256(np.asarray(self.prompt, "<u4").tobytes()).hexdigest()

    def opening(self, model: LoadedModel, history: History, now_ms: int, cached_tokens: int) -> Event:
        """The first event of the attempt, `started` or `resumed`. Raises CannotContinue."""
        started = history.started
        if started is None:
            return Started(
                model=model.name,
                seed=self.resolved.seed,
                max_tokens=self.resolved.max_tokens,
                prompt_tokens=len(self.prompt),
                cached_tokens=cached_tokens,
                started_at=now_ms,
                enqueued_at=self.enqueued_ms,
                prompt_hash=self.prompt_hash,
                fingerprint=model.fingerprint,
                numerics=model.numerics_id,
            )
        left = model.engine.context - len(self.prompt)
        if started.max_tokens > left:
            constraint = f"at most {left}: what the context of the worker that continues leaves"
            raise CannotContinue(InvalidRequest.of(("max_tokens", constraint, started.max_tokens)), history)
        if any(not 0 <= token.id < model.vocab_size for token in history.tokens):
            constraint = "published by a model with another vocabulary"
            raise CannotContinue(InvalidRequest.of(("model", constraint, None)), history)
        ours = (model.fingerprint, self.prompt_hash, model.numerics_id)
        equal = bool(model.numerics_id) and ours == (started.fingerprint, started.prompt_hash, started.numerics)
        exact = history.exact and equal
        return Resumed(from_i=len(history.tokens), reason=history.reason, exact=exact)

    def answer(self, model: LoadedModel, history: History) -> Answer:
        """The answer that continues `history`, with the parameters resolved when it started."""
        resolved, first = self.resolved, history.started
        if first is not None:
            resolved = Resolved(first.model, len(self.prompt), first.max_tokens, first.seed)
        published = [token.id for token in history.tokens]
        return Answer(self.job, resolved, model.tokenizer, self.prompt, published, self.grammar)


class StopReason(IntEnum):
    """Why an attempt must stop; the highest reason counts."""

    OTHER_MODEL = 0
    """The job names a model that another worker serves: leave it to that one."""
    DRAIN = 1
    """The grace period is over: hand the job back."""
    CANCEL = 2
    DELETED = 3
    """The queue entry was deleted: end the job as cancelled."""
    LOST = 4
    """Another worker has the queue entry: write nothing more."""
    STALLED = 5
    """The engine hangs and the worker will exit: leave the job without waiting for the engine."""


class AttemptInterrupted(Exception):
    """The attempt must stop for `reason`, which is no error of the job."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.name)
        self.reason = reason


class AttemptLimits:
    """What ends one attempt early. The engine may run for `timeout_s` seconds, without the replay.

    Times are of `time.monotonic`.
    """

    def __init__(self, timeout_s: float) -> None:
        self.wake = asyncio.Event()
        """Set whenever the attempt must look at its inbox or at its limits."""
        self.stop_reason: StopReason | None = None
        self._timeout_s = timeout_s
        self._deadline = self._timeout_at = math.inf
        self._replay_began: float | None = None

    def interrupt(self, reason: StopReason) -> None:
        """Stop the attempt at the next token boundary."""
        self.stop_reason = reason if self.stop_reason is None else max(self.stop_reason, reason)
        self.wake.set()

    def set_deadline(self, in_s: float) -> None:
        """Set the job's deadline, in seconds from now; negative if it has passed."""
        self._deadline = time.monotonic() + in_s

    def start_timeout(self) -> None:
        """Start the inference timeout."""
        self._timeout_at = time.monotonic() + self._timeout_s

    def exclude_replay(self, at: float, last: bool) -> None:
        """Count a replayed token, drawn at `at`. From the first to the last the timeout pauses."""
        self._replay_began = at if self._replay_began is None else self._replay_began
        if last:
            self._timeout_at += at - self._replay_began

    def deadline_error(self) -> InferenceTimeout | None:
        """The job's error if its deadline has passed."""
        if time.monotonic() < self._deadline:
            return None
        return InferenceTimeout("the job's deadline has passed")

    def check(self, replaying: bool = False) -> None:
        """Raise AttemptInterrupted, Cancelled or InferenceTimeout if the attempt must end."""
        if self.stop_reason is StopReason.CANCEL:
            raise Cancelled("cancelled by request")
        if self.stop_reason is StopReason.DELETED:
            raise Cancelled(ENTRY_DELETED)
        if self.stop_reason is not None:
            raise AttemptInterrupted(self.stop_reason)
        if error := self.deadline_error():
            raise error
        if time.monotonic() >= self._timeout_at and not replaying:
            raise InferenceTimeout(f"no end after {self._timeout_s:g} s of inference")

    async def wait(self, until: float = math.inf, replaying: bool = False) -> None:
        """Wait for `wake`, at most until `until` or until a limit is reached."""
        nearest = min(until, self._deadline, math.inf if replaying else self._timeout_at)
        left = None if nearest == math.inf else max(0.0, nearest - time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left):
                await self.wake.wait()
        self.wake.clear()

    async def guard(self, work: Awaitable[T]) -> T:
        """The result of `work`. Cancels it and raises as `check` does if the attempt ends first."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self.wake.set())
        try:
            while not task.done():
                self.check()
                await self.wait()
            return task.result()
        finally:
            task.cancel()
