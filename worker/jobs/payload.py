"""Decode a queue entry's payload to a plain map, and describe wrong fields for an error event.

A payload is msgpack, or JSON if its first byte is `{`. Only form is checked here: size, syntax and
keys. What the fields mean is in `protocol.py`. Values are shortened so that an error event stays
small, and text that may belong to a prompt is replaced by its length.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
from pydantic import ValidationError

from worker.errors import InvalidRequest

JOB_ID = re.compile(r"[A-Za-z0-9\-_.:]{1,128}")
JOB_ID_RULE = "1 to 128 of letters, digits, - _ . :"
MAX_FIELDS = 64
"""Fields of one job. A payload with more is refused unread, which bounds the number of errors."""
MAX_FIELD_ERRORS = 8
"""Errors listed for one top-level field; further ones are counted."""
PROMPT_FIELDS = ("prompt", "messages", "prompt_tokens")

FieldError = tuple[str, str, Any]
"""(field, constraint, value), as `InvalidRequest.of` accepts it."""

_CONSTRAINTS: Mapping[str, str] = {
    "missing": "required",
    "extra_forbidden": "unknown field",
    "invalid_key": "keys are strings",
    "string_pattern_mismatch": JOB_ID_RULE,
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} items",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
}
"""Constraint by pydantic's error type; for other types pydantic's message is used."""


def read_map(payload: bytes, max_bytes: int) -> tuple[dict[Any, Any], list[FieldError]]:
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
    is_json = payload.startswith(b"{")
    try:
        if is_json:
            fields = json.loads(payload.decode(errors="surrogateescape"), object_pairs_hook=unique)
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


def describe_field(field: str, value: object, error_type: str = "") -> Any:
    """`value` as an error on `field` reports it: text that may belong to a prompt as its length."""
    private = field.partition(".")[0] in PROMPT_FIELDS and not field.endswith(".role")
    if isinstance(value, str) and (private or error_type == "extra_forbidden"):
        return f"string of {len(value)}"
    return describe(value)


def field_name(key: object) -> str:
    """A key as a field's name: at most 128 characters, encodable as UTF-8."""
    return str(key)[:128].encode(errors="replace").decode()


def field_errors(error: ValidationError) -> list[FieldError]:
    """Translate pydantic's errors."""
    found: list[FieldError] = []
    for line in error.errors(include_url=False):
        field = ".".join(field_name(part) for part in line["loc"])
        template = _CONSTRAINTS.get(line["type"])
        message = line["msg"].removeprefix("Input should be ")
        constraint = template.format(**line.get("ctx", {})) if template else message
        value = None if line["type"] == "missing" else describe_field(field, line["input"], line["type"])
        found.append((field, constraint, value))
    return found


def limited(errors: list[FieldError]) -> list[FieldError]:
    """The first MAX_FIELD_ERRORS errors of each top-level field, and a count of the rest."""
    kept: list[FieldError] = []
    count: Counter[str] = Counter()
    for error in errors:
        top = error[0].partition(".")[0]
        count[top] += 1
        if count[top] <= MAX_FIELD_ERRORS:
            kept.append(error)
    return kept + [(top, "further errors", n - MAX_FIELD_ERRORS) for top, n in count.items() if n > MAX_FIELD_ERRORS]
