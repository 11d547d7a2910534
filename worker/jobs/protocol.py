"""The wire contract of a job: fields, ranges and defaults, and how a worker resolves them.

Unknown fields are rejected, types are not coerced, and all wrong fields are reported at once, with
shortened values, and text of a prompt as its length. `payload.py` reads the bytes; events are in
`events.py`. Read `transport.py` next.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError

from worker.errors import InvalidRequest
from worker.jobs.chat import CHAT_FIELDS, Messages, ToolChoiceField, Tools, chat_conflicts
from worker.jobs.events import EncodedEvent, Encoding, Envelope, Event, encode_event, now_ms
from worker.jobs.fields import LIST, MAP, TEXT, JsonMap, ShortText, Strict, Text
from worker.jobs.payload import (
    JOB_ID,
    JOB_ID_RULE,
    MAX_PAYLOAD_BYTES,
    FieldError,
    describe,
    field_name,
    job_id_of,
    read_map,
)
from worker.jobs.response_format import FORMAT_TAGS, ResponseFormat, format_conflicts

SCHEMA_VERSION = 2
"""Of jobs. Version 2 adds `response_format` and `token_bytes`; others have version 1."""
DEFAULT_MAX_TOKENS = 2048
MAX_FIELD_ERRORS = 8
"""Errors listed for one top-level field; further ones are counted."""
PROMPT_FIELDS = ("prompt", "messages", "prompt_tokens")

_CONSTRAINTS: Mapping[str, str] = {
    "missing": "required",
    "extra_forbidden": "unknown field",
    "invalid_key": "keys are strings",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
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
_TAGS = FORMAT_TAGS.union((TEXT, LIST, MAP))


class SamplingParams(Strict):
    """Sampling parameters, applied in order: bias, penalties, temperature, top-k, top-p, min-p."""

    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    penalize_prompt: bool = False
    """Penalties count the prompt's tokens as well as the generated ones."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    token_bytes: bool = False
    """With `logprobs`, events have each token's bytes and those of its alternatives."""


class Job(SamplingParams):
    """One job as submitted.

    Construct it with `Job.parse` or `decode_job`, which also check fields against each other.
    """

    job_id: Annotated[str, Field(pattern=f"^{JOB_ID.pattern}$")]
    model: ShortText | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    prompt_tokens: (
        Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, fail_fast=True)] | None
    ) = None
    special: bool = True
    chat_template_kwargs: JsonMap | None = None
    """Variables of the chat template, such as `enable_thinking` or `reasoning_effort`."""
    tools: Tools | None = None
    """Tools that the model may call, in OpenAI's form; passed to the chat template unchanged."""
    tool_choice: ToolChoiceField | None = None
    response_format: ResponseFormat | None = None
    """The form of the answer's text; the reasoning before it is free."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[Annotated[Text, Field(min_length=1, max_length=100)]], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=64)] | None = None
    """Ids below the vocabulary's size that end the answer, with finish reason `stop`.

    As with the model's end tokens, the last token has no text, and none is drawn before
    `min_tokens`. Unlike these, they end the answer with `ignore_eos` too.
    """
    encoding: Encoding = "msgpack"
    """Encoding of the job's events."""
    priority: Annotated[int, Field(ge=0, le=9)] = 0
    """0 is the most urgent. Orders the jobs that a worker has claimed; queues order the others."""
    tenant: ShortText | None = None
    """Jobs of equal priority start in turn by tenant, those without one as one tenant."""
    deadline_ms: Annotated[int, Field(ge=1, le=2**53)] | None = None
    correlation_id: ShortText | None = None
    traceparent: ShortText | None = None
    v: Annotated[int, Field(ge=1)] = 1
    """The schema version; if not given, the lowest one that has all of the job's fields."""

    @classmethod
    def parse(cls, fields: Mapping[Any, Any], errors: list[FieldError] | None = None) -> Self:
        """Validate fields; `errors` are those that `read_map` found in the bytes.

        Raises:
            InvalidRequest: `details["errors"]` has each wrong field, its constraint and its value.
        """
        bias, bias_errors = _parse_bias(fields.get("logit_bias"))
        found = [*(errors or []), *_conflicts(fields), *bias_errors]
        try:
            job = cls.model_validate({"v": _implied_version(fields), **fields, "logit_bias": bias})
        except ValidationError as error:
            found += _field_errors(error)
        if found:
            raise InvalidRequest.of(*_limited(found))
        return job

    def resolve(self, limits: Limits, prompt_len: int, entry_id: str) -> Resolved:
        """Resolve defaults, given the prompt's length in tokens and the queue entry.

        Raises:
            InvalidRequest: a job for another model, a prompt or max_tokens that exceeds the
                context, token ids outside the vocabulary.
        """
        errors = _exceeded(self, limits, prompt_len)
        if errors:
            raise InvalidRequest.of(*_limited(errors))
        left = limits.context - prompt_len
        max_tokens = min(DEFAULT_MAX_TOKENS, left) if self.max_tokens is None else self.max_tokens
        seed = derived_seed(self.job_id, entry_id) if self.seed is None else self.seed
        return Resolved(limits.model, prompt_len, max_tokens, seed)


