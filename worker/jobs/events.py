"""Events of a job's stream and of a worker's own stream, encoded as msgpack or JSON, and decoded.

Grammar of a job's stream: `[started (tokens | metrics | resumed)*] (end | error)`. An entry has the
fields `type`, plain text, and `p`, a map of the event's fields and the envelope's, which is JSON if
its first byte is `{`, otherwise msgpack. Readers ignore unknown types and fields. `transport.py`
writes events and assigns their ids.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, Self

import msgpack

from worker.errors import Internal, WorkerError
from worker.sampling import FinishReason

SCHEMA_VERSION = 1

Encoding = Literal["msgpack", "json"]
"""Encoding of a job's events, which the job chooses."""

Channel = Literal["final", "reasoning", "tool"]
"""What a token's text belongs to: the answer, the model's reasoning, or a tool call's arguments."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """Fields common to all events. `job_id` is None and `epoch` 0 for events about the worker."""

    job_id: str | None
    epoch: int
    ts_ms: int
    """Time of writing, ms since 1970, by the writer's clock."""
    worker_id: str
    """The writer's consumer name; empty if a client wrote the event."""
    correlation_id: str | None = None
    traceparent: str | None = None
    v: int = SCHEMA_VERSION

    def to_fields(self) -> dict[str, Any]:
        """All fields, in their order."""
        return {name: getattr(self, name) for name in _ENVELOPE_FIELDS}


_ENVELOPE_FIELDS = tuple(each.name for each in fields(Envelope))


class EncodedEvent(NamedTuple):
    """The two fields of an event's entry: `type` as plain text and the encoded `p`."""

    kind: str
    packed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base class of all events; `kind` is the entry's `type`."""

    kind: ClassVar[str]
    terminal: ClassVar[bool] = False

    def to_fields(self) -> dict[str, Any]:
        """The event's own fields without those that are None."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Self:
        """Construct from `values`, ignoring unknown fields. Raises TypeError if one is missing."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """The first attempt begins. Contains all resolved values, for later attempts."""

    kind = "started"
    model: str
    seed: int
    max_tokens: int
    prompt_tokens: int
    cached_tokens: int
    started_at: int
    """ms since 1970, like `enqueued_at`, the time of the queue entry by the server's clock."""
    enqueued_at: int
    prompt_hash: str
    """SHA-256 of the prompt's token ids, in hex."""
    fingerprint: str
    """Digest of the model file."""
    numerics: str = ""
    """The numerics id of the worker; empty in streams of older workers."""


