"""Lines of a batch: requests of its input file, and results of its output files.

Both are JSON Lines in OpenAI's form. The number of a line, from 1, identifies its request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worker.gateway.sse import escape_breaks, to_json

MAX_REQUESTS = 50_000
MAX_MISTAKES = 100
"""Mistakes that are reported; a file with one is not run."""
_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class LineRequest:
    """One request of a batch."""

    line: int
    custom_id: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer to a request, as its endpoint gives it without streaming."""

    status: int
    body: Mapping[str, Any]
    retry_after_s: float | None = None
    """When to try again a request that was not accepted."""

    @property
    def is_success(self) -> bool:
        """Whether it goes to the output file, not to the error file."""
        return self.status < 300


class Mistake(Exception):
    """A line is no request of its batch."""

    def __init__(self, line: int | None, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.line, self.code, self.message, self.param = line, code, message, param

    def to_api(self) -> dict[str, Any]:
        """An item of a batch's `errors`."""
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


def parse_line(line: int, raw: bytes, endpoint: str) -> LineRequest:
    """Read a line of a batch of requests to `endpoint`. Raises Mistake."""
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        raise Mistake(line, "invalid_json_line", "the line is not a JSON object") from None
    if not isinstance(fields, dict):
        raise Mistake(line, "invalid_json_line", "the line is not a JSON object")
    for name in _FIELDS:
        if name not in fields:
            raise Mistake(line, "missing_required_parameter", f"{name}: required", name)
    if unknown := next((name for name in fields if name not in _FIELDS), None):
        unknown = unknown.encode(errors="replace").decode()  # a lone surrogate cannot be in a response
        raise Mistake(line, "unknown_parameter", f"{unknown}: unknown field", unknown)
    custom_id, body = fields["custom_id"], fields["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        raise Mistake(line, "invalid_value", "custom_id: text of 1 to 512 characters", "custom_id")
    if any("\ud800" <= character <= "\udfff" for character in custom_id):
        raise Mistake(line, "invalid_value", "custom_id: text without lone surrogates", "custom_id")
    if fields["method"] != "POST":
        raise Mistake(line, "invalid_method", "method: POST", "method")
    if fields["url"] != endpoint:
        raise Mistake(line, "mismatched_endpoint", f"url: {endpoint}, the endpoint of the batch", "url")
    if not isinstance(body, dict):
        raise Mistake(line, "invalid_value", "body: an object", "body")
    for name in ("stream", "background"):
        if body.get(name):
            raise Mistake(line, "invalid_value", f"body.{name}: not in a batch", f"body.{name}")
    return LineRequest(line, custom_id, body)


def result_line(batch_id: str, request: LineRequest, outcome: Outcome) -> bytes:
    """The line of an output or error file that answers a request."""
    request_id = _request_id(batch_id, request)
    response = {"status_code": outcome.status, "request_id": request_id, "body": outcome.body}
    return _line({"id": request_id, "custom_id": request.custom_id, "response": response, "error": None})


def expired_line(batch_id: str, request: LineRequest) -> bytes:
    """The line of an error file for a request that was not run in time."""
    error = {"code": "batch_expired", "message": "the request was not run before the batch expired"}
    fields = {"id": _request_id(batch_id, request), "custom_id": request.custom_id}
    return _line(fields | {"response": None, "error": error})


def _request_id(batch_id: str, request: LineRequest) -> str:
    return f"batch_req_{batch_id.removeprefix('batch_')}_{request.line}"


def _line(fields: Mapping[str, Any]) -> bytes:
    return escape_breaks(to_json(fields)).encode(errors="replace")
