"""Replies of the server as text, fields and entries of streams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker.jobs.redis_resp import Value
from worker.jobs.streams import Record


def text_of(value: Value) -> str:
    """A name or an id of a reply as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def texts_of(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    """A hash of a reply as text."""
    return {text_of(name): text_of(value) for name, value in fields.items()}


def fields_of(fields: Mapping[bytes, bytes] | list[bytes] | None) -> dict[str, bytes]:
    """An entry's fields with decoded names; empty for a deleted entry."""
    if isinstance(fields, list):  # as the server sends them
        return {text_of(name): value for name, value in zip(fields[::2], fields[1::2], strict=True)}
    return {text_of(name): value for name, value in (fields or {}).items()}


def stream_records(reply: Any) -> list[Record]:
    """The entries of an XREAD or XREADGROUP reply."""
    return [(text_of(entry_id), fields_of(fields)) for _, records in reply or () for entry_id, fields in records]
