"""Packing of commands and parsing of replies, and pipelines over one connection."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import ConnectionError as ConnectionLost
from redis.exceptions import InvalidResponse, ResponseError
from redis.exceptions import TimeoutError as NoReply

from worker.jobs.redis_pool import WaitingPool, new_connection
from worker.jobs.redis_resp import Replies, pack_command
from worker.redis_url import RedisUrl

WIRE = b"$3\r\n1-5\r\n:7\r\n-NOSCRIPT none\r\n*2\r\n$-1\r\n*1\r\n+OK\r\n$4\r\na\r\nb\r\n*0\r\n*-1\r\n"


def plain(values):
    return [str(value) if isinstance(value, ResponseError) else value for value in values]


PARSED = [b"1-5", 7, "NOSCRIPT none", [None, [b"OK"]], b"a\r\nb", [], None]


@given(st.sets(st.integers(0, len(WIRE))))
def test_replies_are_parsed_however_they_arrive(cuts):
    replies, at = Replies(len(PARSED)), 0
    for cut in sorted(cuts | {len(WIRE)}):
        assert not replies.complete or at == len(WIRE)
        replies.feed(WIRE[at:cut])
        at = cut
    assert replies.complete
    assert plain(replies.values) == PARSED


@pytest.mark.parametrize(
    "wire",
    [b"?1\r\n", b"$abc\r\n", b":x\r\n", b"*x\r\n", b"$3\r\nabcXY", b"*1\r\n" * 3000 + b":1\r\n"],
    ids=["kind", "length", "integer", "count", "end", "depth"],
)
def test_what_is_no_reply_is_refused(wire):
    with pytest.raises(InvalidResponse):
        Replies(1).feed(wire)


def test_bytes_after_the_last_reply_are_kept():
    for wire, surplus in ((b":1\r\n", b""), (b":1\r\n:2\r\n", b":2\r\n"), (b":1\r\n:", b":")):
        replies = Replies(1)
        replies.feed(wire)
        assert (replies.values, replies.surplus) == ([1], surplus)


def test_another_reply_is_expected_for_one_that_is_dropped():
    replies = Replies(2)
    replies.feed(b":1\r\n:2\r\n:3\r\n:4\r\n")
    replies.drop_first()
    assert (replies.values, replies.surplus) == ([2, 3], b":4\r\n")
    replies.drop_first()
    replies.drop_first()
    assert (replies.values, replies.complete) == ([4], False)


def test_a_reply_of_many_parts_is_parsed_once(monkeypatch):
    """To parse it from its beginning with each part would take time in the square of its size."""
    items, parse, calls = 2000, Replies._parse, 0

    def counted(self, start):
        nonlocal calls
        calls += 1
        return parse(self, start)

    monkeypatch.setattr(Replies, "_parse", counted)
    wire, replies = b"*%d\r\n" % items + b"$4\r\nabcd\r\n" * items, Replies(1)
    parts = [wire[at : at + 50] for at in range(0, len(wire), 50)]
    for part in parts:
        replies.feed(part)
    assert replies.values == [[b"abcd"] * items]
    assert calls <= 1 + items + len(parts)


def test_a_command_is_packed_with_lengths_in_bytes():
    packed = pack_command(("SET", "ключ", 12, b"\r\n"))
    assert packed == b"*4\r\n$3\r\nSET\r\n$8\r\n" + "ключ".encode() + b"\r\n$2\r\n12\r\n$2\r\n\r\n\r\n"


async def serve(reply):
    """A server that answers the first bytes by `reply` and is silent then; without one, it closes."""

    async def answer(reader, writer):
        await reader.read(1000)
        writer.write(reply)
        if reply:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


def open_pool(url, timeout_s):
    parsed = RedisUrl.parse(url)
    return WaitingPool(1, lambda: new_connection(parsed, parsed.login, parsed.addresses[0], timeout_s))


@pytest.mark.parametrize(
    ("reply", "error"), [(b"$3\r\n1-", NoReply), (b"", ConnectionLost), (b"?\r\n", InvalidResponse)]
)
async def test_a_connection_without_all_replies_is_closed(reply, error):
    server, port = await serve(reply)
    async with server:
        pool = open_pool(f"redis://127.0.0.1:{port}", 2.0)
        with pytest.raises(error):
            await pool.exchange([("PING",)])
        assert [connection.is_connected for connection in pool.connections] == [False]
        await pool.close()


async def test_many_commands_share_a_connection(server):
    pool = open_pool(server.url, 2.0)
    commands = [("SET", f"resp-{n}", "x" * n * 100) for n in range(200)]
    commands += [("GET", f"resp-{n}") for n in range(200)]
    replies = await pool.exchange(commands)
    assert replies[:200] == [b"OK"] * 200
    assert replies[200:] == [b"x" * n * 100 for n in range(200)]
    assert len(pool.connections) == 1
    await pool.close()
