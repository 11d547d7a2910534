"""Reading event streams: a client's cursor, which yields each event once, and a worker's history.

A client receives one event at a time, each with the id to resume at; a `tokens` entry is split into
its tokens. `event_reader.py` does the I/O. A later attempt reads the whole stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from worker.errors import EventsLost, WorkerError
from worker.jobs.events import End, Envelope, ErrorEvent, Event, Resumed, Started, Token, Tokens, decode_event
from worker.jobs.keys import START, events_key, next_id, split_id
from worker.jobs.streams import JobState, Record, Streams, retry_until_connected

_PAGE = 1000


class JobFailed(Exception):
    """The job ended with the error event `error`."""

    def __init__(self, error: ErrorEvent) -> None:
        super().__init__(f"{error.code}: {error.message}")
        self.error = error


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One event of a stream; a `tokens` entry yields one of these for each token."""

    kind: str
    event: Event | Token
    envelope: Envelope
    entry_id: str
    resume: str
    """Pass it as `after` to continue here; other tokens of the same entry are repeated."""


def decode_entry(record: Record, before: str) -> list[StreamEvent]:
    """Decode one entry: empty for an unknown type, one event for each token of a `tokens` entry.

    `before` is the id of the entry before it, the resume id of all but its last token.
    """
    entry_id, fields = record
    decoded = decode_event(fields.get("type", b"").decode(errors="replace"), fields.get("p", b""))
    if decoded is None:
        return []
    event, envelope = decoded
    if not isinstance(event, Tokens):
        return [StreamEvent(event.kind, event, envelope, entry_id, entry_id)]
    last = len(event.tokens) - 1
    return [
        StreamEvent("token", token, envelope, entry_id, entry_id if n == last else before)
        for n, token in enumerate(event.tokens)
    ]


class Cursor:
    """Position of a reader in a job's stream: each token once, even if the server lost writes.

    Lost events are written again, but a repeated attempt may batch its tokens differently. Then
    entry ids do not identify tokens, and indices do. `next_i` is the index of the first token that
    the reader has not received, None if unknown.
    """

    def __init__(self, after: str, next_i: int | None) -> None:
        self.after = after
        self._next_i = 0 if next_i is None and after == START else next_i
        self._newest = after
        self._rewound = False

    @property
    def has_begun(self) -> bool:
        """Whether the reader has received an entry, or resumes after one."""
        return self._newest != START

    def is_behind(self, tokens: int) -> bool:
        """Whether a stream of `tokens` tokens has some that the reader has not received."""
        return self._next_i is not None and self._next_i < tokens

    def rewind(self) -> bool:
        """Move to the stream's start; received events are not repeated.

        Returns False if it is there, or if the last rewind found no new token.
        """
        if self._rewound or self.after == START:
            return False
        self.after, self._rewound = START, True
        return True

    def advance(self, record: Record) -> list[StreamEvent] | None:
        """Move to the entry after `after`, and return the events that the reader has not received.

        None if tokens before the entry are missing: the cursor is rewound, and the reader must read
        on from `after`.

        Raises:
            EventsLost: the tokens are missing in the whole stream.
        """
        events = decode_entry(record, self.after)
        span = _token_span(events)
        if span is not None and self.is_behind(span[0]):
            if self.rewind():
                return None
            raise EventsLost(f"the events of the job lack its tokens from {self._next_i} to {span[0] - 1}")
        unseen = [item for item in events if self._is_unseen(item)]
        self.after, self._newest = record[0], max(self._newest, record[0], key=split_id)
        if span is not None:
            self._rewound = self._rewound and span[1] <= (self._next_i or 0)
            self._next_i = max(self._next_i or 0, span[1])
        return unseen

    def _is_unseen(self, item: StreamEvent) -> bool:
        if isinstance(item.event, Token):
            return item.event.i >= (self._next_i or 0)
        return item.event.terminal or split_id(item.entry_id) > split_id(self._newest)


def _token_span(events: list[StreamEvent]) -> tuple[int, int] | None:
    """Index of an entry's first token and one past its last; for `end`, the token count twice."""
    indices = [item.event.i for item in events if isinstance(item.event, Token)]
    if indices:
        return indices[0], indices[-1] + 1
    counts = [item.event.tokens_out for item in events if isinstance(item.event, End)]
    return (counts[0], counts[0]) if counts else None


@dataclass(frozen=True, slots=True)
class History:
    """What earlier attempts published. The next token is a function of the job and of this."""

    epoch: int = 1
    """Epoch of the attempt that begins now."""
    started: Started | None = None
    tokens: tuple[Token, ...] = ()
    reason: Literal["crash", "drain"] = "crash"
    """Why this attempt follows another, as in `resumed`: the last one crashed or released it."""
    exact: bool = True
    """False once an attempt has continued with other numerics: published tokens may be its own."""
    intact: bool = True
    """False if events are missing or unreadable; the job cannot be continued then."""

    @classmethod
    def read(cls, records: Sequence[Record], epoch: int, reason: Literal["crash", "drain"]) -> History:
        """Read a job's whole event stream."""
        started: Started | None = None
        tokens: list[Token] = []
        exact = True
        try:
            for _, fields in records:
                decoded = decode_event(fields["type"].decode(), fields["p"])
                event = decoded and decoded[0]
                if isinstance(event, Started):
                    started = event
                elif isinstance(event, Tokens):
                    tokens += event.tokens
                elif isinstance(event, Resumed):
                    exact = exact and event.exact
        except (WorkerError, KeyError, UnicodeDecodeError):
            return cls(epoch, reason=reason, intact=False)
        contiguous = started is not None and all(i == token.i for i, token in enumerate(tokens))
        return cls(epoch, started, tuple(tokens), reason, exact, intact=epoch == 1 or contiguous)


async def read_history(streams: Streams, job_id: str) -> tuple[JobState, History]:
    """Read a job's state and events. `take` detects later changes by the stream's last id."""
    state = await retry_until_connected(streams.job_state, job_id)
    records: list[Record] = []
    first = "-"
    while True:
        page = await retry_until_connected(streams.range, events_key(job_id), first, state.last_id, _PAGE)
        records += page
        if len(page) < _PAGE:
            released = state.fields.get("state") == "handed_back"
            return state, History.read(records, state.next_epoch, "drain" if released else "crash")
        first = next_id(records[-1][0])
