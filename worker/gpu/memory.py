"""Device memory by purpose: every allocation of this process goes through `DeviceMemory`.

Memory comes from plain cudaMalloc in large slabs. A `Pool` divides one slab into arrays at 256-byte
offsets and reuses each range when the last view of its array dies. First fit and reference counts
give a forward the same addresses every time, so it can be captured as a CUDA graph, and a step
allocates nothing. All uses of a pool are on one stream, which orders the old use of a range before
the new one. Next: `upload.py`, `runner.py`.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from worker.errors import VramOom

DeviceArray: TypeAlias = Any
"""A `cupy.ndarray`."""

ALIGNMENT = 256
_DEVICE_TYPE = 2  # cudaMemoryTypeDevice: neither host nor managed memory


class Purpose(Enum):
    """The purpose of an allocation, as VRAM events and metrics name it."""

    WEIGHTS = "weights"
    KV = "kv"
    ACTIVATIONS = "activations"
    WORKSPACE = "workspace"


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class FreeList:
    """Free ranges (offset, size) of a slab, ascending, neighbours merged; first fit."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranges: list[tuple[int, int]] = [(0, size)] if size else []

    @property
    def free(self) -> int:
        """Bytes in all free ranges."""
        return sum(size for _, size in self._ranges)

    def allocate(self, size: int) -> int | None:
        """The offset of `size` bytes in the first range that holds them, or None."""
        for index, (offset, available) in enumerate(self._ranges):
            if available >= size:
                rest = [(offset + size, available - size)] if available > size else []
                self._ranges[index : index + 1] = rest
                return offset
        return None

    def release(self, offset: int, size: int) -> None:
        """Free `size` bytes that `allocate` returned at `offset`."""
        at = bisect_left(self._ranges, (offset, 0))
        end = offset + size
        if at < len(self._ranges) and self._ranges[at][0] == end:
            end += self._ranges.pop(at)[1]
        if at and sum(self._ranges[at - 1]) == offset:
            at -= 1
            offset = self._ranges.pop(at)[0]
        self._ranges.insert(at, (offset, end - offset))


class _Owner:
    """Keeps `memory` alive for the arrays over it; calls `release` after the last one."""

    def __init__(self, memory: Any, release: Callable[[], None]) -> None:
        self._memory = memory
        self._release = release

    def __del__(self) -> None:
        self._release()


class Slab:
    """One allocation; it is freed when neither the slab nor an array over it is left."""

    def __init__(self, cupy: ModuleType, owner: _Owner, address: int, nbytes: int) -> None:
        self._cupy = cupy
        self._owner = owner
        self._device = cupy.cuda.Device().id
        self.nbytes = nbytes
        self.address = address
        """Address of the first byte on the device."""

    def array(self, shape: tuple[int, ...], dtype: Any, offset: int = 0, owner: Any = None) -> DeviceArray:
        """An array over the slab's bytes from `offset` on; all views of it keep `owner` alive."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        cuda = self._cupy.cuda
        memory = cuda.UnownedMemory(self.address + offset, size, owner or self._owner, self._device)
        return self._cupy.ndarray(shape, dtype, memptr=cuda.MemoryPointer(memory, 0))


class DeviceMemory:
    """The device memory of this process.

    `fails` is for tests: it is called with the number of each allocation, from 1, including those
    of pools, and returns whether the allocation fails.
    """

    def __init__(self, fails: Callable[[int], bool] | None = None) -> None:
        import cupy  # noqa: PLC0415  (launchers are imported, and kernels compiled, without CuPy)

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
        """Bytes free on the device, for all processes."""
        return int(self._cupy.cuda.runtime.memGetInfo()[0])

    def reserve(self, nbytes: int, purpose: Purpose) -> Slab:
        """Allocate `nbytes` of device memory, rounded up to ALIGNMENT. Raises: VramOom."""
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

        return Slab(self._cupy, _Owner(memory, release), address, nbytes)

    def count(self, nbytes: int, purpose: Purpose) -> None:
        """Count an allocation of `nbytes`. Raises: VramOom if `fails` returns true for it."""
        self._allocations += 1
        if self._fails is not None and self._fails(self._allocations):
            raise _oom(nbytes, 0, purpose)

    @property
    def slabs(self) -> int:
        """The number of live slabs."""
        return len(self._live)

    def non_resident(self) -> list[int]:
        """Addresses of slabs that are not plain device memory: a check that must return none."""
        attributes = self._cupy.cuda.runtime.pointerGetAttributes
        return [address for address in self._live if attributes(address).type != _DEVICE_TYPE]


class Pool:
    """Arrays of one slab; a range is reused when its array and all views of it have died."""

    def __init__(self, memory: DeviceMemory, nbytes: int, purpose: Purpose) -> None:
        self._memory = memory
        self._purpose = purpose
        self._slab = memory.reserve(nbytes, purpose)
        self._free_list = FreeList(self._slab.nbytes)
        self.peak = 0
        """The largest extent in use so far in bytes, fragmentation included."""

    @property
    def nbytes(self) -> int:
        """Bytes of the slab."""
        return self._slab.nbytes

    @property
    def in_use(self) -> int:
        """Bytes of live arrays."""
        return self._slab.nbytes - self._free_list.free

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> DeviceArray:
        """An uninitialized array [shape] at a multiple of ALIGNMENT. Raises: VramOom."""
        shape = (shape,) if isinstance(shape, int) else shape
        size = aligned(max(1, math.prod(shape) * np.dtype(dtype).itemsize))
        self._memory.count(size, self._purpose)
        offset = self._free_list.allocate(size)
        if offset is None:
            raise _oom(size, self._free_list.free, self._purpose)
        self.peak = max(self.peak, offset + size)
        owner = _Owner(self._slab, lambda: self._free_list.release(offset, size))
        return self._slab.array(shape, dtype, offset, owner)


def _oom(nbytes: int, free: int, purpose: Purpose) -> VramOom:
    details = {"required": nbytes, "available": free, "purpose": purpose.value}
    return VramOom(f"cannot allocate {nbytes:,} bytes of device memory for {purpose.value}: {free:,} are free", details)
