"""`worker run` as a process that is killed when the tests end."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
SHORT_LEASE = {"WORKER_LEASE__LEASE_S": "1.5", "WORKER_LEASE__RENEW_S": "0.3", "WORKER_LEASE__SCAN_S": "0.1"}


class Process:
    """One `worker run`; its log goes to a file."""

    module = "worker"
    command = "run"
    port_option = "--http-port"

    def __init__(self, url: str, log: Path, *arguments: object, **environment: str) -> None:
        libc = ctypes.CDLL(None)
        command = [sys.executable, "-m", self.module, self.command, "--redis-url", url, self.port_option, "0"]
        self.log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                [*command, *map(str, arguments)],
                stdout=output,
                stderr=output,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **SHORT_LEASE, **environment},
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
            )

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, timeout_s: float = 15.0) -> int:
        return self.popen.wait(timeout_s)

    def logged(self, event: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    def await_log(self, event: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """Wait for a log line of this event; returns the first one."""
        deadline = time.monotonic() + timeout_s
        while not (found := self.logged(event)):
            assert self.popen.poll() is None, f"the process ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {event}: {self.log.read_text()}"
            time.sleep(0.02)
        return found[0]


@contextlib.contextmanager
def workers(url: str, folder: Path, *each: tuple[object, ...], **environment: str) -> Iterator[list[Process]]:
    """A ready worker for each tuple of arguments; killed at the end."""
    processes = [Process(url, folder / str(n), *arguments, **environment) for n, arguments in enumerate(each)]
    try:
        for process in processes:
            process.await_log("worker_ready")
        yield processes
    finally:
        for process in processes:
            process.send(signal.SIGKILL)
            process.send(signal.SIGCONT)
            process.wait()
