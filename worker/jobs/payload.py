"""From the bytes of a queue entry to a plain map: msgpack, or JSON where the first byte is `{`.

It checks form alone (size, syntax, keys) and knows one field by name, `job_id`, which a refusal needs even when the
rest can't be read. What the fields mean is `protocol.py`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgpack

from worker.errors import InvalidRequest
from worker.jobs.faults import Fault, name_of, shown

JOB_ID = re.compile(r"[A-Za-z0-9\-_.:]{1,128}")
MAX_FIELDS = 64
"""Of one job: above it a payload is refused unread, so that unknown fields can't become a million errors."""


def read_map(payload: bytes, max_bytes: int) -> tuple[dict[Any, Any], list[Fault]]:
    """The payload's top-level map, and the keys that were given twice or are no names.

    Text that is no UTF-8 arrives with lone surrogates in place of the bad bytes, so that the field can be named later.

    Raises:
        InvalidRequest: too large, neither msgpack nor JSON, no map, or more than MAX_FIELDS fields.
    """
    faults: list[Fault] = []

    def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        kept: dict[Any, Any] = {}
        for key, value in pairs:
            if type(key) not in (str, int):
                faults.append(("payload", "keys are strings", shown(key)))
            elif key in kept:
                faults.append((name_of(key), "given twice", shown(value)))
            else:
                kept[key] = value
        return kept

    if len(payload) > max_bytes:
        raise InvalidRequest.of(("payload", f"at most {max_bytes} bytes", len(payload)))
    try:
        if payload.startswith(b"{"):
            fields = json.loads(payload.decode(errors="surrogateescape"), object_pairs_hook=unique)
        else:
            fields = msgpack.unpackb(
                payload, object_pairs_hook=unique, strict_map_key=False, unicode_errors="surrogateescape"
            )
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        form = "JSON" if payload.startswith(b"{") else "msgpack"
        raise InvalidRequest.of(
            ("payload", f"readable {form}: {str(error) or type(error).__name__}", shown(payload))
        ) from None
    if not isinstance(fields, dict):
        raise InvalidRequest.of(("payload", "a map of fields", shown(fields)))
    if len(fields) + len(faults) > MAX_FIELDS:
        raise InvalidRequest.of(("payload", f"at most {MAX_FIELDS} fields", len(fields) + len(faults)))
    return fields, faults


def job_id_of(payload: bytes) -> str | None:
    """The payload's top-level `job_id` as far as it can be read, else None; never raises.

    Only the top level counts: an id that a broken payload mentions deeper inside may be somebody else's job.
    """
    pairs = _json_pairs(payload.decode(errors="replace")) if payload.startswith(b"{") else _msgpack_pairs(payload)
    try:
        for key, value in pairs:
            if key == "job_id":
                return value if isinstance(value, str) and JOB_ID.fullmatch(value) else None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        pass
    return None


def _msgpack_pairs(payload: bytes) -> Iterator[tuple[object, object]]:
    unpacker = msgpack.Unpacker(max_buffer_size=len(payload) or 1, strict_map_key=False, unicode_errors="replace")
    unpacker.feed(payload)
    for _ in range(unpacker.read_map_header()):
        key = unpacker.unpack()
        if key == "job_id":
            yield key, unpacker.unpack()
        else:
            unpacker.skip()


def _json_pairs(text: str) -> Iterator[tuple[object, object]]:
    decoder, blank, at = json.JSONDecoder(), re.compile(r"[ \t\r\n]*"), 0

    def value_after(mark: str, at: int) -> tuple[object, int]:
        at = blank.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing at all too
        if text[at : at + 1] != mark:
            raise ValueError(mark)
        return decoder.raw_decode(text, blank.match(text, at + 1).end())  # type: ignore[union-attr]

    mark = "{"
    while True:
        key, at = value_after(mark, at)
        value, at = value_after(":", at)
        yield key, value
        mark = ","
