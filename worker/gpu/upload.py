"""A file's tensors on their way to VRAM: mapped pages → pinned chunks → asynchronous copies → planes.

A few threads copy chunks side by side, because one reads the page cache at a quarter of what it gives; each has a lane
of its own: two pinned buffers, a stream, and a place on the device where a kernel takes a chunk of blocks apart
(`kernels/repack.cu`). So reading, copying and taking apart overlap, and so does whatever the caller does until `close`.
What is allocated is bounded whatever the file's size. Knows no architecture. Next: `layouts.py`.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from worker.errors import CudaError, VramOom
from worker.gguf_file import GgufFile, TensorInfo
from worker.gpu.compiler import KernelName, Kernels
from worker.gpu.kernel import device_errors
from worker.gpu.launch import Allocator
from worker.gpu.layouts import PLANES, BlockMatrix, address, is_vector, plane_bytes
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose, Slab, aligned
from worker.ops import QTensor
from worker.quants import QUANT_TYPES, Bytes, Floats, QuantType, dequantize

CHUNK = 8 << 20  # a multiple of ALIGNMENT, as its pieces begin at some
LANES = 6  # more read no faster: H100 host, 16 cores, 25 GB/s of the 29 that its page cache gives to readers alone
_THREADS = 256
_SUPER = 256
_A_LANE_MORE = 512 << 20  # bytes of a file
_HOST_TO_DEVICE, _ON_DEVICE = 1, 3
INSTANTIATIONS: tuple[KernelName, ...] = tuple(
    ("repack.cu", f"repack<{kind.name}>") for kind in QUANT_TYPES if kind.block_size > 1
)


class _Piece(NamedTuple):
    """Bytes of the file, and what takes them apart when they are on the device: it hears where, and on which stream."""

    host: Bytes
    unpack: Callable[[int, Any], None]


class Upload:
    """An upload for `worker.adapters.weights.Weights`: tensors of `file` into arrays of `pool`.

    Arrays are handed out at once and filled meanwhile: weights are there once `close` has returned, and until then
    whatever is dropped stays taken. `on_bytes` hears the file bytes of each chunk that is under way, one call at a
    time, from any thread. `expected` is how many bytes will be asked for, if known: after them lanes end by themselves.
    """

    def __init__(
        self,
        file: GgufFile,
        kernels: Kernels,
        memory: DeviceMemory,
        pool: Allocator,
        on_bytes: Callable[[int], None] = lambda _: None,
        *,
        expected: int = 0,
    ) -> None:
        import cupy  # noqa: PLC0415

        self._file = file
        self._kernels = kernels
        self._pool = pool
        self._on_bytes = on_bytes
        self._one_at_a_time = Lock()
        count = min(_lanes_for(expected), os.cpu_count() or 1)
        self._staging: Slab | None = memory.reserve(count * CHUNK, Purpose.WORKSPACE)
        self._lanes = [_Lane(cupy.cuda, self._staging.address + lane * CHUNK) for lane in range(count)]
        self._idle = list(self._lanes)
        self._threads = ThreadPoolExecutor(count, "upload", cupy.cuda.Device().use)
        self._runtime, self._stream = cupy.cuda.runtime, cupy.cuda.Stream(non_blocking=True)
        self._to_come = expected or -1
        self._chunk: list[_Piece] = []
        self._gathered = 0  # bytes of the chunk
        self._waiting: deque[list[_Piece]] = deque()
        self._under_way: list[Future[None]] = []
        self._targets: list[QTensor] = []
        self._values: list[Floats] = []

    def __call__(self, info: TensorInfo) -> QTensor:
        """Start the tensor's way to the device. Raises VramOom."""
        data = self._vector(info) if is_vector(info) else self._matrix(info)
        tensor = QTensor(info.name, info.shape, info.kind, data)
        self._targets.append(tensor)  # nobody else gets its memory while bytes are on their way there
        self._to_come -= info.nbytes
        if self._to_come == 0:
            self._send()
        return tensor

    def close(self) -> None:
        """Wait for everything and give the buffers back. Raises CudaError or VramOom where a chunk did not arrive."""
        try:
            self._send()
            for sent in self._under_way:
                sent.result()
            with device_errors():
                for stream in (self._stream, *(lane.stream for lane in self._lanes)):
                    stream.synchronize()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Send nothing more, and give the buffers back as soon as nobody uses them; harmless after `close`."""
        self._threads.shutdown(cancel_futures=True)
        for stream in (self._stream, *(lane.stream for lane in self._lanes)):
            with suppress(CudaError, VramOom), device_errors():
                stream.synchronize()
        self._chunk.clear()
        self._waiting.clear()
        self._under_way.clear()
        self._targets.clear()
        self._values.clear()
        self._idle.clear()
        self._lanes.clear()
        self._staging = None

    def _vector(self, info: TensorInfo) -> DeviceArray:
        """From here, at once: a vector is small, and there are as many as matrices."""
        values = dequantize(self._file.data(info), info.kind).reshape(info.shape)
        array = self._pool.empty(info.shape, np.float32)
        self._values.append(values)  # most drivers have read them when the call returns, but not all
        with device_errors():
            self._runtime.memcpyAsync(
                address(array), values.ctypes.data, values.nbytes, _HOST_TO_DEVICE, self._stream.ptr
            )
        self._tell(info.nbytes)
        return array

    def _matrix(self, info: TensorInfo) -> BlockMatrix:
        sizes = plane_bytes(info.kind, info.shape[-1])
        planes = tuple(self._pool.empty((*info.shape[:-1], size), np.uint8) if size else None for size in sizes)
        matrix = BlockMatrix(info.kind, planes)
        blocks = self._file.data(info).reshape(-1)
        step = _chunk_elements(info.kind)
        for start in range(0, math.prod(info.shape), step):
            part = blocks[info.kind.row_bytes(start) : info.kind.row_bytes(start + step)]
            offsets = plane_bytes(info.kind, start)
            to = tuple(at and at + offset for at, offset in zip(matrix.addresses(), offsets, strict=True))
            self._add(_Piece(part, self._unpacking(info.kind, part.size, to)))
        return matrix

    def _unpacking(self, kind: QuantType, nbytes: int, to: tuple[int, ...]) -> Callable[[int, Any], None]:
        if kind.block_size == 1:
            copy = self._runtime.memcpyAsync
            return lambda at, stream: copy(to[0], at, nbytes, _ON_DEVICE, stream.ptr)
        units = nbytes // kind.block_bytes * (kind.block_size // 32)
        repack = self._kernels.get(*_repack(kind))  # here: compiling is not for many threads
        grid, planes, count = (-(-units // _THREADS),), np.array(to, PLANES), np.uint32(units)

        def unpack(at: int, stream: Any) -> None:
            with stream:
                repack(grid, (_THREADS,), (np.uint64(at), planes, count))

        return unpack

    def _add(self, piece: _Piece) -> None:
        """Small pieces share a chunk: each call of the driver costs its thread a wait for Python's lock."""
        room = aligned(piece.host.size)
        if self._gathered + room > CHUNK:
            self._send()
        self._chunk.append(piece)
        self._gathered += room

    def _send(self) -> None:
        """What has gathered goes to the lanes."""
        if self._chunk:
            self._waiting.append(self._chunk)
            self._chunk, self._gathered = [], 0
            self._under_way.append(self._threads.submit(self._run))

    def _run(self) -> None:
        """On one of the threads, of which there are as many as lanes."""
        pieces, lane = self._waiting.popleft(), self._idle.pop()
        try:
            with device_errors():
                lane.carry(pieces)
                if self._to_come == 0 and not self._waiting:
                    lane.end()
        finally:
            self._idle.append(lane)
        self._tell(sum(piece.host.size for piece in pieces))

    def _tell(self, nbytes: int) -> None:
        with self._one_at_a_time:
            self._on_bytes(nbytes)


