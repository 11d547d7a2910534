"""Replies of the server as text, fields and entries of streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from worker.jobs.redis_resp import Value
from worker.jobs.streams import PendingEntry, QueueOverview, Record


def text_of(value: Value) -> str:
    """A name or an id of a reply as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def flat(rows: Iterable[tuple[Value, ...]]) -> list[Value]:
    """Rows of a mapping as arguments of a command."""
    return list(chain.from_iterable(rows))


def pairs(reply: Sequence[bytes] | None) -> list[tuple[bytes, bytes]]:
    """Names and values that a reply has in turn; none for the reply None, of a deleted entry."""
    reply = reply or ()
    return list(zip(reply[::2], reply[1::2], strict=True))


def texts_of(reply: Sequence[bytes]) -> dict[str, str]:
    """A hash of a reply as text."""
    return {text_of(name): text_of(value) for name, value in pairs(reply)}


def fields_of(reply: Sequence[bytes] | None) -> dict[str, bytes]:
    """An entry's fields with decoded names; empty for a deleted entry."""
    return {text_of(name): value for name, value in pairs(reply)}


def records_of(reply: Any) -> list[Record]:
    """The entries of an XRANGE reply, or of one stream."""
    return [(text_of(entry_id), fields_of(fields)) for entry_id, fields in reply or ()]


def streams_of(reply: Any) -> dict[str, list[Record]]:
    """The entries of an XREAD or XREADGROUP reply by key."""
    return {text_of(key): records_of(records) for key, records in reply or ()}


def ms_of(time: Sequence[Value]) -> int:
    """A reply to TIME, seconds and microseconds, in ms."""
    return int(time[0]) * 1000 + int(time[1]) // 1000


def pending_entries(now_ms: int, rows: Any) -> list[PendingEntry]:
    """The rows of an XPENDING reply that was read at the server's time `now_ms`."""
    return [PendingEntry(text_of(i), text_of(name), idle, n, now_ms - idle) for i, name, idle, n in rows]


def overview_of(reply: Any) -> QueueOverview:
    """The reply of `overview.lua`."""
    time, length, delivered, count, running, pending, first, entries = reply
    return QueueOverview(
        now_ms=ms_of(time),
        length=length,
        delivered=text_of(delivered),
        pending_count=count,
        running=running,
        pending=pending_entries(ms_of(time), pending),
        first_waiting=text_of(first),
        entries=[(text_of(entry_id), payload) for entry_id, payload in entries],
    )
