"""The connections of the HTTP server: uvicorn's protocol over httptools, corrected and limited.

uvicorn reports the end of a connection to its last request only, and stops reading, so that it does
not see the end, while a request waits for the response to the one before it (HTTP pipelining). A
client that disconnects then would not cancel the job of the request that runs.

httptools keeps a head of any size, and for any time, until it is complete.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from worker.gateway.errors import ApiError

MAX_HEAD_BYTES = 64 * 1024
"""Maximum size of a request's line and headers together."""
HEAD_S = 30.0
"""Time from the connection, or from a request's first byte, to the end of its headers."""


class Connection(HttpToolsProtocol):
    """One connection, on which one request may wait for the response to the one before it.

    The connection is closed when a second request waits, or one with a large body.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._answered: RequestResponseCycle | None = None
        """The request that runs while another one waits."""
        self._head_timer: asyncio.TimerHandle | None = None
        """Runs while the head of a request is incomplete."""
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request, for a limited time."""
        super().connection_made(transport)
        self._begin_head()

    def data_received(self, data: bytes) -> None:
        """Parse; refuse a request whose head is too large and not complete."""
        in_head = self._head_timer is not None
        super().data_received(data)
        if in_head and self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("")

    def send_400_response(self, msg: str) -> None:
        """Answer a head that is too large, or what is no HTTP request."""
        if self._head_bytes > MAX_HEAD_BYTES:
            message = f"the request's line and headers have more than {MAX_HEAD_BYTES} bytes"
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, message, "headers_too_large")
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "this is not a valid HTTP/1.1 request", "invalid_http")

    def on_message_begin(self) -> None:
        """Begin the head of a request."""
        super().on_message_begin()
        self._begin_head()

    def on_headers_complete(self) -> None:
        """Begin or queue a request; keep reading, so that the end of the connection is seen."""
        self._end_head()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._head_bytes = size
            raise ValueError("the head is too large")  # the parser calls `send_400_response`
        running, waiting = self.cycle, len(self.pipeline)
        super().on_headers_complete()
        if len(self.pipeline) == waiting:
            return
        if waiting:
            self.transport.close()
            return
        self._answered = running
        self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """Keep a part of a body; a large one of a request that waits closes the connection."""
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > HIGH_WATER_LIMIT:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end to the request that runs too."""
        self._end_head()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def _begin_head(self) -> None:
        self._end_head()
        self._head_timer = self.loop.call_later(HEAD_S, self._late)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer, self._head_bytes = None, 0

    def _late(self) -> None:
        message = f"the request's headers were not complete after {HEAD_S:g} s"
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, message, "request_timeout")

    def _refuse(self, status: HTTPStatus, message: str, code: str) -> None:
        """Close the connection, with an error unless a response to another request is due."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if (
            cycle is None
            or cycle.response_complete
            or (cycle.more_body and not (cycle.response_started or self.pipeline))
        ):
            body = json.dumps(ApiError(status, message, code=code).openai_body()).encode()
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
