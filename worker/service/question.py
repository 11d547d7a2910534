"""What a queue entry asks: its payload decoded, checked against the model and tokenized, before anything runs.

It decides what the job's stream opens with, from what earlier attempts published. No clock, no server, no device;
`attempt.py` drives it, on a thread of its own since a payload may hold megabytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

import numpy as np

from worker.answer import Answer, prompt_ids
from worker.errors import InvalidRequest
from worker.jobs.events import ErrorEvent, Event, Resumed, Started
from worker.jobs.lease import History
from worker.jobs.protocol import Job, Limits, Resolved
from worker.runtime import LoadedModel


@dataclass(frozen=True)
class Question:
    """A job that this worker's model can answer."""

    job: Job
    prompt: list[int]
    resolved: Resolved
    enqueued_ms: int
    cached_tokens: int = 0
    """How many of the prompt's are in the prefix cache, and reserved there."""

    @classmethod
    def of(cls, job: Job, served: LoadedModel, entry_id: str, enqueued_ms: int) -> Question:
        """Tokenize the job and fit it to the model. Raises InvalidRequest."""
        enqueued = datetime.fromtimestamp(min(enqueued_ms, _LATEST_MS) / 1000, UTC)
        prompt = prompt_ids(job, served.tokenizer, enqueued)
        resolved = job.resolve(Limits(served.name, served.vocab_size, served.engine.context), len(prompt), entry_id)
        return cls(job, prompt, resolved, enqueued_ms)

    @cached_property
    def prompt_hash(self) -> str:
        """See `prompt_hash`: found when it is asked for, as the engine begins without it."""
        return prompt_hash(self.prompt)

    def opening(self, served: LoadedModel, history: History, now_ms: int) -> Event:
        """What the attempt's epoch opens with: `started`, `resumed`, or an error where it can't be continued here."""
        started = history.started
        if started is None:
            return Started(
                model=served.name,
                seed=self.resolved.seed,
                max_tokens=self.resolved.max_tokens,
                prompt_tokens=len(self.prompt),
                cached_tokens=self.cached_tokens,
                started_at=now_ms,
                enqueued_at=self.enqueued_ms,
                prompt_hash=self.prompt_hash,
                fingerprint=served.fingerprint,
            )
        left = served.engine.context - len(self.prompt)
        if started.max_tokens > left:
            return _refusal(f"at most {left}: what the context of the worker that continues leaves", started.max_tokens)
        if any(not 0 <= token.id < served.vocab_size for token in history.tokens):
            return _refusal("published by a model with another vocabulary", None, field="model")
        exact = (started.fingerprint, started.prompt_hash) == (served.fingerprint, self.prompt_hash)
        return Resumed(from_i=len(history.tokens), reason=history.reason, exact=exact)

    def answer(self, served: LoadedModel, history: History) -> Answer:
        """The answer from where `history` leaves it, with what was resolved when it started."""
        resolved = self.resolved
        if history.started is not None:
            first = history.started
            resolved = Resolved(first.model, len(self.prompt), first.max_tokens, first.seed)
        published = [token.id for token in history.tokens]
        return Answer(self.job, resolved, served.tokenizer, self.prompt, published)


def prompt_hash(ids: Sequence[int]) -> str:
    """SHA-256 of token ids as little-endian uint32, in hex."""
    return hashlib.sha256(np.asarray(ids, "<u4").tobytes()).hexdigest()


def _refusal(constraint: str, value: int | None, field: str = "max_tokens") -> ErrorEvent:
    return ErrorEvent.of(InvalidRequest.of((field, constraint, value)))


_LATEST_MS = 253_402_300_799_000
"""The end of year 9999: an entry's id may name any time."""
