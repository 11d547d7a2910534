"""A Redis reply, bytes throughout, as text and records. Knows no client and no connection; see `redis_streams.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from worker.jobs.streams import Record

Value = str | int | bytes


def text(value: bytes | str | int) -> str:
    """One value."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def texts(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    """A hash, names and values."""
    return {text(name): text(value) for name, value in fields.items()}


def named(fields: Mapping[bytes, bytes] | None) -> dict[str, bytes]:
    """An entry's fields: names as text, values as they are; none for an entry that was deleted."""
    return {text(name): value for name, value in (fields or {}).items()}


def records_of(reply: Any) -> list[Record]:
    """The entries of an XREAD or XREADGROUP, of all streams that it names."""
    return [(text(entry_id), named(fields)) for _, records in reply or () for entry_id, fields in records]


def flat(rows: Iterable[tuple[Value, ...]]) -> list[Value]:
    """Names and values as a command's arguments."""
    return list(chain.from_iterable(rows))
