"""`worker serve` with a tiny model: one command answers requests, and leaves no process or file."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from worker.embedded import free_port

NAMES = ("page", "OpenAI", "Anthropic")
"""Of the addresses that the command shows, in their order."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts the command with its files in `tmp_path`; kill it at the end."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    started = []

    def start(model, *arguments):
        command = [sys.executable, "-m", "worker", "serve", str(model), "--backend", "cpu", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def url(start, tiny):
    """A served tiny model, and the URL of its gateway."""
    port = free_port()
    return start(tiny("qwen2"), "--port", port, "--served-name", "mine"), f"http://127.0.0.1:{port}"


def wait_until(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)


def is_served(url):
    try:
        return bool(httpx.get(f"{url}/v1/models").json()["data"])
    except httpx.TransportError:
        return False


def test_one_command_serves_a_model_over_http(url, tmp_path: Path):
    process, base = url
    wait_until(lambda: is_served(base))
    assert len(psutil.Process(process.pid).children()) == 3, "the server, the worker and the gateway"
    children = psutil.Process(process.pid).children(recursive=True)
    body = {"model": "mine", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    answer = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=30).json()
    assert answer["usage"]["completion_tokens"] <= 4, answer
    assert httpx.get(f"{base}/").headers["content-type"].startswith("text/html")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert f"{base}/v1" in process.stderr.read()
    assert [child.name() for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert list(tmp_path.iterdir()) == []


def test_without_a_port_the_command_shows_the_one_that_it_listens_on(start, tiny):
    process = start(tiny("qwen2"), "--port", 0)
    shown = dict(next(line for line in process.stderr if line.split()[:1] == [name]).split() for name in NAMES)
    base = shown["Anthropic"]
    assert shown == {"page": f"{base}/", "OpenAI": f"{base}/v1", "Anthropic": base}
    wait_until(lambda: is_served(base))


def test_the_command_ends_when_its_worker_dies(url):
    process, base = url
    wait_until(lambda: is_served(base))
    (worker,) = [child for child in psutil.Process(process.pid).children() if "run" in child.cmdline()]
    worker.kill()
    assert process.wait(30) == 1


def test_a_model_that_cannot_load_ends_the_command_with_the_reason(start, tmp_path: Path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    process = start(bad)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "MODEL_LOAD_FAILED" in err
