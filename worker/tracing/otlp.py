"""OpenTelemetry's SDK as workers and gateways use it: finished spans in, OTLP/HTTP out.

Spans and metrics are sent in batches by threads of the SDK. If the endpoint is away, its queue
drops the oldest spans, the log has one line when that begins and one when it ends, and `close` does
not wait. Spans and metrics are independent in that: a collector may accept only one of them.
Resource, headers, timeout, sampler and batches follow the OTEL_* variables.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import requests
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from worker import __version__
from worker.telemetry import Log

Attributes = Mapping[str, str | int | float | Sequence[str]]
Parent = SpanContext
Kind = Literal["server", "consumer", "internal"]

CLOSE_S = 0.5
"""For which `close` waits for the last spans. An idle worker drains in less than a second."""
_KINDS = {"server": SpanKind.SERVER, "consumer": SpanKind.CONSUMER, "internal": SpanKind.INTERNAL}
_SCOPE = "worker-orcd"
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_propagator = TraceContextTextMapPropagator()


class Tracing:
    """The spans and metrics of one process. Used on one thread, except for `close`.

    The sampler is that of OTEL_TRACES_SAMPLER, by default: spans of a sampled or of no parent.
    """

    def __init__(self, endpoint: str, service: str, instance: str, log: Log) -> None:
        _silence_packages()
        own = Resource({"service.name": service})
        fixed = Resource({"service.instance.id": instance, "service.version": __version__})
        resource = own.merge(OTELResourceDetector().detect()).merge(fixed)
        self._spans_to, self._metrics_to = _Signal(endpoint, "traces", log), _Signal(endpoint, "metrics", log)
        self._ids = _Ids()
        self._provider = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(_SpanExporter(self._spans_to)))
        self._tracer = self._provider.get_tracer(_SCOPE, __version__)
        reader = PeriodicExportingMetricReader(_MetricExporter(self._metrics_to))
        self._meters = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        meter = self._meters.get_meter(_SCOPE, __version__)

        def histogram(name: str, description: str, bounds: Sequence[float]) -> Callable[[float, Attributes], None]:
            created = meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=bounds)
            return created.record

        self.request_duration = histogram(
            "gen_ai.server.request.duration", "From a job's submission to its last event.", _DURATION_S
        )
        self.time_to_first_token = histogram(
            "gen_ai.server.time_to_first_token", "From a job's submission to its first token.", _FIRST_TOKEN_S
        )
        self.time_per_output_token = histogram(
            "gen_ai.server.time_per_output_token", "Time per token after an attempt's first.", _PER_TOKEN_S
        )

    @staticmethod
    def parent_of(traceparent: str | None) -> SpanContext | None:
        """The span that a `traceparent` names; None if it is missing or invalid."""
        carrier = {"traceparent": traceparent or ""}
        found = trace.get_current_span(_propagator.extract(carrier, Context())).get_span_context()
        return found if found.is_valid else None

    def planned(self, parent: SpanContext | None, trace_id: int, span_id: int) -> SpanContext:
        """The context of a span that `add` makes later, perhaps in another process.

        Without a parent it begins the trace of that id.
        """
        if parent is not None:
            return SpanContext(parent.trace_id, span_id, is_remote=True, trace_flags=parent.trace_flags)
        decision = self._provider.sampler.should_sample(None, trace_id, "").decision
        flags = TraceFlags(TraceFlags.SAMPLED if decision is Decision.RECORD_AND_SAMPLE else TraceFlags.DEFAULT)
        return SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)

    def add(
        self,
        name: str,
        parent: SpanContext | None,
        times_ns: tuple[int, int],
        attributes: Attributes,
        *,
        kind: Kind = "internal",
        error: str = "",
        planned: SpanContext | None = None,
    ) -> SpanContext:
        """Add a finished span from its start to its end, ns since 1970; returns its context.

        `error` is a stable code. `planned` has the span's own ids.
        """
        if planned is not None:
            self._ids.next_trace_id, self._ids.next_span_id = planned.trace_id, planned.span_id
        start, end = times_ns
        span = self._tracer.start_span(
            name, _context_of(parent), kind=_KINDS[kind], attributes=dict(attributes), start_time=start
        )
        if error:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(max(start, end))
        return span.get_span_context()

    def begin_request(self, traceparent: str | None) -> RequestSpan:
        """Begin the span of an HTTP request that continues the `traceparent` of its header."""
        context = _context_of(self.parent_of(traceparent))
        return RequestSpan(self._tracer.start_span("request", context, kind=SpanKind.SERVER))

    def close(self) -> None:
        """Send what is left for at most CLOSE_S; do not wait for what was last not accepted."""
        end_s = time.monotonic() + CLOSE_S
        waited = []
        for signal, shutdown in ((self._spans_to, self._provider.shutdown), (self._metrics_to, self._meters.shutdown)):
            thread = threading.Thread(target=shutdown, daemon=True, name="tracing-close")
            thread.start()
            if signal.is_accepted:
                waited.append(thread)
        for thread in waited:
            thread.join(max(0.0, end_s - time.monotonic()))


class RequestSpan:
    """The span of one HTTP request."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """What the request's jobs continue."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return carrier["traceparent"]

    def end(self, name: str, attributes: Attributes, *, error: str = "") -> None:
        """End the span, with its name and what is known by now."""
        self._span.update_name(name)
        self._span.set_attributes(dict(attributes))
        if error:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class _Ids(RandomIdGenerator):
    """Random ids, unless those of the next span are given."""

    next_trace_id = next_span_id = 0

    def generate_trace_id(self) -> int:
        given, self.next_trace_id = self.next_trace_id, 0
        return given or super().generate_trace_id()

    def generate_span_id(self) -> int:
        given, self.next_span_id, self.next_trace_id = self.next_span_id, 0, 0
        return given or super().generate_span_id()


