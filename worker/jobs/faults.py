"""Wrong fields, as an error event names them: field, constraint, value.

Values are cut so that an event stays small, and text that may be a prompt is measured, never echoed. What is wrong is
decided in `payload.py` and `protocol.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

PROMPT_FIELDS = ("prompt", "messages", "prompt_tokens")
MAX_FAULTS = 8
"""Listed for one field; further ones are counted."""

Fault = tuple[str, str, Any]
"""(field, constraint, value), as `InvalidRequest.of` takes it."""

_CONSTRAINTS: Mapping[str, str] = {
    "missing": "required",
    "extra_forbidden": "unknown field",
    "invalid_key": "keys are strings",
    "string_pattern_mismatch": "1 to 128 of letters, digits, - _ . :",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} items",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
}
"""Pydantic's error types in the words of the contract; other types speak for themselves."""


def shown(value: object) -> Any:
    """`value` as an error may carry it: numbers and short strings as they are, all else by its kind and length."""
    if isinstance(value, str):
        return name_of(value) if len(value) <= 64 else f"{name_of(value[:64])}… ({len(value)} characters)"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**64):
        return value
    if isinstance(value, int):
        return f"integer of {value.bit_length()} bits"
    kinds: dict[type, str] = {list: "list", tuple: "list", dict: "map", bytes: "bytes"}
    kind = kinds.get(type(value), type(value).__name__)
    return f"{kind} of {len(value)}" if hasattr(value, "__len__") else kind


def name_of(key: object) -> str:
    """A key as a field's name: at most 128 characters, and always encodable."""
    return str(key)[:128].encode(errors="replace").decode()


def faults_of(error: ValidationError) -> list[Fault]:
    """Pydantic's findings as faults."""
    faults: list[Fault] = []
    for line in error.errors(include_url=False):
        where = ".".join(name_of(part) for part in line["loc"])
        words = _CONSTRAINTS.get(line["type"])
        constraint = (
            line["msg"].removeprefix("Input should be ") if words is None else words.format(**line.get("ctx", {}))
        )
        value = None if line["type"] == "missing" else shown_in(where, line["input"], line["type"])
        faults.append((where, constraint, value))
    return faults


def shown_in(where: str, value: object, kind: str = "") -> Any:
    """`value` for an error on field `where`; text that may be a prompt is never echoed, only measured."""
    private = where.partition(".")[0] in PROMPT_FIELDS and not where.endswith(".role")
    if isinstance(value, str) and (private or kind == "extra_forbidden"):
        return f"string of {len(value)}"
    return shown(value)


def bounded(faults: list[Fault]) -> list[Fault]:
    """The first MAX_FAULTS of each top-level field, and how many more there were."""
    kept: list[Fault] = []
    count: dict[str, int] = {}
    for fault in faults:
        top = fault[0].partition(".")[0]
        count[top] = count.get(top, 0) + 1
        if count[top] <= MAX_FAULTS:
            kept.append(fault)
    return kept + [(top, "further errors", n - MAX_FAULTS) for top, n in count.items() if n > MAX_FAULTS]
