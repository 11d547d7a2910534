"""The ASGI application: routes, and what happens to every request before and after its endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from worker.errors import WorkerError, as_exception
from worker.gateway import batches, files, health, messages, model_list, page, responses
from worker.gateway.chat import chat_completions
from worker.gateway.completions import completions
from worker.gateway.context import Call, GatewayContext
from worker.gateway.errors import CLIENT_CLOSED_REQUEST, ApiError, api_error, draining, invalid
from worker.gateway.queue_watch import QueueWatch
from worker.jobs.streams import Disconnected

if TYPE_CHECKING:
    from worker.tracing.otlp import RequestSpan

REQUEST_ID = "x-request-id"
BODY_S = 30.0
"""Time for which a part of a request's body is waited for."""
_PRINTABLE = re.compile(r"[!-~]{1,128}")
_OPEN_PATHS = ("/", "/health", "/metrics")
_OPEN_FOLDER = "/static/"
"""Paths that need no API key and are served while the gateway drains."""

ROUTES = [
    Route("/health", health.health),
    Route("/metrics", health.metrics),
    Route("/v1/models", model_list.models),
    Route("/v1/models/{name:path}", model_list.model),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/completions", completions, methods=["POST"]),
    *responses.ROUTES,
    *messages.ROUTES,
    *files.ROUTES,
    *batches.ROUTES,
    Route("/tokenize", health.tokenize, methods=["POST"]),
    Route("/detokenize", health.tokenize, methods=["POST"]),
    *page.ROUTES,
]


