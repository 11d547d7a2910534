"""The page at `/`: a chat, and a live view of workers and queues. Its files are in `static/`.

The page reads `/v1/models` and `/v1/chat/completions` like any client, and the two paths below
`/page/` that only it uses.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from worker.gateway.context import GatewayContext, call_of, context_of
from worker.gateway.errors import invalid
from worker.gateway.models import count_in
from worker.queue_order import queues_of

STATIC = Path(__file__).parent / "static"
_TEXTS = ("state", "model", "queue")
_NUMBERS = ("running", "waiting", "jobs", "kv_blocks_used", "kv_blocks", "vram_used", "vram_free")
_POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


class PageFiles(StaticFiles):
    """The page's files; browsers ask each time whether they have changed."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """A file, with headers for browsers."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(_headers())
        return response


async def page(request: Request) -> Response:
    """`GET /`: the page itself."""
    return FileResponse(STATIC / "index.html", headers=_headers())


def _headers() -> dict[str, str]:
    return {"cache-control": "no-cache", "content-security-policy": _POLICY, "x-content-type-options": "nosniff"}


class QueueLengths:
    """Lengths of the workers' queues, read at most once in `refresh_s` for all viewers."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._rows: list[dict[str, Any]] = []
        self._read_s = -float("inf")
        self._reading = asyncio.Lock()

    async def read(self) -> list[dict[str, Any]]:
        """A row for each queue: its name, entries (waiting and running) and dead letters."""
        async with self._reading:
            if time.monotonic() - self._read_s >= self._context.section.registry_s:
                client, workers = self._context.client, self._context.models.workers.values()
                names = sorted(frozenset({client.queue_name}).union(*map(queues_of, workers)))
                self._rows = [
                    {
                        "queue": name,
                        "length": await client.queue_length(name),
                        "dead": await client.dead_letter_count(name),
                    }
                    for name in names
                ]
                self._read_s = time.monotonic()
        return self._rows


async def status(request: Request) -> Response:
    """`GET /page/status`: live workers and their queues.

    A key with a list of models gets the workers of these, and no queue that only others serve.
    """
    context, caller = context_of(request), call_of(request).caller
    lengths: QueueLengths = request.app.state.queue_lengths
    rows = await lengths.read()
    shown, others = {}, []
    for name, fields in sorted(context.models.workers.items()):
        if caller.may_use(fields.get("model", "")):
            shown[name] = fields
        else:
            others.append(fields)
    hidden = frozenset().union(*map(queues_of, others)).difference(*map(queues_of, shown.values()))
    workers = [_worker(name, fields) for name, fields in shown.items()]
    return JSONResponse({"workers": workers, "queues": [row for row in rows if row["queue"] not in hidden]})


def _worker(name: str, fields: Mapping[str, str]) -> dict[str, Any]:
    texts = {key: fields.get(key, "") for key in _TEXTS}
    numbers = {key: count_in(fields, key) for key in _NUMBERS}
    return {"worker": name, "degraded": fields.get("degraded") == "1", **texts, **numbers}


async def position(request: Request) -> Response:
    """`GET /page/position?request=ID&model=NAME`: the place in the queue of a request's job.

    `request` is the `X-Request-Id` that the request was sent with. `position` is null unless the
    job waits.
    """
    request_id, model = request.query_params.get("request"), request.query_params.get("model")
    if not request_id:
        raise invalid("request: required", "request", "missing")
    context, caller = context_of(request), call_of(request).caller
    served = await context.models.require(model or None, caller)
    place, waiting = await context.client.position(request_id, served.name) or (None, None)
    return JSONResponse({"position": place, "waiting": waiting})


ROUTES: list[BaseRoute] = [
    Route("/", page),
    Mount("/static", PageFiles(directory=STATIC)),
    Route("/page/status", status),
    Route("/page/position", position),
]
