"""Spans and GenAI metrics over OTLP/HTTP; nothing is imported and nothing runs without an endpoint.

`otlp.py` sends them. The spans of a job are in `worker/service/attempt_spans.py`, that of a request
in `worker/gateway/app.py`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from worker.config import TracingSection, otlp_endpoint_variable
from worker.errors import ConfigInvalid

if TYPE_CHECKING:
    from worker.telemetry import Log
    from worker.tracing.otlp import Tracing

_PACKAGES = {
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
}


def open_tracing(section: TracingSection, service: str, instance: str, log: Log) -> Tracing | None:
    """Start to send spans of that service and process; None without an endpoint.

    The endpoint is that of the setting, else of OTEL_EXPORTER_OTLP_ENDPOINT. Raises ConfigInvalid
    if the setting has one and the packages of the extra are missing. If the variable cannot be
    used, which may be meant for other programs, the log has one warning `tracing_off`.
    """
    try:
        endpoint = section.endpoint or otlp_endpoint_variable()
    except ValueError as error:
        log.warning("tracing_off", reason=f"OTEL_EXPORTER_OTLP_ENDPOINT {error}")
        return None
    if not endpoint:
        return None
    if missing := [package for module, package in _PACKAGES.items() if not _is_installed(module)]:
        needed = f"is set, and tracing needs {', '.join(missing)}; pip install 'worker-orcd[tracing]'"
        if section.endpoint:
            raise ConfigInvalid(f"tracing.endpoint {needed}")
        log.warning("tracing_off", reason=f"OTEL_EXPORTER_OTLP_ENDPOINT {needed}")
        return None
    from worker.tracing.otlp import Tracing  # noqa: PLC0415  # of the extra `tracing`

    return Tracing(endpoint, service, instance, log)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
