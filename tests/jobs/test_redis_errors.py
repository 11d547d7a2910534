"""Error replies of a server, by code: temporary, permanent, or no reply at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.connection import Connection

from tests.jobs.harness import LONG_LEASE, NO_LEASE
from tests.jobs.memory_streams import MemoryStreams
from tests.jobs.servers import Server, free_port, running_server
from worker.config import LeaseSection
from worker.errors import ServerRefused
from worker.jobs.keys import GROUP, events_key, queue_key, state_key
from worker.jobs.redis_errors import code_of, translate
from worker.jobs.redis_resp import Command
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import REFUSAL_S, AppendCall, CancelCall, Contact, Disconnected, retry_until_connected
from worker.jobs.transport import Transport

PARSER = Connection()._parser
XADD: Command = ("XADD", "inf:control", "*", "do", b"inf:x")
STATE: Command = ("EVALSHA", "0ab", 2, "inf:a", "inf:b", "inf:x")


def reply(text: str) -> exceptions.RedisError:
    """The exception that redis-py makes of an error reply."""
    error = PARSER.parse_error(text)
    assert isinstance(error, exceptions.RedisError)
    return error


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("READONLY You can't write against a read only replica.", "READONLY"),
        ("LOADING Redis is loading the dataset in memory", "LOADING"),
        ("MISCONF Redis is configured to save RDB snapshots, but …", "MISCONF"),
        ("NOREPLICAS Not enough good replicas to write. script: 0ab, on @user_script:1.", "NOREPLICAS"),
        ("BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", "BUSY"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "TRYAGAIN"),
        ("CLUSTERDOWN Hash slot not served", "CLUSTERDOWN"),
        ("MASTERDOWN Link with MASTER is down", "MASTERDOWN"),
        ("UNBLOCKED force unblock from blocking operation, instance state changed", "UNBLOCKED"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "OOM"),
        ("NOSCRIPT No matching script. Please use EVAL.", "NOSCRIPT"),
        ("ERR max number of clients reached", "MAXCLIENTS"),
        ("ERR max number of clients + cluster connections reached", "MAXCLIENTS"),
        ("ERR Error running script (call to f_0ab): @user_script:3: -READONLY You can't write", "READONLY"),
        ("ERR Error running script (call to f_0ab): @user_script: 3: -OOM command not allowed", "OOM"),
        ("EXECABORT Transaction discarded because of: NOREPLICAS Not enough good replicas", "NOREPLICAS"),
    ],
)
def test_a_temporary_state_of_the_server_is_a_disconnection_with_its_code(text: str, code: str) -> None:
    error = translate(reply(text), "redis://h:1")
    assert isinstance(error, Disconnected)
    assert (error.reply, error.code) == (code, "REDIS_BUSY")
    assert str(error).startswith("redis://h:1 refuses for now: ")
    assert code in str(error)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("NOPERM User x has no permissions to run the 'xadd' command", "NOPERM", "'xadd'"),
        ("ERR ACL failure in script: User w has no permissions to run the 'xadd' command", "NOPERM", "'xadd'"),
        ("ERR The user executing the script can't run this command or subcommand", "NOPERM", "lacks a right"),
        ("NOAUTH Authentication required.", "NOAUTH", "requires a password"),
        ("ERR Protocol error: unauthenticated multibulk length", "NOAUTH", "requires a password"),
        ("ERR Protocol error: unauthenticated bulk length", "NOAUTH", "requires a password"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "WRONGPASS", "password is wrong"),
        ("ERR invalid password", "WRONGPASS", "password is wrong"),
        ("ERR Client sent AUTH, but no password is set", "NOPASSWORD", "the server has none"),
        ("ERR AUTH <password> called without any password configured for the default user.", "NOPASSWORD", "none"),
        ("MOVED 866 10.0.0.1:7000", "MOVED", "cluster"),
        ("ASK 866 10.0.0.1:7000", "ASK", "cluster"),
        ("CROSSSLOT Keys in request don't hash to the same slot", "CROSSSLOT", "cluster"),
        ("ERR SELECT is not allowed in cluster mode", "CLUSTER", "cluster"),
        ("ERR DB index is out of range", "DB", "no database of that number"),
        ("ERR invalid DB index", "DB", "no database of that number"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", "WRONGTYPE", "another type"),
        (
            "ERR Error running script (call to f_0ab): @user_script:1: WRONGTYPE Operation against a",
            "WRONGTYPE",
            "type",
        ),
        ("ERR unknown command 'XAUTOCLAIM', with args beginning with: 's3cret'", "ERR", "unknown command 'XAUTOCLAIM'"),
        ("ERR", "ERR", "ERR"),
        ("BUSYGROUP Consumer Group name already exists", "BUSYGROUP", "already exists"),
    ],
)
def test_a_permanent_refusal_names_its_cause(text: str, code: str, words: str) -> None:
    error = translate(reply(text), "redis://h:1")
    assert isinstance(error, ServerRefused)
    assert error.details["reply"] == code
    assert words in error.message
    assert "s3cret" not in error.message


@pytest.mark.parametrize(
    ("text", "command", "words"),
    [
        ("NOPERM User us3r has no permissions to run the 'xadd' command", XADD,
         "lacks the right to run 'xadd' on inf:control"),
        ("NOPERM this user has no permissions to run the 'select' command", (), "lacks the right to run 'select'"),
        ("NOPERM No permissions to access a key", XADD, "may not access inf:control (xadd)"),
        ("NOPERM No permissions to access a key", STATE, "may not access inf:a or inf:b (evalsha)"),
        ("ERR ACL failure in script: User us3r has no permissions to run the 'hset' command script: on @user_script:1.",
         STATE, "lacks the right to run 'hset' on inf:a and inf:b"),
        ("NOPERM no right to run 'xinfo|stream' on 'inf:b' script: 0ab, on @user_script:10.", STATE,
         "lacks the right to run 'xinfo|stream' on inf:b"),
        ("NOPERM no right to run 'time' on '' script: 0ab, on @user_script:10.", STATE,
         "lacks the right to run 'time'"),
        ("ERR The user executing the script can't access at least one of the keys mentioned in the command", STATE,
         "may not access inf:a or inf:b (evalsha)"),
    ],
)  # fmt: skip
def test_a_missing_right_is_one_sentence_with_command_and_key(text: str, command: Command, words: str) -> None:
    for error in (reply(text), exceptions.ResponseError(text)):  # redis-py's parser, and `redis_resp.py`
        error.command = command
        expected = f"redis://h:1 refuses: the user {words}; deploy/redis/users.acl has the rights of each role"
        assert str(translate(error, "redis://h:1")) == f"{expected} (NOPERM)"


@pytest.mark.parametrize("text", ["NOPERM x", "NOAUTH x", "WRONGPASS x"])
def test_a_running_worker_waits_for_access(text: str) -> None:
    error = translate(reply(text), "redis://h:1", waiting=True)
    assert isinstance(error, Disconnected)
    assert error.reply == text[:-2]


def test_a_deleted_queue_is_no_change_of_role() -> None:
    assert code_of(reply("UNBLOCKED the stream key no longer exists")) == "NOGROUP"


def caused(error: exceptions.RedisError, cause: Exception) -> exceptions.RedisError:
    error.__cause__ = cause
    return error


def test_without_a_reply_the_system_s_reason_is_named() -> None:
    lost = exceptions.ConnectionError("Error 111 connecting to h:1.")
    many = exceptions.ConnectionError("Error Multiple exceptions: …")
    several = OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 111] Connect call failed")
    for error, reason in (
        (caused(lost, ConnectionRefusedError(111, "x")), "connection refused"),
        (caused(many, several), "connection refused"),
        (exceptions.TimeoutError("Timeout reading from h:1"), "no reply in time"),
        (exceptions.ConnectionError("Connection closed by server."), "connection closed by server"),
        (
            caused(exceptions.ConnectionError("x"), ssl.SSLEOFError(8, "EOF")),
            "connection closed during the TLS handshake",
        ),
    ):
        found = translate(error, "redis://h:1")
        assert isinstance(found, Disconnected)
        assert (str(found), found.reply) == (f"cannot reach redis://h:1 ({reason})", "")


def test_a_failure_of_tls_is_permanent() -> None:
    failure = ssl.SSLCertVerificationError(1, "certificate verify failed")
    failure.verify_message = "self-signed certificate"
    error = translate(caused(exceptions.ConnectionError("x"), failure), "rediss://h:1")
    assert isinstance(error, ServerRefused)
    assert error.details["reply"] == "TLS"
    assert "certificate not accepted: self-signed certificate" in error.message


def test_the_code_in_a_pipeline_s_error_is_found() -> None:
    error = reply("NOREPLICAS Not enough good replicas to write.")
    Redis().pipeline().annotate_exception(error, 1, ("HSET", "READONLY x", "y"))
    assert code_of(error) == "NOREPLICAS"


# On a real server


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server whose settings a test may change."""
    with running_server() as server:
        yield server


