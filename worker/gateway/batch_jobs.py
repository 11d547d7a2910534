"""How a gateway answers the requests of batches: through its own endpoints, when workers have room.

A request goes to the endpoint that it names, inside the process, as a request of the API key
that created the batch, with an idempotency key of batch and line. So its jobs have ids that every
gateway derives, and a request that is run again attaches to the jobs that it has.

Queues are first in, first out. So that other jobs need not wait behind a batch, a request is
started only while fewer jobs of its model are unclaimed than workers serve it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Message

from worker.gateway.batch_lines import LineRequest, Outcome
from worker.gateway.batch_store import Batch
from worker.gateway.context import Call, GatewayContext
from worker.gateway.errors import ApiError, api_error
from worker.jobs.streams import Disconnected

WINDOW_S = 24 * 3600
PRIORITY = 9
"""Of the jobs of batches: the least urgent."""
_POLL_S = 0.05
_SUBMIT_POLL_S = 0.005
_SUBMIT_S = 1.0
"""Time allowed for a submission that has begun to reach the server."""


class LineJobs:
    """The requests of all batches that a process runs."""

    def __init__(self, app: Starlette, context: GatewayContext) -> None:
        self._app = app
        self._context = context
        self._calls: dict[tuple[str, int], Call] = {}
        """The requests that are being answered, by batch and line."""
        self._starting: defaultdict[Any, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Held, by model, while a request waits for room and is submitted."""

    async def execute(self, batch: Batch, line: LineRequest) -> Outcome:
        """Answer a request. Raises Disconnected if the server is away."""
        caller = self._context.keys.of_digest(batch.key_digest)
        if caller is None:
            message = "the API key that created the batch is no longer valid"
            error = ApiError(HTTPStatus.FORBIDDEN, message, code="no_api_key")
            return Outcome(error.status, error.openai_body())
        key = f"{batch.id}:{line.line}"
        call = Call(f"{batch.id}-{line.line}", caller, time.monotonic(), idempotency_key=key)
        self._calls[batch.id, line.line] = call
        try:
            return await self._start(batch, line.body, call)
        finally:
            del self._calls[batch.id, line.line]

    async def _start(self, batch: Batch, body: Mapping[str, Any], call: Call) -> Outcome:
        """Wait for room, then answer. No other request starts before this one is submitted."""
        model = body.get("model")
        named = model if isinstance(model, str) else None
        async with self._starting[named]:
            if not await self._wait_for_room(batch, named):
                return Outcome(HTTPStatus.SERVICE_UNAVAILABLE, {}, retry_after_s=0.0)
            answer = asyncio.create_task(self._respond(batch.endpoint, body, call))
            try:
                while not answer.done() and not (call.job_id and await self._context.client.is_known(call.job_id)):
                    await asyncio.sleep(_SUBMIT_POLL_S)
            except BaseException:
                answer.cancel()
                raise
        try:
            return await answer
        finally:
            answer.cancel()

    async def _wait_for_room(self, batch: Batch, model: str | None) -> bool:
        """Wait until fewer jobs of the model are unclaimed than workers serve it.

        Return False if the batch expires or is cancelled first.
        """
        while not (batch.is_late or batch.is_cancelling):
            statuses = self._context.models.workers.values()
            workers = sum(model in (None, status.get("model")) for status in statuses)
            if await self._context.client.unclaimed(model) < max(1, workers):
                return True
            await asyncio.sleep(_POLL_S)
        return False

    async def _respond(self, endpoint: str, body: Mapping[str, Any], call: Call) -> Outcome:
        job_fields = {"priority": PRIORITY, "deadline_ms": WINDOW_S * 1000}
        try:
            request = self._request(endpoint, json.dumps(dict(body) | job_fields).encode(), call)
            response = await self._endpoint(endpoint)(request)
        except Disconnected:
            raise
        except Exception as failure:
            error = api_error(failure)
            self._context.log_failure("batch_request_failed", failure, error.code, path=endpoint)
            retry_s = int(error.headers["retry-after-ms"]) / 1000 if "retry-after-ms" in error.headers else None
            return Outcome(error.status, error.openai_body(), retry_s)
        return Outcome(response.status_code, json.loads(bytes(response.body)))

    def _endpoint(self, path: str) -> Any:
        return next(
            route.endpoint
            for route in self._app.routes
            if isinstance(route, Route) and route.path == path and "POST" in (route.methods or ())
        )

    def _request(self, path: str, body: bytes, call: Call) -> Request:
        """A request as Starlette makes it, whose client does not disconnect."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            return messages.pop() if messages else await _never()

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        return Request(scope | {"app": self._app, "gateway.call": call}, receive)

    async def cancel(self, batch: Batch, line: LineRequest) -> None:
        """Cancel the jobs of a request that is being answered."""
        call = self._calls.get((batch.id, line.line))
        if call is not None:
            await asyncio.gather(*(self._cancel_job(job_id) for job_id in call.job_ids))

    async def _cancel_job(self, job_id: str) -> None:
        """Cancel a job, which may not have reached the server yet."""
        until_s = time.monotonic() + _SUBMIT_S
        while await self._context.client.cancel(job_id) == "unknown" and time.monotonic() < until_s:
            await asyncio.sleep(_POLL_S)


async def _never() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError("the event is never set")
