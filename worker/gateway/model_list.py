"""`GET /v1/models`: the models with a worker that the caller may use."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from worker.gateway.context import call_of, context_of


async def models(request: Request) -> Response:
    """`GET /v1/models`."""
    context = context_of(request)
    served = context.models.served(call_of(request).caller)
    return JSONResponse({"object": "list", "data": [model.to_api() for model in served]})


async def model(request: Request) -> Response:
    """`GET /v1/models/{name}`."""
    context = context_of(request)
    found = await context.models.require(request.path_params["name"], call_of(request).caller)
    return JSONResponse(found.to_api())
