"""The part of CuPy that an upload uses, over host memory and synchronous."""

from __future__ import annotations

import ctypes
import threading
import weakref
from types import SimpleNamespace

import numpy as np

from worker.gpu.layouts import PLANES, plane_bytes
from worker.quants import QUANT_TYPES


class CudaFailure(Exception):
    """The runtime's error."""

    status = 719


class FakeCupy:
    """`cupy`: `copies` counts copies; the copy with number `fails_at` fails."""

    def __init__(self):
        self.copies = 0
        self.fails_at = None
        self.pinned = 0
        self._counting = threading.Lock()
        runtime = SimpleNamespace(memcpyAsync=self._copy, CUDARuntimeError=CudaFailure)
        self.cuda = SimpleNamespace(
            runtime=runtime,
            driver=SimpleNamespace(CUDADriverError=CudaFailure),
            memory=SimpleNamespace(OutOfMemoryError=MemoryError),
            Stream=_Stream,
            Event=_Event,
            Device=lambda: SimpleNamespace(use=lambda: None),
            PinnedMemory=self._pin,
            PinnedMemoryPointer=lambda memory, offset: memory,
        )

    def _pin(self, nbytes):
        self.pinned += nbytes
        return _Bytes(nbytes)

    def _copy(self, to, source, nbytes, kind, stream):
        with self._counting:
            self.copies += 1
            fails = self.copies == self.fails_at
        if fails:
            raise CudaFailure("cudaErrorLaunchFailure")
        ctypes.memmove(to, source, nbytes)


class _Bytes(bytearray):
    @property
    def ptr(self):
        return np.frombuffer(self, np.uint8).ctypes.data


class _Event:
    def __init__(self, disable_timing):
        pass

    def record(self, stream):
        pass

    def synchronize(self):
        pass


class _Stream:
    ptr = 0

    def __init__(self, non_blocking):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        pass

    def synchronize(self):
        pass


class FakeArray:
    """Bytes of a plane or values of a vector, poisoned."""

    def __init__(self, shape, dtype):
        self.host = np.full(shape, 0xAA, np.uint8).view() if dtype == np.uint8 else np.full(shape, np.nan, dtype)
        self.data = SimpleNamespace(ptr=self.host.ctypes.data)


class FakePool:
    """`Pool` without a limit; `alive` counts referenced arrays."""

    def __init__(self):
        self.alive = 0

    def empty(self, shape, dtype=np.float32):
        array = FakeArray(shape, dtype)
        self.alive += 1
        weakref.finalize(array, self._died)
        return array

    def _died(self):
        self.alive -= 1


class FakeMemory:
    """`DeviceMemory` that counts the reserved bytes in `held`."""

    def __init__(self):
        self.held = 0

    def reserve(self, nbytes, purpose):
        self.held += nbytes
        memory = self

        class Slab:
            def __init__(self):
                self.bytes = np.zeros(nbytes, np.uint8)
                self.address = self.bytes.ctypes.data

            def __del__(self):
                memory.held -= nbytes

        return Slab()


def cut(kind, blocks):
    """Split blocks into four arrays of the planes' sizes (not a real layout)."""
    rows = blocks.reshape(-1, kind.block_bytes)
    ends = np.cumsum(plane_bytes(kind, kind.block_size)).tolist()
    return [rows[:, start:end].reshape(-1) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


class FakeKernels:
    """`Kernels` whose repack splits blocks as `cut` does."""

    def get(self, file, expression):
        kind = next(kind for kind in QUANT_TYPES if expression == f"repack<{kind.name}>")

        def repack(grid, block, args):
            address, codebook, to, units = args
            assert codebook == 0
            assert to.dtype == PLANES
            assert grid[0] * block[0] >= units
            size = int(units) * 32 // kind.block_size * kind.block_bytes
            source = np.frombuffer((ctypes.c_uint8 * size).from_address(int(address)), np.uint8)
            for target, plane in zip(to.item(), cut(kind, source), strict=True):
                if plane.size:
                    ctypes.memmove(target, plane.tobytes(), plane.size)

        return repack
