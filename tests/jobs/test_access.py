"""The roles of deploy/redis/users.acl: each does its work on a real server, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator

import pytest
import redis

from tests.jobs.acl import ROLES, USERS, acl_file, admin_of, password_of, url_of
from tests.jobs.echo import begin, claim_next, complete, take_next, text
from tests.jobs.harness import LONG_LEASE, lease_settings
from tests.jobs.servers import Server, running_server
from worker.cli.jobs import _show_all
from worker.config import LeaseSection
from worker.errors import ServerRefused
from worker.jobs.client import Client
from worker.jobs.keys import START
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.transport import Transport

README = USERS.with_name("README.md")
AT_ONCE = lease_settings(lease_s=0.0, scan_s=0.02, max_attempts=1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server("--aclfile", str(acl_file(tmp_path_factory.mktemp("acl")))) as started:
        yield started


@pytest.fixture
def server(shared: Server) -> Server:
    with admin_of(shared) as admin:
        admin.flushall()
    return shared


def streams(server: Server, user: str) -> RedisStreams:
    return RedisStreams.from_url(f"{url_of(server, user)}/1?client_name=test")


async def worker(server: Server, name: str, lease: LeaseSection) -> Transport:
    transport = Transport(streams(server, "worker"), name, lease=lease)
    await transport.open()
    transport._streams.waits_for_access = False  # a missing right must fail the test, not be waited for
    return transport


async def test_a_worker_and_an_orchestrator(server: Server) -> None:
    program, running = Client(streams(server, "orchestrator")), await worker(server, "w1", LONG_LEASE)
    await running.registration.heartbeat({"state": "ready"})
    assert set(await program.workers()) == {"w1"}
    await program.submit(job_id="a", prompt="hello")
    assert await program.position("a") == (1, 1)
    assert await program.server_time_ms(), "every command calls it first"
    lease = await take_next(running)
    assert await program.cancel("a") == "requested"
    assert (await running.renew(lease)).value == "cancel_requested"
    assert [each.value for each in await running.renew_many([lease]) if each] == ["cancel_requested"]
    await complete(running, lease, 3)
    assert (await program.result("a"))[0] == text(3)
    await program.forget("a", 60)
    assert await program.is_known("a")
    await program.submit(job_id="b", prompt="hello")
    assert await program.cancel("b") == "cancelled"
    await program.drain("w1")
    await running.close()
    await program.close()


async def test_workers_that_take_over_and_an_operator(server: Server) -> None:
    operator = Client(streams(server, "operator"))
    showing = asyncio.create_task(_show_all(streams(server, "operator"), "default", None, lambda _: None))
    await operator.submit(job_id="a", prompt="hello")
    first = await worker(server, "w1", LONG_LEASE)
    await first.registration.heartbeat({"state": "ready"})
    await first.release(await take_next(first))
    barren, last = await worker(server, "w2", AT_ONCE), await worker(server, "w3", AT_ONCE)
    await take_next(barren)
    await begin(last, await claim_next(last))
    assert [entry.job_id for entry in await operator.queue()] == []
    assert (await operator.queue_depth()).dead_letters == (await first.queue_depths())["default"].dead_letters == 1
    assert await operator.dead_letter_count() == 1
    overview = await operator._streams.overview("default", 1000, START, 10)
    assert (overview.length, overview.pending_count) == (0, 0)
    letter = (await operator.dead_letters())[0]
    assert await operator.dead_letter(letter.entry_id)
    assert await operator.retry_dead_letter(letter) == "a.r1"
    assert not await operator.drop_dead_letter(letter.entry_id), "the retry has deleted it"
    with admin_of(server) as admin:
        admin.select(1)
        entry_id = admin.xadd(DEAD, {"p": b"x"}).decode()
    assert await operator.drop_dead_letter(entry_id)
    await operator.drain("w1")
    for transport in (first, barren, last):
        await transport.close()
    assert not showing.done()
    showing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await showing
    await operator.close()


async def test_a_gateway(server: Server) -> None:
    gateway, running = Client(streams(server, "gateway")), await worker(server, "w1", LONG_LEASE)
    await gateway.submit(job_id="a", prompt="hello")
    assert (await gateway.queue_depth()).waiting == 1
    await complete(running, await take_next(running), 3)
    assert (await gateway.result("a"))[0] == text(3)
    assert len(await gateway.published("a")) > 3
    await gateway.forget("a", 60)
    assert await gateway.is_known("a")
    assert await gateway.dead_letter_count() == 0
    assert await gateway.unclaimed() == 0
    with redis.Redis(port=server.port, db=1, username="orchestrator", password=password_of("orchestrator")) as other:
        other.execute_command("HSET", "inf:{job:}:events", "of", "another type")
    assert await gateway.write_refusal() is None
    documents = gateway.documents
    key = "inf:{file:f}:meta"
    await documents.put(key, {"a": "1"}, 60_000)
    assert await documents.get(key) == {"a": b"1"}
    assert await documents.put_once(key, "b", "2")
    assert await documents.values(key, ["b"]) == [b"2"]
    assert sorted(await documents.names(key)) == ["a", "b"]
    await documents.increment(key, "n")
    await documents.expire(key, 60_000)
    await documents.shorten(key, 50_000)
    assert await documents.delete(key)
    await documents.enlist("inf:batches-active", "a", 1, 60_000)
    assert await documents.listed("inf:batches-active") == ["a"]
    await documents.unlist("inf:batches-active", "a")
    assert await documents.hold("inf:{batch:b}:lease", "one", 60_000)
    assert await documents.hold("inf:{batch:b}:lease", "one", 60_000)
    await documents.release("inf:{batch:b}:lease", "one")
    await running.close()
    await gateway.close()


QUEUE, DEAD, EVENTS = "inf:{q:default}:jobs", "inf:{q:default}:dead", "inf:{job:a}:events"
READ_GROUP = ("XREADGROUP", "GROUP", "workers", "x", "STREAMS", QUEUE, ">")
DENIED: dict[str, list[tuple[str | int, ...]]] = {
    "orchestrator": [
        ("XDEL", QUEUE, "1-1"),
        READ_GROUP,
        ("DEL", EVENTS),
        ("XRANGE", DEAD, "-", "+"),
        ("ZADD", "inf:workers", 1, "w"),
        ("HSET", "inf:worker:w", "a", "b"),
        ("XTRIM", QUEUE, "MAXLEN", 0),
        ("XACK", QUEUE, "workers", "1-1"),
        ("HGETALL", "inf:{file:f}:meta"),
    ],
    "worker": [
        ("XADD", "inf:control", "*", "do", "drain"),
        ("XTRIM", QUEUE, "MAXLEN", 0),
        ("XGROUP", "DESTROY", QUEUE, "workers"),
        ("HGETALL", "inf:{file:f}:meta"),
        ("HGETALL", "inf:{job:a}:response"),
        ("ZRANGE", "inf:files:t", 0, -1),
    ],
    "operator": [
        ("XDEL", QUEUE, "1-1"),
        READ_GROUP,
        ("XADD", DEAD, "*", "a", "b"),
        ("XACK", QUEUE, "workers", "1-1"),
        ("DEL", DEAD),
        ("ZREM", "inf:workers", "w"),
        ("HGETALL", "inf:{job:a}:response"),
    ],
    "gateway": [
        ("DEL", EVENTS),
        ("DEL", QUEUE),
        READ_GROUP,
        ("XDEL", DEAD, "1-1"),
        ("XDEL", QUEUE, "1-1"),
        ("ZADD", "inf:workers", 1, "w"),
        ("SET", "inf:{job:a}:state", "x"),
        ("XADD", DEAD, "*", "a", "b"),
    ],
}
DENIED_TO_ALL: list[tuple[str | int, ...]] = [
    *[("KEYS", "*"), ("SCAN", 0), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST"), ("CLIENT", "LIST")],
    *[("GET", "other"), ("XRANGE", "other", "-", "+"), ("HGETALL", "inf"), ("SHUTDOWN",), ("EVAL", "", 0)],
    *[("MONITOR",), ("SUBSCRIBE", "x"), ("PUBLISH", "x", "y"), ("FUNCTION", "LIST"), ("INFO",), ("SAVE",)],
]


@pytest.mark.parametrize("role", ROLES)
def test_a_role_may_do_nothing_else(server: Server, role: str) -> None:
    allowed = []
    with redis.Redis(port=server.port, username=role, password=password_of(role), protocol=2) as client:
        assert client.ping()
        for command in (*DENIED[role], *DENIED_TO_ALL):
            try:
                client.execute_command(*command)
            except redis.exceptions.NoPermissionError:
                continue
            except redis.exceptions.ResponseError as error:
                allowed.append(f"{command}: {error}")
            else:
                allowed.append(str(command))
    assert allowed == []


@pytest.mark.parametrize("role", ROLES)
def test_a_script_gives_a_role_no_more_rights(server: Server, role: str) -> None:
    with redis.Redis(port=server.port, username=role, password=password_of(role), protocol=2) as client:
        for source in ("return redis.call('FLUSHALL')", "return redis.call('GET', 'other')"):
            with pytest.raises(redis.exceptions.ResponseError, match=r"ACL failure|can't run|can't access"):
                client.evalsha(client.script_load(source), 0)


async def test_nobody_logs_in_before_a_password_is_set() -> None:
    with running_server("--aclfile", str(USERS)) as server:
        for user in ("default", "admin", *ROLES):
            opened = RedisStreams.from_url(f"redis://{user}:{password_of(user)}@127.0.0.1:{server.port}")
            with pytest.raises(ServerRefused, match="WRONGPASS"):
                await opened.time_ms()
            await opened.close()


def test_the_file_and_its_description_hold_no_password() -> None:
    for line in USERS.read_text("utf-8").splitlines():
        assert not re.search(r"(^| )([#>]\S|nopass)", line), line
    assert hashlib.sha256(b"").hexdigest() not in README.read_text("utf-8")


CALLS: dict[str, tuple[str, Callable[[RedisStreams], Awaitable[object]]]] = {
    "'xdel' on inf:{q:default}:dead": ("orchestrator", lambda s: s.delete(DEAD, "1-1")),
    "'xrange' on inf:{q:default}:jobs": ("worker", lambda s: s.range(QUEUE, "-", "+", 1)),
    "'xinfo|stream' on inf:{job:a}:events": ("gateway", lambda s: s.job_state("a")),
    "'hset' on inf:{file:a}:meta": ("gateway", lambda s: s.documents.put("inf:{file:a}:meta", {"a": "b"}, 1000)),
    "'xgroup|create' on inf:{q:default}:jobs": ("worker", lambda s: s.open_queue("default")),
}


@pytest.mark.parametrize("missing", CALLS)
async def test_a_missing_right_is_one_sentence_with_command_and_key(server: Server, missing: str) -> None:
    role, call = CALLS[missing]
    opened = RedisStreams.from_url(url_of(server, role))
    with admin_of(server) as admin:
        admin.xadd(EVENTS, {"a": "b"})
        try:
            admin.execute_command("ACL", "SETUSER", role, "clearselectors", "-" + missing.split("'")[1])
            with pytest.raises(ServerRefused) as caught:
                await call(opened)
        finally:
            admin.execute_command("ACL", "LOAD")
            await opened.close()
    refused = f"redis://127.0.0.1:{server.port} refuses: the user lacks the right to run {missing}"
    assert caught.value.message == f"{refused}; deploy/redis/users.acl has the rights of each role (NOPERM)"


async def test_a_key_without_rights_is_named(server: Server) -> None:
    opened = RedisStreams.from_url(url_of(server, "orchestrator"))
    with pytest.raises(ServerRefused, match=r"may not access inf:\{file:f\}:meta \(hgetall\); deploy/redis"):
        await opened.documents.get("inf:{file:f}:meta")
    await opened.close()
