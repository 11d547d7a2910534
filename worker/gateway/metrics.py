"""Prometheus metrics of a gateway process, described in docs/metrics.md.

None is labelled by job, key or request. `queue_watch.py` sets those of queues and workers.
"""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from worker.telemetry import QueueGauges

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_RELAY_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)


class GatewayMetrics:
    """The metrics, in their own registry. Times in seconds."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self.server_reached = gauge(
            "gateway_server_reached", "1 if the Redis server was read and accepts writes, else 0."
        )
        self.queues = QueueGauges(self._registry, "gateway")
        self.queue_workers = gauge("gateway_queue_workers", "Workers that take jobs of a queue.", ["queue"])
        self.model_workers = gauge("gateway_model_workers", "Workers that take jobs of a model.", ["model"])
        self.kv_usage = gauge("gateway_kv_cache_usage_ratio", "KV blocks that the model's workers use.", ["model"])
        self.requests = counter("gateway_requests_total", "Answered HTTP requests.", ["route", "status"])
        self.open_requests = gauge("gateway_open_requests", "Requests without a complete response.")
        self.open_streams = gauge("gateway_open_streams", "Responses that are streamed now.")
        self.jobs = counter("gateway_jobs_total", "Submitted jobs.")
        self.attached = counter("gateway_attached_total", "Jobs that a request attached to instead of submitting one.")
        self.cancelled = counter("gateway_cancelled_total", "Jobs cancelled because their client disconnected.")
        self.tokens = counter("gateway_tokens_total", "Tokens that were relayed.")
        self.duration = histogram("gateway_request_seconds", "Duration of requests.", ["route"], buckets=_LATENCY_S)
        self.first_token = histogram(
            "gateway_first_token_seconds", "From a request to its first token.", buckets=_LATENCY_S
        )
        self.relay = histogram(
            "gateway_relay_seconds", "From the worker's write of a first token to the gateway's.", buckets=_RELAY_S
        )

    def clear_queues(self) -> None:
        """Remove what is read from the server: it is unknown."""
        self.server_reached.set(0)
        for each in (self.queues, self.queue_workers, self.model_workers, self.kv_usage):
            each.clear()

    def exposition(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self._registry)
