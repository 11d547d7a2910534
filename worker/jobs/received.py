"""What a reader gets: one event at a time, with the id to resume at; a `tokens` entry token by token.

Where the entries come from is `client.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.jobs.events import Envelope, ErrorEvent, Event, Token, Tokens, decode_event
from worker.jobs.streams import Record


class JobFailed(Exception):
    """The job ended with an `error` event, which is `error`."""

    def __init__(self, error: ErrorEvent) -> None:
        super().__init__(f"{error.code}: {error.message}")
        self.error = error


@dataclass(frozen=True, slots=True)
class Received:
    """One event of a stream; a `tokens` entry arrives as one of these for each token."""

    kind: str
    event: Event | Token
    envelope: Envelope
    entry_id: str
    resume: str
    """Pass it as `after` to go on behind this event; within a `tokens` entry, its tokens come again."""


def received(record: Record, before: str) -> list[Received]:
    """What a reader gets for one entry: nothing for a type that it doesn't know, each token of a `tokens` entry."""
    entry_id, fields = record
    decoded = decode_event(fields.get("type", b"").decode(errors="replace"), fields.get("p", b""))
    if decoded is None:
        return []
    event, envelope = decoded
    if not isinstance(event, Tokens):
        return [Received(event.kind, event, envelope, entry_id, entry_id)]
    last = len(event.tokens) - 1
    return [
        Received("token", token, envelope, entry_id, entry_id if at == last else before)
        for at, token in enumerate(event.tokens)
    ]
