"""The spans of an attempt, made when it has ended from the times that it noted.

    parent (`traceparent`) ─ chat MODEL ─┬─ queue wait
                                         ├─ attempt ─┬─ prefill
                                         │           └─ decode
                                         └─ attempt (of another worker) ─ …

The span of the job is added by the attempt that ends it, under an id that every attempt derives
from the job. Attributes follow OpenTelemetry's GenAI conventions; no span has text of prompt or
answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker.answer import AttemptStats
from worker.jobs.events import End, ErrorEvent, Event
from worker.jobs.lease import Claim, Lease
from worker.jobs.protocol import Job, Trace

if TYPE_CHECKING:
    from worker.tracing.otlp import Parent, Tracing

PROVIDER = "worker-orcd"
Attributes = dict[str, str | int | float | list[str]]

_FAULTS = {"fault": "INTERNAL", "stalled": "INTERNAL", "cuda_error": "CUDA_ERROR"}
"""Codes of attempts that failed without ending their job, by outcome."""
_REQUEST = ("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "max_tokens", "seed")


@dataclass(slots=True)
class AttemptRecord:
    """What an attempt notes for its spans. Times are of `time.monotonic`."""

    claim: Claim
    claimed_s: float
    server_lead_ms: float = 0.0
    """The server's clock less `time.monotonic`, ms."""
    job_id: str | None = None
    job: Job | None = None
    trace: Trace | None = None
    prompt_tokens: int | None = None
    prefill_s: float | None = None
    """When the engine could begin to compute."""
    lease: Lease | None = None
    stats: AttemptStats | None = None
    last: Event | None = None
    """The terminal event, if this attempt wrote it."""
    cancelled_before: bool = False
    """The client had ended the job before any attempt."""
    ended_s: float = field(default_factory=time.monotonic)

    @property
    def enqueued_s(self) -> float:
        """Submission of the job by this clock, from the server's time; at most the claim."""
        return min(self.claimed_s, (self.claim.enqueued_ms - self.server_lead_ms) / 1000)

    @property
    def published(self) -> int:
        """Number of tokens of earlier attempts."""
        return len(self.lease.history.tokens) if self.lease else 0

    @property
    def error(self) -> str:
        """The code of the error that ended the job, else empty."""
        if self.cancelled_before:
            return "CANCELLED"
        return self.last.code if isinstance(self.last, ErrorEvent) else ""


def trace_attempt(tracing: Tracing, record: AttemptRecord, model: str, outcome: str) -> None:
    """Add the spans of an attempt that ends now, and the metrics of a job that ended with it."""
    if record.job_id is None or record.trace is None:
        return  # an unreadable payload
    record.ended_s = time.monotonic()
    derived = tracing.parent_of(Trace.of(record.job_id, record.claim.entry_id).traceparent)
    assert derived is not None, "a derived traceparent is valid"
    parent = tracing.parent_of(record.trace.traceparent)
    if parent == derived:
        parent = None  # the job's own span begins the trace
    job_span = tracing.planned(parent, derived.trace_id, derived.span_id)
    ns, ended = _clock(), record.last is not None or record.cancelled_before
    if record.claim.deliveries == 1 and (
        record.lease is None or record.lease.epoch == 1
    ):  # a release counts no delivery
        tracing.add("queue wait", job_span, (ns(record.enqueued_s), ns(record.claimed_s)), _queue(record))
    code = record.error or _FAULTS.get(outcome, "")
    attributes = _common(record, model) | _usage(record, 0) | _attempt(record, outcome)
    attempt = tracing.add("attempt", job_span, (ns(record.claimed_s), ns(record.ended_s)), attributes, error=code)
    if record.prefill_s is not None:
        _add_phases(tracing, record, attempt, ns, code)
    if ended:
        common = _common(record, model)
        attributes = common | _request(record.job) | _usage(record, record.published) | _queue(record)
        times = (ns(record.enqueued_s), ns(record.ended_s))
        name = f"{common['gen_ai.operation.name']} {common['gen_ai.request.model']}"
        tracing.add(name, parent, times, attributes, kind="consumer", error=record.error, planned=job_span)
        _measure(tracing, record, common)


