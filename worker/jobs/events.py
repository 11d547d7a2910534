"""What a worker publishes: the events of a job's stream and of the worker's own, msgpack both ways.

Grammar of a job's stream: `[started (tokens | metrics | resumed)*] (end | error)`, and nothing after it. An entry holds
`type` in plain text and `p`, a msgpack map of the event's fields and the envelope's. Readers skip types and fields that
they don't know. Who writes them, and under which id, is `transport.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import msgpack

from worker.errors import Internal, WorkerError

SCHEMA_VERSION = 1

FinishReason = Literal["stop", "stop_sequence", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What every event carries beside its own fields. `job_id` is None and `epoch` 0 on events about the worker."""

    job_id: str | None
    epoch: int
    ts_ms: int
    """When it was written, ms since 1970, by the writer's clock."""
    worker_id: str
    """The writer's consumer name; empty for what a client wrote."""
    correlation_id: str | None = None
    traceparent: str | None = None
    v: int = SCHEMA_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The root of all events; `kind` is the entry's plain `type`."""

    kind: ClassVar[str]
    terminal: ClassVar[bool] = False

    def to_fields(self) -> dict[str, Any]:
        """The event's own fields; an optional one that is None stays off the wire."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Self:
        """The event of these fields, unknown ones skipped. Raises TypeError where one is missing."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """The first attempt begins. Carries what was resolved, so that a later attempt need not resolve again."""

    kind = "started"
    model: str
    seed: int
    max_tokens: int
    prompt_tokens: int
    cached_tokens: int
    started_at: int
    """ms since 1970, as is `enqueued_at`, the queue entry's time by the server's clock."""
    enqueued_at: int
    prompt_hash: str
    """SHA-256 of the prompt's token ids, hex."""
    fingerprint: str
    """Of the model: equal ones give equal tokens."""


@dataclass(frozen=True, slots=True)
class Token:
    """One drawn token: its index from 0, id, and the text that it released."""

    i: int
    id: int
    t: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None
    """(id, log-probability) by falling log-probability."""
    channel: str | None = None
    """gpt-oss: analysis, commentary or final."""

    def to_fields(self) -> dict[str, Any]:
        """The token as one item of a `tokens` entry."""
        item: dict[str, Any] = {"i": self.i, "id": self.id, "t": self.t}
        if self.logprob is not None:
            item["logprob"] = self.logprob
        if self.top is not None:
            item["top"] = self.top
        if self.channel is not None:
            item["channel"] = self.channel
        return item

    @classmethod
    def from_fields(cls, item: Mapping[str, Any]) -> Token:
        """The token of one item of a `tokens` entry. Raises KeyError where a field is missing."""
        top = item.get("top")
        pairs = None if top is None else tuple((int(id), float(logprob)) for id, logprob in top)
        return cls(item["i"], item["id"], item["t"], item.get("logprob"), pairs, item.get("channel"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Event):
    """One or more drawn tokens with consecutive indices, the end token too."""

    kind = "tokens"
    tokens: tuple[Token, ...]

    def to_fields(self) -> dict[str, Any]:
        """One list, each token a map."""
        return {"tokens": [token.to_fields() for token in self.tokens]}

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Self:
        """Raises KeyError where a field is missing."""
        return cls(tokens=tuple(map(Token.from_fields, values["tokens"])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics(Event):
    """How the running job does; every 250–1000 ms. Memory is in bytes, of the device."""

    kind = "metrics"
    tokens_out: int
    tokens_per_second: float
    decode_ms: float
    vram_used: int
    vram_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """Opens each later epoch, the envelope's: tokens before `from_i` are published, the next one drawn is `from_i`."""

    kind = "resumed"
    from_i: int
    reason: Literal["crash", "drain"]
    exact: bool
    """Same model fingerprint and prompt hash as `started`'s."""


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
    """Which stop string ended it, where `finish_reason` is `stop_sequence`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorEvent(Event):
    """The job is over without an answer; `retriable` advises the submitter. A copy goes to the worker's own stream."""

    kind = "error"
    terminal = True
    code: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    retriable: bool = False

    @classmethod
    def of(cls, error: WorkerError) -> ErrorEvent:
        """The event that reports `error`."""
        return cls(code=error.code, message=error.message, details=error.details, retriable=error.retriable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting(Event):
    """The worker's process is up and begins to load."""

    kind = "starting"
    model: str
    backend: str
    version: str
    pid: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress(Event):
    """Weights on their way to the device: at least at 0, 25, 50, 75 and 100 %."""

    kind = "load_progress"
    percent: float
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready(Event):
    """Loaded and about to take jobs."""

    kind = "ready"
    model: str
    fingerprint: str
    context: int
    load_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vram(Event):
    """Device memory by purpose, bytes; at each job's edge and every few seconds while it changes."""

    kind = "vram"
    weights: int
    kv: int
    activations: int
    free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency(Event):
    """Whether every weight lies in plain device memory; `strays` names those that don't."""

    kind = "residency"
    ok: bool
    checked: int
    strays: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draining(Event):
    """No more jobs are taken; the running ones have `grace_s` seconds."""

    kind = "draining"
    reason: str
    grace_s: float
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The worker's last words."""

    kind = "stopped"
    reason: str
    exit_code: int


_KINDS: Mapping[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        *(Started, Tokens, Metrics, Resumed, End, ErrorEvent),
        *(Starting, LoadProgress, Ready, Vram, Residency, Draining, Stopped),
    )
}
_ENVELOPE = tuple(f.name for f in fields(Envelope))
TERMINAL_KINDS = frozenset(kind for kind, cls in _KINDS.items() if cls.terminal)


def encode_event(event: Event, envelope: Envelope) -> tuple[str, bytes]:
    """The entry's `type` and `p`."""
    common = {name: getattr(envelope, name) for name in _ENVELOPE}
    packed: bytes = msgpack.packb(common | event.to_fields())
    return event.kind, packed


def decode_event(kind: str, packed: bytes) -> tuple[Event, Envelope] | None:
    """The event and its envelope, or None for a type that this version doesn't know.

    Raises:
        Internal: a known type whose fields can't be read.
    """
    cls = _KINDS.get(kind)
    if cls is None:
        return None
    try:
        values = msgpack.unpackb(packed, strict_map_key=False)
        envelope = Envelope(**{name: values[name] for name in _ENVELOPE if name in values})
        return cls.from_fields(values), envelope
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise Internal(f"an event of type {kind} can't be read: {type(error).__name__}") from error