@pytest_asyncio.fixture
async def admin(own_server: Server) -> AsyncIterator[Redis]:
    client = Redis.from_url(own_server.url, protocol=2)
    yield client
    await client.aclose()


@pytest_asyncio.fixture
async def streams(own_server: Server) -> AsyncIterator[RedisStreams]:
    opened = RedisStreams.from_url(own_server.url)
    await opened.open_queue("default")
    yield opened
    await opened.close()


async def refusal(streams: RedisStreams) -> str:
    """The code with which a write by a script is refused for now."""
    with pytest.raises(Disconnected) as caught:
        await streams.enqueue("default", {"p": b"x"}, 10)
    return caught.value.reply


async def test_states_in_which_a_server_refuses_writes(admin: Redis, streams: RedisStreams) -> None:
    for name, refusing, serving, code in (
        ("min-replicas-to-write", 1, 0, "NOREPLICAS"),
        ("maxmemory", 1, 0, "OOM"),
    ):
        await admin.config_set(name, refusing)
        assert await refusal(streams) == code
        if code == "NOREPLICAS":
            with pytest.raises(Disconnected, match="too few replicas"):
                await streams.put_status("w", {"state": "ready"}, 1000)
        await admin.config_set(name, serving)
        assert await streams.enqueue("default", {"p": b"x"}, 10)