def create_app(context: GatewayContext) -> Starlette:
    """The application over a context, which it closes at its end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        runner = app.state.batch_runner = batches.batch_runner(app, context)
        loops = (context.models.run(context.refusals), QueueWatch(context).run(), runner.run())
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await context.close()

    async def answer_error(request: Request, error: Exception) -> Response:
        return error_response(context, request.scope, error)

    handlers = dict.fromkeys((ApiError, HTTPException, WorkerError, Disconnected), answer_error)
    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(RequestMiddleware, context=context)],
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # it would redirect POSTs, to the host and scheme behind a proxy
    app.state.context = context
    app.state.queue_lengths = page.QueueLengths(context)
    return app


def error_response(context: GatewayContext, scope: Scope, error: Exception) -> Response:
    """The error in the shape of the API that the path belongs to."""
    if isinstance(error, HTTPException):
        message = f"{scope['method']} {scope['path']}: {error.detail}"
        known = ApiError(error.status_code, message, code="unknown_url", headers=error.headers)
    else:
        known = api_error(error)
    context.log_failure("request_failed", error, known.code, path=scope["path"])
    anthropic = scope["path"].startswith("/v1/messages")
    body = known.anthropic_body() if anthropic else known.openai_body()
    return JSONResponse(body, known.status, known.headers)


class RequestMiddleware:
    """Request id, API key, drain; counts and logs each request."""

    def __init__(self, app: ASGIApp, context: GatewayContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context, began = self._context, time.monotonic()
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _PRINTABLE.fullmatch(given) else uuid.uuid4().hex
        traced = context.tracing is not None and not _is_open(scope)
        span = context.tracing.begin_request(headers.get("traceparent")) if context.tracing and traced else None

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope.setdefault("gateway.status", message["status"])
                headers_out = MutableHeaders(scope=message)
                headers_out[REQUEST_ID] = request_id
                if scope["path"].startswith("/v1/messages"):
                    headers_out["request-id"] = request_id  # Anthropic's name
            await send(message)

        context.open_requests += 1
        context.metrics.open_requests.inc()
        try:
            refused = self._refuse(scope, headers, request_id, began, span)
            await (refused or self._app)(scope, _in_time(receive), send_with_id)
        except ClientDisconnect:  # before its request was complete
            scope["gateway.status"] = CLIENT_CLOSED_REQUEST
        except BaseException as raised:  # also a panic of a native library
            response = error_response(context, scope, as_exception(raised))
            if "gateway.status" in scope:  # sent: only the connection's end can report the error
                raise
            await response(scope, receive, send_with_id)
        finally:
            context.open_requests -= 1
            context.metrics.open_requests.dec()
            self._log(scope, request_id, time.monotonic() - began)
            if span is not None:
                _end_span(span, scope)

    def _refuse(
        self, scope: Scope, headers: Headers, request_id: str, began: float, span: RequestSpan | None
    ) -> Response | None:
        """The error response, or None after the call is added to the scope."""
        context = self._context
        if _is_open(scope):
            return None
        try:
            if context.draining:
                raise draining()
            _refuse_cross_origin(scope, headers)
            key = _header(headers, "idempotency-key")
            last_id = _header(headers, "last-event-id")
            caller = context.keys.caller(headers)
            traceparent = _header(headers, "traceparent") if span is None else span.traceparent
            scope["gateway.call"] = Call(request_id, caller, began, traceparent, key, last_id)
        except ApiError as error:
            response = error_response(context, scope, error)
            if context.draining:
                response.headers["connection"] = "close"
            return response
        return None

    def _log(self, scope: Scope, request_id: str, duration_s: float) -> None:
        context, status = self._context, scope.get("gateway.status", HTTPStatus.INTERNAL_SERVER_ERROR)
        path = _route_of(scope)
        context.metrics.requests.labels(path, str(int(status))).inc()
        context.metrics.duration.labels(path).observe(duration_s)
        call = scope.get("gateway.call")
        fields = {"correlation_id": request_id, "job_id": call.job_id if call else None, "status": int(status)}
        context.log.info("request", route=path, duration_ms=round(duration_s * 1000, 3), **fields)


def _is_open(scope: Scope) -> bool:
    """Whether the path needs no API key."""
    return scope["path"] in _OPEN_PATHS or bool(scope["path"].startswith(_OPEN_FOLDER))


def _route_of(scope: Scope) -> str:
    route = scope.get("route")
    return route.path if isinstance(route, Route) else "other"


def _end_span(span: RequestSpan, scope: Scope) -> None:
    """End the request's span. An answer that fails after its status was sent is a failed job."""
    status, route = int(scope.get("gateway.status", HTTPStatus.INTERNAL_SERVER_ERROR)), _route_of(scope)
    attributes = {"http.request.method": scope["method"], "http.route": route, "http.response.status_code": status}
    call: Call | None = scope.get("gateway.call")
    if call is not None and call.job_id is not None:
        operation = "text_completion" if route == "/v1/completions" else "chat"
        attributes |= {"gen_ai.operation.name": operation, "gen_ai.response.id": call.job_id}
        attributes |= {"gen_ai.request.model": call.model} if call.model else {}
    span.end(f"{scope['method']} {route}", attributes, error=str(status) if status >= 500 else "")


def _in_time(receive: Receive) -> Receive:
    """`receive`, which raises status 408 if no part of an incomplete body comes for `BODY_S`."""
    complete = False

    async def receive_part() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout(BODY_S):
                message = await receive()
        except TimeoutError:
            text = f"no further part of the body came for {BODY_S:g} s"
            raise ApiError(HTTPStatus.REQUEST_TIMEOUT, text, code="request_timeout") from None
        complete = not message.get("more_body", False)
        return message

    return receive_part


def _refuse_cross_origin(scope: Scope, headers: Headers) -> None:
    """Raise status 403 for a POST that any web page can send without the server's consent.

    Browsers request consent (CORS) for the media type of JSON, and the gateway never consents.
    """
    origin = headers.get("origin")
    if scope["method"] != "POST" or origin is None:
        return
    if headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        return
    try:
        host = urlsplit(origin).netloc.lower()
    except ValueError:  # such as http://[
        host = None
    if host != headers.get("host", "").lower():
        message = "a page of another origin may not send this; send Content-Type: application/json"
        raise ApiError(HTTPStatus.FORBIDDEN, message, code="cross_origin")


def _header(headers: Headers, name: str) -> str | None:
    """An optional header of 1 to 255 printable characters. Raises status 400."""
    value = headers.get(name, "").strip()
    if value and not re.fullmatch(r"[ -~]{1,255}", value):
        raise invalid(f"the header {name} must have 1 to 255 printable characters", name)
    return value or None
