"""A file's tensors on their way to VRAM: mapped pages → pinned chunks → asynchronous copies → planes.

The host copies a chunk into one of two pinned buffers while the other is on its way; on the device a kernel takes each
chunk of blocks apart (`kernels/repack.cu`). What is allocated is bounded whatever the file's size, and given back by
`close`. Knows no architecture. Next: `layouts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from worker.gguf_file import GgufFile, TensorInfo
from worker.gpu.compiler import KernelName, Kernels
from worker.gpu.launch import Allocator
from worker.gpu.layouts import PLANES, BlockMatrix, address, is_vector, plane_bytes
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose
from worker.ops import QTensor
from worker.quants import QUANT_TYPES, Bytes, QuantType, dequantize

CHUNK = 16 << 20
_THREADS = 256
_SUPER = 256
_HOST_TO_DEVICE = 1
INSTANTIATIONS: tuple[KernelName, ...] = tuple(
    ("repack.cu", f"repack<{kind.name}>") for kind in QUANT_TYPES if kind.block_size > 1
)


class Upload:
    """An upload for `worker.adapters.weights.Weights`: tensors of `file` into arrays of `pool`.

    `on_bytes` hears the file bytes of each chunk that is under way. Weights are there once `close` has returned.
    """

    def __init__(
        self,
        file: GgufFile,
        kernels: Kernels,
        memory: DeviceMemory,
        pool: Allocator,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        import cupy  # noqa: PLC0415

        self._cuda = cupy.cuda
        self._file = file
        self._kernels = kernels
        self._pool = pool
        self._on_bytes = on_bytes
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._buffers = [_PinnedBuffer(cupy.cuda) for _ in range(2)]
        self._staging = memory.reserve(CHUNK, Purpose.WORKSPACE)

    def __call__(self, info: TensorInfo) -> QTensor:
        """Start the tensor's way to the device. Raises VramOom."""
        data = self._vector(info) if is_vector(info) else self._matrix(info)
        return QTensor(info.name, info.shape, info.kind, data)

    def close(self) -> None:
        """Wait for everything and give the buffers back."""
        self._stream.synchronize()
        self._buffers.clear()
        del self._staging

    def _vector(self, info: TensorInfo) -> DeviceArray:
        values = dequantize(self._file.data(info), info.kind).reshape(info.shape)
        array = self._pool.empty(info.shape, np.float32)
        host = values.reshape(-1).view(np.uint8)
        for start in range(0, host.size, CHUNK):
            self._copy(host[start : start + CHUNK], address(array) + start)
        self._on_bytes(info.nbytes)
        return array

    def _matrix(self, info: TensorInfo) -> BlockMatrix:
        sizes = plane_bytes(info.kind, info.shape[-1])
        planes = tuple(self._pool.empty((*info.shape[:-1], size), np.uint8) if size else None for size in sizes)
        matrix = BlockMatrix(info.kind, planes)
        blocks = self._file.data(info).reshape(-1)
        step = _chunk_elements(info.kind)
        for start in range(0, math.prod(info.shape), step):
            chunk = blocks[info.kind.row_bytes(start) : info.kind.row_bytes(start + step)]
            offsets = plane_bytes(info.kind, start)
            to = tuple(at and at + offset for at, offset in zip(matrix.addresses(), offsets, strict=True))
            self._blocks(info.kind, chunk, to)
            self._on_bytes(chunk.size)
        return matrix

    def _blocks(self, kind: QuantType, chunk: Bytes, to: tuple[int, ...]) -> None:
        if kind.block_size == 1:
            self._copy(chunk, to[0])
            return
        self._copy(chunk, self._staging.address)
        units = chunk.size // kind.block_bytes * (kind.block_size // 32)
        args = (np.uint64(self._staging.address), np.array(to, PLANES), np.uint32(units))
        with self._stream:
            self._kernels.get("repack.cu", f"repack<{kind.name}>")((-(-units // _THREADS),), (_THREADS,), args)

    def _copy(self, chunk: Bytes, to: int) -> None:
        """Copy at most CHUNK bytes to the device address `to`, in the order of the stream."""
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        buffer.send(chunk, to, self._stream)


class _PinnedBuffer:
    """Page-locked host memory that the device copies from by itself."""

    def __init__(self, cuda: Any) -> None:
        self._runtime = cuda.runtime
        self._memory = cuda.PinnedMemoryPointer(cuda.PinnedMemory(CHUNK), 0)
        self._host = np.frombuffer(self._memory, np.uint8, CHUNK)
        self._sent = cuda.Event(disable_timing=True)

    def send(self, chunk: Bytes, to: int, stream: Any) -> None:
        """Wait until the last chunk has left, then start this one's copy."""
        self._sent.synchronize()
        self._host[: chunk.size] = chunk
        self._runtime.memcpyAsync(to, self._memory.ptr, chunk.size, _HOST_TO_DEVICE, stream.ptr)
        self._sent.record(stream)


def _chunk_elements(kind: QuantType) -> int:
    """The most elements, a multiple of 256, whose blocks fill no more than CHUNK bytes."""
    return CHUNK // kind.row_bytes(_SUPER) * _SUPER
