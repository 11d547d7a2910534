"""Upload a file's tensors to VRAM: mapped pages → pinned buffers → asynchronous copies → planes.

Several threads copy, since one reaches a quarter of the page cache's bandwidth. Each has a lane:
two pinned buffers, a stream, and a staging area on the device from which a kernel repacks the
blocks (`kernels/repack.cu`). Reading, copying and repacking overlap with each other and with the
caller's work until `close`. Allocations are bounded for any file size. Next: `layouts.py`.
"""

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
from worker.gpu.layouts import PLANES, BlockMatrix, address, is_vector, plane_bytes, stored_type
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose, Slab, aligned
from worker.ops import QTensor
from worker.quants import CODEBOOK_TYPES, QUANT_TYPES, Bytes, Floats, QuantType, codebook, dequantize

CHUNK = 8 << 20  # bytes of a copy; a multiple of ALIGNMENT, at which its transfers begin
MAX_LANES = 6  # saturates an H100 host of 16 cores: 25 of the 29 GB/s that pure reading reaches
_THREADS = 256
_SUPER = 256
_BYTES_PER_LANE = 512 << 20  # of the file, for each lane above three
_HOST_TO_DEVICE, _ON_DEVICE = 1, 3
INSTANTIATIONS: tuple[KernelName, ...] = tuple(
    ("repack.cu", f"repack<{kind.name}>") for kind in QUANT_TYPES if kind.block_size > 1
)


class _Transfer(NamedTuple):
    """Bytes of the file, and its repacking function, called with device address and stream."""

    host: Bytes
    unpack: Callable[[int, Any], None]


class Upload:
    """Uploads tensors of `file` into arrays of `pool`; a `worker.backend.Upload`.

    A call returns its array at once; contents are valid after `close`. Freed memory is not reused
    until `close`. `on_bytes` receives the file bytes of each chunk that is copied, one call at a
    time, from any thread. `expected`: total bytes if known; the lanes end on their own after them.
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
        self._memory = memory
        self._codebooks: dict[QuantType, Slab] = {}
        self._staging: Slab | None = memory.reserve(count * CHUNK, Purpose.WORKSPACE)
        self._lanes = [_Lane(cupy.cuda, self._staging.address + lane * CHUNK) for lane in range(count)]
        self._idle = list(self._lanes)
        self._threads = ThreadPoolExecutor(count, "upload", cupy.cuda.Device().use)
        self._runtime, self._stream = cupy.cuda.runtime, cupy.cuda.Stream(non_blocking=True)
        self._to_come = expected or -1
        self._chunk: list[_Transfer] = []
        self._gathered = 0  # bytes of the chunk
        self._waiting: deque[list[_Transfer]] = deque()
        self._under_way: list[Future[None]] = []
        self._targets: list[QTensor] = []
        self._values: list[Floats] = []

    def __call__(self, info: TensorInfo, scale: float = 1.0) -> QTensor:
        """Start the upload of a tensor. Raises VramOom."""
        data = self._vector(info, scale) if is_vector(info) else self._matrix(info)
        tensor = QTensor(info.name, info.shape, info.kind if is_vector(info) else stored_type(info.kind), data)
        self._targets.append(tensor)  # its memory must not be reused during the copy
        self._to_come -= info.nbytes
        if self._to_come == 0:
            self._send()
        return tensor

    def close(self) -> None:
        """Wait for all copies, free the buffers. Raises CudaError or VramOom if a copy failed."""
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
        """Cancel what has not started, wait for the rest, free the buffers. Idempotent."""
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
        self._codebooks.clear()
        self._staging = None

    def _vector(self, info: TensorInfo, scale: float) -> DeviceArray:
        """Copy from this thread: a vector is small, and there are as many as matrices."""
        values = dequantize(self._file.data(info), info.kind).reshape(info.shape)
        if scale != 1.0:
            values = values * np.float32(scale)
        array = self._pool.empty(info.shape, np.float32)
        self._values.append(values)  # the driver may read them after the call returns
        with device_errors():
            self._runtime.memcpyAsync(
                address(array), values.ctypes.data, values.nbytes, _HOST_TO_DEVICE, self._stream.ptr
            )
        self._tell(info.nbytes)
        return array

    def _matrix(self, info: TensorInfo) -> BlockMatrix:
        sizes = plane_bytes(info.kind, info.shape[-1])
        planes = tuple(self._pool.empty((*info.shape[:-1], size), np.uint8) if size else None for size in sizes)
        matrix = BlockMatrix(stored_type(info.kind), planes)
        step, first = _chunk_elements(info.kind), 0
        for piece in self._file.pieces(info):
            blocks, elements = piece.reshape(-1), len(piece) * info.shape[-1]
            for start in range(0, elements, step):
                part = blocks[info.kind.row_bytes(start) : info.kind.row_bytes(start + step)]
                offsets = plane_bytes(info.kind, first + start)
                to = tuple(at and at + offset for at, offset in zip(matrix.addresses(), offsets, strict=True))
                self._add(_Transfer(part, self._unpacking(info.kind, part.size, to)))
            first += elements
        return matrix

    def _unpacking(self, kind: QuantType, nbytes: int, to: tuple[int, ...]) -> Callable[[int, Any], None]:
        if kind.block_size == 1:
            copy = self._runtime.memcpyAsync
            return lambda at, stream: copy(to[0], at, nbytes, _ON_DEVICE, stream.ptr)
        units = nbytes // kind.block_bytes * (kind.block_size // 32)
        repack = self._kernels.get(*_repack(kind))  # compiled on this thread, not on a lane
        grid, planes, count = (-(-units // _THREADS),), np.array(to, PLANES), np.uint32(units)

        codebook = np.uint64(self._codebook(kind))

        def unpack(at: int, stream: Any) -> None:
            with stream:
                repack(grid, (_THREADS,), (np.uint64(at), codebook, planes, count))

        return unpack

    def _codebook(self, kind: QuantType) -> int:
        """Device address of a type's codebook, copied on first use; 0 if it has none."""
        if kind not in CODEBOOK_TYPES:
            return 0
        if kind not in self._codebooks:
            rows = codebook(kind)
            slab = self._memory.reserve(rows.nbytes, Purpose.WORKSPACE)
            with device_errors():
                self._runtime.memcpyAsync(
                    slab.address, rows.ctypes.data, rows.nbytes, _HOST_TO_DEVICE, self._stream.ptr
                )
                self._stream.synchronize()
            self._codebooks[kind] = slab
        return self._codebooks[kind].address

    def _add(self, transfer: _Transfer) -> None:
        """Small transfers share a chunk: each driver call waits for the GIL."""
        room = aligned(transfer.host.size)
        if self._gathered + room > CHUNK:
            self._send()
        self._chunk.append(transfer)
        self._gathered += room

    def _send(self) -> None:
        """Queue the collected chunk for the lanes."""
        if self._chunk:
            self._waiting.append(self._chunk)
            self._chunk, self._gathered = [], 0
            self._under_way.append(self._threads.submit(self._run))

    def _run(self) -> None:
        """Copy one chunk, on one of the threads; there are as many threads as lanes."""
        transfers, lane = self._waiting.popleft(), self._idle.pop()
        try:
            with device_errors():
                lane.carry(transfers)
                if self._to_come == 0 and not self._waiting:
                    lane.end()
        finally:
            self._idle.append(lane)
        self._tell(sum(transfer.host.size for transfer in transfers))

    def _tell(self, nbytes: int) -> None:
        with self._one_at_a_time:
            self._on_bytes(nbytes)


