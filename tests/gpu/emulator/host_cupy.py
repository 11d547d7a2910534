"""The part of CuPy that the runner and the tests use, over host memory; kernels come from g++.

Fresh device memory is NaNs and -1s, as the guarded pool has it. Streams are one: work is done when
it is asked for, or noted while a stream captures. Only launches and `memcpyAsync` are noted; an
array's own methods act at once, which a card in capture would refuse. Next: `launches.py`,
`compiler.py`.
"""

from __future__ import annotations

import ctypes
import math
import time
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np

from tests.gpu.emulator.compiler import GxxNvrtc, fibers
from tests.gpu.emulator.launches import MOST_SHARED, Device, HostModule, LaunchError

ALIGNMENT, POISON = 256, 0xFF
FREE, TOTAL = 64 << 30, 80 << 30
_DEVICE_TYPE = 2  # cudaMemoryTypeDevice


class RuntimeFailure(Exception):
    """`cupy.cuda.runtime.CUDARuntimeError`."""

    status = 719


class OutOfMemory(Exception):
    """`cupy.cuda.memory.OutOfMemoryError`."""

    status = 2


class HostMemory:
    """`cupy.cuda.Memory`."""

    def __init__(self, nbytes):
        if nbytes > FREE:
            raise OutOfMemory(f"{nbytes} bytes")
        self._bytes = np.full(nbytes + ALIGNMENT, POISON, np.uint8)
        self.ptr = -(-self._bytes.ctypes.data // ALIGNMENT) * ALIGNMENT


class BorrowedMemory:
    """`cupy.cuda.UnownedMemory`."""

    def __init__(self, ptr, size, owner, device_id=0):
        self.ptr, self.owner = ptr, owner


class Pointer:
    """`cupy.cuda.MemoryPointer`: an address and a reference to its memory."""

    def __init__(self, mem, offset=0):
        self.mem, self._offset = mem, offset

    @property
    def ptr(self):
        return self.mem.ptr + self._offset

    def __add__(self, offset):
        return Pointer(self.mem, self._offset + offset)


class HostArray(np.ndarray):
    """`cupy.ndarray`."""

    def __new__(cls, shape, dtype=np.float32, memptr=None):
        dtype, shape = np.dtype(dtype), (shape,) if isinstance(shape, int) else tuple(shape)
        size = math.prod(shape) * dtype.itemsize
        memptr = memptr or Pointer(HostMemory(size))
        array = np.frombuffer(_bytes_at(memptr.ptr, size), np.uint8, size).view(dtype).reshape(shape).view(cls)
        array._keep = memptr
        return array

    def __array_finalize__(self, source):
        self._keep = getattr(source, "_keep", None)

    @property
    def device_address(self):
        return self.ctypes.data

    @property
    def data(self):
        return Pointer(BorrowedMemory(self.device_address, self.nbytes, self._keep))

    def get(self, stream=None, out=None):
        if out is None:
            return np.array(self)
        out[...] = self
        return out

    def set(self, values):
        self[...] = values


class Stream:
    """`cupy.cuda.Stream`."""

    ptr = 0

    def __init__(self, device, non_blocking=True):
        self._device = device

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        pass

    def synchronize(self):
        pass

    def begin_capture(self):
        self._device.captures.append([])

    def end_capture(self):
        return Graph(self._device, self._device.captures.pop())


class Graph:
    """`cupy.cuda.Graph`."""

    def __init__(self, device, works):
        self._device, self._works = device, works

    def launch(self, stream=None):
        for work in self._works:
            self._device.do(work)

    def upload(self, stream=None):
        pass


class Event:
    """`cupy.cuda.Event`."""

    def __init__(self, disable_timing=False):
        self.at = math.nan

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass


def installed(cache, *, backwards=False):
    """`cupy` and `cupy.cuda` of a device with one multiprocessor, so grid barriers meet one block."""
    fibers(cache).run_backwards(backwards)
    device = Device()
    cuda = _module("cupy.cuda", **_cuda(device))
    names = {
        "emulated": True,
        "cuda": cuda,
        "ndarray": HostArray,
        "RawModule": partial(HostModule, device),
        "full": _full,
        "zeros": lambda shape, dtype=np.float32: _full(shape, 0, dtype),
        "asarray": lambda values: _full(np.shape(values), values, np.asarray(values).dtype),
        "asnumpy": np.array,
        "get_default_memory_pool": lambda: SimpleNamespace(free_all_blocks=lambda: None),
    }
    bindings = _module("cuda.bindings", driver=_driver())
    return {
        "cupy": _module("cupy", **names),
        "cupy.cuda": cuda,
        "cuda": _module("cuda", bindings=bindings),
        "cuda.bindings": bindings,
        "cuda.bindings.driver": bindings.driver,
    }


def _driver():
    """`cuda.bindings.driver`: tensor maps of f16 matrices, as `ptx_copy_box` of ptx.h reads them."""

    def encode(dtype, rank, address, sizes, strides, box, *options):
        opaque = [address, *sizes, *box]
        return 0, SimpleNamespace(opaque=opaque + [0] * (16 - len(opaque)))

    names = ("DataType", "Interleave", "Swizzle", "L2promotion", "FloatOOBfill")
    enums = {f"CUtensorMap{name}": _AnyName() for name in names}
    success = SimpleNamespace(CUDA_SUCCESS=0)
    return _module(
        "cuda.bindings.driver", cuTensorMapEncodeTiled=encode, CUresult=success, cuuint64_t=int, cuuint32_t=int, **enums
    )


class _AnyName:
    """An enumeration whose values do not matter."""

    def __getattr__(self, name):
        return name


def _cuda(device):
    properties = {"MultiProcessorCount": 1, "MaxSharedMemoryPerBlockOptin": MOST_SHARED}
    card = SimpleNamespace(id=0, attributes=properties, compute_capability="80", use=lambda: None)
    return {
        "Memory": HostMemory,
        "UnownedMemory": BorrowedMemory,
        "MemoryPointer": Pointer,
        "PinnedMemory": _PinnedMemory,
        "PinnedMemoryPointer": lambda memory, offset: memory.buffer,
        "alloc_pinned_memory": lambda nbytes: _PinnedMemory(nbytes).buffer,
        "Stream": partial(Stream, device),
        "Event": Event,
        "get_elapsed_time": lambda start, end: 1e3 * (end.at - start.at),
        "Device": lambda *_: card,
        "get_current_stream": partial(Stream, device),
        "runtime": _runtime(device),
        "memory": SimpleNamespace(OutOfMemoryError=OutOfMemory),
        "driver": SimpleNamespace(CUDADriverError=LaunchError),
        "nvrtc": GxxNvrtc(),
    }


def _runtime(device):
    def copy(to, source, nbytes, kind, stream):
        device.do(lambda: ctypes.memmove(to, source, nbytes))

    def copy_rows(to, pitch, source, source_pitch, width, rows, kind, stream):
        for row in range(rows):
            copy(to + row * pitch, source + row * source_pitch, width, kind, stream)

    return SimpleNamespace(
        memcpyAsync=copy,
        memcpy2DAsync=copy_rows,
        CUDARuntimeError=RuntimeFailure,
        memGetInfo=lambda: (FREE, TOTAL),
        getDeviceCount=lambda: 1,
        getDeviceProperties=lambda _: {"name": b"emulator"},
        pointerGetAttributes=lambda _: SimpleNamespace(type=_DEVICE_TYPE),
        deviceSynchronize=lambda: None,
    )


class _PinnedMemory(HostMemory):
    """`cupy.cuda.PinnedMemory`; `buffer` stands for its pointer: bytes with an address."""

    def __init__(self, nbytes):
        super().__init__(nbytes)
        self.buffer = _bytes_at(self.ptr, nbytes)
        self.buffer.ptr, self.buffer.keep = self.ptr, self._bytes


def _bytes_at(address, size):
    return (ctypes.c_uint8 * max(1, size)).from_address(address)


def _full(shape, value, dtype=None):
    array = HostArray(shape, dtype or np.asarray(value).dtype)
    array[...] = value
    return array


def _module(name, **names):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # required by `importlib.util.find_spec`
    vars(module).update(names)
    return module
