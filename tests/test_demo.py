"""`worker demo` with a tiny model: its output, and that no process or file remains after it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest


@pytest.fixture
def start(tiny, tmp_path, monkeypatch):
    """Return a function that starts a demo with its files in `tmp_path`; kill it at the end."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    started = []

    def start(*arguments):
        command = [sys.executable, "-m", "worker", "demo", "--model", str(tiny("qwen2")), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)


def url_of(text):
    return re.search(r"redis://127\.0\.0\.1:(\d+), ", text)[1]


def processes_with(port):
    """Processes whose command line contains the port."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        matches = any(port in argument for argument in process.info["cmdline"] or ())
        if matches and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["cmdline"])
    return found


def test_the_demo_streams_two_answers_with_statistics_and_prints_the_next_commands(start, tmp_path):
    out, err = start("--max-tokens", 6).communicate(timeout=120)
    assert "> What is the capital of France" in out, err
    assert "> Write a short poem" in out
    figures = r"waited \d+ ms in the queue, first token after \d+ ms, (\d+) tokens at [\d.]+ tokens/s, ended by (\w+)"
    assert len(re.findall(figures, out)) == 2
    port = url_of(out)
    for what in ("demo-paris", "demo-sea", "--all"):
        assert f"tail {what} --redis-url redis://127.0.0.1:{port}" in out
    assert re.search(r"tail --worker demo-\d+-\w+ --redis-url", out)
    assert "run --model smollm2" in out
    assert re.search(r"http://127\.0\.0\.1:8000/v1, over that queue, .*:\n .* gateway\n .* serve smollm2\n", out)
    assert processes_with(port) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_process_or_file_remains_when_the_demo_is_interrupted(start, tmp_path, how, code):
    process = start("--max-tokens", 400)
    port = url_of(process.stdout.readline())
    while "> What is" not in process.stdout.readline():
        assert process.poll() is None
    assert len(processes_with(port)) == 2
    process.send_signal(how)
    assert process.wait(20) == code
    assert "Traceback" not in process.stderr.read()
    wait_until(lambda: processes_with(port) == [])
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_cannot_load_ends_the_demo_with_its_log(start, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    process = start("--model", bad)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "MODEL_LOAD_FAILED" in err
    assert processes_with(url_of(out)) == []
    assert os.listdir(tmp_path) == ["bad.gguf"]
