"""Bytes that no client of the APIs sends: each is answered with a status 4xx or the connection's end, at once."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.gateway.gateways import fake_worker, gateway
from tests.jobs.harness import FakeRedisHarness
from worker.gateway import app, connection

CHAT = "/v1/chat/completions"
JSON = "content-type: application/json"


@pytest.fixture
async def running():
    harness = FakeRedisHarness()
    async with gateway(harness, max_body_bytes=100_000) as opened:
        await fake_worker(harness, opened, "m")
        yield opened
        assert opened.logged("request_failed") == []
    await harness.close()


async def exchange(running, data: bytes, *, then: bytes = b"", ends: bool = True) -> list[tuple[int, dict]]:
    """Send bytes, read the responses until the connection's end or the first complete one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    try:
        writer.write(data)
        if then:
            await asyncio.sleep(0)
            writer.write(then)
        responses = []
        async with asyncio.timeout(30):
            while head := await _head(reader):
                status = int(head.split(b" ", 2)[1])
                size = next(
                    (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length:" in line), 0
                )
                body = await reader.readexactly(size)
                responses.append((status, json.loads(body) if body.startswith(b"{") else {}))
                if not ends:
                    break
        return responses
    finally:
        writer.close()


async def _head(reader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return b""


def post(body: bytes, *headers: str, path: str = CHAT, length: str | None = None) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "host: a",
        "connection: close",
        f"content-length: {length or len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chunked(body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{JSON}\r\ntransfer-encoding: chunked\r\n\r\n"
    return head.encode() + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def chat(**fields) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}).encode()


