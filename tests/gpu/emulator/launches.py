"""A kernel's library as `cupy.RawModule`: checked launches, run at once or recorded by a capture.

Knows no kernel. Next: `fibers.h`, where the threads of a launch run.
"""

from __future__ import annotations

import ctypes
import math
import threading

import numpy as np

ORDINARY_SHARED, MOST_SHARED = 48 << 10, 227 << 10
MOST_THREADS, MOST_BLOCKS_BEYOND_X = 1024, 65535
_MOST_PARAMETERS = 64


class Device(threading.local):
    """Runs the work of a stream at once, or records it while the thread captures a graph."""

    one_at_a_time = threading.Lock()  # uploads launch from several threads, and fibers have one scheduler

    def __init__(self):
        self.captures = []

    def do(self, work):
        if self.captures:
            self.captures[-1].append(work)
            return
        with self.one_at_a_time:
            work()


class LaunchError(Exception):
    """`cupy.cuda.driver.CUDADriverError`."""

    status = 719


class HostModule:
    """`cupy.RawModule`."""

    def __init__(self, device, path):
        self._device, self._library = device, ctypes.CDLL(path)

    def get_function(self, symbol):
        return HostKernel(self._device, self._library, symbol)


class HostKernel:
    """`cupy.RawKernel`: rejects calls that the driver would reject, and arguments of wrong size."""

    def __init__(self, device, library, name):
        self._device, self._name, self._run = device, name, library.run
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        sizes = (ctypes.c_uint * _MOST_PARAMETERS)()
        self._sizes = sizes[: library.parameter_sizes(sizes)]
        self.max_dynamic_shared_size_bytes = ORDINARY_SHARED
        self.shared_size_bytes = 0  # static shared memory is not measured here

    def __call__(self, grid, block, args, *, shared_mem=0):
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        self._check(grid, block, shared_mem)
        values = [_value(arg).copy() for arg in args]
        if [value.nbytes for value in values] != self._sizes:
            raise LaunchError(f"{self._name}: parameters of {self._sizes} bytes, got {[v.nbytes for v in values]}")
        shape = np.array([*grid, *block], np.uint32)
        pointers = np.array([value.ctypes.data for value in values], np.uint64)

        def work():
            assert len(values) == len(pointers)  # they live as long as this does
            stuck = self._run(shape.ctypes.data, shared_mem, pointers.ctypes.data)
            if stuck:
                raise LaunchError(f"{self._name}: {stuck} threads wait for others that are gone")

        self._device.do(work)

    def _check(self, grid, block, shared_mem):
        if min(*grid, *block) < 1 or math.prod(block) > MOST_THREADS or max(grid[1:]) > MOST_BLOCKS_BEYOND_X:
            raise LaunchError(f"{self._name}: no grid {grid} of blocks {block} can be launched")
        if shared_mem > min(self.max_dynamic_shared_size_bytes, MOST_SHARED):
            raise LaunchError(f"{self._name}: {shared_mem} bytes of shared memory")


def _value(arg):
    """The bytes of an argument."""
    if arg is None:
        return np.zeros((), np.uint64)
    if hasattr(arg, "device_address"):
        return np.array(arg.device_address, np.uint64)
    return np.asarray(arg)
