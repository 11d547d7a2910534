"""Commands at a server that refuses, or with a wrong URL: one sentence and a stable exit code."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import redis

from tests.jobs.servers import Server, running_server
from tests.service.test_server_states import run_until_killed
from worker import cli
from worker.jobs.keys import events_key, state_key

COMMANDS = [
    ("submit", "hello"),
    ("tail", "a"),
    ("tail", "--all"),
    ("cancel", "a"),
    ("jobs",),
    ("workers",),
    ("dead", "ls"),
]


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as started:
        yield started


@pytest.fixture
def admin(server: Server) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port) as client:
        yield client


@pytest.fixture
def worker(monkeypatch, capsys):
    """Run a command with a URL in this process: its exit code and its last line on stderr."""

    def run(url, *arguments):
        monkeypatch.setenv("WORKER_REDIS__URL", url)
        monkeypatch.setattr(sys, "argv", ["worker", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert out == ""
        assert "s3cret" not in err
        assert "Traceback" not in err
        return ended.value.code, err.splitlines()[-1]

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_password_fails_within_a_second(server, admin, worker, command) -> None:
    admin.config_set("requirepass", "right")
    began_s = time.monotonic()
    code, err = worker(f"redis://:s3cret@127.0.0.1:{server.port}", *command)
    assert time.monotonic() - began_s < 1
    assert code == 5
    assert err.startswith("worker: REDIS_REFUSED: ")
    assert "the password is wrong" in err
    assert "start the server" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_right_is_named(server, admin, worker, command) -> None:
    admin.execute_command("ACL", "SETUSER", "default", "-evalsha", "-zrange", "-xread", "-xlen")
    code, err = worker(server.url, *command)
    assert code == 5
    assert err.startswith("worker: REDIS_REFUSED: ")
    assert "deploy/redis/users.acl" in err


def test_a_key_of_a_job_without_an_id_does_not_matter(server, admin, monkeypatch, capsys) -> None:
    for key in (state_key(""), events_key("")):
        admin.set(key, "another type")
    monkeypatch.setattr(sys, "argv", ["worker", "dead", "ls", "--redis-url", server.url])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0, capsys.readouterr().out) == (0, "no dead letters\n")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://h?nonsense=1", "nonsense"),
        ("redis://h?decode_responses=true", "decode_responses"),
        ("redis://h?protocol=3", "protocol"),
        ("redis://h?socket_timeout=1", "socket_timeout"),
        ("redis://h/notadb", "database"),
        ("redis://:s3cret#x@h", "percent-encoded"),
        ("rediss://h?ssl_ca_certs=/missing/ca.pem", "/missing/ca.pem"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_url_is_an_invalid_setting(worker, url, words, command) -> None:
    code, err = worker(url, *command)
    assert code == 4
    assert err.startswith("worker: CONFIG_INVALID: redis.url: ")
    assert words in err


def test_health_names_the_reason_in_words(worker) -> None:
    code, err = worker("redis://h", "health", "--url", "127.0.0.1:1")
    assert code == 1
    assert "does not reply (connection refused)" in err


def test_a_database_that_the_server_lacks(server, worker) -> None:
    code, err = worker(f"{server.url}/99", "jobs")
    assert code == 5
    assert "REDIS_REFUSED" in err
    assert "no database of that number" in err


def test_a_full_server_is_named(server, admin, worker) -> None:
    admin.config_set("maxmemory", 1)
    code, err = worker(server.url, "submit", "hello")
    assert code == 5
    assert err.startswith("worker: REDIS_BUSY: ")
    assert "its memory limit is reached (OOM)" in err


def test_a_long_script_is_named(server, admin, worker) -> None:
    admin.config_set("busy-reply-threshold", 100)
    running = threading.Thread(target=run_until_killed, args=[admin])
    running.start()
    time.sleep(0.5)
    try:
        code, err = worker(server.url, "jobs")
        assert code == 5
        assert err.startswith("worker: REDIS_BUSY: ")
        assert "a script has been running" in err
    finally:
        with socket.create_connection(("127.0.0.1", server.port)) as link:
            link.sendall(b"SCRIPT KILL\r\n")
            link.recv(5)
        running.join()
