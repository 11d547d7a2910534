"""The state of sequences in device memory: KV cache, inputs of a decode step, inputs of a chunk.

Captured graphs read all their inputs from here; the host uploads them in one asynchronous copy. The
sampler's kernel writes a sequence's next token, position and index into `StepState`, so the host
loads it only when a sequence starts or another one continues. Kernel side: `kernels/kv_cache.cuh`,
`kernels/sampling.cuh`. Next: `runner.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose, aligned
from worker.model import Hparams
from worker.ops import KV_BLOCK, Batch
from worker.sampling import DrawRequest, Sampling

REQUEST = np.dtype(
    [
        *((name, "f8") for name in ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")),
        ("seed", "u8"),
        *((name, "i4") for name in ("index", "min_tokens", "top_k", "logprobs", "forced", "penalized", "biased")),
        ("unused", "i4"),
    ]
)
"""`Request` of kernels/sampling.cuh."""

KV_ELEMENT_BYTES = 2
"""Bytes of an f16."""

_PINNED_SLOTS = 4


class KvCache:
    """The paged KV cache: K and V of each layer as [blocks, Hk, B, D] f16.

    Unwritten slots are never read.
    """

    def __init__(self, memory: DeviceMemory, hp: Hparams, blocks: int) -> None:
        shape = (hp.block_count, 2, blocks, hp.head_count_kv, KV_BLOCK, hp.head_dim)
        slab = memory.reserve(blocks * KV_BLOCK * hp.kv_bytes_per_token(KV_ELEMENT_BYTES), Purpose.KV)
        self.array: DeviceArray = slab.array(shape, np.float16)
        self._layers = [(self.array[layer, 0], self.array[layer, 1]) for layer in range(hp.block_count)]

    def layer(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """The keys and values of one layer."""
        return self._layers[layer]


class PinnedRing:
    """Page-locked buffers in turn; each is rewritten only after the device has finished with it."""

    def __init__(self, nbytes: int, slots: int = _PINNED_SLOTS) -> None:
        import cupy  # noqa: PLC0415

        self._runtime = cupy.cuda.runtime
        self._memory = [cupy.cuda.alloc_pinned_memory(nbytes) for _ in range(slots)]
        self._views = [np.frombuffer(memory, np.uint8, nbytes) for memory in self._memory]
        self._writable = [view.data for view in self._views]
        for view in self._views:
            view.fill(0)  # gaps between the uploaded arrays are copied too, and must hold valid ids
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(slots)]
        self._next = 0

    def upload(self, arrays: Sequence[tuple[int, np.ndarray[Any, Any]]], target: DeviceArray, stream: Any) -> None:
        """Copy `arrays`, each to its byte offset, into `target`, in stream order."""
        slot, self._next = self._next, (self._next + 1) % len(self._views)
        self._events[slot].synchronize()
        end = 0
        for offset, array in arrays:
            stop = offset + array.nbytes
            self._writable[slot][offset:stop] = array.tobytes()
            end = max(end, stop)
        self._runtime.memcpyAsync(target.data.ptr, self._memory[slot].ptr, end, 1, stream.ptr)
        self._events[slot].record(stream)

    def download(self, source: DeviceArray, stream: Any) -> tuple[np.ndarray[Any, Any], Any]:
        """Copy `source` to the host in stream order: a view, valid once the event has completed.

        The view is overwritten after as many downloads as there are slots.
        """
        slot, self._next = self._next, (self._next + 1) % len(self._views)
        self._runtime.memcpyAsync(self._memory[slot].ptr, source.data.ptr, source.nbytes, 2, stream.ptr)
        self._events[slot].record(stream)
        return self._views[slot][: source.nbytes], self._events[slot]


class _Inputs:
    """Arrays at fixed offsets of one zeroed slab, uploaded together through a `PinnedRing`."""

    def __init__(self, memory: DeviceMemory, shapes: Sequence[tuple[tuple[int, ...], Any]], slots: int) -> None:
        sizes = [aligned(int(np.prod(shape)) * np.dtype(dtype).itemsize) for shape, dtype in shapes]
        ends = np.cumsum(sizes).tolist()
        self._offsets = [0, *ends[:-1]]
        slab = memory.reserve(ends[-1], Purpose.WORKSPACE)
        self._bytes = slab.array((ends[-1],), np.uint8)
        self._bytes.fill(0)  # a captured chunk covers more tokens than are valid: their ids must be valid too
        self.arrays = [slab.array(*shape, at) for shape, at in zip(shapes, self._offsets, strict=True)]
        self._ring = PinnedRing(ends[-1], slots)

    def upload(self, values: Sequence[np.ndarray[Any, Any]], stream: Any) -> None:
        """Upload a value, or the beginning of one, for each array."""
        self._ring.upload(list(zip(self._offsets, values, strict=True)), self._bytes, stream)


class StepState:
    """Inputs of a decode step of S sequences.

    `tokens` [S] and `positions` [S] i32, `requests` [S] (bytes of REQUEST), `tables` [S, blocks]
    i32.
    """

    def __init__(self, memory: DeviceMemory, sequences: int, blocks: int) -> None:
        rows = ((sequences,), np.int32)
        requests = ((sequences, REQUEST.itemsize), np.uint8)
        self._inputs = _Inputs(memory, (rows, rows, requests, ((sequences, blocks), np.int32)), _PINNED_SLOTS)
        self.tokens, self.positions, self.requests, self.tables = self._inputs.arrays

    def load(self, batch: Batch, requests: Sequence[DrawRequest], stream: Any) -> None:
        """Upload all rows: tokens, their positions and block tables, and the draws that follow."""
        tables = np.zeros(self.tables.shape, np.int32)
        if len(batch.block_tables) > len(tables):
            raise ValueError(f"a step of {len(batch.block_tables)} sequences exceeds the step state's {len(tables)}")
        for row, table in enumerate(batch.block_tables):
            tables[row, : len(table)] = table
        packed = np.array([pack(request) for request in requests], REQUEST)
        self._inputs.upload((batch.tokens, batch.positions, packed, tables), stream)


class ChunkState:
    """Inputs of a chunk of a prompt.

    `tokens` [T]; `span` [2]: position of the first token, number of valid tokens; `wanted` [R]:
    rows whose logits are requested; `table` [blocks]; all i32. `count` [1] is the second element of
    `span`, `wanted_count` [1] the number of valid rows in `wanted`.
    """

    def __init__(self, memory: DeviceMemory, tokens: int, rows: int, blocks: int) -> None:
        shapes = [((size,), np.int32) for size in (tokens, 2, 1 + rows, blocks)]
        self._inputs = _Inputs(memory, shapes, slots=1)  # the host prepares one chunk ahead: a cancel waits for no more
        self.tokens, self.span, wanted, self.table = self._inputs.arrays
        self.count = self.span[1:]
        self.wanted_count, self.wanted = wanted[:1], wanted[1:]
        self._rows = rows

    def load(self, chunk: Batch, stream: Any) -> None:
        """Upload `chunk`, of at most T tokens and R rows with logits."""
        rows = chunk.logit_rows
        if len(rows) > self._rows:
            raise ValueError(f"a chunk with logits of {len(rows)} rows exceeds the limit of {self._rows}")
        wanted = np.zeros(1 + self._rows, np.int32)
        wanted[0], wanted[1 : 1 + len(rows)] = len(rows), rows
        span = np.array((chunk.positions[0], len(chunk.tokens)), np.int32)
        self._inputs.upload((chunk.tokens, span, wanted, chunk.block_tables[0]), stream)


def penalized(sampling: Sampling) -> bool:
    """Whether a draw depends on the tokens drawn before it."""
    return (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1, 0, 0)


def pack(request: DrawRequest) -> tuple[float | int, ...]:
    """The fields of REQUEST in order."""
    s = request.sampling
    return (
        *(s.temperature, s.top_p, s.min_p),
        *(s.repetition_penalty, s.frequency_penalty, s.presence_penalty, s.seed),
        *(request.index, s.min_tokens, s.top_k),
        -1 if s.logprobs is None else s.logprobs,
        -1 if request.forced is None else request.forced,
        *(penalized(s), bool(s.logit_bias), 0),
    )
