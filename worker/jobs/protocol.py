"""The wire contract of a job: its fields, their ranges and defaults, and what a worker makes of them.

Unknown fields are rejected, no type is coerced, and every wrong field is collected before an answer is given. The
bytes are `payload.py`'s, the events `events.py`'s; neither Redis nor a device is known here. Read `transport.py` next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from worker.errors import InvalidRequest
from worker.jobs.events import SCHEMA_VERSION
from worker.jobs.faults import PROMPT_FIELDS, Fault, bounded, faults_of, name_of, shown, shown_in
from worker.jobs.payload import JOB_ID, job_id_of, read_map

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
    """One turn of a chat; special tokens in `content` stay plain text."""

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: Text


class SamplingParams(_Strict):
    """How each token is drawn, in the order of application: bias, penalties, temperature, top-k, top-p, min-p."""

    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    penalize_prompt: bool = False
    """The penalties count the prompt's tokens too, not the generated ones alone."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Job(SamplingParams):
    """One job as submitted. Build it with `Job.parse` or `decode_job`, which also check fields against each other."""

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
    def parse(cls, fields: Mapping[Any, Any], faults: list[Fault] | None = None) -> Self:
        """The job of these fields; `faults` are those that the reader of the bytes had found.

        Raises:
            InvalidRequest: `details["errors"]` names every wrong field, its constraint and its value.
        """
        bias, bias_faults = _bias(fields.get("logit_bias"))
        found = [*(faults or []), *_contradictions(fields), *bias_faults]
        try:
            job = cls.model_validate({**fields, "logit_bias": bias})
        except ValidationError as error:
            found += faults_of(error)
        if found:
            raise InvalidRequest.of(*bounded(found))
        return job

    def resolve(self, limits: Limits, prompt_len: int, entry_id: str) -> Resolved:
        """What this worker makes of the job: `prompt_len` tokens of prompt, submitted as queue entry `entry_id`.

        Raises:
            InvalidRequest: another model's job, a prompt or a max_tokens beyond the context, ids beyond the vocabulary.
        """
        faults = _misfits(self, limits, prompt_len)
        if faults:
            raise InvalidRequest.of(*bounded(faults))
        left = limits.context - prompt_len
        max_tokens = min(DEFAULT_MAX_TOKENS, left) if self.max_tokens is None else self.max_tokens
        seed = derived_seed(self.job_id, entry_id) if self.seed is None else self.seed
        return Resolved(limits.model, prompt_len, max_tokens, seed)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a worker can serve: its model's name, rows of the vocabulary, and min(file, setting, KV pool) tokens."""

    model: str
    vocab_size: int
    context: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A job's open questions, answered: `max_tokens` as cut to the context, `seed` as given or derived."""

    model: str
    prompt_len: int
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Trace:
    """The two ids that every event and log line of a job carries."""

    correlation_id: str
    traceparent: str

    @classmethod
    def of(cls, job_id: str, entry_id: str, job: Job | None = None, entry_traceparent: str | None = None) -> Trace:
        """The entry's own traceparent wins over the job's. What neither gives is derived from (job_id, entry_id), so
        that a second attempt generates the same.
        """
        digest = hashlib.sha256(f"trace\0{job_id}\0{entry_id}".encode()).hexdigest()
        return cls(
            (job and job.correlation_id) or digest[:32],
            entry_traceparent or (job and job.traceparent) or f"00-{digest[:32]}-{digest[32:48]}-01",
        )


def decode_job(payload: bytes, max_bytes: int = MAX_PAYLOAD_BYTES) -> Job:
    """The job in a queue entry's `p`.

    Raises:
        InvalidRequest: with every wrong field in `details["errors"]`, and `details["job_id"]` where one can be read.
    """
    try:
        return Job.parse(*read_map(payload, max_bytes))
    except InvalidRequest as error:
        job_id = job_id_of(payload)
        if job_id is not None:
            error.details["job_id"] = job_id
        raise


def derived_seed(job_id: str, entry_id: str) -> int:
    """The seed of a job that names none: the first 8 bytes, big-endian, of SHA-256(job_id, a zero byte, entry_id)."""
    return int.from_bytes(hashlib.sha256(f"{job_id}\0{entry_id}".encode()).digest()[:8], "big")


def _bias(given: Any) -> tuple[Any, list[Fault]]:
    """`logit_bias` with integer keys, as pydantic then checks it; wrong entries are taken out and reported."""
    if not isinstance(given, Mapping):
        return given, []
    bias: dict[int, float] = {}
    faults: list[Fault] = []
    for key, value in given.items():
        decimal = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token = int(key) if decimal else key
        where = f"logit_bias.{name_of(key)}"
        if type(token) is not int or token < 0:
            faults.append((where, "a token id, as an integer or a decimal string", shown(key)))
        elif token in bias:
            faults.append((where, "given twice", shown(value)))
        elif type(value) not in (int, float) or not -100 <= value <= 100:
            faults.append((where, "a number from -100 to 100", shown(value)))
        else:
            bias[token] = value
    return bias, faults


def _contradictions(fields: Mapping[Any, Any]) -> list[Fault]:
    """What no field alone can show: a newer schema, more or less than one prompt, min_tokens above max_tokens."""
    faults: list[Fault] = []
    v, least, most = fields.get("v"), fields.get("min_tokens"), fields.get("max_tokens")
    if type(v) is int and v > SCHEMA_VERSION:
        faults.append(("v", f"at most {SCHEMA_VERSION}: this worker is older than the job's schema version", shown(v)))
    given = [name for name in PROMPT_FIELDS if fields.get(name) is not None]
    if len(given) != 1:
        rule = "exactly one of prompt, messages and prompt_tokens"
        faults += [(name, rule, shown_in(name, fields.get(name))) for name in given or PROMPT_FIELDS[:1]]
    if type(least) is int and type(most) is int and least > most > 0:
        faults.append(("min_tokens", "at most max_tokens", shown(least)))
    return faults


def _misfits(job: Job, limits: Limits, prompt_len: int) -> list[Fault]:
    """Where the job goes beyond this worker's limits."""
    faults: list[Fault] = []
    vocab, left = limits.vocab_size, limits.context - prompt_len
    if job.model is not None and job.model != limits.model:
        faults.append(("model", f"this worker serves {limits.model}", shown(job.model)))
    source = next(name for name in PROMPT_FIELDS if getattr(job, name) is not None)
    if left < 1:
        faults.append((source, f"at most {limits.context - 1} tokens, to leave one of the context", prompt_len))
    elif prompt_len < 1:
        faults.append((source, "at least one token", prompt_len))
    elif job.max_tokens is not None and job.max_tokens > left:
        faults.append(("max_tokens", f"at most {left}: what the context leaves", shown(job.max_tokens)))
    below = f"below {vocab}, the size of the vocabulary"
    tokens, bias = job.prompt_tokens or (), job.logit_bias or ()
    faults += [(f"prompt_tokens.{at}", below, token) for at, token in enumerate(tokens) if token >= vocab]
    faults += [(f"logit_bias.{token}", below, shown(token)) for token in bias if token >= vocab]
    if job.top_k > vocab:
        faults.append(("top_k", f"at most {vocab}, the size of the vocabulary", shown(job.top_k)))
    return faults
