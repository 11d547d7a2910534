"""What a worker holds while it works on a job: the claim on a queue entry, then the lease on the job itself.

`transport.py` makes and moves these; nothing here talks to a server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import Literal

from worker.errors import WorkerError
from worker.jobs.events import ErrorEvent, Event, Started, Token, Tokens, decode_event
from worker.jobs.keys import START, epoch_of, order_of
from worker.jobs.protocol import Trace
from worker.jobs.streams import Record, Written


@dataclass(frozen=True, slots=True)
class Policy:
    """The protocol's times and bounds."""

    lease_s: float = 4.0
    """An entry that nobody renewed for so long may be taken over."""
    scan_s: float = 0.5
    """How often an idle worker looks for such entries."""
    retention_s: float = 24 * 3600.0
    """How long a settled job's keys live."""
    unsettled_s: float = 7 * 24 * 3600.0
    """How long they live while the job is not settled; pushed by each write."""
    max_attempts: int = 3
    """Attempts that end without a give-back and without one new token, before the job is dead-lettered."""
    max_deliveries: int = 20
    status_ttl_s: float = 15.0
    worker_events: int = 10_000
    """Kept, about, on a worker's own stream and on the control stream."""


class Fenced(Exception):
    """The job is somebody else's now, or its keys are gone. Drop it: write nothing more and never acknowledge it."""


class Renewal(Enum):
    """What a renewal found."""

    HELD = "held"
    LOST = "lost"
    """Somebody else holds the entry: stop at once, as if fenced."""
    CANCEL_REQUESTED = "cancel_requested"
    """Held, and the job is to end as cancelled."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A queue entry that is this worker's for one lease."""

    entry_id: str
    payload: bytes
    traceparent: str | None
    """The entry's own; it wins over the job's."""
    deliveries: int

    @property
    def enqueued_ms(self) -> int:
        """When it was submitted, by the server's clock; deadlines count from here."""
        return order_of(self.entry_id)[0]

    def dead_letter(self, job_id: str, reason: str, attempts: int, last_error: str) -> dict[str, bytes]:
        """The entry as the dead-letter stream keeps it."""
        words = {"job_id": job_id, "reason": reason, "attempts": str(attempts), "last_error": last_error}
        words |= {"entry": self.entry_id, "traceparent": self.traceparent or ""}
        return {"p": self.payload} | {name: word.encode() for name, word in words.items()}


@dataclass(frozen=True, slots=True)
class History:
    """What earlier attempts published. Everything about the next token is a function of the job and of this."""

    epoch: int = 1
    """Of the attempt that begins now."""
    started: Started | None = None
    tokens: tuple[Token, ...] = ()
    handed_back: bool = False
    """The last attempt ended by a give-back."""
    intact: bool = True
    """False where events are missing or can't be read: the job can't be continued then."""

    @property
    def reason(self) -> Literal["crash", "drain"]:
        """Why there is another attempt, as `resumed` says it."""
        return "drain" if self.handed_back else "crash"

    @classmethod
    def read(cls, records: Sequence[Record], epoch: int, handed_back: bool) -> History:
        """From a job's event stream, whole."""
        started: Started | None = None
        tokens: list[Token] = []
        try:
            for _, fields in records:
                decoded = decode_event(fields["type"].decode(), fields["p"])
                event = decoded and decoded[0]
                if isinstance(event, Started):
                    started = event
                elif isinstance(event, Tokens):
                    tokens += event.tokens
        except (WorkerError, KeyError, UnicodeDecodeError):
            return cls(epoch, handed_back=handed_back, intact=False)
        whole = epoch == 1 or (started is not None and all(at == token.i for at, token in enumerate(tokens)))
        return cls(epoch, started, tuple(tokens), handed_back, whole)


@dataclass(frozen=True, slots=True)
class Closed:
    """There is nothing to run; the entry is settled already, or, where it was lost, left to its owner."""

    reason: Literal["over", "duplicate", "lost", "refused", "cancelled", "dead_lettered"]
    """`over`: finished before. `duplicate`: another queue entry's job. `refused`: `opening` was an error."""
    error: ErrorEvent | None = None
    """The terminal event, if this call wrote it."""


@dataclass(slots=True)
class Lease:
    """One epoch of one job. Keeps what it has written, to write it again where the server lost it."""

    claim: Claim
    job_id: str
    trace: Trace
    history: History
    base: str
    """The stream's top before this epoch."""
    opening: InitVar[Written]
    log: list[Written] = field(init=False)
    """Event n has the id `<epoch>-n`."""
    top: str = field(init=False)
    """The stream's top as last known."""
    tokens: int = field(init=False)
    """How many are in the log or were before it."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One batch in flight."""

    def __post_init__(self, opening: Written) -> None:
        self.log = [opening]
        self.top = f"{self.epoch}-0"
        self.tokens = len(self.history.tokens)

    @property
    def epoch(self) -> int:
        """The fencing number, and the first half of every event's id."""
        return self.history.epoch

    def stage(self, event: Event, written: Written) -> None:
        """Note an event that is to be written. Raises ValueError where a token's index is not the next."""
        for token in event.tokens if isinstance(event, Tokens) else ():
            if token.i != self.tokens:
                raise ValueError(f"token {token.i} where {self.tokens} is the next")
            self.tokens += 1
        self.log.append(written)

    def unwritten(self) -> list[tuple[str, Written]]:
        """Events above `top`, with their ids."""
        at = self._written(self.top)
        return [(f"{self.epoch}-{seq}", event) for seq, event in enumerate(self.log[at:], at)]

    def owns(self, top: str) -> bool:
        """Whether a stream with this top is as this epoch, or the server's loss of a part of it, would leave it."""
        return top == self.base != START or epoch_of(top) == self.epoch

    def _written(self, top: str) -> int:
        return 0 if top == self.base else min(order_of(top)[1] + 1, len(self.log))