async def test_a_server_that_becomes_a_replica(admin: Redis, streams: RedisStreams, own_server: Server) -> None:
    blocked = asyncio.create_task(streams.read("inf:control", "0-0", 2000))
    while not (await admin.info("clients"))["blocked_clients"]:
        await asyncio.sleep(0.01)
    await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(Disconnected) as caught:
        await blocked
    assert caught.value.reply == "UNBLOCKED"
    assert await refusal(streams) == "READONLY"
    opened = streams.reconnects
    assert await refusal(streams) == "READONLY"
    assert streams.reconnects == opened + 1  # its address may name another server by now
    await admin.execute_command("REPLICAOF", "NO", "ONE")
    assert await streams.enqueue("default", {"p": b"x"}, 10)


async def test_a_server_that_runs_a_long_script(admin: Redis, streams: RedisStreams) -> None:
    await admin.config_set("busy-reply-threshold", 50)
    looping = asyncio.create_task(admin.eval("while true do end", 0))
    await asyncio.sleep(0.3)
    with pytest.raises(Disconnected) as caught:
        await streams.time_ms()
    assert caught.value.reply == "BUSY"
    await admin.execute_command("SCRIPT", "KILL")
    with contextlib.suppress(exceptions.ResponseError):
        await looping
    assert await streams.time_ms()


