"""`/v1/batches`: create, retrieve, list and cancel batches.

`batch_runner.py` runs them, `batch_jobs.py` answers their requests.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Literal

from pydantic import Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from worker.gateway.batch_jobs import WINDOW_S, LineJobs
from worker.gateway.batch_runner import BatchRunner, RunnerSettings
from worker.gateway.batch_store import Batch, BatchStore
from worker.gateway.context import GatewayContext, call_of, context_of
from worker.gateway.errors import ApiError, invalid
from worker.gateway.files import file_store, listing, paged, tenant_of
from worker.gateway.request import ApiModel, read_body
from worker.jobs.fields import ShortText

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
    batch.key_digest = call_of(request).caller.digest
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


def batch_runner(app: Starlette, context: GatewayContext) -> BatchRunner:
    """The runner of a process, whose `run` the application's lifespan runs."""
    lines, lease_s = LineJobs(app, context), context.section.batch_lease_s
    settings = RunnerSettings(context.section.batch_concurrency, lease_s=lease_s, renew_s=lease_s / 5)
    stores = batch_store(context), file_store(context)
    return BatchRunner(*stores, lines.execute, lines.cancel, context.log, settings)


ROUTES = [
    Route("/v1/batches", create, methods=["POST"]),
    Route("/v1/batches", list_batches, methods=["GET"]),
    Route("/v1/batches/{batch_id}", retrieve, methods=["GET"]),
    Route("/v1/batches/{batch_id}/cancel", cancel, methods=["POST"]),
]