@dataclass(frozen=True, slots=True)
class Limits:
    """A worker's limits: the model it serves, its vocabulary size, and its context in tokens."""

    model: str
    vocab_size: int
    context: int
    """The minimum of the file's, the setting and the KV pool."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A job's resolved values: `max_tokens` limited to the context, `seed` as given or derived."""

    model: str
    prompt_len: int
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What all events of a job have in common: two correlation ids, and the encoding."""

    correlation_id: str
    traceparent: str
    encoding: Encoding = "msgpack"

    def envelope(self, job_id: str, epoch: int, worker_id: str) -> Envelope:
        """The envelope of an event of the job that is written now."""
        return Envelope(job_id, epoch, now_ms(), worker_id, self.correlation_id, self.traceparent)

    def encode(self, event: Event, envelope: Envelope) -> EncodedEvent:
        """Encode an event of the job."""
        return encode_event(event, envelope, self.encoding)

    @classmethod
    def of(
        cls,
        job_id: str,
        entry_id: str,
        job: Job | None = None,
        entry_traceparent: str | None = None,
        encoding: Encoding = "msgpack",
    ) -> Trace:
        """The entry's traceparent overrides the job's; `encoding` counts without a job.

        Missing ids are derived from (job_id, entry_id), so that every attempt derives the same.
        """
        digest = hashlib.sha256(f"trace\0{job_id}\0{entry_id}".encode()).hexdigest()
        return cls(
            (job and job.correlation_id) or digest[:32],
            entry_traceparent or (job and job.traceparent) or f"00-{digest[:32]}-{digest[32:48]}-01",
            job.encoding if job else encoding,
        )


def decode_job(payload: bytes, max_bytes: int = MAX_PAYLOAD_BYTES) -> Job:
    """Decode and validate the `p` field of a queue entry.

    Raises:
        InvalidRequest: `details["errors"]` has every wrong field, `details["job_id"]` the job's id
            if it can be read.
    """
    try:
        return Job.parse(*read_map(payload, max_bytes))
    except InvalidRequest as error:
        job_id = job_id_of(payload)
        if job_id is not None:
            error.details["job_id"] = job_id
        raise


def derived_seed(job_id: str, entry_id: str) -> int:
    """Default seed: the first 8 bytes, big-endian, of SHA-256(job_id, a zero byte, entry_id)."""
    return int.from_bytes(hashlib.sha256(f"{job_id}\0{entry_id}".encode()).digest()[:8], "big")


def _implied_version(fields: Mapping[Any, Any]) -> int:
    """The lowest schema version that has all of the fields."""
    since_2 = ("response_format", "token_bytes")
    return 1 if all(fields.get(name) is None for name in since_2) else 2


def _parse_bias(value: Any) -> tuple[Any, list[FieldError]]:
    """`logit_bias` with integer keys, ready for pydantic; wrong items are removed and reported."""
    if not isinstance(value, Mapping):
        return value, []
    parsed: dict[int, float] = {}
    errors: list[FieldError] = []
    for key, bias in value.items():
        decimal = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token = int(key) if decimal else key
        field = f"logit_bias.{field_name(key)}"
        if type(token) is not int or token < 0:
            errors.append((field, "a token id, as an integer or a decimal string", describe(key)))
        elif token in parsed:
            errors.append((field, "given twice", describe(bias)))
        elif type(bias) not in (int, float) or not -100 <= bias <= 100:
            errors.append((field, "a number from -100 to 100", describe(bias)))
        else:
            parsed[token] = bias
    return parsed, errors


def _conflicts(fields: Mapping[Any, Any]) -> list[FieldError]:
    """A newer schema, not exactly one prompt, chat fields without a chat, min_tokens too high."""
    errors: list[FieldError] = []
    v, min_tokens, max_tokens = fields.get("v"), fields.get("min_tokens"), fields.get("max_tokens")
    if type(v) is int and v > SCHEMA_VERSION:
        rule = f"at most {SCHEMA_VERSION}: this worker is older than the job's schema version"
        errors.append(("v", rule, describe(v)))
    prompts = [name for name in PROMPT_FIELDS if fields.get(name) is not None]
    if len(prompts) != 1:
        rule = "exactly one of prompt, messages and prompt_tokens"
        errors += [(name, rule, _describe_field(name, fields.get(name))) for name in prompts or PROMPT_FIELDS[:1]]
    errors += chat_conflicts(fields)
    errors += format_conflicts(fields, _implied_version(fields))
    if type(min_tokens) is int and type(max_tokens) is int and min_tokens > max_tokens > 0:
        errors.append(("min_tokens", "at most max_tokens", describe(min_tokens)))
    return errors


def _exceeded(job: Job, limits: Limits, prompt_len: int) -> list[FieldError]:
    """The worker's limits that the job exceeds."""
    errors: list[FieldError] = []
    vocab, left = limits.vocab_size, limits.context - prompt_len
    if job.model is not None and job.model != limits.model:
        errors.append(("model", f"this worker serves {limits.model}", describe(job.model)))
    source = next(name for name in PROMPT_FIELDS if getattr(job, name) is not None)
    if left < 1:
        errors.append((source, f"at most {limits.context - 1} tokens, to leave one of the context", prompt_len))
    elif prompt_len < 1:
        errors.append((source, "at least one token", prompt_len))
    elif job.max_tokens is not None and job.max_tokens > left:
        errors.append(("max_tokens", f"at most {left}: what the context leaves", describe(job.max_tokens)))
    below = f"below {vocab}, the size of the vocabulary"
    tokens, bias = job.prompt_tokens or (), job.logit_bias or ()
    errors += [(f"prompt_tokens.{i}", below, token) for i, token in enumerate(tokens) if token >= vocab]
    errors += [(f"logit_bias.{token}", below, describe(token)) for token in bias if token >= vocab]
    stops = job.stop_token_ids or ()
    errors += [(f"stop_token_ids.{i}", below, token) for i, token in enumerate(stops) if token >= vocab]
    if job.top_k > vocab:
        errors.append(("top_k", f"at most {vocab}, the size of the vocabulary", describe(job.top_k)))
    return errors


