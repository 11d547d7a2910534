"""Real processes on a real server: killed, suspended and terminated in the middle of an answer."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from tests.service.jobs import reference_tokens
from tests.service.processes import Process, workers
from tests.service.serving import JobEvents
from worker.jobs.client import SyncClient
from worker.jobs.streams import Disconnected

FIELDS = {"prompt": "hello world", "seed": 7, "temperature": 0.8, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def client(server):
    with SyncClient.from_url(server.url) as client:
        yield client


def read(events, count=None):
    """A job's events to the end, or to the token of index `count`."""
    items = []
    for item in events:
        items.append(item)
        if item.kind == "token" and item.event.i == count:
            break
    return items


def owner(client, processes):
    held_by = client.queue()[0].worker
    return sorted(processes, key=lambda process: f"-{process.popen.pid}-" not in held_by)


def test_the_job_of_a_killed_worker_is_continued_by_another(server, client, tiny, model, tmp_path):
    arguments = ("--model", tiny("qwen2"), "--backend", "cpu")
    with workers(server.url, tmp_path, arguments, arguments) as (one, two):
        client.submit(job_id="a", **FIELDS)
        begun = read(client.events("a"), count=30)
        first, second = owner(client, (one, two))
        first.send(signal.SIGKILL)
        killed = time.monotonic()
        result = JobEvents(begun + read(client.events("a", after=begun[-1].resume, idle_s=10)))
        resumed = next(item for item in result.items if item.kind == "resumed")
        assert resumed.event.exact
        assert resumed.event.reason == "crash"
        assert first.popen.poll() is None or first.wait() == -signal.SIGKILL
        assert second.popen.poll() is None
        assert time.monotonic() - killed < 10
    seen = {token.i: token for token in result.tokens}
    assert list(seen.values()) == reference_tokens(model(), **FIELDS)
    whole = JobEvents(list(client.events("a")))
    assert [token.i for token in whole.tokens] == list(range(400)), "every index once"


def test_a_suspended_worker_that_wakes_after_its_lease_writes_nothing(server, client, tmp_path):
    slow = ("--echo", "--echo-step-ms", 20)
    with workers(server.url, tmp_path, slow, slow) as both:
        client.submit(job_id="a", prompt="abc", max_tokens=100)
        read(client.events("a"), count=10)
        one, two = owner(client, both)
        one.send(signal.SIGSTOP)
        result = JobEvents(list(client.events("a", idle_s=10)))
        assert result.text == "abc" * 33 + "a"
        assert [resumed.reason for resumed in result.of("resumed")] == ["crash"]
        one.send(signal.SIGCONT)
        assert one.await_log("job_released")["outcome"] in ("lost", "fenced")
        whole = JobEvents(list(client.events("a")))
        assert [item.entry_id for item in whole.items] == [item.entry_id for item in result.items]
        two.send(signal.SIGTERM)
        assert two.wait() == 0
        assert client.result(client.submit(prompt="abc", max_tokens=3), idle_s=10)[0] == "abc"


def test_on_sigterm_the_running_job_is_finished(server, client, tmp_path):
    with workers(server.url, tmp_path, ("--echo", "--echo-step-ms", 10, "--grace", 20)) as (worker,):
        for job_id in ("a", "b"):
            client.submit(job_id=job_id, prompt="abc", max_tokens=100)
        read(client.events("a"), count=5)
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
        assert client.result("a")[0] == "abc" * 33 + "a"
        assert [entry.job_id for entry in client.queue()] == ["b"], "it took no other job"
        assert client.workers() == {}


def test_on_sigterm_with_a_short_grace_period_the_job_is_handed_over(server, client, tmp_path):
    lease = {"WORKER_LEASE__LEASE_S": "30", "WORKER_LEASE__RENEW_S": "1"}
    short_grace = ("--echo", "--echo-step-ms", 10, "--grace", 0.2)
    with workers(server.url, tmp_path, short_grace, short_grace, **lease) as both:
        client.submit(job_id="a", prompt="abc", max_tokens=200)
        read(client.events("a"), count=5)
        one, _ = owner(client, both)
        one.send(signal.SIGTERM)
        began = time.monotonic()
        assert one.wait() == 0
        result = JobEvents(list(client.events("a", idle_s=10)))
        assert time.monotonic() - began < 12, "the job waited for the lease of 30 s"
    assert result.text == "abc" * 66 + "ab"
    assert [resumed.reason for resumed in result.of("resumed")] == ["drain"]


def test_a_second_signal_stops_the_worker_at_once(server, client, tmp_path):
    with workers(server.url, tmp_path, ("--echo", "--echo-step-ms", 100)) as (worker,):
        client.submit(job_id="a", prompt="abc", max_tokens=1000)
        read(client.events("a"), count=1)
        worker.send(signal.SIGINT)
        worker.await_log("worker_draining")
        worker.send(signal.SIGINT)
        began = time.monotonic()
        assert worker.wait() == 0
        assert time.monotonic() - began < 3


def test_a_worker_survives_a_server_restart_and_an_idle_drain_takes_under_5_seconds(server, client, tmp_path):
    with workers(server.url, tmp_path, ("--echo", "--name", "w7")) as (worker,):
        assert client.result(client.submit(prompt="abc", max_tokens=3), idle_s=10)[0] == "abc"
        server.stop()
        server.start()
        with contextlib.suppress(Disconnected):
            client.state("the first call after the restart finds its connection gone")
        assert client.result(client.submit(prompt="abc", max_tokens=3), idle_s=10)[0] == "abc"
        names = list(client.workers())
        assert names == [name for name in names if name.startswith(f"w7-{worker.popen.pid}-")]
        began = time.monotonic()
        client.drain("w7")
        assert worker.wait() == 0
        assert time.monotonic() - began < 5
        assert worker.logged("worker_stopped")[0]["exit_code"] == 0


def test_a_model_that_cannot_be_served_is_exit_code_1_and_a_message(server, client, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    process = Process(server.url, tmp_path / "1", "--model", bad, "--backend", "cpu")
    assert process.wait() == 1
    last = process.log.read_text().splitlines()[-1]
    assert last.startswith("worker: MODEL_LOAD_FAILED: ")
    assert process.logged("worker_failed")[0]["code"] == "MODEL_LOAD_FAILED"
    assert process.logged("worker_stopped")[0]["exit_code"] == 1


def test_an_unreachable_server_is_exit_code_5_and_a_message(tmp_path):
    process = Process("redis://127.0.0.1:1", tmp_path / "1", "--echo", WORKER_REDIS__PATIENCE_S="0.3")
    assert process.wait() == 5
    assert process.logged("worker_stopped")[0]["exit_code"] == 5
    last = process.log.read_text().splitlines()[-1]
    assert last.startswith("worker: REDIS_UNREACHABLE: ")
    assert "cannot reach redis://127.0.0.1:1 (connection refused)" in last
    assert "--redis-url" in last


def test_a_sigterm_during_interpreter_exit_does_not_change_the_exit_code(server, tmp_path):
    late = "import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with workers(server.url, tmp_path, ("--echo",), PYTHONPATH=path) as (worker,):
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
