"""The wire contract of a job: fields, ranges and defaults, and how a worker resolves them.

Unknown fields are rejected, types are not coerced, and all wrong fields are reported at once.
Bytes are decoded in `payload.py`; events are in `events.py`. Read `transport.py` next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from worker.errors import InvalidRequest
from worker.jobs.events import SCHEMA_VERSION, Envelope, now_ms
from worker.jobs.payload import (
    JOB_ID,
    PROMPT_FIELDS,
    FieldError,
    describe,
    describe_field,
    field_errors,
    field_name,
    job_id_of,
    limited,
    read_map,
)

MAX_PAYLOAD_BYTES = 8 * 2**20
DEFAULT_MAX_TOKENS = 2048


def _encodable(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("unicode", "valid Unicode, encoded as UTF-8") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
ShortText = Annotated[Text, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class Message(_Strict):
    """One turn of a chat. Special tokens in `content` are treated as plain text."""

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: Text


class SamplingParams(_Strict):
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


class Job(SamplingParams):
    """One job as submitted.

    Construct it with `Job.parse` or `decode_job`, which also check fields against each other.
    """

    job_id: Annotated[str, Field(pattern=f"^{JOB_ID.pattern}$")]
    model: ShortText | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=8192)] | None = None
    prompt_tokens: (
        Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, fail_fast=True)] | None
    ) = None
    special: bool = True
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[Annotated[Text, Field(min_length=1, max_length=100)]], Field(max_length=16)] | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=2**53)] | None = None
    correlation_id: ShortText | None = None
    traceparent: ShortText | None = None
    v: Annotated[int, Field(ge=1)] = SCHEMA_VERSION

    @classmethod
    def parse(cls, fields: Mapping[Any, Any], errors: list[FieldError] | None = None) -> Self:
        """Validate fields; `errors` are those that `read_map` found in the bytes.

        Raises:
            InvalidRequest: `details["errors"]` has each wrong field, its constraint and its value.
        """
        bias, bias_errors = _parse_bias(fields.get("logit_bias"))
        found = [*(errors or []), *_conflicts(fields), *bias_errors]
        try:
            job = cls.model_validate({**fields, "logit_bias": bias})
        except ValidationError as error:
            found += field_errors(error)
        if found:
            raise InvalidRequest.of(*limited(found))
        return job

    def resolve(self, limits: Limits, prompt_len: int, entry_id: str) -> Resolved:
        """Resolve defaults, given the prompt's length in tokens and the queue entry.

        Raises:
            InvalidRequest: a job for another model, a prompt or max_tokens that exceeds the
                context, token ids outside the vocabulary.
        """
        errors = _exceeded(self, limits, prompt_len)
        if errors:
            raise InvalidRequest.of(*limited(errors))
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
    """The two correlation ids that every event and log line of a job carries."""

    correlation_id: str
    traceparent: str

    def envelope(self, job_id: str, epoch: int, worker_id: str) -> Envelope:
        """The envelope of an event of the job that is written now."""
        return Envelope(job_id, epoch, now_ms(), worker_id, self.correlation_id, self.traceparent)

    @classmethod
    def of(cls, job_id: str, entry_id: str, job: Job | None = None, entry_traceparent: str | None = None) -> Trace:
        """The entry's traceparent overrides the job's.

        Missing ids are derived from (job_id, entry_id), so that every attempt derives the same.
        """
        digest = hashlib.sha256(f"trace\0{job_id}\0{entry_id}".encode()).hexdigest()
        return cls(
            (job and job.correlation_id) or digest[:32],
            entry_traceparent or (job and job.traceparent) or f"00-{digest[:32]}-{digest[32:48]}-01",
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
    """A newer schema, not exactly one prompt, min_tokens above max_tokens."""
    errors: list[FieldError] = []
    v, min_tokens, max_tokens = fields.get("v"), fields.get("min_tokens"), fields.get("max_tokens")
    if type(v) is int and v > SCHEMA_VERSION:
        rule = f"at most {SCHEMA_VERSION}: this worker is older than the job's schema version"
        errors.append(("v", rule, describe(v)))
    prompts = [name for name in PROMPT_FIELDS if fields.get(name) is not None]
    if len(prompts) != 1:
        rule = "exactly one of prompt, messages and prompt_tokens"
        errors += [(name, rule, describe_field(name, fields.get(name))) for name in prompts or PROMPT_FIELDS[:1]]
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
    if job.top_k > vocab:
        errors.append(("top_k", f"at most {vocab}, the size of the vocabulary", describe(job.top_k)))
    return errors
