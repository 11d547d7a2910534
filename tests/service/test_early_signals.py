"""SIGTERM and SIGINT during the start of `worker run`, as the first process of a container gets them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

UNREACHABLE = "redis://127.0.0.1:1"
RUN = [sys.executable, "-m", "worker", "run", "--echo", "--http-port", "0", "--redis-url", UNREACHABLE]
OFFSETS_S = (0.0, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)


def start(command=RUN):
    """Start with both signals ignored until the process handles them, as the kernel does for PID 1."""

    def ignore():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, preexec_fn=ignore, env=environment)  # noqa: PLW1509


def wait_until_caught(process, number):
    """Wait until the process has a handler for the signal."""
    deadline = time.monotonic() + 10
    while True:
        with open(f"/proc/{process.pid}/status") as status:
            caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
        if caught >> (number - 1) & 1:
            return
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_time_of_the_start_ends_the_worker_with_0(number):
    processes = [start() for _ in OFFSETS_S]
    try:
        for process, offset_s in zip(processes, OFFSETS_S, strict=True):
            wait_until_caught(process, number)
            time.sleep(offset_s)
            process.send_signal(number)
        assert [process.wait(10) for process in processes] == [0] * len(OFFSETS_S)
    finally:
        for process in processes:
            process.kill()


def test_the_handlers_precede_every_import_that_takes_long():
    script = (
        "import sys, signal\n"
        "before = set(sys.modules)\n"
        "install = signal.signal\n"
        "def record(number, handler):\n"
        "    print(*(set(sys.modules) - before))\n"
        "    raise SystemExit(install(number, handler) and 0)\n"
        "signal.signal = record\n"
        "sys.argv = ['worker', 'run']\n"
        "from worker.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert "worker" in imported
    assert imported <= {"worker", *sys.stdlib_module_names}


def test_other_commands_keep_the_default_action():
    process = subprocess.Popen([sys.executable, "-m", "worker", "pull", "--help"], stdout=subprocess.DEVNULL)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) in (-signal.SIGTERM, 0)


def test_as_process_1_of_a_namespace_a_starting_worker_obeys_sigterm():
    unshare = shutil.which("unshare")
    options = ["--fork", "--pid", "--map-root-user", "--kill-child"]
    if unshare is None or subprocess.run([unshare, *options, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system has no process namespaces for its users")
    process = subprocess.Popen([unshare, *options, *RUN], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not (child := children(process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.2)  # the interpreter's own start, during which the kernel drops the signal
        began = time.monotonic()
        while process.poll() is None:
            assert time.monotonic() - began < 5
            for pid in child:
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.5)
        assert process.returncode == 0
    finally:
        process.kill()


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as listed:
        return [int(each) for each in listed.read().split()]