def _clock() -> Callable[[float], int]:
    """Converts `time.monotonic` to ns since 1970, all times of an attempt alike."""
    now_ns, now_s = time.time_ns(), time.monotonic()
    return lambda at_s: now_ns - round((now_s - at_s) * 1e9)


def _add_phases(
    tracing: Tracing, record: AttemptRecord, attempt: Parent, ns: Callable[[float], int], code: str
) -> None:
    """Add `prefill`, to the first token or the end, and `decode`, from the first to the last."""
    assert record.prefill_s is not None
    stats = record.stats
    drawn = stats is not None and stats.tokens > 0
    first_s = record.claimed_s + stats.ttft_s if stats is not None and drawn else record.ended_s
    begun_s = min(record.prefill_s, first_s)
    read: Attributes = {
        "gen_ai.usage.input_tokens": record.prompt_tokens or 0,
        "worker.replayed_tokens": record.published,
    }
    tracing.add("prefill", attempt, (ns(begun_s), ns(first_s)), read, error="" if drawn else code)
    if stats is not None and drawn:
        written: Attributes = {"gen_ai.usage.output_tokens": stats.tokens}
        tracing.add("decode", attempt, (ns(first_s), ns(first_s + stats.decode_s)), written, error=code)


def _measure(tracing: Tracing, record: AttemptRecord, common: Attributes) -> None:
    """Record the job's metrics; times of tokens only of jobs that succeeded."""
    stats, error = record.stats, record.error
    tracing.request_duration(record.ended_s - record.enqueued_s, common | ({"error.type": error} if error else {}))
    if error or stats is None or not stats.tokens:
        return
    if not record.published:
        tracing.time_to_first_token(record.claimed_s + stats.ttft_s - record.enqueued_s, common)
    if stats.tokens > 1:
        tracing.time_per_output_token(stats.decode_s / (stats.tokens - 1), common)


def _common(record: AttemptRecord, model: str) -> Attributes:
    """Attributes of spans and metrics."""
    job = record.job
    return {
        "gen_ai.operation.name": "chat" if job is not None and job.messages is not None else "text_completion",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": (job and job.model) or model,
        "gen_ai.response.model": model,
    }


def _usage(record: AttemptRecord, earlier: int) -> Attributes:
    found: Attributes = {}
    if record.prompt_tokens is not None:
        found["gen_ai.usage.input_tokens"] = record.prompt_tokens
    if record.stats is not None:
        found["gen_ai.usage.output_tokens"] = earlier + record.stats.tokens
    if isinstance(record.last, End):
        reason = record.last.finish_reason
        found["gen_ai.response.finish_reasons"] = ["stop" if reason == "stop_sequence" else reason]
    return found


def _request(job: Job | None) -> Attributes:
    """The parameters that the job was submitted with, of those that the conventions name."""
    given = job.model_fields_set if job is not None else ()
    return {f"gen_ai.request.{name}": _number(getattr(job, name)) for name in _REQUEST if name in given}


def _number(value: int | float) -> int | float | str:
    """A seed may exceed the integers of OTLP."""
    return str(value) if isinstance(value, int) and value >= 2**63 else value


def _queue(record: AttemptRecord) -> Attributes:
    assert record.job_id is not None
    assert record.trace is not None
    return {
        "messaging.system": "redis",
        "messaging.destination.name": record.claim.queue,
        "gen_ai.response.id": record.job_id,
        "worker.correlation_id": record.trace.correlation_id,
    }


def _attempt(record: AttemptRecord, outcome: str) -> Attributes:
    found: Attributes = {"worker.outcome": outcome, "worker.deliveries": record.claim.deliveries}
    found["gen_ai.response.id"] = record.job_id or ""
    if record.lease is not None:
        found |= {"worker.epoch": record.lease.epoch, "worker.published_tokens": record.published}
    return found
