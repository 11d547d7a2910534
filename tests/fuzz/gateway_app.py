"""Whole requests to the gateway's application: any method, path, headers and body, forms of files too.

The server is in memory and its queue is full, so that a request that is valid ends with status 429.
"""

from __future__ import annotations

import asyncio
import atexit
import io
import json
from collections.abc import Iterator
from typing import Any

from tests.fuzz import gateway_requests as bodies
from tests.fuzz.source import Source
from tests.jobs.memory_streams import MemoryStreams
from worker.config import GatewaySection, LogSection
from worker.errors import QueueFull
from worker.gateway.app import create_app
from worker.gateway.context import GatewayContext
from worker.gateway.keys import ApiKeys
from worker.jobs.client import Client
from worker.telemetry import open_log

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/files",
    "/v1/batches", "/v1/models", "/v1/models/m", "/v1/models/�/x", "/v1/files/file-1", "/v1/files/file-1/content",
    "/v1/batches/batch_1", "/v1/batches/batch_1/cancel", "/v1/responses/resp_1", "/v1/responses/resp_1/cancel",
    "/tokenize",
    "/v1/responses/resp_" + "0" * 32, "/health", "/metrics", "/", "/static/../app.py", "/page/status", "//",
    "/v1/chat/completions/", "\0",
)  # fmt: skip
METHODS = ("POST", "GET", "DELETE", "PUT", "HEAD", "OPTIONS", "PATCH", "X")
HEADERS = (
    b"content-type", b"content-length", b"authorization", b"x-api-key", b"last-event-id", b"idempotency-key",
    b"traceparent",
    b"origin", b"host", b"x-request-id", b"accept", b"transfer-encoding", b"range", b"if-none-match", b"cookie",
    b"anthropic-version",
)  # fmt: skip
VALUES = (
    b"application/json", b"multipart/form-data; boundary=x", b"multipart/form-data",
    b"multipart/form-data; boundary=", b"0", b"-1",
    b"\xb2", b"1e3", b"9" * 30, b"Bearer k", b"Bearer", b"a" * 300, b"\xff\xfe", b"", b" ", b"http://[", b"http://a",
    b"a", b"null",
    bodies.EVENT_ID.encode(), b"00-0-0-0", b"application/x-www-form-urlencoded", b"bytes=0-",
    b"multipart/form-data; boundary=\xff",
    b'multipart/form-data; boundary="x"; charset=\xe9', b"text/event-stream",
)  # fmt: skip
QUERIES = (
    b"",
    b"limit=0",
    b"limit=9",
    b"after=x",
    b"order=asc",
    b"limit=%ff&order=%00",
    b"stream=true&starting_after=-1",
    b"stream=true",
    b"a" * 200,
)
FORM = (
    b"--x\r\n", b"--x--\r\n", b"\r\n", b"\r\n\r\n",
    b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n',
    b'Content-Disposition: form-data; name="purpose"\r\n\r\n', b"batch",
    b'Content-Disposition: form-data; name="x"\r\n\r\n',
    b"Content-Disposition: form-data\r\n\r\n", b"Content-Disposition: form-data; filename*=UTF-8''%ff\r\n\r\n",
    b"Content-Type: \xff\r\n",
    b'Content-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n', b"3600", b"\xff", b"x" * 300, b"--x",
    b"\n", b":",
)  # fmt: skip


class _Documents:
    """An empty store that keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        replies = {"get": {}, "values": [], "names": [], "listed": [], "put_once": True, "hold": False, "delete": False}

        async def call(key: str, *arguments: Any, **_: Any) -> Any:
            if name == "values":
                return [None for _ in arguments[0]]
            return replies.get(name)

        return call


class _Streams(MemoryStreams):
    documents = _Documents()  # type: ignore[assignment]

    async def enqueue(self, queue: str, fields: Any, bound: int) -> str | None:
        raise QueueFull("the queue is full", 1.0)


async def _open() -> Any:
    streams = _Streams()
    await streams.put_status(
        "w", {"model": "m", "state": "ready", "queue": "default", "started_ms": "0", "context": "64"}, 10**12
    )
    log = open_log(LogSection(format="json", level="error"), "fuzz", LOG)
    context = GatewayContext(
        GatewaySection(max_body_bytes=4096, max_file_bytes=4096, registry_s=3600), Client(streams), ApiKeys(), log
    )
    app = create_app(context)
    await context.models.refresh()
    return app


LOG = io.StringIO()
LOOP = asyncio.new_event_loop()
atexit.register(LOOP.close)
APP = LOOP.run_until_complete(_open())
APP.state.batch_runner = type("NoRunner", (), {"wake": staticmethod(lambda: None)})


def seeds() -> Iterator[bytes]:
    for path in range(len(PATHS)):
        for method in range(2):
            yield bytes([path, method, 0, 1, 0, 0, 0, 1, path, 0, 3]) + bytes((path + 17 * i) % 256 for i in range(80))
    yield bytes([0, 0, 0, 1, 0, 0, 0, 0]) + json.dumps(bodies.BODIES[bodies.ChatRequest][0]).encode()
    for n in range(4):
        yield bytes([5, 0, 0, 2, 0, 1, 1, 8, 0, 3]) + bytes((n + 5 * i) % 256 for i in range(60))


def run(data: bytes) -> None:
    source = Source(data)
    path, method, query = source.choose(PATHS), source.choose(METHODS), source.choose(QUERIES)
    headers = [(source.choose(HEADERS), source.choose(VALUES)) for _ in source.times(4)]
    kind = source.byte() % 4
    if kind == 0:
        body = source.rest()
    elif kind == 1:
        body = bodies._body(source.choose(bodies.MODELS), source)
    elif kind == 2:
        body = b"".join(source.map(lambda: source.choose(FORM), 12))
        headers.append((b"content-type", b"multipart/form-data; boundary=x"))
    else:
        body = b"a" * (source.byte() * 64)
    if source.byte() % 4:
        headers.append((b"content-length", str(len(body)).encode()))
    status, response = LOOP.run_until_complete(_call(path, method, query, headers, body, chunks=1 + source.byte() % 3))
    assert status < 500 or status in (501, 503), (status, response, LOG.getvalue()[-2000:])
    if status >= 400 and path.startswith("/v1/") and method != "HEAD":
        assert json.loads(response)["error"]["message"]


async def _call(
    path: str, method: str, query: bytes, headers: list[Any], body: bytes, chunks: int
) -> tuple[int, bytes]:
    scope = {
        "type": "http", "http_version": "1.1", "asgi": {"version": "3.0"}, "method": method, "scheme": "http",
        "root_path": "",
        "path": path, "raw_path": path.encode(), "query_string": query, "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "state": {},
    }  # fmt: skip
    size = -(-len(body) // chunks) or 1
    parts = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": n + 1 < len(parts)} for n, part in enumerate(parts)]
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await APP(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