async def test_a_key_of_another_type(admin: Redis, streams: RedisStreams) -> None:
    await admin.set(state_key("a"), "x")
    await admin.set(events_key("b"), "x")
    for job_id in ("a", "b"):
        with pytest.raises(ServerRefused) as caught:
            await streams.cancel(job_id, CancelCall("0-0", 1, ("error", b""), 0, 1000))  # type: ignore[arg-type]
        assert caught.value.details["reply"] == "WRONGTYPE"
    await admin.set("inf:{q:default}:dead", "x")
    with pytest.raises(ServerRefused, match=r"dead holds a value of another type than a stream; d"):
        await streams.length("inf:{q:default}:dead")


async def test_a_status_of_another_type_hides_no_other_worker(
    admin: Redis, streams: RedisStreams, caplog: pytest.LogCaptureFixture
) -> None:
    await streams.put_status("w", {"state": "ready"}, 10_000)
    await admin.set("inf:worker:evil", "x")
    await admin.zadd("inf:workers", {"evil": 9999999999999})
    for _ in range(2):
        assert await streams.workers() == {"w": {"state": "ready"}}
    assert [record.getMessage() for record in caplog.records] == [
        "worker 'evil' is not listed: inf:worker:evil is no hash"
    ]


async def test_more_clients_than_the_server_allows(admin: Redis, own_server: Server) -> None:
    await admin.config_set("maxclients", 1)
    other = RedisStreams.from_url(own_server.url)
    with pytest.raises(Disconnected) as caught:
        await other.time_ms()
    assert caught.value.reply in ("MAXCLIENTS", "")  # empty if the server closed before the reply was read
    await other.close()


async def test_a_password_that_changes(admin: Redis, streams: RedisStreams, own_server: Server) -> None:
    await admin.config_set("requirepass", "s3cret")
    wrong = own_server.url.replace("redis://", "redis://:wr0ng@")
    for url, code in ((own_server.url, "NOAUTH"), (wrong, "WRONGPASS")):
        other = RedisStreams.from_url(url)
        with pytest.raises(ServerRefused) as caught:
            await other.time_ms()
        assert caught.value.details["reply"] == code
        assert "wr0ng" not in str(caught.value)
        other.waits_for_access = True
        with pytest.raises(Disconnected):
            await other.time_ms()
        waiting = asyncio.create_task(retry_until_connected(other.time_ms))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        waiting.cancel()
        await other.close()


async def test_a_user_without_a_right(admin: Redis, own_server: Server) -> None:
    await admin.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~*", "+@read", "+@connection")
    streams = RedisStreams.from_url(own_server.url.replace("redis://", "redis://reader:pw@"))
    assert await streams.read("inf:control", "0-0", 0) == []
    with pytest.raises(ServerRefused, match=r"deploy/redis/users\.acl") as caught:
        await streams.enqueue("default", {"p": b"x"}, 10)
    assert caught.value.details["reply"] == "NOPERM"
    await streams.close()


async def test_a_database_that_the_server_lacks(own_server: Server) -> None:
    streams = RedisStreams.from_url(f"{own_server.url}/99")
    with pytest.raises(ServerRefused) as caught:
        await streams.time_ms()
    assert caught.value.details["reply"] == "DB"
    await streams.close()


async def test_one_line_when_contact_is_lost_and_one_when_it_is_back(own_server: Server) -> None:
    lines: list[str] = []
    contact = Contact(lines.append, lambda seconds: lines.append(f"back after {seconds:.0f} s"))
    streams = RedisStreams.from_url(own_server.url, contact)
    reading = asyncio.create_task(retry_until_connected(streams.read, "inf:control", "0-0", 1000))
    assert await streams.time_ms()
    own_server.stop()
    calls = [asyncio.create_task(retry_until_connected(streams.time_ms)) for _ in range(5)]
    await asyncio.sleep(1.0)
    own_server.start()
    await asyncio.gather(*calls, reading)
    assert len(lines) == 2
    assert lines[0].startswith(f"cannot reach {own_server.url} (")
    assert lines[1] == "back after 1 s"
    await streams.close()


