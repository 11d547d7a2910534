"""The preStop hook of the worker's pod against a real worker."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.deploy.manifests import base, find, pod_of
from tests.deploy.test_queue_length import await_tokens
from tests.service.processes import workers


@pytest.fixture
def hook():
    """A function from a process id to the hook's command, which has process 1 in a container."""
    lifecycle = pod_of(find(base(), "Deployment/worker"))["containers"][0]["lifecycle"]
    shell, option, script = lifecycle["preStop"]["exec"]["command"]
    assert script.count(" 1;") == 2
    return lambda pid: [shell, option, script.replace(" 1;", f" {pid};")]


def test_the_hook_drains_and_returns_when_the_job_has_ended(server, client, hook, tmp_path):
    with workers(server.url, tmp_path, ("--echo", "--echo-step-ms", 10, "--grace", 30)) as (worker,):
        client.submit(job_id="a", prompt="abc", max_tokens=200)
        await_tokens(client, "a")
        running = subprocess.Popen(hook(worker.popen.pid), stderr=subprocess.DEVNULL)
        assert worker.wait(30) == 0
        assert running.wait(10) == 0
        assert client.result("a")[0] == "abc" * 66 + "ab"
        assert [line["reason"] for line in worker.logged("worker_draining")] == ["SIGTERM"]


def test_the_kubelets_sigterm_at_the_end_of_the_grace_period_hands_the_job_back(server, client, hook, tmp_path):
    slow = ("--echo", "--echo-step-ms", 10, "--grace", 300)
    lease = {"WORKER_LEASE__LEASE_S": "300", "WORKER_LEASE__RENEW_S": "1"}
    with workers(server.url, tmp_path, slow, **lease) as (worker,):
        client.submit(job_id="a", prompt="abc", max_tokens=250)
        await_tokens(client, "a")
        running = subprocess.Popen(hook(worker.popen.pid), stderr=subprocess.DEVNULL)
        worker.await_log("worker_draining")
        os.kill(worker.popen.pid, signal.SIGTERM)
        assert worker.wait(30) == 0
        assert running.wait(10) == 0
    with workers(server.url, tmp_path, slow, **lease):
        items = list(client.events("a", idle_s=30))  # without the handing back: after the lease of 300 s
    assert [item.event.reason for item in items if item.kind == "resumed"] == ["drain"]
    assert items[-1].kind == "end"
