"""The `worker` command with one fault in it, in the step that FAULT names, counted from the first job's first.

    FAULT=trap:20 python -m tests.gpu.faulty_worker run --model MODEL.gguf …

`trap:N` breaks the device for good at step N, by a kernel that traps; `oom:N` fails the first allocation of step N.
"""

from __future__ import annotations

import os

from tests.gpu.child import break_the_device
from worker import cli, runtime
from worker.gpu.memory import DeviceMemory
from worker.gpu.runner import GpuRunner


class Fault:
    """What goes wrong, and when."""

    def __init__(self, spec):
        self._kind, _, at = spec.partition(":")
        self._at, self._steps, self._armed = int(at), 0, False

    def step(self):
        """A step begins."""
        self._steps += 1
        if self._steps != self._at:
            return
        if self._kind == "trap":
            break_the_device()
        self._armed = self._kind == "oom"

    def fails(self, _number):
        """Whether this allocation does."""
        failing, self._armed = self._armed, False
        return failing


def install(fault):
    """Put the fault between the runtime and its device."""
    opened, run = runtime.open_backend, GpuRunner.run

    def open_backend(engine):
        backend = opened(engine)
        backend._memory = DeviceMemory(fault.fails)
        return backend

    def faulty_run(runner, batch, requests):
        fault.step()
        return run(runner, batch, requests)

    runtime.open_backend, GpuRunner.run = open_backend, faulty_run


if __name__ == "__main__":
    install(Fault(os.environ["FAULT"]))
    cli.main()
