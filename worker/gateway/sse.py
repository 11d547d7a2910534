"""Server-sent events, keep-alive comments, and the end of work whose client has disconnected."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from worker.gateway.context import GatewayContext, context_of
from worker.gateway.errors import CLIENT_CLOSED_REQUEST, ApiError, api_error, draining

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
ErrorEncoder = Callable[[ApiError], bytes]


_BREAKS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"})
"""Characters that JSON leaves as they are and at which `str.splitlines` of a client breaks."""


def encode(data: str, event_id: str = "", event: str = "") -> bytes:
    """Encode one event, whose `data` is JSON on one line."""
    lines = (f"id: {event_id}\n" if event_id else "") + (f"event: {event}\n" if event else "")
    return f"{lines}data: {escape_breaks(data)}\n\n".encode()


def escape_breaks(data: str) -> str:
    """JSON on one line also for clients that split lines as Python does."""
    return data if data.isascii() else data.translate(_BREAKS)


to_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Encode as compact JSON on one line. `json.dumps` would create an encoder for each call."""


def openai_error(error: ApiError) -> bytes:
    """The error as an event of OpenAI's streams, which clients raise."""
    return encode(to_json(error.openai_body()))


class EventStream(Response):
    """A response that streams `body`, whose items are encoded events.

    The status is sent with the first item, or with the first keep-alive comment: an error of `body`
    before it is raised as ApiError and has its own status, a later one is sent by `encode_error`.
    When the client disconnects or the gateway stops, `body` is cancelled and closed at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self, context: GatewayContext, body: AsyncGenerator[bytes, None], encode_error: ErrorEncoder = openai_error
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._context = context
        self._stream = body
        self._encode_error = encode_error
        self._started = self._sending = self._disconnected = self._stopped = False
        self._sent_s = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the body ends or the client disconnects."""
        self._context.metrics.open_streams.inc()
        pump = asyncio.create_task(self._pump(send))
        listener = asyncio.create_task(self._listen(receive, send, pump))
        try:
            with self._context.on_stop(lambda: self._stop(pump)):
                await pump
        except asyncio.CancelledError:
            pump.cancel()
            if not self._disconnected:
                raise
            scope["gateway.status"] = CLIENT_CLOSED_REQUEST
        finally:
            listener.cancel()
            self._context.metrics.open_streams.dec()

    def _stop(self, pump: asyncio.Task[None]) -> None:
        """End the stream with an error. A later cancellation of the pump ends it at once."""
        self._stopped = True
        pump.cancel()

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self._stream) as items:
            try:
                async for item in items:
                    await self._send(send, item)
            except asyncio.CancelledError:
                if self._disconnected or not self._stopped:
                    raise
                await self._send_error(send, draining())
            except Exception as failure:
                error = api_error(failure)
                self._context.log_failure("stream_failed", failure, error.code)
                await self._send_error(send, error)
        if not self._started:
            await self._send(send, b"")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_error(self, send: Send, error: ApiError) -> None:
        """Send the error as an event; raise it if the status is not sent."""
        if not self._started:
            raise error
        await self._send(send, self._encode_error(error))

    async def _listen(self, receive: Receive, send: Send, pump: asyncio.Task[None]) -> None:
        """Cancel the pump at a disconnect; send a comment whenever nothing was sent for a time."""
        keep_alive_s = self._context.section.keep_alive_s
        while True:
            try:
                async with asyncio.timeout(max(0.0, self._sent_s + keep_alive_s - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                if self._sending:  # a slow reader, who has something to read
                    self._sent_s = time.monotonic()
                elif time.monotonic() - self._sent_s >= keep_alive_s:
                    await self._send(send, KEEP_ALIVE)
                continue
            if message["type"] == "http.disconnect":
                self._disconnected = True
                pump.cancel()
                return

    async def _send(self, send: Send, data: bytes) -> None:
        self._sending = True
        try:
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            self._sending = False
            self._sent_s = time.monotonic()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response of `work`, which is cancelled as soon as the client disconnects.

    The request's body has been read. Raises status 503 when the gateway stops before.
    """
    context = context_of(request)
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnect(request.receive))
    try:
        with context.on_stop(watcher.cancel):
            await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watcher.cancelled():
            raise draining()
        request.scope["gateway.status"] = CLIENT_CLOSED_REQUEST
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.wait({task})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
