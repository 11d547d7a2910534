"""The `worker` command with one fault, in the step that FAULT names.

    FAULT=trap:20 python -m tests.gpu.faulty_worker run --model MODEL.gguf …

`trap:N` breaks the device at step N with a kernel that traps. `oom:N` makes the driver report out
of memory in step N: a job allocates nothing itself, but its launches may still run out of memory.
"""

from __future__ import annotations

import os

from tests.gpu.child import break_the_device
from worker import cli
from worker.gpu.runner import GpuRunner
from worker.gpu.state import PinnedRing

MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation


class Fault:
    """One fault at one step."""

    def __init__(self, spec):
        self._kind, _, at = spec.partition(":")
        self._at, self._steps, self._armed = int(at), 0, False

    def step(self):
        """Begin a step."""
        self._steps += 1
        if self._steps != self._at:
            return
        if self._kind == "trap":
            break_the_device()
        self._armed = self._kind == "oom"

    def call(self):
        """Raise the armed fault at a driver call of the step."""
        if self._armed:
            from cupy.cuda import runtime

            self._armed = False
            raise runtime.CUDARuntimeError(MEMORY_ALLOCATION)


def install(fault):
    """Insert the fault between the runner and its device."""
    run, upload = GpuRunner.run, PinnedRing.upload

    def faulty_run(runner, chunks, on_launched):
        fault.step()
        return run(runner, chunks, on_launched)

    def faulty_upload(ring, arrays, target, stream):
        fault.call()
        upload(ring, arrays, target, stream)

    GpuRunner.run, PinnedRing.upload = faulty_run, faulty_upload


if __name__ == "__main__":
    install(Fault(os.environ["FAULT"]))
    cli.main()
