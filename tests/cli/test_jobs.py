"""The queue commands against a real server and an echo worker: output, exit codes, messages."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import redis

from tests.jobs.servers import running_server
from tests.service.processes import workers
from worker import cli
from worker.jobs.client import SyncClient


@pytest.fixture(scope="module")
def server_and_port(tmp_path_factory):
    """A server with one echoing worker: the server's URL, and the worker's HTTP port."""
    with running_server() as server:
        slow = ("--echo", "--echo-step-ms", 5, "--name", "echoer")
        with workers(server.url, tmp_path_factory.mktemp("workers"), slow) as (process,):
            port = process.logged("worker_starting")[0]["http_port"]
            yield server.url, port


@pytest.fixture
def url(server_and_port):
    return server_and_port[0]


@pytest.fixture
def port(server_and_port):
    return server_and_port[1]


@pytest.fixture
def worker(url, monkeypatch, capsys):
    """Run a command in this process: its exit code, stdout and stderr."""

    def run(*arguments, at=None):
        monkeypatch.setenv("WORKER_REDIS__URL", at or url)
        monkeypatch.setattr(sys, "argv", ["worker", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_submit_prints_the_id_and_tail_shows_the_job(worker):
    code, out, _ = worker("submit", "abc", "--max-tokens", 5)
    assert (code, bool(re.fullmatch(r"[0-9a-f]{32}\n", out))) == (0, True)
    code, shown, _ = worker("tail", out.strip())
    assert code == 0
    assert [line.split()[3] for line in shown.splitlines()] == ["started", *["token"] * 5, "end"]
    code, shown, _ = worker("tail", out.strip(), "--json")
    events = lines(shown)
    assert [event["event"] for event in events] == ["started", *["token"] * 5, "end"]
    assert "".join(event.get("t", "") for event in events) == "abcab"
    resume = events[3]["resume"]
    _, rest, _ = worker("tail", out.strip(), "--json", "--from", resume)
    indices = [event["i"] for event in lines(rest) if event["event"] == "token"]
    assert indices == list(range(indices[0], 5))
    assert indices[0] <= 3, "tokens of the same entry are repeated, none is missing"


def test_submit_wait_separates_text_and_statistics(worker):
    code, out, err = worker("submit", "abc", "--max-tokens", 7, "--wait")
    assert (code, out) == (0, "abcabca\n")
    assert "7 generated" in err
    code, out, _ = worker("submit", "hi", "--chat", "--system", "be brief", "--wait", "--json", "--seed", 3)
    events = lines(out)
    assert (code, events[0]["seed"], events[-1]["event"]) == (0, 3, "end")
    _, out, _ = worker("submit", "abc", "--max-tokens", 3, "--json", "--job-id", "mine")
    assert lines(out) == [{"job_id": "mine"}]


def test_submit_wait_reports_failures_by_exit_code(worker):
    code, _, err = worker("submit", "abc", "--max-tokens", 100_000, "--wait")
    assert code == 3
    assert "INVALID_REQUEST" in err
    code, _, err = worker("submit", "abc", "--temperature", 9)
    assert (code, err.count("\n")) == (3, 1)
    assert "temperature" in err
    code, out, _ = worker("submit", "abc", "--max-tokens", 3000, "--deadline-ms", 200, "--wait", "--json")
    assert code == 1
    assert lines(out)[-1]["code"] == "INFERENCE_TIMEOUT"


def test_cancel_jobs_and_workers(worker, url):
    worker("submit", "abc", "--max-tokens", 4000, "--job-id", "long")
    worker("submit", "abc", "--max-tokens", 5, "--job-id", "short")
    rows = _until(lambda: lines(worker("jobs", "--json")[1]), lambda rows: rows[0]["state"] == "running")
    assert [(row["job_id"], row["state"]) for row in rows] == [("long", "running"), ("short", "waiting")]
    assert rows[0]["worker"].startswith("echoer-")
    assert "running" in worker("jobs")[1]
    with SyncClient.from_url(url) as client:  # the entry is delivered before the job has begun
        _until(lambda: client.state("long"), lambda state: state["state"] == "running")
    assert worker("cancel", "long")[:2] == (0, "requested\n")
    assert worker("tail", "short")[0] == 0
    assert worker("cancel", "short")[:2] == (0, "over\n")
    assert worker("cancel", "long")[:2] == (0, "cancelled\n")
    assert worker("cancel", "no such job!")[0] == 3
    _until(lambda: worker("jobs")[1], lambda out: out == "the queue is empty\n")
    (row,) = lines(worker("workers", "--json")[1])
    assert (row["name"], row["model"]) == ("echoer", "echo")
    assert {"running", "waiting", "preempted", "kv_blocks_used", "kv_blocks"} < set(row)
    assert "echoer-" in worker("workers")[1]


def _until(read, accept, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while True:
        value = read()
        try:
            if accept(value):
                return value
        except (IndexError, KeyError):
            pass
        assert time.monotonic() < deadline, value


def test_health_queries_the_port(worker, port):
    code, out, _ = worker("health", "--url", f"127.0.0.1:{port}")
    assert (code, json.loads(out)["alive"]) == (0, True)
    code, out, _ = worker("health", "--url", f"http://localhost:{port}/", "--ready")
    assert (code, json.loads(out)["ready"]) == (0, True)
    code, _, err = worker("health", "--url", "127.0.0.1:1")
    assert (code, err.count("\n")) == (1, 1)
    assert worker("health", "--url", "nonsense")[0] == 2


def test_dead_letters_are_listed_shown_retried_and_deleted(worker, url):
    assert worker("dead", "ls")[:2] == (0, "no dead letters\n")
    with SyncClient.from_url(url) as client:
        for payload in (b"\xc1", b'{"job_id": "again", "prompt": "abc", "max_tokens": 3}'):
            fields = {"p": payload, "job_id": b"again" if b"again" in payload else b"", "reason": b"x"}
            client._run(client._client._streams.add("inf:{q:default}:dead", fields, 100, None))
    first, second = lines(worker("dead", "ls", "--json")[1])
    assert "again" in worker("dead", "ls")[1]
    assert lines(worker("dead", "show", second["id"])[1])[0]["job"]["prompt"] == "abc"
    assert lines(worker("dead", "show", first["id"])[1])[0]["job"] == "c1"
    assert worker("dead", "retry", second["id"])[:2] == (0, "again.r1\n")
    assert worker("tail", "again.r1")[0] == 0
    assert worker("dead", "retry", first["id"])[0] == 3
    assert worker("dead", "rm", first["id"])[:2] == (0, f"{first['id']}\n")
    code, _, err = worker("dead", "show", first["id"])
    assert (code, err) == (
        1,
        f"worker: NOT_FOUND: no dead letter {first['id']}; `worker dead ls` lists them\n",
    )


def test_dead_letters_are_deleted_by_id_and_all_of_the_queue(worker, url):
    with redis.Redis.from_url(url) as client:
        ids = [client.xadd("inf:{q:many}:dead", {"p": b"x"}, id=f"{number}-0").decode() for number in range(1, 26)]
        other = client.xadd("inf:{q:other}:dead", {"p": b"x"}).decode()
    many = ("--queue", "many")
    assert worker("dead", "drop", *many, "3")[:2] == (0, "3\n"), "the former name"
    code, out, err = worker("dead", "rm", *many, "1-0", "1-0", "7-7", "2", "3-0", "2-0", "\x1b")
    assert (code, out) == (1, "1-0\n2-0\n"), "each id once"
    missing = "no dead letter 7-7, 3-0, \\x1b: unknown or deleted already; `worker dead ls` lists them"
    assert err == f"worker: NOT_FOUND: {missing}\n"
    for arguments in ((), ("--all", "4-0")):
        code, out, err = worker("dead", "rm", *many, *arguments)
        assert (code, out) == (2, "")
        assert "pass ids, or --all without ids" in err
    assert worker("dead", "rm", *many, "--all")[:2] == (0, "".join(f"{each}\n" for each in ids[3:]))
    assert worker("dead", "rm", *many, "--all") == (0, "", "no dead letters\n")
    assert worker("dead", "ls", *many)[1] == "no dead letters\n"
    assert lines(worker("dead", "ls", "--queue", "other", "--json")[1])[0]["id"] == other
    assert worker("dead", "rm", "--queue", "other", other)[0] == 0


def test_rm_all_keeps_letters_that_arrive_while_another_operator_deletes(worker, url, monkeypatch):
    key, drop = "inf:{q:shared}:dead", SyncClient.drop_dead_letter
    with redis.Redis.from_url(url) as server:
        ids = [server.xadd(key, {"p": b"x"}, id=f"{number}-0").decode() for number in range(1, 31)]

        def drop_beside_another(self, letter):
            if letter == ids[0]:
                server.xdel(key, *ids[15:25])
                for number in range(31, 41):
                    server.xadd(key, {"p": b"x"}, id=f"{number}-0")
            return drop(self, letter)

        monkeypatch.setattr(SyncClient, "drop_dead_letter", drop_beside_another)
        code, out, err = worker("dead", "rm", "--queue", "shared", "--all")
        assert (code, out.split(), err) == (0, ids[:15] + ids[25:], "")
        assert [entry_id.decode() for entry_id, _ in server.xrange(key)] == [f"{n}-0" for n in range(31, 41)]


def test_tail_all_follows_workers_and_jobs_until_interrupted(worker, url, tmp_path):
    command = [sys.executable, "-m", "worker", "tail", "--all", "--json", "--redis-url", url]
    with (tmp_path / "out").open("w+") as output, subprocess.Popen(command, stdout=output) as process:
        # The process does not report that it is listening: submit until its output shows events.
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            worker("submit", "abc", "--max-tokens", 3, "--wait")
            received = lines((tmp_path / "out").read_text())
            if {"end", "vram"} <= {event["event"] for event in received}:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert {"started", "token", "end", "vram"} <= {event["event"] for event in received}


def test_tail_of_a_worker_starts_with_its_first_event(worker, url):
    command = [sys.executable, "-m", "worker", "tail", "--worker", "echoer", "--json", "--redis-url", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        kinds = [json.loads(process.stdout.readline())["event"] for _ in range(7)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert kinds == ["starting", *["load_progress"] * 5, "ready"]


@pytest.mark.parametrize("arguments", [("tail",), ("tail", "a", "--all"), ("tail", "a", "--from", "yesterday")])
def test_wrong_usage_is_exit_code_2(worker, arguments):
    assert worker(*arguments)[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [("submit", "x"), ("tail", "a"), ("tail", "--all"), ("jobs",), ("workers",), ("drain", "w"), ("dead", "ls")],
)
def test_an_unreachable_server_is_one_message_with_a_remedy(worker, arguments):
    code, out, err = worker(*arguments, at="redis://127.0.0.1:1")
    assert (code, out, err.count("\n")) == (5, "", 1)
    assert err.startswith("worker: REDIS_UNREACHABLE: ")
    assert "--redis-url" in err


def test_a_malformed_url_is_an_invalid_setting(worker):
    for bad in ("http://host", "redis://host:port"):
        code, _, err = worker("jobs", at=bad)
        assert (code, err.count("\n")) == (4, 1)
        assert "redis.url" in err


@pytest.mark.parametrize("url", ["redis://:sec/ret@127.0.0.1:1", "redis://:secret@127.0.0.1:1", "http://:secret@host"])
def test_a_password_is_never_printed(worker, url):
    code, out, err = worker("jobs", at=url)
    assert code in (4, 5)
    assert "sec" not in out + err


def test_run_without_a_model_names_the_option(worker):
    code, _, err = worker("run")
    assert code == 4
    assert "--model" in err


def test_drain_of_an_unknown_worker_is_an_error(worker):
    code, _, err = worker("drain", "no-such-worker")
    assert code == 1
    assert "worker workers" in err


def test_every_command_has_help(worker):
    _, out, _ = worker("--help")
    for command in ("run", "submit", "tail", "cancel", "jobs", "workers", "drain", "health", "dead"):
        assert command in out
        code, shown, _ = worker(command, "--help")
        assert code == 0
        assert len(shown) > 200


def test_generate_does_not_import_redis():
    code = "import sys, worker.cli; print([m for m in ('redis', 'structlog', 'prometheus_client') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
