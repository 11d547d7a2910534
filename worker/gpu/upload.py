"""A file's tensors on their way to VRAM: mapped pages → pinned chunks → asynchronous copies → planes.

A few threads copy chunks side by side, because one reads the page cache at a quarter of what it gives; each has a lane
of its own: two pinned buffers, a stream, and a place on the device where a kernel takes a chunk of blocks apart
(`kernels/repack.cu`). So reading, copying and taking apart overlap, and so does whatever the caller does until `close`.
What is allocated is bounded whatever the file's size. Knows no architecture. Next: `layouts.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np

from worker.errors import CudaError, VramOom
from worker.gguf_file import GgufFile, TensorInfo
from worker.gpu.compiler import KernelName, Kernels
from worker.gpu.graphs import device_errors
from worker.gpu.launch import Allocator
from worker.gpu.layouts import PLANES, BlockMatrix, address, is_vector, plane_bytes
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose, Slab
from worker.ops import QTensor
from worker.quants import QUANT_TYPES, Bytes, QuantType, dequantize

CHUNK = 8 << 20
LANES = 6  # more read no faster: H100 host, 16 cores, 25 GB/s of the 29 that its page cache gives to readers alone
_THREADS = 256
_SUPER = 256
_HOST_TO_DEVICE = 1
INSTANTIATIONS: tuple[KernelName, ...] = tuple(
    ("repack.cu", f"repack<{kind.name}>") for kind in QUANT_TYPES if kind.block_size > 1
)


class Upload:
    """An upload for `worker.adapters.weights.Weights`: tensors of `file` into arrays of `pool`.

    Arrays are handed out at once and filled meanwhile: weights are there once `close` has returned, and until then
    whatever is dropped stays taken. `on_bytes` hears the file bytes of each chunk that is under way, one call at a
    time, from any thread.
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

        self._file = file
        self._kernels = kernels
        self._pool = pool
        self._on_bytes = on_bytes
        self._one_at_a_time = Lock()
        count = min(LANES, os.cpu_count() or 1)
        self._staging: Slab | None = memory.reserve(count * CHUNK, Purpose.WORKSPACE)
        self._lanes = [_Lane(cupy.cuda, self._staging.address + lane * CHUNK) for lane in range(count)]
        self._idle = list(self._lanes)
        self._threads = ThreadPoolExecutor(count, "upload", cupy.cuda.Device().use)
        self._under_way: list[Future[None]] = []
        self._targets: list[QTensor] = []

    def __call__(self, info: TensorInfo) -> QTensor:
        """Start the tensor's way to the device. Raises VramOom."""
        data = self._vector(info) if is_vector(info) else self._matrix(info)
        tensor = QTensor(info.name, info.shape, info.kind, data)
        self._targets.append(tensor)  # nobody else gets its memory while bytes are on their way there
        return tensor

    def close(self) -> None:
        """Wait for everything and give the buffers back. Raises CudaError or VramOom where a chunk did not arrive."""
        try:
            for sent in self._under_way:
                sent.result()
            with device_errors():
                for lane in self._lanes:
                    lane.stream.synchronize()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Send nothing more, and give the buffers back as soon as nobody uses them; harmless after `close`."""
        self._threads.shutdown(cancel_futures=True)
        for lane in self._lanes:
            with suppress(CudaError, VramOom), device_errors():
                lane.stream.synchronize()
        self._under_way.clear()
        self._targets.clear()
        self._idle.clear()
        self._lanes.clear()
        self._staging = None

    def _vector(self, info: TensorInfo) -> DeviceArray:
        values = dequantize(self._file.data(info), info.kind).reshape(info.shape)
        array = self._pool.empty(info.shape, np.float32)
        host, to = values.reshape(-1).view(np.uint8), address(array)

        def send(lane: _Lane) -> None:
            for start in range(0, host.size, CHUNK):
                lane.copy(host[start : start + CHUNK], to + start)

        self._start(send, info.nbytes)
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
            self._start(self._blocks(info.kind, chunk, to), chunk.size)
        return matrix

    def _blocks(self, kind: QuantType, chunk: Bytes, to: tuple[int, ...]) -> Callable[[_Lane], None]:
        if kind.block_size == 1:
            return lambda lane: lane.copy(chunk, to[0])
        units = chunk.size // kind.block_bytes * (kind.block_size // 32)
        repack = self._kernels.get("repack.cu", f"repack<{kind.name}>")  # here: compiling is not for many threads

        def send(lane: _Lane) -> None:
            lane.copy(chunk, lane.staging)
            with lane.stream:
                args = (np.uint64(lane.staging), np.array(to, PLANES), np.uint32(units))
                repack((-(-units // _THREADS),), (_THREADS,), args)

        return send

    def _start(self, send: Callable[[_Lane], None], nbytes: int) -> None:
        self._under_way.append(self._threads.submit(self._run, send, nbytes))

    def _run(self, send: Callable[[_Lane], None], nbytes: int) -> None:
        """On one of the threads, of which there are as many as lanes."""
        lane = self._idle.pop()
        try:
            with device_errors():
                send(lane)
        finally:
            self._idle.append(lane)
        with self._one_at_a_time:
            self._on_bytes(nbytes)


class _Lane:
    """A stream, `staging` on the device for one chunk, and two pinned buffers, each allocated when it is first needed.

    Pinned memory costs 0.6 ms a MiB: a small model is through before most lanes have any.
    """

    def __init__(self, cuda: Any, staging: int) -> None:
        self.stream = cuda.Stream(non_blocking=True)
        self.staging = staging
        self._cuda = cuda
        self._buffers: list[_PinnedBuffer] = []

    def copy(self, chunk: Bytes, to: int) -> None:
        """Copy at most CHUNK bytes to the device address `to`, in the order of the stream."""
        buffer = self._buffers.pop(0) if len(self._buffers) == 2 else _PinnedBuffer(self._cuda)
        self._buffers.append(buffer)
        buffer.send(chunk, to, self.stream)


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
        np.copyto(self._host[: chunk.size], chunk)
        self._runtime.memcpyAsync(to, self._memory.ptr, chunk.size, _HOST_TO_DEVICE, stream.ptr)
        self._sent.record(stream)


def _chunk_elements(kind: QuantType) -> int:
    """The most elements, a multiple of 256, whose blocks fill no more than CHUNK bytes."""
    return CHUNK // kind.row_bytes(_SUPER) * _SUPER