class Token(NamedTuple):
    """One generated token: index from 0, id, and the text that it completes."""

    i: int
    id: int
    t: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None
    """(id, log-probability), in descending order of log-probability."""
    channel: Channel = "final"
    """`tool`: `t` is text of the arguments of a call of `recipient`, a JSON object when joined."""
    recipient: str | None = None
    """The called tool, such as `functions.get_weather`; only on the channel `tool`."""
    call: int | None = None
    """Index of the tool call in the answer, from 0; only on the channel `tool`."""
    data: bytes | None = None
    """The token's own bytes, perhaps a part of a character; only if the job has `token_bytes`."""
    top_data: tuple[bytes, ...] | None = None
    """The bytes of each token of `top`."""

    def to_fields(self) -> dict[str, Any]:
        """One item of a `tokens` entry. Written out, since it is called for every token."""
        i, id, t, logprob, top, channel, recipient, call, data, top_data = self
        if logprob is None and top is None and recipient is None and call is None:
            return {"i": i, "id": id, "t": t, "channel": channel}
        item: dict[str, Any] = {"i": i, "id": id, "t": t}
        if logprob is not None:
            item["logprob"] = logprob
        if top is not None:
            item["top"] = top
        item["channel"] = channel
        if recipient is not None:
            item["recipient"] = recipient
        if call is not None:
            item["call"] = call
        if data is not None:
            item["bytes"] = list(data)
        if top_data is not None:
            item["top_bytes"] = [list(each) for each in top_data]
        return item

    @classmethod
    def from_fields(cls, item: Mapping[str, Any]) -> Token:
        """Construct from one item of a `tokens` entry. Raises KeyError if a field is missing."""
        top = item.get("top")
        pairs = None if top is None else tuple((int(id), float(logprob)) for id, logprob in top)
        names = ("logprob", "channel", "recipient", "call")
        optional: dict[str, Any] = {name: item[name] for name in names if name in item}
        if "bytes" in item:
            optional["data"] = bytes(item["bytes"])
        if "top_bytes" in item:
            optional["top_data"] = tuple(map(bytes, item["top_bytes"]))
        return cls(item["i"], item["id"], item["t"], top=pairs, **optional)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Event):
    """One or more generated tokens with consecutive indices, including the end token."""

    kind = "tokens"
    tokens: tuple[Token, ...]

    def to_fields(self) -> dict[str, Any]:
        """One list, with a map for each token."""
        return {"tokens": [token.to_fields() for token in self.tokens]}

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Self:
        """Raises KeyError if a field is missing."""
        return cls(tokens=tuple(map(Token.from_fields, values["tokens"])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics(Event):
    """Progress of the running job, every 250–1000 ms. Device memory in bytes."""

    kind = "metrics"
    tokens_out: int
    tokens_per_second: float
    decode_ms: float
    vram_used: int
    vram_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """A later attempt begins, in a new epoch. The index of its first new token is `from_i`."""

    kind = "resumed"
    from_i: int
    reason: Literal["crash", "drain"]
    exact: bool
    """Whether the next tokens are those that the first worker would have drawn: fingerprint, prompt
    hash and numerics id equal those of `started`, and the numerics id is not empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End(Event):
    """The answer is complete."""

    kind = "end"
    terminal = True
    finish_reason: FinishReason
    tokens_out: int
    prompt_tokens: int
    ttft_ms: float
    decode_ms: float
    stop_sequence: str | None = None
    """The matched stop string if `finish_reason` is `stop_sequence`."""
    stop_token: int | None = None
    """The one of the job's `stop_token_ids` that ended the answer, with `finish_reason` `stop`."""

    @property
    def stopped_by(self) -> str | int | None:
        """What the job named and ended the answer: a string, a token, or neither."""
        return self.stop_token if self.stop_sequence is None else self.stop_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorEvent(Event):
    """The job failed; `retriable` advises the submitter. Copied to the worker's own stream."""

    kind = "error"
    terminal = True
    code: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    retriable: bool = False

    @classmethod
    def of(cls, error: WorkerError) -> ErrorEvent:
        """Construct from an exception."""
        return cls(code=error.code, message=error.message, details=error.details, retriable=error.retriable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting(Event):
    """The worker's process has started and begins to load the model."""

    kind = "starting"
    model: str
    backend: str
    version: str
    pid: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress(Event):
    """Progress of the upload of weights: at least at 0, 25, 50, 75 and 100 %."""

    kind = "load_progress"
    percent: float
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(Event):
    """The model is loaded and the worker takes jobs."""

    kind = "ready"
    model: str
    fingerprint: str
    context: int
    load_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vram(Event):
    """Device memory by purpose, in bytes, and the engine's load.

    Written when a job starts or ends, and while memory changes. Older workers wrote no load.
    """

    kind = "vram"
    weights: int
    kv: int
    activations: int
    free: int
    running: int = 0
    waiting: int = 0
    preempted: int = 0
    """Preemptions since the worker's start; `running` and `waiting` are sequences."""
    kv_blocks_used: int = 0
    kv_blocks: int = 0
    """KV blocks in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency(Event):
    """Whether all weights are in device memory; `strays` names those that are not."""

    kind = "residency"
    ok: bool
    checked: int
    strays: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(Event):
    """The worker takes no more jobs; running ones have `grace_s` seconds."""

    kind = "draining"
    reason: str
    grace_s: float
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The worker's last event."""

    kind = "stopped"
    reason: str
    exit_code: int


_JOB_EVENTS: tuple[type[Event], ...] = (Started, Tokens, Metrics, Resumed, End, ErrorEvent)
_WORKER_EVENTS: tuple[type[Event], ...] = (Starting, LoadProgress, Ready, Vram, Residency, Draining, Stopped)
_KINDS = {cls.kind: cls for cls in _JOB_EVENTS + _WORKER_EVENTS}
TERMINAL_KINDS = frozenset(kind for kind, cls in _KINDS.items() if cls.terminal)


def now_ms() -> int:
    """Milliseconds since 1970 by this machine's clock."""
    return int(time.time() * 1000)


def encode_event(event: Event, envelope: Envelope, encoding: Encoding = "msgpack") -> EncodedEvent:
    """Encode to the entry's `type` and `p`."""
    return encode_fields(event.kind, envelope.to_fields() | event.to_fields(), encoding)


def encode_fields(kind: str, values: dict[str, Any], encoding: Encoding) -> EncodedEvent:
    """Encode an event of that kind, given the fields of its envelope and its own.

    Lone surrogates, such as those of a template's own error, become escapes: `\\ud800`.
    """
    return EncodedEvent(kind, _packed(values) if encoding == "msgpack" else _compact_json(values))


def _packed(values: dict[str, Any]) -> bytes:
    try:
        packed: bytes = msgpack.packb(values)
    except UnicodeEncodeError:
        packed = msgpack.packb(values, unicode_errors="backslashreplace")
    return packed


def _compact_json(values: dict[str, Any]) -> bytes:
    """`values` as UTF-8 without spaces. Values that JSON lacks: see `json_value`."""
    options: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    try:
        return json.dumps(values, **options).encode()
    except ValueError:
        return json.dumps(json_value(values), **options).encode()


def json_value(value: Any, levels: int = 100) -> Any:
    """`value` as JSON can represent it.

    Infinities become the largest numbers, NaN null, lone surrogates escapes, keys that JSON lacks
    (such as bytes) text, maps and lists below the given number of levels the text `...`. Other
    values remain.
    """
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict | list | tuple) and not levels:
        return "..."
    if isinstance(value, dict):
        return {_json_key(name): json_value(item, levels - 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, levels - 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(sys.float_info.max, value)
    return value


def _json_key(name: Any) -> Any:
    key = json_value(name)
    return key if isinstance(key, str | int | float | None) else str(key)


def decode_event(kind: str, packed: bytes) -> tuple[Event, Envelope] | None:
    """The event and its envelope, or None for an unknown type.

    Raises:
        Internal: a known type with unreadable fields.
    """
    cls = _KINDS.get(kind)
    if cls is None:
        return None
    try:
        # `{` begins no msgpack map
        values = json.loads(packed) if packed.startswith(b"{") else msgpack.unpackb(packed, strict_map_key=False)
        envelope = Envelope(**{name: values[name] for name in _ENVELOPE_FIELDS if name in values})
        return cls.from_fields(values), envelope
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise Internal(f"an event of type {kind} can't be read: {type(error).__name__}") from error
