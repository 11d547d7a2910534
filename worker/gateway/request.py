"""Request bodies: size, JSON, fields; what every API's request has in common.

A field is in one of four groups:

| group | effect |
| --- | --- |
| a field of the model | honoured |
| `ignored`: of the API's schema, without an effect on the answer | accepted |
| `neutral`: an extension that has no effect with some values | accepted with these |
| any other | status 400 that names it |

Ranges of the values that a job has too are checked by `Job`, whose fields have the same names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal, LiteralString, Self

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from worker.gateway.context import context_of
from worker.gateway.errors import ApiError, field_path, invalid

MAX_NAMED = 8
"""Wrong fields named in one message."""


async def read_body(request: Request) -> bytes:
    """The body of a request. Raises status 413 above `gateway.max_body_bytes`."""
    limit = context_of(request).section.max_body_bytes
    message = f"the body has more than {limit} bytes"
    too_large = ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, code="request_too_large")
    length = request.headers.get("content-length", "")
    if is_number(length) and int(length) > limit:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def is_number(text: str) -> bool:
    """Whether the text of a header is a decimal number that `int` reads."""
    return re.fullmatch("[0-9]{1,19}", text) is not None


class ApiModel(BaseModel):
    """A map of known fields, without type coercion."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Accepted values by field; null is accepted too."""

    @classmethod
    def parse(cls, body: bytes | Mapping[str, Any]) -> Self:
        """Validate a body of JSON, or its map. Raises status 400 that names the wrong fields."""
        values = body if isinstance(body, Mapping) else _json_map(body)
        known = {name: value for name, value in values.items() if not cls._has_no_effect(name, value)}
        try:
            return cls.model_validate(known)
        except ValidationError as error:
            raise _wrong_fields(error) from None

    @classmethod
    def _has_no_effect(cls, name: str, value: Any) -> bool:
        if name in cls.ignored:
            return True
        return name in cls.neutral and (value is None or any(value == each for each in cls.neutral[name]))


def _json_map(body: bytes) -> Mapping[str, Any]:
    try:
        values = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise invalid("the body is not a JSON object", code="invalid_json")
    return values


_MESSAGES = {"extra_forbidden": "unknown or unsupported field", "missing": "required"}


def _wrong_fields(error: ValidationError) -> ApiError:
    lines = [
        (
            _path((*each["loc"], *each.get("ctx", {}).get("path", ()))),
            _MESSAGES.get(each["type"], each["msg"].removeprefix("Value error, ")),
            each["type"],
        )
        for each in error.errors(include_url=False, include_input=False)
    ]
    named = "; ".join(f"{path}: {message}" for path, message, _ in lines[:MAX_NAMED])
    codes = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
    return invalid(named, lines[0][0], codes.get(lines[0][2], "invalid_value"))


def _path(location: tuple[int | str, ...]) -> str:
    """The field's path without the parts that name an alternative of a union."""
    parts = [str(part) for part in location if isinstance(part, int) or re.fullmatch(r"[A-Za-z_][\w\-]*", part)]
    return field_path(".".join(parts)) or "body"


def contradiction(field: str, rule: LiteralString) -> PydanticCustomError:
    """The error of a field that contradicts others, to raise in a validator of the whole map."""
    path = [int(part) if part.isdigit() else part for part in field.split(".")]
    return PydanticCustomError("contradiction", rule, {"path": path})


def _top_k(value: object) -> object:
    return 0 if value == -1 else value


def _seed(value: object) -> object:
    """OpenAI's seeds are signed: those from -2**63 to -1 become 2**63 to 2**64 - 1."""
    return value + 2**64 if type(value) is int and -(2**63) <= value < 0 else value


def _stop(value: object) -> object:
    return [value] if isinstance(value, str) else value


class SamplingFields(ApiModel):
    """Fields of OpenAI's requests and vLLM's extensions that a job has under the same name."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int | None, BeforeValidator(_top_k)] = None
    """-1, vLLM's value for no limit, is 0."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**64 - 1), BeforeValidator(_seed)] = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop)] = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None
    deadline_ms: Annotated[int | None, Field(le=2**53)] = None
    """Milliseconds from submission after which the job ends with status 504."""

    def sampling(self) -> dict[str, Any]:
        """The job fields that are given."""
        fields = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return {name: value for name, value in fields.items() if value not in (None, [])}


Choices = Annotated[int, Field(ge=1, le=128)]
"""`n`: the number of choices, each a job of its own."""


def choice_jobs(job: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """The jobs of `n` choices, with consecutive seeds if one is given."""
    if job.get("seed") is None:
        return [dict(job) for _ in range(n)]
    return [dict(job) | {"seed": (job["seed"] + index) % 2**64} for index in range(n)]


class StreamOptions(ApiModel):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Without an effect: chunks have no padding."""
    continuous_usage_stats: Literal[False] | None = None
    """vLLM's; only the last chunk has the usage."""


class TextFields(SamplingFields):
    """What requests of chat completions and of text completions have in common."""

    model: str | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    """vLLM's form of `response_format`."""
    user: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options: only with stream", "stream_options")
        if self.response_format is not None and self.structured_outputs is not None:
            raise invalid("structured_outputs: only without response_format", "structured_outputs")
        return self


VLLM_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1.0,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""vLLM's fields that are accepted with the values that change nothing."""
