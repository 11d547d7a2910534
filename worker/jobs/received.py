"""What a reader gets: one event at a time, with the id to resume at; a `tokens` entry token by token.

Where the entries come from is `client.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.jobs.events import End, Envelope, ErrorEvent, Event, Token, Tokens, decode_event
from worker.jobs.keys import START, order_of
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


class Bookmark:
    """How far a reader of a job's stream is, so that it hears each token once, even of a server that forgot writes.

    What the server forgot is written again, but an attempt that is begun again may cut its entries elsewhere: then an
    id says nothing and the tokens' indices all. `next_i` is the first that the reader lacks, None where it can't tell.
    """

    def __init__(self, after: str, next_i: int | None) -> None:
        self.after = after
        self._next_i = 0 if next_i is None and after == START else next_i
        self._newest = after
        self._again = False

    def lacks(self, tokens: int) -> bool:
        """Whether a stream of so many tokens has some that the reader has not heard."""
        return self._next_i is not None and self._next_i < tokens

    def begin_again(self) -> bool:
        """Go back to the stream's start, unless that was done and brought nothing new; what was heard stays heard."""
        if self._again:
            return False
        self.after, self._again = START, True
        return True

    def news(self, record: Record) -> list[Received] | None:
        """What the reader has not heard of the entry after `after`.

        None where tokens before it are missing: it is to read on from `after`, which is the start now. It does without
        those that are not found there either.
        """
        items = received(record, self.after)
        span = _span(items)
        if span is not None and self.lacks(span[0]) and self.begin_again():
            return None
        fresh = [item for item in items if self._is_new(item)]
        self.after, self._newest = record[0], max(self._newest, record[0], key=order_of)
        if span is not None:
            self._again = self._again and span[1] <= (self._next_i or 0)
            self._next_i = max(self._next_i or 0, span[1])
        return fresh

    def _is_new(self, item: Received) -> bool:
        if isinstance(item.event, Token):
            return item.event.i >= (self._next_i or 0)
        return item.event.terminal or order_of(item.entry_id) > order_of(self._newest)


def _span(items: list[Received]) -> tuple[int, int] | None:
    """The index of an entry's first token and of the one that comes after it; an `end` says which would come."""
    indices = [item.event.i for item in items if isinstance(item.event, Token)]
    if indices:
        return indices[0], indices[-1] + 1
    ends = [item.event.tokens_out for item in items if isinstance(item.event, End)]
    return (ends[0], ends[0]) if ends else None