DIGITS = b"9" * 5000
BODIES = {
    "no JSON": (b"{", 400, "invalid_json"),
    "invalid UTF-8": (b'{"model": "\xff\xfe"}', 400, "invalid_json"),
    "invalid UTF-8 in a message": (chat().replace(b'"x"', b'"\xc3\x28"'), 400, "invalid_json"),
    "a lone surrogate": (chat().replace(b'"x"', rb'"\ud800"'), 400, None),
    "a lone surrogate as a name": (chat().replace(b'"role"', rb'"\udfff"'), 400, None),
    "UTF-16": (chat().decode().encode("utf-16"), 400, "invalid_json"),
    "a byte order mark": (b"\xef\xbb\xbf" + chat(), 400, "invalid_json"),
    "a NUL": (b"\0" * 100, 400, "invalid_json"),
    "deep lists": (b"[" * 50_000, 400, "invalid_json"),
    "deep lists in a field": (chat(tools=[]).replace(b"[]", b"[" * 40_000 + b"]" * 40_000), 400, None),
    "deep maps in a field": (b'{"metadata": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, 400, None),
    "deep variables": (chat(chat_template_kwargs={}).replace(b"{}", b'{"a":' * 150 + b"1" + b"}" * 150), 429, None),
    "a huge integer": (chat(max_tokens=1).replace(b": 1", b": " + DIGITS), 400, None),
    "a huge seed": (chat(seed=1).replace(b": 1", b": " + DIGITS), 400, None),
    "a huge integer in a tool": (chat(tools=[{"a": 1}]).replace(b": 1", b": " + DIGITS), 400, None),
    "a huge integer as a variable": (chat(chat_template_kwargs={"a": 1}).replace(b": 1", b": " + b"9" * 40), 400, None),
    "a huge exponent": (chat(temperature=1).replace(b": 1", b": 1e999"), 400, None),
    "not a number": (chat(temperature=1).replace(b": 1", b": NaN"), 400, "invalid_json"),
    "a list": (b"[]", 400, "invalid_json"),
    "nothing": (b"", 400, "invalid_json"),
    "many fields": (json.dumps({f"a{n}": n for n in range(5000)}).encode(), 400, None),
    "a body that is too large": (b" " * 100_001, 413, "request_too_large"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
async def test_a_hostile_body_has_a_status_and_a_code(running, name):
    body, status, code = BODIES[name]
    if status == 429:
        running.client._bound = 0
    for data in (post(body, JSON), chunked(body)):
        ((found, error),) = await exchange(running, data)
        assert (found, bool(error["error"]["message"])) == (status, True), error
        assert code in (None, error["error"]["code"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/messages", "/v1/batches"])
async def test_other_apis_refuse_the_same_bodies(running, path):
    for name in ("invalid UTF-8", "deep lists", "a NUL", "many fields", "a body that is too large"):
        body, status, _ = BODIES[name]
        ((found, error),) = await exchange(running, post(body, JSON, path=path))
        assert (found, bool(error["error"]["message"])) == (status, True), name


LINE = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\n".encode()
HEADS = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "an unknown version": (b"GET / HTTP/9.9\r\n\r\n", 400),
    "a header without a colon": (LINE + b"abc\r\n\r\n", 400),
    "a NUL in a header": (LINE + b"a: \0\r\n\r\n", 400),
    "a negative length": (LINE + b"content-length: -1\r\n\r\n", 400),
    "a length of other digits": (LINE + b"content-length: \xb2\r\n\r\n", 400),
    "a huge length": (LINE + b"content-length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "two lengths": (LINE + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab", 400),
    "length and chunks": (LINE + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "no chunk": (LINE + b"transfer-encoding: chunked\r\n\r\nxyz\r\n", 400),
    "a length above the limit": (LINE + b"content-length: 1000000\r\n\r\n", 413),
    "a long path": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 431),
    "a long header": (LINE + b"x: " + b"a" * 100_000 + b"\r\n\r\n", 431),
    "many headers": (LINE + b"x: a\r\n" * 20_000 + b"\r\n", 431),
    "an endless header": (LINE + b"x: " + b"a" * 1_000_000, 431),
    "an endless path": (b"GET /" + b"a" * 1_000_000, 431),
    "CONNECT": (b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", 400),
    "a path that is no text": (b"GET /v1/models/%ff%fe HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 404),
    "a NUL in the path": (b"GET /v1/%00 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 404),
    "a folder above": (b"GET /static/../../../../etc/passwd HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 404),
    "a folder above, quoted": (b"GET /static/%2e%2e/app.py HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 404),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
async def test_a_hostile_head_has_a_status_and_ends_its_connection(running, name):
    data, status = HEADS[name]
    ((found, error),) = await exchange(running, data)
    assert (found, bool(error["error"]["message"])) == (status, True), error


async def test_an_origin_that_is_no_url_is_another_origin(running):
    ((status, error),) = await exchange(running, post(chat(), "origin: http://["))
    assert (status, error["error"]["code"]) == (403, "cross_origin")


async def test_a_request_to_upgrade_is_answered_as_an_ordinary_one(running):
    headers = ("upgrade: websocket", "sec-websocket-key: a")
    for data in (
        post(b"{", JSON, *headers),
        post(b"{", JSON, *headers).replace(b"connection: close", b"connection: upgrade"),
    ):
        ((status, _),) = await exchange(running, data, ends=False)
        assert status == 400


async def test_requests_after_an_invalid_one_are_not_answered(running):
    good = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
    responses = await exchange(running, good + b"\x00\x01\r\n\r\n" + good)
    assert [status for status, _ in responses] in ([200, 400], [200], [])
    assert len(await exchange(running, good, ends=False)) == 1


async def test_a_panic_of_a_native_library_is_an_error_of_one_request(running, monkeypatch):
    class PanicException(BaseException):
        """Stands for pyo3's."""

    def panicking(*_):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("pydantic_core.from_json", lambda *_, **__: panicking())
    ((status, error),) = await exchange(running, post(chat(), JSON))
    assert (status, error["error"]["code"]) == (500, "internal_error")
    assert len(running.logged("request_failed")) == 1
    running.output.seek(0)
    running.output.truncate()
    monkeypatch.undo()
    ((status, _),) = await exchange(running, post(b"[]", JSON))
    assert status == 400


async def test_a_head_that_is_never_complete_is_given_up(running, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    for data in (b"", b"GET / HTTP/1.1\r\nx: "):
        ((status, error),) = await exchange(running, data)
        assert (status, error["error"]["code"]) == (408, "request_timeout")


async def test_a_body_that_is_never_complete_is_given_up(running, monkeypatch):
    monkeypatch.setattr(app, "BODY_S", 0.2)
    form = post(b"--x\r\n", "content-type: multipart/form-data; boundary=x", path="/v1/files", length="50")
    for data in (post(b"{", JSON, length="50"), chunked(b"{").removesuffix(b"0\r\n\r\n"), form):
        ((status, error),) = await exchange(running, data)
        assert (status, error["error"]["code"]) == (408, "request_timeout")
