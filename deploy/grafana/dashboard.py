"""Writes dashboards/worker.json, the Grafana dashboard: `python deploy/grafana/dashboard.py`.

docs/metrics.md describes the metrics. tests/monitoring runs every query on a Prometheus server.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.telemetry import FAULTS

TARGET = Path(__file__).with_name("dashboards") / "worker.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
COLUMNS = 24
_faults = "|".join(FAULTS)
FAILED = f'worker_requests_total{{outcome=~"{_faults}"}}'
ENDED = f'worker_requests_total{{outcome=~"completed|{_faults}"}}'
TAKING_JOBS = 'worker_state{state=~"ready|busy"}'
API = 'gateway_requests_total{route=~"/v1/.*"}'
API_5XX = 'gateway_requests_total{route=~"/v1/.*",status=~"5.."}'


@dataclass(frozen=True)
class Panel:
    """Queries by legend; `kind` is Grafana's panel type, `width` is in columns of 24."""

    title: str
    unit: str
    queries: Mapping[str, str]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8


def of_model(series: str) -> str:
    """The series of workers of the chosen models, with the label `model` of worker_info."""
    return f'{series} * on (job, instance) group_left (model) worker_info{{model=~"$model"}}'


def rate(counter: str) -> str:
    """Per second, of workers of the chosen models."""
    return of_model(f"rate({counter}[$__rate_interval])")


def quantiles(buckets: str, by: str) -> dict[str, str]:
    """The quantiles of a histogram, given its summed buckets, with a legend for each `by`."""
    return {f"p{q} {{{{{by}}}}}": f"histogram_quantile({q / 100}, {buckets})" for q in (50, 95, 99)}


def latency(title: str, histogram: str) -> Panel:
    """A worker's histogram of seconds, by model."""
    buckets = f"sum by (le, model) ({rate(f'{histogram}_bucket')})"
    return Panel(title, "s", quantiles(buckets, "model"))


def gateway_rate(counter: str) -> str:
    """Per second, of all gateways."""
    return f"sum(rate({counter}[$__rate_interval]))"


def of_queue(figure: str, state: str = "") -> str:
    """A figure of the chosen queues, which gateways and workers read from the same server."""
    chosen = '{queue=~"$queue"' + (f',state="{state}"' if state else "") + "}"
    return f"max by (queue) (gateway_queue_{figure}{chosen} or worker_queue_{figure}{chosen})"


def stat(title: str, unit: str, query: str) -> Panel:
    """One number."""
    return Panel(title, unit, {"": query}, kind="stat", width=4, height=4)


