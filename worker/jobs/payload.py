"""A job's payload: fields to bytes of msgpack, and bytes, msgpack or JSON, to a map of fields.

A payload is JSON if its first character after white space, or after a byte order mark, is `{`;
otherwise it is msgpack. What can be read of a broken payload names the job to which its error
belongs. `protocol.py` validates the fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack

from worker.errors import InvalidRequest
from worker.jobs.events import Encoding

MAX_PAYLOAD_BYTES = 8 * 2**20
JOB_ID = re.compile(r"[A-Za-z0-9\-_.:]{1,128}")
JOB_ID_RULE = "1 to 128 of letters, digits, - _ . :"
MAX_FIELDS = 64
"""Fields of one job. A payload with more is refused unread, which bounds the number of errors."""

FieldError = tuple[str, str, Any]
"""(field, constraint, value), as `InvalidRequest.of` accepts it."""

_JSON = re.compile(rb'\xef\xbb\xbf|\xff\xfe|\xfe\xff|\x00\x00\xfe\xff|[ \t\r\n]*[{\["]')
"""A byte order mark of UTF-8, 16 or 32, or the begin of a map, list or string. None of these bytes
begins a msgpack map."""
_LOOSE_ID = re.compile(rb"[ \t\r\n]*\{\s*'?job_id'?\s*:\s*'?([A-Za-z0-9\-_.:]{1,128})'?\s*[,}]")
"""The id as the first field of a map in Python's syntax, or whose quotes a shell has removed."""


def pack(fields: Mapping[str, Any]) -> bytes:
    """Encode valid fields as msgpack.

    Raises:
        InvalidRequest: more than MAX_PAYLOAD_BYTES, or values that msgpack cannot encode.
    """
    try:
        payload: bytes = msgpack.packb(fields)
    except (OverflowError, ValueError) as error:
        too_large = [(field, "integers of at most 64 bits", None) for field in _large_integers(fields)]
        raise InvalidRequest.of(*(too_large or [("payload", f"encodable as msgpack: {error}", None)])) from None
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise InvalidRequest.of(("payload", f"at most {MAX_PAYLOAD_BYTES} bytes", len(payload)))
    return payload


def _large_integers(fields: Mapping[str, Any]) -> Iterator[str]:
    """The paths of the integers that msgpack cannot represent."""
    stack: list[tuple[str, Any]] = list(fields.items())
    while stack:
        path, value = stack.pop()
        if isinstance(value, Mapping):
            stack += [(f"{path}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            stack += [(f"{path}.{index}", item) for index, item in enumerate(value)]
        elif isinstance(value, int) and not -(2**63) <= value < 2**64:
            yield path


def read_map(payload: bytes, max_bytes: int = MAX_PAYLOAD_BYTES) -> tuple[dict[Any, Any], list[FieldError]]:
    """Decode the payload's top-level map; also return the keys that are repeated or no names.

    Bytes of text that are not UTF-8 become lone surrogates, so that validation can name the field.

    Raises:
        InvalidRequest: too large, neither msgpack nor JSON, no map, or more than MAX_FIELDS fields.
    """
    errors: list[FieldError] = []

    def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        kept: dict[Any, Any] = {}
        for key, value in pairs:
            if type(key) not in (str, int):
                errors.append(("payload", "keys are strings", describe(key)))
            elif key in kept:
                errors.append((field_name(key), "given twice", describe(value)))
            else:
                kept[key] = value
        return kept

    if len(payload) > max_bytes:
        raise InvalidRequest.of(("payload", f"at most {max_bytes} bytes", len(payload)))
    is_json = _JSON.match(payload) is not None
    try:
        if is_json:
            fields = json.loads(_json_text(payload, "surrogateescape"), object_pairs_hook=unique)
        else:
            options = {"strict_map_key": False, "unicode_errors": "surrogateescape"}
            fields = msgpack.unpackb(payload, object_pairs_hook=unique, **options)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        rule = f"readable {'JSON' if is_json else 'msgpack'}: {str(error) or type(error).__name__}"
        raise InvalidRequest.of(("payload", rule, describe(payload))) from None
    if not isinstance(fields, dict):
        raise InvalidRequest.of(("payload", "a map of fields", describe(fields)))
    if len(fields) + len(errors) > MAX_FIELDS:
        raise InvalidRequest.of(("payload", f"at most {MAX_FIELDS} fields", len(fields) + len(errors)))
    return fields, errors


def job_id_of(payload: bytes) -> str | None:
    """The payload's top-level `job_id` if it can be read and is valid, else None. Never raises.

    Only the top level counts: an id nested in a broken payload may belong to another job.
    """
    job_id = _top_level(payload, "job_id")
    if job_id is None and (loose := _LOOSE_ID.match(payload)):
        return loose[1].decode()
    return job_id if isinstance(job_id, str) and JOB_ID.fullmatch(job_id) else None


def encoding_of(payload: bytes) -> Encoding:
    """The encoding that the payload's top level requests for events. Never raises."""
    return "json" if _top_level(payload, "encoding") == "json" else "msgpack"


def _top_level(payload: bytes, name: str) -> object:
    """The first value of the top-level field `name`, as far as the payload can be read, or None."""
    try:
        if not _JSON.match(payload):
            pairs = _msgpack_pairs(payload, name)
        else:
            text = _json_text(payload, "replace").lstrip()
            pairs = _json_pairs(json.loads(text) if text.startswith('"') else text)  # a string: encoded twice
        for key, value in pairs:
            if key == name:
                return value
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        pass
    return None


def _json_text(payload: bytes, errors: str) -> str:
    """The payload's text, without a byte order mark."""
    return payload.decode(json.detect_encoding(payload), errors)


def _msgpack_pairs(payload: bytes, name: str) -> Iterator[tuple[object, object]]:
    """The pair of that key. Both may be of the type `bin`, as which some libraries write text."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(payload) or 1, strict_map_key=False, unicode_errors="replace")
    unpacker.feed(payload)
    for _ in range(unpacker.read_map_header()):
        if _as_text(unpacker.unpack()) == name:
            yield name, _as_text(unpacker.unpack())
        else:
            unpacker.skip()


def _as_text(value: object) -> object:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _json_pairs(text: str) -> Iterator[tuple[object, object]]:
    decoder, blank, at = json.JSONDecoder(), re.compile(r"[ \t\r\n]*"), 0

    def value_after(mark: str, at: int) -> tuple[object, int]:
        at = blank.match(text, at).end()  # type: ignore[union-attr]  # the pattern always matches
        if text[at : at + 1] != mark:
            raise ValueError(mark)
        return decoder.raw_decode(text, blank.match(text, at + 1).end())  # type: ignore[union-attr]

    mark = "{"
    while True:
        key, at = value_after(mark, at)
        value, at = value_after(":", at)
        yield key, value
        mark = ","


def describe(value: object) -> Any:
    """`value` for an error: numbers and short strings unchanged, others as kind and length."""
    if isinstance(value, str):
        return field_name(value) if len(value) <= 64 else f"{field_name(value[:64])}… ({len(value)} characters)"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**64):
        return value
    if isinstance(value, int):
        return f"integer of {value.bit_length()} bits"
    kinds: dict[type, str] = {list: "list", tuple: "list", dict: "map", bytes: "bytes"}
    kind = kinds.get(type(value), type(value).__name__)
    return f"{kind} of {len(value)}" if hasattr(value, "__len__") else kind


def field_name(key: object) -> str:
    """A key as a field's name: at most 128 characters, encodable as UTF-8."""
    return str(key)[:128].encode(errors="replace").decode()
