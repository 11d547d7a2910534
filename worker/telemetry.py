"""Prometheus metrics and structured logs of a worker.

docs/metrics.md describes each metric. None is labelled by job. The log has one line per event;
prompts and outputs appear only as SHA-256, lengths and counts. `worker/service/` updates the
metrics and writes the log.
"""

import sys
import time
import traceback
from bisect import bisect_left
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from structlog.typing import FilteringBoundLogger, Processor

from worker.config import LogSection

Log = FilteringBoundLogger

VLLM_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
VLLM_LATENCY_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Bucket bounds of the histograms that vLLM has too."""
FAULTS = ("dead_lettered", "fault", "inference_timeout", "internal", "stalled", "vram_oom")
"""Outcomes that count as errors of the worker or of its model."""


class BatchHistogram(Collector):
    """A histogram without labels to which many values are added at once.

    prometheus_client's takes more than a microsecond a value. The exposition is the same. Values
    are added on one thread.
    """

    def __init__(self, registry: CollectorRegistry, bounds: Sequence[float], name: str, documentation: str) -> None:
        self._name, self._documentation = name, documentation
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        """Values up to each bound and above the one before; the last bound is infinite."""
        self._sum = 0.0
        self._created = time.time()
        registry.register(self)

    def observe(self, values: Sequence[float]) -> None:
        """Add values."""
        counts, bounds = self._counts, self._bounds
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self._sum += sum(values)

    def collect(self) -> Iterable[Metric]:
        """The samples, for the registry."""
        family = HistogramMetricFamily(self._name, self._documentation)
        bounds = [*map(repr, self._bounds), "+Inf"]
        family.add_metric([], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        family.add_sample(f"{self._name}_created", {}, self._created)
        return [family]


class Total(Collector):
    """A counter whose value is counted elsewhere and copied to `value`."""

    def __init__(self, registry: CollectorRegistry, name: str, documentation: str) -> None:
        self.value = 0
        self.name, self._documentation = name, documentation
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The sample, for the registry."""
        return [CounterMetricFamily(self.name, self._documentation, self.value)]


