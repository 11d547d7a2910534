"""Device memory, accounted by purpose: every byte that the worker takes goes through one `DeviceMemory`.

Plain cudaMalloc in large slabs; a `Pool` cuts one slab into arrays at 256-byte offsets and takes each back when the
last view of it dies. First fit and reference counts make a forward in plain Python meet the same addresses every time,
so it can be captured in a CUDA graph and a step allocates nothing. Work on one stream orders a block's old use before
its new one. Knows no model. Next: `free_list.py`, `upload.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from worker.errors import VramOom
from worker.gpu.free_list import FreeList

DeviceArray: TypeAlias = Any
"""A `cupy.ndarray`."""

ALIGNMENT = 256
_DEVICE_TYPE = 2  # cudaMemoryTypeDevice: neither host, nor managed


class Purpose(Enum):
    """What memory is for, as VRAM events and metrics name it."""

    WEIGHTS = "weights"
    KV = "kv"
    ACTIVATIONS = "activations"
    WORKSPACE = "workspace"


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class _Lease:
    """The owner of a piece of memory: says so when the last array over it dies."""

    def __init__(self, keep: Any, release: Callable[[], None]) -> None:
        self._keep = keep
        self._release = release

    def __del__(self) -> None:
        self._release()


class Slab:
    """One plain allocation. It is freed when neither the slab nor an array over it is left."""

    def __init__(self, cupy: ModuleType, memory: Any, nbytes: int) -> None:
        self._cupy = cupy
        self._memory = memory
        self._device = cupy.cuda.Device().id
        self.nbytes = nbytes
        self.address = int(memory.ptr)
        """Its first byte on the device."""

    def array(self, shape: tuple[int, ...], dtype: Any, offset: int = 0, owner: Any = None) -> DeviceArray:
        """An array over the slab's bytes from `offset` on; `owner` lives as long as any view of it does."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        cuda = self._cupy.cuda
        piece = cuda.UnownedMemory(self.address + offset, size, owner or self._memory, self._device)
        return self._cupy.ndarray(shape, dtype, memptr=cuda.MemoryPointer(piece, 0))


class DeviceMemory:
    """The device's memory as this process uses it.

    `fails` is for tests: it hears the number of each allocation, from 1, pools' included, and makes those fail for
    which it says so.
    """

    def __init__(self, fails: Callable[[int], bool] | None = None) -> None:
        import cupy  # noqa: PLC0415  (launchers are imported, and their kernels compiled, where there is no CuPy)

        self._cupy: ModuleType = cupy
        self._fails = fails
        self._allocations = 0
        self._used = dict.fromkeys(Purpose, 0)
        self._live: dict[int, int] = {}

    @property
    def used(self) -> dict[Purpose, int]:
        """Bytes allocated by purpose, whole slabs."""
        return dict(self._used)

    @property
    def free(self) -> int:
        """Bytes that the driver still has for anyone."""
        return int(self._cupy.cuda.runtime.memGetInfo()[0])

    def reserve(self, nbytes: int, purpose: Purpose) -> Slab:
        """Allocate `nbytes` of plain device memory, rounded up to ALIGNMENT. Raises VramOom."""
        nbytes = aligned(nbytes)
        self.count(nbytes, purpose)
        cuda = self._cupy.cuda
        try:
            memory = cuda.Memory(nbytes)
        except (cuda.runtime.CUDARuntimeError, cuda.memory.OutOfMemoryError) as error:
            raise _oom(nbytes, self.free, purpose) from error
        address = int(memory.ptr)
        self._used[purpose] += nbytes
        self._live[address] = nbytes

        def release() -> None:
            self._used[purpose] -= nbytes
            del self._live[address]

        return Slab(self._cupy, _Held(memory, release), nbytes)

    def count(self, nbytes: int, purpose: Purpose) -> None:
        """Number an allocation; VramOom where the test's hook wants it to fail."""
        self._allocations += 1
        if self._fails is not None and self._fails(self._allocations):
            raise _oom(nbytes, 0, purpose)

    @property
    def slabs(self) -> int:
        """Allocations that are alive."""
        return len(self._live)

    def not_resident(self) -> list[int]:
        """Addresses of slabs that are no longer plain device memory: always none, unless something is broken."""
        attributes = self._cupy.cuda.runtime.pointerGetAttributes
        return [address for address in self._live if attributes(address).type != _DEVICE_TYPE]


class _Held:
    """A cudaMalloc and the accounting of it, which end together."""

    def __init__(self, memory: Any, release: Callable[[], None]) -> None:
        self.ptr = memory.ptr
        self._lease = _Lease(memory, release)


class Pool:
    """A slab that hands out arrays and takes them back: `empty` is all that an op needs."""

    def __init__(self, memory: DeviceMemory, nbytes: int, purpose: Purpose) -> None:
        self._memory = memory
        self._purpose = purpose
        self._slab = memory.reserve(nbytes, purpose)
        self._holes = FreeList(self._slab.nbytes)
        self.peak = 0
        """The most bytes that were ever needed, fragmentation included."""

    @property
    def nbytes(self) -> int:
        """Bytes of the slab."""
        return self._slab.nbytes

    @property
    def in_use(self) -> int:
        """Bytes handed out."""
        return self._slab.nbytes - self._holes.free

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> DeviceArray:
        """An array [shape] of whatever the memory holds, at a multiple of ALIGNMENT. Raises VramOom."""
        shape = (shape,) if isinstance(shape, int) else shape
        size = aligned(max(1, math.prod(shape) * np.dtype(dtype).itemsize))
        self._memory.count(size, self._purpose)
        offset = self._holes.take(size)
        if offset is None:
            raise _oom(size, self._holes.free, self._purpose)
        self.peak = max(self.peak, offset + size)
        lease = _Lease(self._slab, lambda: self._holes.give(offset, size))
        return self._slab.array(shape, dtype, offset, lease)


def _oom(nbytes: int, free: int, purpose: Purpose) -> VramOom:
    details = {"required": nbytes, "available": free, "purpose": purpose.value}
    return VramOom(f"no {nbytes:,} bytes of device memory for {purpose.value}; {free:,} are free", details)
