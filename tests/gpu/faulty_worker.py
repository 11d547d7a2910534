"""The `worker` command with one fault in it, in the step that FAULT names, counted from the first job's first.

    FAULT=trap:20 python -m tests.gpu.faulty_worker run --model MODEL.gguf …

`trap:N` breaks the device for good at step N, by a kernel that traps. `oom:N` makes the driver refuse step N memory: a
job allocates nothing of its own, but what it launches may still find none.
"""

from __future__ import annotations

import os

from tests.gpu.child import break_the_device
from worker import cli
from worker.gpu.runner import GpuRunner
from worker.gpu.state import PinnedRing

MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation


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

    def call(self):
        """The step calls the driver."""
        if self._armed:
            from cupy.cuda import runtime

            self._armed = False
            raise runtime.CUDARuntimeError(MEMORY_ALLOCATION)


def install(fault):
    """Put the fault between the runner and its device."""
    run, upload = GpuRunner.run, PinnedRing.upload

    def faulty_run(runner, batch, requests, on_launched):
        fault.step()
        return run(runner, batch, requests, on_launched)

    def faulty_upload(ring, parts, target, stream):
        fault.call()
        upload(ring, parts, target, stream)

    GpuRunner.run, PinnedRing.upload = faulty_run, faulty_upload


if __name__ == "__main__":
    install(Fault(os.environ["FAULT"]))
    cli.main()