class QueueGauges:
    """The jobs of queues, as a worker or a gateway (`prefix`) last read them from the server."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        gauge = partial(Gauge, registry=registry)
        self._jobs = gauge(f"{prefix}_queue_jobs", "Jobs of a queue, by state: waiting, running.", ["queue", "state"])
        self._oldest = gauge(
            f"{prefix}_queue_oldest_wait_seconds", "Since the oldest waiting job was submitted; 0 if none.", ["queue"]
        )
        self._dead = gauge(f"{prefix}_queue_dead_letters", "Dead letters of a queue.", ["queue"])

    def set(self, queue: str, waiting: int, running: int, oldest_wait_ms: int, dead_letters: int) -> None:
        """Set the figures of one queue."""
        self._jobs.labels(queue, "waiting").set(waiting)
        self._jobs.labels(queue, "running").set(running)
        self._oldest.labels(queue).set(oldest_wait_ms / 1000)
        self._dead.labels(queue).set(dead_letters)

    def clear(self) -> None:
        """Remove all queues: their figures are unknown."""
        for each in (self._jobs, self._oldest, self._dead):
            each.clear()


class Metrics:
    """The metrics of one worker, in their own registry. Times in seconds."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        gauge, counter = partial(Gauge, registry=self._registry), partial(Counter, registry=self._registry)
        histogram, total = partial(Histogram, registry=self._registry), partial(Total, self._registry)
        latency = partial(
            BatchHistogram,
            self._registry,
            (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
        )
        duration = partial(histogram, buckets=(0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0))
        wait = partial(histogram, buckets=(0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 3600.0))

        self._info = gauge("worker_info", "Always 1.", ["model", "device", "version"])
        self.server_reached = gauge(
            "worker_server_reached", "1 if the Redis server replies and refuses nothing, else 0."
        )
        self.degraded = gauge("worker_degraded", "1 after a failed allocation until the next completed job, else 0.")
        self.queues = QueueGauges(self._registry, "worker")
        self._vram = gauge("worker_vram_bytes", "Device memory by purpose.", ["purpose"])
        self._kv_blocks = gauge("worker_kv_blocks", "KV blocks of 16 tokens.", ["state"])
        self._kv_usage = gauge("worker_kv_cache_usage_ratio", "KV blocks that sequences use; 1 is all.")
        self._state = gauge("worker_state", "1 for the current state, 0 for the others.", ["state"])
        self.jobs_running = gauge("worker_jobs_running", "Jobs in this worker, from claim to their last event.")
        self._sequences = gauge("worker_sequences", "Sequences in the engine.", ["state"])
        self._preemptions = total("worker_preemptions", "Sequences that gave up their KV blocks.")
        self._drafts = total("worker_draft_tokens", "Draft tokens that decode steps have verified.")
        self._accepted = total("worker_accepted_draft_tokens", "Draft tokens that were drawn as expected.")
        for count in (self._preemptions, self._drafts, self._accepted):
            gauge(count.name, f"As {count.name}_total.").set_function(partial(getattr, count, "value"))
        self._steps = total("worker_engine_steps", "Completed steps of the engine.")
        self.requests = counter("worker_requests_total", "Finished jobs, by outcome.", ["outcome"])
        for outcome in ("completed", "cancelled", "invalid_request", "unreadable", *FAULTS):
            self.requests.labels(outcome)
        self.success = counter("worker_request_success_total", "Completed jobs, by finish reason.", ["finish_reason"])
        for reason in ("stop", "stop_sequence", "length"):
            self.success.labels(reason)
        self.tokens_in = counter("worker_tokens_in_total", "Prompt tokens, computed or found in the prefix cache.")
        self.tokens_generated = counter("worker_tokens_generated_total", "Tokens sampled.")
        self.prefix_queries = counter(
            "worker_prefix_cache_query_tokens_total", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_hits = counter("worker_prefix_cache_hit_tokens_total", "Prompt tokens found in the prefix cache.")
        self.first_token = latency("worker_time_to_first_token_seconds", "From claim to first token.")
        self.inter_token = latency("worker_inter_token_seconds", "Between consecutive tokens of a job.")
        self.inference = duration("worker_inference_seconds", "From claim to last token.")
        self.queue_wait = wait("worker_queue_wait_seconds", "From submission to claim.")
        self.request_first_token = histogram(
            "worker_request_first_token_seconds", "From submission to first token.", buckets=VLLM_TTFT_S
        )
        self.request = histogram("worker_request_seconds", "From submission to last token.", buckets=VLLM_LATENCY_S)
        self.model_load = gauge("worker_model_load_seconds", "Time to load the model.")
        began = time.monotonic()
        gauge("worker_uptime_seconds", "Since the worker started.").set_function(lambda: time.monotonic() - began)
        self.set_state("starting")

    def set_model(self, name: str, device: str, version: str) -> None:
        """Set the served model, its device and the worker's version."""
        self._info.labels(name, device, version).set(1)

    def set_state(self, state: str) -> None:
        """Set the current state of the worker."""
        for each in ("starting", "ready", "busy", "draining", "failed"):
            self._state.labels(each).set(each == state)

    def set_memory(self, purposes: Mapping[str, int], kv_blocks: Mapping[str, int]) -> None:
        """Set device bytes by purpose and KV blocks by state: used, cached (prefix cache), free."""
        for purpose, count in purposes.items():
            self._vram.labels(purpose).set(count)
        for state, count in kv_blocks.items():
            self._kv_blocks.labels(state).set(count)
        self._kv_usage.set(kv_blocks["used"] / max(1, sum(kv_blocks.values())))

    def set_sequences(self, running: int, waiting: int, preemptions: int, steps: int) -> None:
        """Set the engine's sequences by state, and its preemptions and steps so far."""
        self._sequences.labels("running").set(running)
        self._sequences.labels("waiting").set(waiting)
        self._preemptions.value, self._steps.value = preemptions, steps

    def set_draft_tokens(self, verified: int, accepted: int) -> None:
        """Set the engine's draft tokens so far."""
        self._drafts.value, self._accepted.value = verified, accepted

    def exposition(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)


def open_log(section: LogSection, worker_id: str, stream: TextIO | None = None) -> Log:
    """Open the worker's log, on stderr by default: JSON lines, or readable lines on a terminal.

    Every line has worker_id, model, gpu, job_id and correlation_id; those that are not bound are
    null.
    """
    out = stream or sys.stderr
    console = section.format == "console" or (section.format == "auto" and out.isatty())
    stamped: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp" if console else "ts"),
    ]
    rendered: list[Processor] = [_event_first, structlog.processors.JSONRenderer()]
    if console:
        rendered = [_without_nulls, structlog.dev.ConsoleRenderer(colors=out.isatty())]
    log: Log = structlog.wrap_logger(
        structlog.WriteLogger(out),
        processors=[*stamped, *rendered],
        wrapper_class=structlog.make_filtering_bound_logger(section.level),
        cache_logger_on_first_use=True,
    ).bind(worker_id=worker_id, model=None, gpu=None, job_id=None, correlation_id=None)
    return log


REFUSED_S = 60.0
"""A refusal is logged again if its call was not refused for this long: its cause may have ended."""


class Refusals:
    """Logs calls that the server refuses: `redis_refused` with the reason, once for each change.

    A missing right, or a key of another type, refuses the same calls again and again.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._reasons: dict[str, tuple[str, float]] = {}
        """By call, the reason and the time (`time.monotonic`) of its last refusal."""

    def failed(self, call: str, error: Exception) -> None:
        """Log the error, unless the last call of that or another name had the same reason."""
        reason, now = str(error), time.monotonic()
        self._reasons = {each: known for each, known in self._reasons.items() if now - known[1] <= REFUSED_S}
        if reason not in (known for known, _ in self._reasons.values()):
            self._log.warning("redis_refused", reason=reason)
        self._reasons[call] = reason, now

    def replied(self, call: str, error: Exception | None) -> None:
        """Note the reply to a call: `failed` with an error, otherwise `succeeded`."""
        if error is None:
            self.succeeded(call)
        else:
            self.failed(call, error)

    def succeeded(self, call: str) -> None:
        """Log the next refusal of that call, and of those that were refused for its reason."""
        over, _ = self._reasons.get(call, (None, 0.0))
        self._reasons = {each: known for each, known in self._reasons.items() if known[0] != over}


def _without_nulls(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: value for name, value in line.items() if value is not None}


def _event_first(_: object, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {"ts": line.pop("ts"), "level": line.pop("level"), "event": line.pop("event"), **line}


def frames_of(error: BaseException) -> list[str]:
    """Return the stack frames of `error`, outermost first, and its type, without its message.

    The message may quote a prompt.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames] + [type(error).__name__]


def trace_of(error: BaseException) -> str:
    """Return the full traceback with messages. Only for the engine's errors, which hold no text."""
    return "".join(traceback.format_exception(error))
