"""Pages about the gateway itself: /health, /metrics, and what it does not serve."""

from __future__ import annotations

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from worker.errors import WorkerError
from worker.gateway.context import context_of
from worker.gateway.errors import NO_RETRY, ApiError
from worker.jobs.streams import Disconnected

_PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


async def health(request: Request) -> Response:
    """Status 200 while the gateway takes requests and reaches the Redis server, else 503.

    While the server refuses writes, reads are served, and requests get the error `redis_busy`.
    """
    context = context_of(request)
    try:
        await context.models.refresh()
        status = "ok" if context.models.refusal is None else "redis_busy"
    except (Disconnected, WorkerError):
        status = "redis_unreachable"
    status = "draining" if context.draining else status
    ok = status in ("ok", "redis_busy")
    report = {"status": status, "workers": len(context.models.workers), "open_requests": context.open_requests}
    return JSONResponse(report, HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE)


async def metrics(request: Request) -> Response:
    """All metrics in the Prometheus text format."""
    return Response(context_of(request).metrics.exposition(), media_type=_PROMETHEUS_TEXT)


async def tokenize(request: Request) -> Response:
    """Refuse: the gateway has no vocabulary, and workers take jobs only."""
    message = "the gateway has no vocabulary; run `worker tokenize MODEL` where the model file is"
    raise ApiError(HTTPStatus.NOT_IMPLEMENTED, message, code="not_supported", headers=NO_RETRY)
