"""Event lists of whole answers: parts of text, reasoning and tool calls."""

from __future__ import annotations

from itertools import chain

from tests.gateway.recorded_events import pages, started
from worker.jobs.events import ErrorEvent, Event, Metrics, Resumed, Token
from worker.jobs.reader import StreamEvent

STARTED = started()
METRICS = Metrics(tokens_out=1, tokens_per_second=1.0, decode_ms=1.0, vram_used=0, vram_free=0)
RESUMED = Resumed(from_i=1, reason="crash", exact=True)
FAILED = ErrorEvent(code="INTERNAL", message="a bug")
CANCELLED = ErrorEvent(code="CANCELLED", message="cancelled by request")


def text(*pieces: str) -> list[Token]:
    return [Token(0, 0, piece) for piece in pieces]


def thoughts(*pieces: str) -> list[Token]:
    return [Token(0, 0, piece, channel="reasoning") for piece in pieces]


def call(name: str, *pieces: str, index: int = 0) -> list[Token]:
    return [Token(0, 0, piece, channel="tool", recipient=f"functions.{name}", call=index) for piece in pieces]


def stream(*events: Event | list[Token]) -> list[StreamEvent]:
    """The items of a job's stream, whose tokens get indices and ids."""
    items: list[Event | Token] = []
    index = 0
    for event in events:
        for each in event if isinstance(event, list) else [event]:
            items.append(each._replace(i=index, id=100 + index) if isinstance(each, Token) else each)
            index += isinstance(each, Token)
    return list(chain.from_iterable(pages(items)))
