"""What a worker holds of a job: a claimed queue entry, then a lease with the events of its epoch.

`transport.py` creates and writes them.
"""

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from worker.jobs.events import EncodedEvent, ErrorEvent, Event, Tokens, encode_fields, now_ms
from worker.jobs.keys import START, epoch_of, split_id
from worker.jobs.protocol import Trace
from worker.jobs.reader import History


class Fenced(Exception):
    """Another worker owns the job, or its keys are gone: write and acknowledge nothing more."""


class Renewal(Enum):
    """Result of a renewal."""

    HELD = "held"
    LOST = "lost"
    """Another consumer has the entry: stop immediately, as if fenced."""
    DELETED = "deleted"
    """The entry was deleted from the queue: the job must end as cancelled."""
    CANCEL_REQUESTED = "cancel_requested"
    """Held, and the job must end as cancelled."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A queue entry that is pending for this worker."""

    queue: str
    entry_id: str
    payload: bytes
    traceparent: str | None
    """The entry's own, which overrides the job's."""
    deliveries: int

    @property
    def enqueued_ms(self) -> int:
        """When the job was submitted, by the server's clock; deadlines count from here."""
        return split_id(self.entry_id)[0]

    def dead_letter(self, job_id: str, reason: str, attempts: int, last_error: str) -> dict[str, bytes]:
        """Fields of the entry in the dead-letter stream."""
        texts = {"job_id": job_id, "reason": reason, "attempts": str(attempts), "last_error": last_error}
        texts |= {"entry": self.entry_id, "traceparent": self.traceparent or ""}
        return {"p": self.payload} | {name: text.encode() for name, text in texts.items()}


@dataclass(frozen=True, slots=True)
class Closed:
    """Nothing to run. The entry is settled, or after `lost` pending for another consumer."""

    reason: Literal["over", "duplicate", "lost", "refused", "cancelled", "dead_lettered"]
    """`over`: it had ended before. `duplicate`: another queue entry has the job. `refused`: the
    opening event was an error."""
    error: ErrorEvent | None = None
    """The terminal event, if this call wrote it."""
    cancelled_before: bool = field(default=False, compare=False)
    """The job was cancelled while it waited, and this is the first delivery of its entry."""


@dataclass(slots=True)
class Lease:
    """One epoch of one job. Keeps its events, to write them again if the server loses them.

    Renewed with `Transport.renew`, which runs `lua/renew.lua` on the server.
    """

    claim: Claim
    job_id: str
    trace: Trace
    history: History
    base: str
    """The stream's last id before this epoch."""
    base_attempt: str
    """The attempt before this one: `JobState.attempt`."""
    taken_ms: int
    """When `take` was called. With the worker's name it identifies the attempt."""
    log: list[EncodedEvent]
    """Event n has the id `<epoch>-n`."""
    last_id: str
    """The stream's last id, as last reported by the server."""
    tokens: int
    """Number of tokens of the answer so far, those of earlier epochs included."""
    ending: tuple[str, str] = ("running", "")
    """The job's state and error code after the last event, once `finish` was called."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held during an append: one batch is in flight at a time."""
    _envelope: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """The envelope's fields, which are the same in all events but for the time."""

    @property
    def epoch(self) -> int:
        """The fencing token: the first number of every event id."""
        return self.history.epoch

    def stage(self, event: Event, worker_id: str) -> None:
        """Encode an event into the log. Raises ValueError if a token's index is not the next."""
        for token in event.tokens if isinstance(event, Tokens) else ():
            if token.i != self.tokens:
                raise ValueError(f"token {token.i} where {self.tokens} is the next")
            self.tokens += 1
        if not self._envelope:
            self._envelope = self.trace.envelope(self.job_id, self.epoch, worker_id).to_fields()
        values = self._envelope | {"ts_ms": now_ms()} | event.to_fields()
        self.log.append(encode_fields(event.kind, values, self.trace.encoding))

    def unwritten(self) -> list[tuple[str, EncodedEvent]]:
        """Events of the log above `last_id`, with their ids."""
        first = 0 if self.last_id == self.base else min(split_id(self.last_id)[1] + 1, len(self.log))
        return [(f"{self.epoch}-{seq}", event) for seq, event in enumerate(self.log[first:], first)]

    def owns(self, last_id: str) -> bool:
        """Whether a stream that ends at `last_id` is this epoch's, possibly with writes lost."""
        return last_id == self.base != START or epoch_of(last_id) == self.epoch
