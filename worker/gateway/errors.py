"""Errors of the HTTP APIs: status, headers and body, in OpenAI's and in Anthropic's shape.

The openai package retries 408, 409, 429 and 5xx and obeys `x-should-retry`: a response whose retry
cannot succeed, or would run a finished job again, has `x-should-retry: false`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from worker.errors import InvalidRequest, QueueFull, WorkerError
from worker.jobs.events import ErrorEvent
from worker.jobs.reader import JobFailed
from worker.jobs.streams import Disconnected

NO_RETRY: Mapping[str, str] = {"x-should-retry": "false"}
CLIENT_CLOSED_REQUEST = 499
"""Logged for a request whose client disconnected; never sent."""

_TYPES: Mapping[int, tuple[str, str]] = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "invalid_request_error"),
    409: ("conflict_error", "invalid_request_error"),
    411: ("invalid_request_error", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    501: ("not_supported_error", "invalid_request_error"),
    503: ("service_unavailable_error", "overloaded_error"),
    504: ("timeout_error", "timeout_error"),
}
"""Type of an error by status: OpenAI's and Anthropic's."""


_REQUEST_NAMES: Mapping[str, str] = {"tenant": "user", "prompt_tokens": "prompt"}
"""Names of the request's fields by those of the job's, where they differ."""


class ApiError(Exception):
    """A response with an error status, in the shape of the API that was called."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.event: ErrorEvent | None = None
        """The event of the job that failed."""

    def rename(self, names: Mapping[str, str]) -> None:
        """Replace names of a job's fields, given as patterns, by those of the request."""
        for pattern, own in names.items():
            field = rf"{pattern}(?=[:.\[]|$)"
            self.message = re.sub(rf"(^|; ){field}", rf"\g<1>{own}", self.message)
            self.param = self.param and re.sub(f"^{field}", own, self.param)

    def openai_body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, ("server_error", "api_error"))[0]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's error object."""
        kind = _TYPES.get(self.status, ("server_error", "api_error"))[1]
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400: a field of the request is wrong."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, code=code, param=param)


def too_many(message: str, retry_after_s: float, code: str) -> ApiError:
    """Status 429, with the time to wait in both forms that clients read."""
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code=code, headers=retry_headers(retry_after_s))


def unavailable(message: str, retry_after_s: float = 1.0, code: str = "service_unavailable") -> ApiError:
    """Status 503: no worker, no server, or the gateway drains."""
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, code=code, headers=retry_headers(retry_after_s))


def draining() -> ApiError:
    """Status 503: the gateway takes no more requests, or stops before an answer's end."""
    return unavailable("the gateway is stopping", code="draining")


def deadline_passed(message: str) -> ApiError:
    """Status 504: the job's deadline or its worker's time limit has passed."""
    return ApiError(HTTPStatus.GATEWAY_TIMEOUT, message, code="inference_timeout", headers=NO_RETRY)


def retry_headers(retry_after_s: float) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least 1, and `retry-after-ms`."""
    ms = max(1, round(retry_after_s * 1000))
    return {"retry-after": str(max(1, -(-ms // 1000))), "retry-after-ms": str(ms)}


def api_error(error: Exception) -> ApiError:
    """The API's error for an exception of the job client; status 500 for any other."""
    match error:
        case ApiError():
            known = error
        case JobFailed():
            known = error_of_event(error.error)
        case InvalidRequest():
            known = _invalid_job(error.message, error.details)
        case QueueFull():
            known = too_many(error.message, error.retry_after_s, "queue_full")
        case Disconnected(reply=""):
            known = unavailable("the Redis server is not reachable", code="redis_unreachable")
        case Disconnected():
            known = unavailable(f"the Redis server refuses commands for now ({error.reply})", code="redis_busy")
        case WorkerError(code="REDIS_REFUSED"):
            known = unavailable("the Redis server refuses the gateway's commands", 10.0, "redis_refused")
        case WorkerError(code="EVENTS_LOST"):
            known = _failed(error.message, "events_lost", NO_RETRY)
        case _:
            known = _failed("internal error of the gateway", "internal_error", NO_RETRY)
    return known


def _failed(message: str, code: str, headers: Mapping[str, str] | None = None) -> ApiError:
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, code=code, headers=headers)


def error_of_event(event: ErrorEvent) -> ApiError:
    """The API's error for a job's `error` event."""
    error = _error_of(event)
    error.event = event
    return error


def _error_of(event: ErrorEvent) -> ApiError:
    code = event.code.lower()
    match event.code:
        case "INVALID_REQUEST":
            return _invalid_job(event.message, event.details)
        case "INFERENCE_TIMEOUT":
            return deadline_passed(event.message)
        case "CANCELLED":
            return ApiError(HTTPStatus.CONFLICT, f"the job was {event.message}", code=code, headers=NO_RETRY)
    return _failed(event.message, code, None if event.retriable else NO_RETRY)


@contextlib.contextmanager
def fields_named(names: Mapping[str, str]) -> Iterator[None]:
    """Raise errors about a job's fields under the names of the request's fields."""
    try:
        yield
    except (ApiError, InvalidRequest) as error:
        known = api_error(error)
        known.rename(names)
        raise known from error


def field_path(field: str) -> str:
    """A field's path as OpenAI writes it: `messages[0].content` for `messages.0.content`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", field)


def _invalid_job(message: str, details: Mapping[str, Any]) -> ApiError:
    """Status 400 for the fields of a job, under the names of the request's fields."""
    errors = [each for each in details.get("errors", ()) if isinstance(each, Mapping)]
    if not errors:
        return invalid(message)
    named = [(field_path(_requested(str(each.get("field")))), str(each.get("constraint"))) for each in errors]
    exceeds = any("the context" in constraint for _, constraint in named)
    code = "context_length_exceeded" if exceeds else "invalid_value"
    return invalid("; ".join(f"{field}: {constraint}" for field, constraint in named), named[0][0], code)


def _requested(field: str) -> str:
    name, dot, rest = field.partition(".")
    return _REQUEST_NAMES.get(name, name) + dot + rest
