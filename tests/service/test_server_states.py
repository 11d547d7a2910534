"""`worker run` at a server that refuses, at the start and later: its log, its sentence, its code."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from tests.jobs.servers import Server, running_server
from tests.service.processes import Process, workers
from worker.jobs.client import SyncClient


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as started:
        yield started


@pytest.fixture
def admin(server: Server) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port) as client:
        yield client


def last_line(process: Process) -> str:
    return process.log.read_text().splitlines()[-1]


def require_password(admin: redis.Redis) -> None:
    admin.config_set("requirepass", "right")


def forbid_scripts(admin: redis.Redis) -> None:
    admin.execute_command("ACL", "SETUSER", "default", "-evalsha", "-eval")


@pytest.mark.parametrize(
    ("prepare", "credentials", "path", "words"),
    [
        (require_password, "", "", "requires a password"),
        (require_password, ":wr0ng@", "", "the user name or the password is wrong"),
        (forbid_scripts, "", "", "the user lacks the right to run"),
        (lambda _: None, ":wr0ng@", "", "the server has none"),
        (lambda _: None, "", "/99", "it has no database of that number"),
    ],
)
def test_a_refusal_at_the_start_ends_the_worker_with_its_cause(
    server: Server,
    admin: redis.Redis,
    tmp_path,
    prepare: Callable[[redis.Redis], None],
    credentials: str,
    path: str,
    words: str,
) -> None:
    prepare(admin)
    began_s = time.monotonic()
    process = Process(f"redis://{credentials}127.0.0.1:{server.port}{path}", tmp_path / "1", "--echo")
    assert process.wait() == 5
    assert time.monotonic() - began_s < 5  # with the start of the interpreter, on a busy machine
    assert process.logged("worker_stopped")
    assert last_line(process).startswith(f"worker: REDIS_REFUSED: redis://127.0.0.1:{server.port} refuses: ")
    assert words in last_line(process)
    assert "wr0ng" not in process.log.read_text()
    assert "Traceback" not in process.log.read_text()


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [("maxmemory", 1, "its memory limit is reached (OOM)"), ("min-replicas-to-write", 1, "too few replicas")],
)
def test_a_temporary_refusal_at_the_start_is_waited_for_and_named(
    server: Server, admin: redis.Redis, tmp_path, setting: str, value: int, words: str
) -> None:
    admin.config_set(setting, value)
    process = Process(server.url, tmp_path / "1", "--echo", WORKER_REDIS__PATIENCE_S="0.5")
    assert process.wait() == 5
    assert last_line(process).startswith("worker: REDIS_BUSY: ")
    assert words in last_line(process)
    assert words in process.logged("redis_lost")[0]["reason"]


def test_tls_to_a_server_without_it_is_named(server: Server, tmp_path) -> None:
    url = f"rediss://127.0.0.1:{server.port}"
    process = Process(url, tmp_path / "1", "--echo", WORKER_REDIS__PATIENCE_S="3")
    assert process.wait() == 5
    assert f"cannot reach {url} (no reply in time; does its port expect TLS?)" in last_line(process)


def test_a_missing_file_of_tls_is_an_invalid_setting(tmp_path) -> None:
    process = Process("rediss://h?ssl_ca_certs=/missing/ca.pem", tmp_path / "1", "--echo")
    assert process.wait() == 4
    assert last_line(process) == "worker: CONFIG_INVALID: redis.url: ssl_ca_certs: there is no file /missing/ca.pem"


def works(server: Server, password: str = "") -> bool:
    with SyncClient.from_url(f"redis://:{password}@127.0.0.1:{server.port}") as client:
        return client.result(client.submit(prompt="abc", max_tokens=3), idle_s=10)[0] == "abc"


def assert_one_line_each(worker: Process, reason: str) -> None:
    worker.await_log("redis_back")
    time.sleep(0.5)
    lost, back = worker.logged("redis_lost"), worker.logged("redis_back")
    assert (len(lost), len(back)) == (1, 1)
    assert reason in lost[0]["reason"]
    assert back[0]["lost_s"] > 0.5
    assert not worker.logged("background_fault")
    assert not worker.logged("claim_fault")


def test_a_server_that_is_away_for_a_while_is_two_lines(server: Server, tmp_path) -> None:
    with workers(server.url, tmp_path, ("--echo",)) as (worker,):
        server.stop()
        time.sleep(1.5)
        server.start()
        assert_one_line_each(worker, f"{server.url} (")
        assert works(server)


def test_a_password_that_changes_is_two_lines(server: Server, admin: redis.Redis, tmp_path) -> None:
    admin.config_set("requirepass", "first")
    admin.execute_command("AUTH", "first")
    with workers(f"redis://:first@127.0.0.1:{server.port}", tmp_path, ("--echo",)) as (worker,):
        admin.config_set("requirepass", "second")
        admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        time.sleep(1.5)
        admin.config_set("requirepass", "first")
        worker.await_log("redis_back")
        reasons = [line["reason"] for line in worker.logged("redis_lost")]
        assert len(reasons) == 1
        assert works(server, "first")
        text = worker.log.read_text()
        assert "first" not in text
        assert "second" not in text


def test_a_right_that_is_taken_and_given_back_is_two_lines(server: Server, admin: redis.Redis, tmp_path) -> None:
    with workers(server.url, tmp_path, ("--echo",)) as (worker,):
        admin.execute_command("ACL", "SETUSER", "default", "-xreadgroup")
        time.sleep(1.5)
        admin.execute_command("ACL", "SETUSER", "default", "+xreadgroup")
        assert_one_line_each(worker, "the user lacks the right to run")
        assert works(server)


@pytest.mark.parametrize(
    ("begin", "end", "reason"),
    [
        (
            ("CONFIG", "SET", "min-replicas-to-write", "1"),
            ("CONFIG", "SET", "min-replicas-to-write", "0"),
            "NOREPLICAS",
        ),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), ""),
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "OOM"),
    ],
)
def test_a_server_that_refuses_writes_for_a_while_is_two_lines(
    server: Server, admin: redis.Redis, tmp_path, begin: tuple[str, ...], end: tuple[str, ...], reason: str
) -> None:
    with workers(server.url, tmp_path, ("--echo",), WORKER_SERVICE__HEARTBEAT_S="0.5") as (worker,):
        admin.execute_command(*begin)
        time.sleep(1.5)
        admin.execute_command(*end)
        assert_one_line_each(worker, reason)
        assert works(server)


def run_until_killed(admin: redis.Redis) -> None:
    with contextlib.suppress(redis.RedisError):
        admin.eval("while true do end", 0)


def test_a_server_that_runs_a_long_script_is_two_lines(server: Server, admin: redis.Redis, tmp_path) -> None:
    admin.config_set("busy-reply-threshold", 100)
    with workers(server.url, tmp_path, ("--echo",)) as (worker,):
        until_killed = threading.Thread(target=run_until_killed, args=[admin])
        until_killed.start()
        time.sleep(1.5)
        with socket.create_connection(("127.0.0.1", server.port)) as link:
            link.sendall(b"SCRIPT KILL\r\n")
            assert link.recv(5) == b"+OK\r\n"
        until_killed.join()
        assert_one_line_each(worker, "BUSY")
        assert works(server)


KEYS = (
    *("inf:control", "inf:workers", "inf:worker:{worker}", "inf:worker:{worker}:events"),
    "inf:{{q:default}}:jobs",
)


def put_string(admin: redis.Redis, key: str) -> None:
    with admin.pipeline(transaction=True) as pipeline:
        pipeline.delete(key).set(key, "x").execute()


def await_count(worker: Process, event: str, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(worker.logged(event)) < count:
        assert worker.popen.poll() is None
        assert time.monotonic() < deadline, worker.log.read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_another_type_is_one_line_until_it_is_mended(
    server: Server, admin: redis.Redis, tmp_path, key: str
) -> None:
    settings = {"WORKER_SERVICE__HEARTBEAT_S": "0.3", "WORKER_SERVICE__QUEUE_S": "0.3", "WORKER_SERVICE__VRAM_S": "0.1"}
    with workers(server.url, tmp_path, ("--echo", "--echo-step-ms", 20), **settings) as (worker,):
        name = worker.logged("worker_ready")[0]["worker_id"]
        broken = key.format(worker=name)
        with SyncClient.from_url(server.url) as client:
            for count in (1, 2):
                running = client.submit(prompt="abc" * 30, max_tokens=90)
                next(client.tokens(running, idle_s=10))
                put_string(admin, broken)
                assert client.result(running, idle_s=10)[0] == "abc" * 30
                if not broken.endswith("jobs"):
                    assert works(server)
                await_count(worker, "redis_refused", count)
                time.sleep(1.5)
                lines = worker.logged("redis_refused")
                assert len(lines) == count
                assert f"{broken} holds a value of another type" in lines[-1]["reason"]
                assert admin.delete(broken)
                assert works(server)
                await_listed(client, name)
            client.drain(name)
        assert worker.wait() == 0
        assert not [line for line in worker.log.read_text().splitlines() if "_fault" in line]


def await_listed(client: SyncClient, name: str) -> None:
    deadline = time.monotonic() + 10
    while name not in client.workers():
        assert time.monotonic() < deadline
        time.sleep(0.05)
