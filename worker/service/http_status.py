"""The worker's HTTP port: /livez, /readyz and /metrics, answered from what is cached.

A server of a few lines, because it serves three fixed GETs to a prober and a scraper: one request a connection, bounded
in size and time. What it says comes from `health.py` and `worker/telemetry.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from http import HTTPStatus

from worker.errors import ConfigInvalid

_REQUEST_S = 5.0
_HEAD_BYTES = 8192

Answer = tuple[HTTPStatus, str, bytes]
"""Status, content type, body."""

TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus's text format."""


def json_answer(good: bool, report: Mapping[str, object]) -> Answer:
    """200 or 503 with a JSON body."""
    status = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
    return status, "application/json", json.dumps(report).encode() + b"\n"


class StatusServer:
    """Serves `routes`, path to answer. Port 0 takes a free one; `port` says which."""

    def __init__(self, routes: Mapping[str, Callable[[], Answer]]) -> None:
        self.port = 0
        self._routes = routes
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> None:
        """Listen. Raises ConfigInvalid where the address can't be had."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_HEAD_BYTES)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigInvalid(
                f"http.port: {host}:{port} can't be listened on ({reason}); choose another --http-port; 0 takes any"
            ) from None
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A peer that leaves, dawdles or sends too much gets no answer, and nobody else notices.
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head))
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    def _response(self, head: bytes) -> bytes:
        parts = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        method, target = (parts[0], parts[1]) if len(parts) == 3 else ("", "")
        status, kind, body = self._answer(method, target.partition("?")[0])
        allow = "Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
        lines = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            f"{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        return lines.encode() + (b"" if method == "HEAD" else body)

    def _answer(self, method: str, path: str) -> Answer:
        if not method:
            return HTTPStatus.BAD_REQUEST, "text/plain", b"not an HTTP request\n"
        if path not in self._routes:
            return HTTPStatus.NOT_FOUND, "text/plain", f"try {', '.join(self._routes)}\n".encode()
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"GET or HEAD\n"
        return self._routes[path]()
