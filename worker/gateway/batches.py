"""`/v1/batches`: create, retrieve, list and cancel batches; how a gateway answers their requests.

A request of a batch goes to the endpoint that it names, inside the process, as a request of the
batch's tenant with an idempotency key of batch and line. So its jobs have ids that every gateway
derives, and a request that is run again attaches to the jobs that it has.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal, NoReturn

from pydantic import Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message

from worker.gateway.batch_lines import LineRequest, Outcome
from worker.gateway.batch_runner import BatchRunner, RunnerSettings
from worker.gateway.batch_store import Batch, BatchStore
from worker.gateway.context import Call, GatewayContext, context_of
from worker.gateway.errors import ApiError, api_error, invalid
from worker.gateway.files import file_store, listing, paged, tenant_of
from worker.gateway.request import ApiModel, read_body
from worker.jobs.fields import ShortText
from worker.jobs.streams import Disconnected

WINDOW_S = 24 * 3600
PRIORITY = 9
"""Of the jobs of batches: the least urgent."""
_PAGE = 20


class ExpiresAfter(ApiModel):
    """When the output files expire."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=30 * 24 * 3600)]


class BatchRequest(ApiModel):
    """The body of `POST /v1/batches`."""

    input_file_id: ShortText
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = None
    output_expires_after: ExpiresAfter | None = None


def batch_store(context: GatewayContext) -> BatchStore:
    """The batches of the context's server."""
    return BatchStore(context.client.documents, context.section.file_retention_s)


async def create(request: Request) -> Response:
    """Create a batch; a gateway validates and runs it."""
    context, tenant = context_of(request), tenant_of(request)
    body = BatchRequest.parse(await read_body(request))
    try:
        await file_store(context).find(body.input_file_id, tenant)
    except ApiError as error:
        raise invalid(error.message, "input_file_id", error.code) from None
    expires_s = body.output_expires_after.seconds if body.output_expires_after else None
    batch = Batch(*("", tenant, body.endpoint, body.input_file_id, body.completion_window, body.metadata, expires_s))
    await batch_store(context).create(batch, WINDOW_S)
    request.app.state.batch_runner.wake()
    return JSONResponse(batch.to_api())


async def retrieve(request: Request) -> Response:
    """Describe a batch."""
    batch = await batch_store(context_of(request)).find(request.path_params["batch_id"], tenant_of(request))
    return JSONResponse(batch.to_api())


async def cancel(request: Request) -> Response:
    """Request that a batch is cancelled: its runner cancels the jobs that have not ended."""
    store, tenant = batch_store(context_of(request)), tenant_of(request)
    batch = await store.find(request.path_params["batch_id"], tenant)
    if batch.is_over:
        message = f"the batch {batch.id} has ended: it is {batch.status}"
        raise ApiError(HTTPStatus.CONFLICT, message, code="batch_ended", headers={"x-should-retry": "false"})
    await store.request_cancel(batch)
    return JSONResponse((await store.find(batch.id, tenant)).to_api())


async def list_batches(request: Request) -> Response:
    """List the tenant's batches, the newest first."""
    store, tenant = batch_store(context_of(request)), tenant_of(request)

    async def find(batch_id: str) -> Batch | None:
        return await store.read(batch_id)

    page, more = await paged(request, await store.ids(tenant), find, _PAGE)
    return JSONResponse(listing([batch.to_api() for batch in page], has_more=more))


class LineRunner:
    """Answers the requests of batches through the endpoints of this process."""

    def __init__(self, app: Starlette, context: GatewayContext) -> None:
        self._app = app
        self._context = context
        self._calls: dict[tuple[str, int], Call] = {}
        """The requests that are being answered, by batch and line."""

    async def execute(self, batch: Batch, line: LineRequest) -> Outcome:
        """Answer a request. Raises Disconnected if the server is away."""
        caller = self._context.keys.of_tenant(batch.tenant or None)
        if caller is None:
            error = ApiError(HTTPStatus.FORBIDDEN, "the tenant of the batch has no API key", code="no_api_key")
            return Outcome(error.status, error.openai_body())
        key = f"{batch.id}:{line.line}"
        call = Call(f"{batch.id}-{line.line}", caller, time.monotonic(), idempotency_key=key)
        self._calls[batch.id, line.line] = call
        try:
            return await self._respond(batch.endpoint, line.body, call)
        finally:
            del self._calls[batch.id, line.line]

    async def _respond(self, endpoint: str, body: Mapping[str, Any], call: Call) -> Outcome:
        job_fields = {"priority": PRIORITY, "deadline_ms": WINDOW_S * 1000}
        request = self._request(endpoint, json.dumps(dict(body) | job_fields).encode(), call)
        try:
            response = await self._endpoint(endpoint)(request)
        except Disconnected:
            raise
        except Exception as failure:
            error = api_error(failure)
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
        if call is None or call.job_id is None:
            return
        choices = line.body.get("n")
        count = choices if isinstance(choices, int) else 1
        names = [call.job_id, *(f"{call.job_id}-{index}" for index in range(1, count))]
        await asyncio.gather(*(self._context.client.cancel(name) for name in names))


async def _never() -> NoReturn:
    await asyncio.Event().wait()
    raise AssertionError("the event is never set")


def batch_runner(app: Starlette, context: GatewayContext, settings: RunnerSettings | None = None) -> BatchRunner:
    """The runner of a process, whose `run` the application's lifespan runs."""
    lines = LineRunner(app, context)
    settings = settings or RunnerSettings(context.section.batch_concurrency)
    stores = batch_store(context), file_store(context)
    return BatchRunner(*stores, lines.execute, lines.cancel, context.log, settings)


ROUTES = [
    Route("/v1/batches", create, methods=["POST"]),
    Route("/v1/batches", list_batches, methods=["GET"]),
    Route("/v1/batches/{batch_id}", retrieve, methods=["GET"]),
    Route("/v1/batches/{batch_id}/cancel", cancel, methods=["POST"]),
]