def _describe_field(field: str, value: object, error_type: str = "") -> Any:
    """`value` as an error on `field` reports it: text that may belong to a prompt as its length."""
    named = (*PROMPT_FIELDS, *CHAT_FIELDS[:2], "response_format")
    private = field.partition(".")[0] in named and not field.endswith((".role", ".type"))
    if isinstance(value, str) and (private or error_type == "extra_forbidden"):
        return f"string of {len(value)}"
    return describe(value)


def _field_errors(error: ValidationError) -> list[FieldError]:
    """Translate pydantic's errors."""
    found: list[FieldError] = []
    for line in error.errors(include_url=False):
        context = line.get("ctx", {})
        path = [part for part in line["loc"] if part not in _TAGS] + context.get("path", [])
        field = ".".join(field_name(part) for part in path)
        kind = line["type"]
        if kind in ("too_long", "too_short") and isinstance(line["input"], str):
            kind = f"string_{kind}"
        template = _CONSTRAINTS.get(kind)
        message = line["msg"].removeprefix("Input should be ")
        constraint = template.format(**context) if template else message
        value = (
            None
            if line["type"] in ("missing", "contradiction")
            else _describe_field(field, line["input"], line["type"])
        )
        found.append((field, constraint, value))
    return found


def _limited(errors: list[FieldError]) -> list[FieldError]:
    """The first MAX_FIELD_ERRORS errors of each top-level field, and a count of the rest."""
    kept: list[FieldError] = []
    count: Counter[str] = Counter()
    for error in errors:
        top = error[0].partition(".")[0]
        count[top] += 1
        if count[top] <= MAX_FIELD_ERRORS:
            kept.append(error)
    return kept + [(top, "further errors", n - MAX_FIELD_ERRORS) for top, n in count.items() if n > MAX_FIELD_ERRORS]