ROWS: Mapping[str, tuple[Panel, ...]] = {
    "Now": (
        stat("Workers that take jobs", "short", f"sum({of_model(TAKING_JOBS)})"),
        stat("Waiting jobs", "short", f"sum({of_queue('jobs', 'waiting')})"),
        stat("Running jobs", "short", f"sum({of_queue('jobs', 'running')})"),
        stat("Oldest wait now", "s", f"max({of_queue('oldest_wait_seconds')})"),
        stat("Dead letters", "short", f"sum({of_queue('dead_letters')})"),
        stat("Firing alerts", "short", 'count(ALERTS{alertstate="firing"}) or vector(0)'),
    ),
    "Queues": (
        Panel(
            "Jobs",
            "short",
            {"waiting {{queue}}": of_queue("jobs", "waiting"), "running {{queue}}": of_queue("jobs", "running")},
        ),
        Panel("Oldest wait", "s", {"{{queue}}": of_queue("oldest_wait_seconds")}),
        Panel(
            "Workers and dead letters",
            "short",
            {
                "workers {{queue}}": 'max by (queue) (gateway_queue_workers{queue=~"$queue"})',
                "dead letters {{queue}}": of_queue("dead_letters"),
            },
        ),
    ),
    "Latency": (
        latency("Time to first token, from submission", "worker_request_first_token_seconds"),
        latency("Duration, from submission", "worker_request_seconds"),
        latency("Queue wait", "worker_queue_wait_seconds"),
        latency("Time to first token, from claim", "worker_time_to_first_token_seconds"),
        latency("Inter-token", "worker_inter_token_seconds"),
        latency("Inference, from claim", "worker_inference_seconds"),
    ),
    "Throughput": (
        Panel(
            "Tokens per second",
            "short",
            {
                "prompt {{model}}": f"sum by (model) ({rate('worker_tokens_in_total')})",
                "generated {{model}}": f"sum by (model) ({rate('worker_tokens_generated_total')})",
            },
        ),
        Panel("Jobs per second", "reqps", {"{{outcome}}": f"sum by (outcome) ({rate('worker_requests_total')})"}),
        Panel(
            "Completed jobs per second",
            "reqps",
            {"{{finish_reason}}": f"sum by (finish_reason) ({rate('worker_request_success_total')})"},
        ),
        Panel(
            "Error rate",
            "percentunit",
            {"{{model}}": f"sum by (model) ({rate(FAILED)}) / sum by (model) ({rate(ENDED)})"},
        ),
        Panel(
            "Prefix cache hit rate",
            "percentunit",
            {
                "{{model}}": f"sum by (model) ({rate('worker_prefix_cache_hit_tokens_total')})"
                f" / sum by (model) ({rate('worker_prefix_cache_query_tokens_total')})"
            },
        ),
        Panel(
            "Draft tokens per second",
            "short",
            {
                "verified {{model}}": f"sum by (model) ({rate('worker_draft_tokens_total')})",
                "accepted {{model}}": f"sum by (model) ({rate('worker_accepted_draft_tokens_total')})",
            },
        ),
    ),
    "Workers": (
        Panel(
            "Sequences",
            "short",
            {
                "{{state}} {{instance}}": of_model("worker_sequences"),
                "jobs {{instance}}": of_model("worker_jobs_running"),
            },
        ),
        Panel(
            "KV cache use",
            "percentunit",
            {
                "{{instance}}": of_model("worker_kv_cache_usage_ratio"),
                "{{model}}": 'max by (model) (gateway_kv_cache_usage_ratio{model=~"$model"})',
            },
        ),
        Panel("KV blocks", "short", {"{{state}}": f"sum by (state) ({of_model('worker_kv_blocks')})"}),
        Panel("Device memory", "bytes", {"{{purpose}} {{instance}}": of_model("worker_vram_bytes")}),
        Panel(
            "Preemptions and steps per second",
            "short",
            {
                "preemptions {{instance}}": rate("worker_preemptions_total"),
                "steps {{instance}}": rate("worker_engine_steps_total"),
            },
        ),
        Panel("State", "short", {"{{state}}": "sum by (state) (worker_state)"}),
        Panel(
            "Health",
            "short",
            {
                "degraded {{instance}}": of_model("worker_degraded"),
                "worker reaches Redis {{instance}}": of_model("worker_server_reached"),
                "gateway reaches Redis {{instance}}": "gateway_server_reached",
            },
        ),
        Panel(
            "Uptime and load time",
            "s",
            {
                "up {{instance}}": of_model("worker_uptime_seconds"),
                "load {{instance}}": of_model("worker_model_load_seconds"),
            },
        ),
        Panel("Models", "short", {"{{model}}": 'max by (model) (gateway_model_workers{model=~"$model"})'}),
    ),
    "Gateways": (
        Panel(
            "Responses per second",
            "reqps",
            {"{{status}} {{route}}": "sum by (route, status) (rate(gateway_requests_total[$__rate_interval]))"},
        ),
        Panel(
            "Share of 5xx",
            "percentunit",
            {"5xx": f"({gateway_rate(API_5XX)} or vector(0)) / {gateway_rate(API)}"},
        ),
        Panel(
            "Request duration",
            "s",
            quantiles("sum by (le, route) (rate(gateway_request_seconds_bucket[$__rate_interval]))", "route"),
        ),
        Panel(
            "First token and relay",
            "s",
            {
                f"{name} p95": f"histogram_quantile(0.95, sum by (le) (rate({metric}_bucket[$__rate_interval])))"
                for name, metric in (("first token", "gateway_first_token_seconds"), ("relay", "gateway_relay_seconds"))
            },
        ),
        Panel(
            "Open",
            "short",
            {"requests {{instance}}": "gateway_open_requests", "streams {{instance}}": "gateway_open_streams"},
        ),
        Panel(
            "Jobs and tokens per second",
            "short",
            {
                name: gateway_rate(f"gateway_{metric}_total")
                for name, metric in {
                    "submitted": "jobs",
                    "attached": "attached",
                    "cancelled": "cancelled",
                    "tokens": "tokens",
                }.items()
            },
        ),
    ),
}


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel at a place of the grid."""
    targets = [
        {"refId": chr(ord("A") + n), "datasource": SOURCE, "expr": query, "legendFormat": legend or "__auto"}
        for n, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "datasource": SOURCE,
        "gridPos": {"h": panel.height, "w": panel.width, "x": x, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def panels_json() -> list[dict[str, Any]]:
    """The rows and panels, from left to right and from top to bottom."""
    placed: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS.items():
        row = {"id": len(placed) + 1, "type": "row", "title": title, "collapsed": False, "panels": []}
        placed.append(row | {"gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y}})
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + panel.height
            placed.append(panel_json(panel, len(placed) + 1, x, y))
            x += panel.width
        y += panels[-1].height
    return placed


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """A choice of label values, by default all."""
    everything = {"text": "All", "value": "$__all"}
    choice = {"multi": True, "includeAll": True, "allValue": ".*", "current": everything, "refresh": 2, "sort": 1}
    return {"name": name, "label": label, "type": "query", "datasource": SOURCE, "query": query, **choice}


def dashboard() -> dict[str, Any]:
    """The whole dashboard in Grafana's JSON model."""
    source = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "uid": "worker",
        "title": "Inference workers",
        "schemaVersion": 39,
        "tags": ["worker"],
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                source,
                variable("model", "Model", "label_values(worker_info, model)"),
                variable("queue", "Queue", 'label_values({__name__=~"(gateway|worker)_queue_jobs"}, queue)'),
            ]
        },
        "panels": panels_json(),
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=2) + "\n", "utf-8")
