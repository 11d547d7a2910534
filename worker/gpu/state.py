"""What a step reads of its sequences, held in device memory, and how it gets there: one asynchronous copy.

A `StepState` moves on by itself: the sampler's kernel writes the next token, position and index into it, so the host
loads it only when a sequence starts or continues elsewhere. Knows no model. Kernel side: `kernels/sample.cu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose, aligned
from worker.ops import Batch
from worker.sampling import DrawRequest, Sampling

REQUEST = np.dtype(
    [
        *((name, "f8") for name in ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")),
        ("seed", "u8"),
        *((name, "i4") for name in ("index", "min_tokens", "top_k", "logprobs", "forced", "penalized", "biased")),
        ("unused", "i4"),
    ]
)
"""`Request` of sample.cu."""

_PINNED_SLOTS = 4


class PinnedRing:
    """A few page-locked buffers in turn: one is written again only after the device is done with it."""

    def __init__(self, nbytes: int, slots: int = _PINNED_SLOTS) -> None:
        import cupy  # noqa: PLC0415

        self._runtime = cupy.cuda.runtime
        self._memory = [cupy.cuda.alloc_pinned_memory(nbytes) for _ in range(slots)]
        self._views = [np.frombuffer(memory, np.uint8, nbytes) for memory in self._memory]
        self._writable = [view.data for view in self._views]
        for view in self._views:
            view.fill(0)  # what lies between parts travels too, and a captured piece reads ids beyond the real ones
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(slots)]
        self._next = 0

    def upload(self, parts: Sequence[tuple[int, np.ndarray[Any, Any]]], target: DeviceArray, stream: Any) -> None:
        """Copy `parts`, each at its byte offset, over the first bytes of `target`, in the stream's order."""
        slot, self._next = self._next, (self._next + 1) % len(self._views)
        self._events[slot].synchronize()
        end = 0
        for offset, part in parts:
            stop = offset + part.nbytes
            self._writable[slot][offset:stop] = part.tobytes()
            end = max(end, stop)
        self._runtime.memcpyAsync(target.data.ptr, self._memory[slot].ptr, end, 1, stream.ptr)
        self._events[slot].record(stream)

    def download(self, source: DeviceArray, stream: Any) -> tuple[np.ndarray[Any, Any], Any]:
        """Copy `source` here, in the stream's order: a view that holds it once the event has happened.

        The view is written again after as many downloads as there are slots.
        """
        slot, self._next = self._next, (self._next + 1) % len(self._views)
        self._runtime.memcpyAsync(self._memory[slot].ptr, source.data.ptr, source.nbytes, 2, stream.ptr)
        self._events[slot].record(stream)
        return self._views[slot][: source.nbytes], self._events[slot]


class StepState:
    """Of each of S sequences: `tokens` [S] and `positions` [S] i32, `requests` [S], `tables` [S, blocks] i32."""

    def __init__(self, memory: DeviceMemory, sequences: int, blocks: int) -> None:
        sizes = (4 * sequences, 4 * sequences, REQUEST.itemsize * sequences, 4 * sequences * blocks)
        ends = np.cumsum([aligned(size) for size in sizes]).tolist()
        self._offsets = [0, *ends[:-1]]
        slab = memory.reserve(ends[-1], Purpose.WORKSPACE)
        at = self._offsets
        self._bytes = slab.array((ends[-1],), np.uint8)
        self._bytes.fill(0)
        self.tokens = slab.array((sequences,), np.int32, at[0])
        self.positions = slab.array((sequences,), np.int32, at[1])
        self.requests = slab.array((sequences, REQUEST.itemsize), np.uint8, at[2])
        self.tables = slab.array((sequences, blocks), np.int32, at[3])
        self._ring = PinnedRing(ends[-1])

    def load(self, batch: Batch, requests: Sequence[DrawRequest], stream: Any) -> None:
        """Set all rows: the tokens to compute, their positions and tables, and the draws that follow."""
        tables = np.zeros(self.tables.shape, np.int32)
        if len(batch.block_tables) > len(tables):
            raise ValueError(f"{len(batch.block_tables)} sequences where the step state holds {len(tables)}")
        for row, table in enumerate(batch.block_tables):
            tables[row, : len(table)] = table
        packed = np.array([pack(request) for request in requests], REQUEST)
        parts = zip(self._offsets, (batch.tokens, batch.positions, packed, tables), strict=True)
        self._ring.upload([(at, part) for at, part in parts], self._bytes, stream)


def penalized(sampling: Sampling) -> bool:
    """Whether a draw depends on what was drawn before."""
    return (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) != (1, 0, 0)


def pack(request: DrawRequest) -> tuple[float | int, ...]:
    """A request as sample.cu reads it: the fields of REQUEST in order."""
    s = request.sampling
    return (
        *(s.temperature, s.top_p, s.min_p),
        *(s.repetition_penalty, s.frequency_penalty, s.presence_penalty, s.seed),
        *(request.index, s.min_tokens, s.top_k),
        -1 if s.logprobs is None else s.logprobs,
        -1 if request.forced is None else request.forced,
        *(penalized(s), bool(s.logit_bias), 0),
    )