class _Lane:
    """A stream, `staging` on the device for one chunk, and two pinned buffers, each allocated when it is first needed.

    Pinned memory costs 0.6 ms a MiB: a small model is through before most lanes have any.
    """

    def __init__(self, cuda: Any, staging: int) -> None:
        self.stream = cuda.Stream(non_blocking=True)
        self._staging = staging
        self._cuda = cuda
        self._buffers: list[_PinnedBuffer] = []

    def carry(self, pieces: list[_Piece]) -> None:
        """Bring pieces of at most CHUNK bytes together to the device and take them apart there, in stream order."""
        buffer = self._buffers.pop(0) if len(self._buffers) == 2 else _PinnedBuffer(self._cuda)
        self._buffers.append(buffer)
        places = buffer.send([piece.host for piece in pieces], self._staging, self.stream)
        for piece, at in zip(pieces, places, strict=True):
            piece.unpack(at, self.stream)

    def end(self) -> None:
        """Wait for all of it, and give the buffers back, which takes a millisecond each: here nobody waits for it."""
        self.stream.synchronize()
        self._buffers.clear()


class _PinnedBuffer:
    """Page-locked host memory that the device copies from by itself."""

    def __init__(self, cuda: Any) -> None:
        self._runtime = cuda.runtime
        self._memory = cuda.PinnedMemoryPointer(cuda.PinnedMemory(CHUNK), 0)
        self._host = np.frombuffer(self._memory, np.uint8, CHUNK)
        self._sent = cuda.Event(disable_timing=True)

    def send(self, parts: list[Bytes], to: int, stream: Any) -> list[int]:
        """Wait until the last chunk has left, then start this one's copy to `to`: where each of its parts will lie."""
        self._sent.synchronize()
        end, places = 0, []
        for part in parts:
            places.append(to + end)
            np.copyto(self._host[end : end + part.size], part)
            end += aligned(part.size)
        self._runtime.memcpyAsync(to, self._memory.ptr, end, _HOST_TO_DEVICE, stream.ptr)
        self._sent.record(stream)
        return places


def repack_kernels(weights: Iterable[TensorInfo]) -> dict[KernelName, None]:
    """What uploads of these tensors launch, in order, for the kernels to begin before the first is asked for."""
    return {_repack(info.kind): None for info in weights if info.kind.block_size > 1 and not is_vector(info)}


def _repack(kind: QuantType) -> KernelName:
    return "repack.cu", f"repack<{kind.name}>"


def _lanes_for(nbytes: int) -> int:
    """Three read a small file while the host is busy with the rest of a start; what a lane pins costs time too."""
    return min(LANES, 3 + nbytes // _A_LANE_MORE) if nbytes else LANES


def _chunk_elements(kind: QuantType) -> int:
    """The most elements, a multiple of 256, whose blocks fill no more than CHUNK bytes."""
    return CHUNK // kind.row_bytes(_SUPER) * _SUPER