async def test_reads_that_succeed_do_not_end_a_refusal_of_writes(admin: Redis, own_server: Server) -> None:
    lines: list[str] = []
    contact = Contact(lines.append, lambda _: lines.append("back"))
    streams = RedisStreams.from_url(own_server.url, contact)
    await admin.config_set("maxmemory", 1)
    for _ in range(3):
        assert await refusal(streams) == "OOM"
        assert await streams.time_ms()
    assert len(lines) == 1
    await admin.config_set("maxmemory", 0)
    assert await streams.enqueue("default", {"p": b"x"}, 10)
    assert lines[1:] == ["back"]
    await streams.close()


async def test_a_right_to_read_that_is_missing_is_one_line_until_it_is_granted(own_server: Server) -> None:
    lines: list[str] = []
    streams = RedisStreams.from_url(own_server.url, Contact(lines.append, lambda _: lines.append("back")))
    streams.waits_for_access = True
    async with Redis(port=own_server.port) as admin:
        await admin.execute_command("ACL", "SETUSER", "default", "-xlen")
        for _ in range(3):
            with pytest.raises(Disconnected, match="'xlen' on inf:control"):
                await streams.length("inf:control")
            assert await streams.read("inf:control", "0-0", 0) == []
            assert await streams.time_ms()
        assert len(lines) == 1
        assert streams.contact.refused_for_s > 0
        await admin.execute_command("ACL", "SETUSER", "default", "+xlen")
    assert await streams.length("inf:control") == 0
    assert lines[1:] == ["back"]
    assert streams.contact.refused_for_s == 0
    await streams.close()


def test_a_call_that_is_refused_now_and_then_counts_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("worker.jobs.streams.time.monotonic", lambda: now)
    contact, refused = Contact(lambda _: None, lambda _: None), Disconnected("refused", reply="NOPERM")
    for second in range(20):
        now = 100.0 + second
        if second % 5 == 0:
            contact.failed("depth", refused)
            assert contact.refused_for_s == second  # of the other call
            contact.failed("HSET inf:worker:w", refused)
        contact.succeeded("renew", now)
        assert contact.refused_for_s == second
    contact.succeeded("HSET inf:worker:w", now)
    assert contact.refused_for_s == 0
    contact.failed("append", refused)
    now += REFUSAL_S + 1
    assert contact.refused_for_s == 0
    contact.failed("append", refused)
    assert contact.refused_for_s == 0


@pytest.mark.parametrize(("lease", "counts"), [(NO_LEASE, True), (LONG_LEASE, False)])
async def test_a_refusal_of_writes_counts_as_silence_after_a_lease(lease: LeaseSection, counts: bool) -> None:
    streams = MemoryStreams()
    transport = Transport(streams, "w", lease=lease)
    streams.contact.failed("put_status", Disconnected("full", "OOM"))
    first_s, last_s = streams.contact._refusals["put_status"]
    streams.contact._refusals["put_status"] = first_s - 10, last_s
    await transport.claim()
    assert (transport.seconds_since_contact >= 10) == counts
    streams.contact.succeeded("put_status", time.monotonic())
    assert transport.seconds_since_contact < 10


async def held_entry(streams: RedisStreams) -> str:
    """An entry that is pending for `w`. Loads the scripts of `renew_many`."""
    await streams.open_queue("default")
    entry_id = await streams.enqueue("default", {"p": b"x"}, 10)
    assert entry_id
    await streams.read_new(["default"], "w", 0)
    assert await streams.renew("default", "w", entry_id) == "held"
    await streams.job_state("j")
    return entry_id


