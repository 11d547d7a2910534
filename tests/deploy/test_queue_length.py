"""The figure that KEDA scales by, XLEN of the queue, on a real server with real workers.

Never 0 with work left, 0 when all is done; and what the group's lag shows instead.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import pytest
import redis

from tests.deploy.manifests import ROOT, base, find
from tests.service.processes import workers
from worker.jobs.client import SyncClient
from worker.jobs.keys import GROUP, events_key

TRIGGER = find(base(), "ScaledObject/worker")["spec"]["triggers"][0]["metadata"]
SLOW = ("--echo", "--echo-step-ms", 10, "--max-running", 4)
KEDA_RIGHTS = next(
    line.strip().removeprefix("ACL SETUSER keda on >PASSWORD ")
    for line in (ROOT / "docs/kubernetes.md").read_text().splitlines()
    if "ACL SETUSER keda" in line
)


class Keda:
    """What KEDA's scaler reads for the trigger of the manifest, as a user with the documented rights."""

    def __init__(self, port: int) -> None:
        self.operator = redis.Redis(port=port)
        self.operator.execute_command("ACL", "SETUSER", "keda", "on", ">secret", *KEDA_RIGHTS.split())
        self.connection = redis.Redis(port=port, username="keda", password="secret", db=int(TRIGGER["databaseIndex"]))

    def length(self) -> int:
        return self.connection.xlen(TRIGGER["stream"])

    def lag(self):
        (group,) = self.operator.xinfo_groups(TRIGGER["stream"])
        assert group["name"].decode() == GROUP
        return group["lag"]

    def close(self) -> None:
        self.connection.close()
        self.operator.execute_command("ACL", "DELUSER", "keda")
        self.operator.close()


@pytest.fixture
def keda(server):
    scaler = Keda(server.port)
    yield scaler
    scaler.close()


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)


def await_tokens(client: SyncClient, job_id: str, count: int = 2) -> None:
    for item in client.events(job_id, idle_s=20):
        if item.kind == "token" and item.event.i >= count:
            return
    raise AssertionError(f"{job_id} ended")


def test_the_trigger_reads_the_queue_and_the_user_of_keda_can_do_nothing_else(keda, client):
    assert keda.length() == 0  # the queue does not exist yet
    client.submit(job_id="secret", prompt="a")
    assert keda.length() == 1
    for command in (
        ("XRANGE", TRIGGER["stream"], "-", "+"),
        ("XADD", TRIGGER["stream"], "*", "p", "{}"),
        ("DEL", TRIGGER["stream"]),
        ("XLEN", events_key("secret")),
        ("KEYS", "*"),
        ("CONFIG", "GET", "*"),
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            keda.connection.execute_command(*command)


def test_xlen_counts_waiting_and_running_jobs_through_every_step_of_a_job(server, client, keda, tmp_path):
    for number, job in enumerate("abcd", start=1):  # no worker runs: the scaler wakes the first one
        client.submit(job_id=job, prompt="abc", max_tokens=200)
        assert keda.length() == number
    client.cancel("d")
    assert keda.length() == 4  # a worker has to settle the cancelled job's entry
    with workers(server.url, tmp_path, SLOW) as (first,):
        wait_until(lambda: keda.length() == 3)
        for job in "abc":
            await_tokens(client, job)
        assert keda.length() == 3
        assert not keda.lag(), "the lag is 0 or nil while three jobs run"
        client.cancel("c")
        wait_until(lambda: keda.length() == 2)
        first.send(signal.SIGKILL)
        first.wait()
        assert keda.length() == 2
    folder = tmp_path / "second"
    folder.mkdir()
    with workers(server.url, folder, SLOW) as (second,):
        await_tokens(client, "a", 150)
        second.send(signal.SIGTERM)
        assert second.wait() == 0
    assert client.result("a")[0] == client.result("b")[0] == "abc" * 66 + "ab"
    wait_until(lambda: keda.length() == 0)


def test_xlen_is_never_below_the_number_of_unfinished_jobs(server, client, keda, tmp_path):
    """Workers are killed, drained and replaced, jobs cancelled, while every sample is one transaction."""
    jobs, violations, samples, stop = [], [], [], threading.Event()

    def sample() -> None:
        with redis.Redis(port=server.port) as connection:
            while not stop.wait(0.01):
                submitted = list(jobs)
                pipeline = connection.pipeline(transaction=True)
                pipeline.xlen(TRIGGER["stream"])
                for job in submitted:
                    pipeline.xrevrange(events_key(job), count=1)
                length, *newest = pipeline.execute()
                left = sum(not last or last[0][1][b"type"] not in (b"end", b"error") for last in newest)
                samples.append(length)
                if length < left:
                    violations.append((length, left))

    observer = threading.Thread(target=sample)
    observer.start()
    try:
        for number in range(20):
            client.submit(job_id=f"job-{number}", prompt="abc", max_tokens=30 + number)
            jobs.append(f"job-{number}")
        for turn in ("first", "second"):
            folder = tmp_path / turn
            folder.mkdir()
            with workers(server.url, folder, SLOW, SLOW) as (one, two):
                running = [entry.job_id for entry in client.queue() if entry.worker]
                for job in running[:2]:
                    client.cancel(job)
                one.send(signal.SIGKILL)
                two.send(signal.SIGTERM)
                two.wait(30)
        with workers(server.url, tmp_path, SLOW):
            wait_until(lambda: client.queue_length() == 0, 60)
    finally:
        stop.set()
        observer.join()
    assert violations == []
    assert max(samples) == 20
    assert len(samples) > 100
    assert keda.length() == 0
    assert {client.state(job)["state"] for job in jobs} <= {"end", "error"}