class _Session(requests.Session):
    """A session that keeps the result of its last request for the log."""

    result = ""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            response = super().request(*args, **kwargs)
        except requests.RequestException as error:  # its text has the URL
            self.result = f"no reply ({type(error).__name__})"
            raise
        self.result = f"HTTP status {response.status_code}"
        return response


class _Signal:
    """Where spans or metrics are sent; logs when the endpoint stops or begins to accept them."""

    def __init__(self, endpoint: str, name: Literal["traces", "metrics"], log: Log) -> None:
        self.url = f"{endpoint.rstrip('/')}/v1/{name}"
        self.session = _Session()
        self.is_accepted = True
        """Whether the last batch was accepted."""
        self._log = log.bind(endpoint=urlsplit(endpoint).netloc.rpartition("@")[2], signal=name)
        self._lost_s = 0.0

    def note(self, is_accepted: bool) -> None:
        """Note the result of an export. Exports of a signal follow one another."""
        if is_accepted is self.is_accepted:
            return
        self.is_accepted = is_accepted
        if is_accepted:
            self._log.info("tracing_back", lost_s=round(time.monotonic() - self._lost_s, 3))
        else:
            self._lost_s = time.monotonic()
            self._log.warning("tracing_lost", reason=self.session.result or "the batch was not sent")


class _SpanExporter(OTLPSpanExporter):
    def __init__(self, signal: _Signal) -> None:
        super().__init__(signal.url, session=signal.session)
        self._signal = signal

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._signal.session.result = ""
        result = super().export(spans)
        self._signal.note(result is SpanExportResult.SUCCESS)
        return result


class _MetricExporter(OTLPMetricExporter):
    def __init__(self, signal: _Signal) -> None:
        super().__init__(signal.url, session=signal.session)
        self._signal = signal

    def export(
        self, metrics_data: MetricsData, timeout_millis: float | None = 10_000, **kwargs: object
    ) -> MetricExportResult:
        self._signal.session.result = ""
        result = super().export(metrics_data, timeout_millis, **kwargs)
        self._signal.note(result is MetricExportResult.SUCCESS)
        return result


def _context_of(parent: SpanContext | None) -> Context:
    return Context() if parent is None else trace.set_span_in_context(NonRecordingSpan(parent), Context())


def _silence_packages() -> None:
    """Discard what the SDK logs of every failed export: `_Signal` logs the first."""
    logger = logging.getLogger("opentelemetry")
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