async def test_states_that_are_read_do_not_end_a_refusal_of_renewals(admin: Redis, own_server: Server) -> None:
    lines: list[str] = []
    contact = Contact(lines.append, lambda _: lines.append("back"))
    streams = RedisStreams.from_url(own_server.url, contact)
    calls = [("default", await held_entry(streams), "j")] * 2
    await admin.config_set("min-replicas-to-write", 1)
    for _ in range(2):
        with pytest.raises(Disconnected, match="NOREPLICAS"):
            await streams.renew_many("w", calls)
        assert len(lines) == 1
    await admin.config_set("min-replicas-to-write", 0)
    assert await streams.renew_many("w", calls) == [("held", False)] * 2
    assert lines[1:] == ["back"]
    await streams.close()


async def test_flushed_scripts_are_left_to_single_calls(admin: Redis, own_server: Server) -> None:
    lines: list[str] = []
    streams = RedisStreams.from_url(own_server.url, Contact(lines.append))
    entry_id = await held_entry(streams)
    await admin.script_flush()
    append = AppendCall("0-0", 1, "w", 1, "running", 0, "", [], 0, 1000)
    assert await streams.append_many([("j", append)] * 2) == [None, None]
    for job_id in ("j", None):
        assert await streams.renew_many("w", [("default", entry_id, job_id)] * 2) == [None, None]
    assert await streams.renew("default", "w", entry_id) == "held"
    assert lines == []
    await streams.close()


async def test_claims_of_a_lost_group_are_left_to_single_renewals(admin: Redis, streams: RedisStreams) -> None:
    entry_id = await held_entry(streams)
    await admin.xgroup_destroy(queue_key("default"), GROUP)
    assert await streams.renew_many("w", [("default", entry_id, None)] * 2) == [None, None]


async def test_a_node_of_a_cluster() -> None:
    with running_server("--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        for path, replies in (("", ["CLUSTERDOWN"]), ("/1", ["CLUSTER", "DB"])):  # DB: of Valkey 9
            streams = RedisStreams.from_url(f"{server.url}{path}")
            with pytest.raises((Disconnected, ServerRefused)) as caught:
                await streams.enqueue("default", {"p": b"x"}, 10)
            found = caught.value.reply if isinstance(caught.value, Disconnected) else caught.value.details["reply"]
            assert found in replies
            await streams.close()


async def test_a_host_without_an_address() -> None:
    streams = RedisStreams.from_url("redis://no-such-host.invalid")
    with pytest.raises(Disconnected, match=r"cannot reach redis://no-such-host\.invalid:6379 \(.+\)"):
        await streams.time_ms()
    await streams.close()


async def test_a_server_of_another_protocol() -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
        streams = RedisStreams.from_url(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(ServerRefused, match="does not reply as a Redis server does"):
            await streams.time_ms()
        await streams.close()


async def test_a_server_that_cannot_save(tmp_path: Path) -> None:
    (folder := tmp_path / "data").mkdir()
    with running_server("--dir", str(folder), "--save", "3600 1") as server:
        streams, admin = RedisStreams.from_url(server.url), Redis.from_url(server.url, protocol=2)
        await streams.open_queue("default")
        folder.rmdir()
        await admin.bgsave()
        while (await admin.info("persistence"))["rdb_last_bgsave_status"] != "err":
            await asyncio.sleep(0.02)
        assert await refusal(streams) == "MISCONF"
        await streams.close()
        await admin.aclose()


async def test_a_server_that_loads_its_data(tmp_path: Path) -> None:
    options = ("--dir", str(tmp_path), "--key-load-delay", "200000", "--loading-process-events-interval-bytes", "1024")
    with running_server(*options) as server:
        streams, admin = RedisStreams.from_url(server.url), Redis.from_url(server.url, protocol=2)
        for n in range(5):
            await admin.set(f"k{n}", os.urandom(8192))
        await admin.save()
        server.stop()
        server.start()
        with contextlib.suppress(Disconnected):  # the connection of before the restart
            await streams.time_ms()
        assert await refusal(streams) == "LOADING"
        assert await streams.time_ms(), "TIME is served meanwhile, PING is not"
        assert await refusal(streams) == "LOADING"
        await retry_until_connected(streams.open_queue, "default")
        await streams.close()
        await admin.aclose()
