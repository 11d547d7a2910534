"""A worker's health: its state, and the HTTP pages /livez, /readyz and /metrics that report it.

| page | status 200 while |
| --- | --- |
| /livez | the process works: its event loop replies and the engine is not stalled |
| /readyz | the model is loaded, the Redis server is reached, and the worker takes jobs |

The pages read cached facts only, which `service.py` and `reporter.py` keep current; a request never
waits for a Redis server or a device.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from worker.backend import MemoryUse
from worker.errors import ConfigInvalid, VramOom
from worker.telemetry import Metrics

State = Literal["starting", "ready", "busy", "draining", "failed"]
Page = tuple[HTTPStatus, str, bytes]
"""Status, content type, body."""

_REQUEST_TIMEOUT_S = 5.0
_MAX_HEAD_BYTES = 8192
_PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The engine's sequences and KV blocks at one time."""

    running: int = 0
    waiting: int = 0
    preempted: int = 0
    """Preemptions since the start."""
    kv_blocks_used: int = 0
    kv_blocks: int = 0
    """Blocks in all: used, cached and free."""


class Health:
    """One worker's health.

    `silence_s` returns the seconds since the last successful claim poll or renewal; above
    `patience_s` the server counts as unreachable.
    """

    def __init__(self, metrics: Metrics, silence_s: Callable[[], float], patience_s: float) -> None:
        self.state: State = "starting"
        self.degraded = False
        """An allocation failed during a job, and no job has succeeded since."""
        self.memory = MemoryUse()
        self.load = EngineLoad()
        self.jobs = 0
        """Attempts that ended."""
        self.running = 0
        """Attempts that run now."""
        self.changed = asyncio.Event()
        self._metrics = metrics
        metrics.server_reached.set_function(lambda: self.reached)
        self._silence_s = silence_s
        self._patience_s = patience_s
        self._last_attempt_end = time.monotonic()

    def enter(self, state: State) -> None:
        """Change the state. A worker that drains or failed does not become ready or busy again."""
        if self.state == "failed" or (self.state == "draining" and state in ("ready", "busy")):
            return
        self.state = state
        self._metrics.set_state(state)
        self.changed.set()

    def set_running(self, attempts: int) -> None:
        """Set the number of attempts that run."""
        self.running = attempts
        self._metrics.jobs_running.set(attempts)
        self.changed.set()

    def attempt_ended(self, outcome: str) -> None:
        """Count an attempt that ended, unless it was left to the workers of another model.

        The worker is ready, not busy, if none runs.
        """
        self.jobs += outcome != "other_model"
        self._last_attempt_end = time.monotonic()
        if outcome in ("completed", VramOom.code.lower()):
            self.degraded = outcome != "completed"
            self._metrics.degraded.set(self.degraded)
        if not self.running:
            self.enter("ready")

    @property
    def reached(self) -> bool:
        """Whether the server was reached within `patience_s`."""
        return min(self._silence_s(), time.monotonic() - self._last_attempt_end) < self._patience_s

    @property
    def alive(self) -> bool:
        """/livez: the event loop runs, as a reply shows, and the engine is not stalled.

        Without regard to the server: a restart of every worker would not end its outage.
        """
        return self.state != "failed"

    @property
    def ready(self) -> bool:
        """/readyz: the model is loaded, the server is reached, and the worker takes jobs."""
        return self.state in ("ready", "busy") and self.reached

    def report(self) -> dict[str, Any]:
        """The JSON body of /livez and /readyz."""
        return {
            "alive": self.alive,
            "ready": self.ready,
            "state": self.state,
            "degraded": self.degraded,
            "server_silent_s": round(self._silence_s(), 3),
        }

    def pages(self) -> dict[str, Callable[[], Page]]:
        """The pages of a worker by path, for `StatusServer`."""
        return {
            "/livez": lambda: json_page(self.alive, self.report()),
            "/readyz": lambda: json_page(self.ready, self.report()),
            "/metrics": lambda: (HTTPStatus.OK, _PROMETHEUS_TEXT, self._metrics.exposition()),
        }


def json_page(ok: bool, report: Mapping[str, object]) -> Page:
    """A page with status 200 or 503 and a JSON body."""
    status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
    return status, "application/json", json.dumps(report).encode() + b"\n"


class StatusServer:
    """A minimal HTTP server for GET requests of fixed `pages`, for a prober and a scraper.

    One request a connection, bounded in size and time. With port 0 the system chooses `port`.
    """

    def __init__(self, pages: Mapping[str, Callable[[], Page]]) -> None:
        self.port = 0
        self._pages = pages
        self._server: asyncio.Server | None = None

    async def open(self, host: str, port: int) -> None:
        """Start to listen. Raises ConfigInvalid if the address can't be bound."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=_MAX_HEAD_BYTES)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigInvalid(
                f"http.port: cannot listen on {host}:{port} ({reason}); "
                "choose another port with --http-port; 0 takes any free one"
            ) from None
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A peer that disconnects, is too slow or sends too much gets no response.
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head))
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    def _response(self, head: bytes) -> bytes:
        parts = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        method, target = (parts[0], parts[1]) if len(parts) == 3 else ("", "")
        status, kind, body = self._page(method, target.partition("?")[0])
        allow = "Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
        lines = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            f"{allow}Cache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        return lines.encode() + (b"" if method == "HEAD" else body)

    def _page(self, method: str, path: str) -> Page:
        if not method:
            return HTTPStatus.BAD_REQUEST, "text/plain", b"not an HTTP request\n"
        if path not in self._pages:
            return HTTPStatus.NOT_FOUND, "text/plain", f"not found; try {', '.join(self._pages)}\n".encode()
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET and HEAD\n"
        return self._pages[path]()