class _Lane:
    """A stream, `staging` memory on the device for one chunk, and two pinned buffers.

    Buffers are allocated on first use: pinning takes 0.6 ms a MiB, and a small model needs few.
    """

    def __init__(self, cuda: Any, staging: int) -> None:
        self.stream = cuda.Stream(non_blocking=True)
        self._staging = staging
        self._cuda = cuda
        self._buffers: list[_PinnedBuffer] = []

    def carry(self, transfers: list[_Transfer]) -> None:
        """Copy transfers of at most CHUNK bytes in all to the device and repack them."""
        buffer = self._buffers.pop(0) if len(self._buffers) == 2 else _PinnedBuffer(self._cuda)
        self._buffers.append(buffer)
        places = buffer.send([transfer.host for transfer in transfers], self._staging, self.stream)
        for transfer, at in zip(transfers, places, strict=True):
            transfer.unpack(at, self.stream)

    def end(self) -> None:
        """Wait for the stream and free the buffers, a millisecond each, off the critical path."""
        self.stream.synchronize()
        self._buffers.clear()


class _PinnedBuffer:
    """Page-locked host memory for asynchronous copies to the device."""

    def __init__(self, cuda: Any) -> None:
        self._runtime = cuda.runtime
        self._memory = cuda.PinnedMemoryPointer(cuda.PinnedMemory(CHUNK), 0)
        self._host = np.frombuffer(self._memory, np.uint8, CHUNK)
        self._sent = cuda.Event(disable_timing=True)

    def send(self, parts: list[Bytes], to: int, stream: Any) -> list[int]:
        """Wait for the previous copy, start this one to `to`; returns each part's address."""
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
    """Kernels that the upload of these tensors launches, to compile them ahead of it."""
    return {_repack(info.kind): None for info in weights if info.kind.block_size > 1 and not is_vector(info)}


def _repack(kind: QuantType) -> KernelName:
    return "repack.cu", f"repack<{kind.name}>"


def _lanes_for(nbytes: int) -> int:
    """Lanes for a file of `nbytes`: three for a small one, since pinning buffers takes time."""
    return min(MAX_LANES, 3 + nbytes // _BYTES_PER_LANE) if nbytes else MAX_LANES


def _chunk_elements(kind: QuantType) -> int:
    """Largest multiple of 256 elements whose blocks fit CHUNK bytes."""
    return CHUNK // kind.row_bytes(_SUPER) * _SUPER
