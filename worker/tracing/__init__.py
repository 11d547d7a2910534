"""Spans and GenAI metrics over OTLP/HTTP; nothing is imported and nothing runs without an endpoint.

`otlp.py` sends them. The spans of a job are in `worker/service/attempt_spans.py`, that of a request
in `worker/gateway/app.py`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from worker.config import TracingSection, check_otel_variables, otlp_endpoint_variable
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
    if the setting has one, and packages of the extra are missing or an OTEL_* variable is out of
    range. If the endpoint is the variable's, which may be meant for other programs, the log has one
    warning `tracing_off` instead.
    """
    try:
        endpoint = _usable_endpoint(section)
    except ValueError as error:
        if section.endpoint:
            raise ConfigInvalid(str(error)) from None
        log.warning("tracing_off", reason=str(error))
        return None
    if not endpoint:
        return None
    from worker.tracing.otlp import Tracing  # noqa: PLC0415  # of the extra `tracing`

    return Tracing(endpoint, service, instance, log)


def _usable_endpoint(section: TracingSection) -> str:
    """The endpoint, empty if there is none. Raises ValueError if it cannot be used."""
    endpoint, name = section.endpoint, "tracing.endpoint"
    if not endpoint:
        endpoint, name = otlp_endpoint_variable(), "OTEL_EXPORTER_OTLP_ENDPOINT"
    if not endpoint:
        return ""
    if missing := [package for module, package in _PACKAGES.items() if not _is_installed(module)]:
        raise ValueError(f"{name} is set, and tracing needs {', '.join(missing)}; pip install 'worker-orcd[tracing]'")
    check_otel_variables()
    return endpoint


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
