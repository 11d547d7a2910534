"""The state of sequences in device memory: KV cache and inputs of a decode step.

Captured graphs read all their inputs from here; the host uploads them asynchronously. The sampler's
kernel writes a sequence's next token, position and index into `StepState`, so the host uploads a
slot once, when its sequence begins to generate. Kernel side: `kernels/kv_cache.cuh`,
`kernels/sampling.cuh`. Next: `prefill_state.py`, `slots.py`, `runner.py`.
"""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import accumulate
from typing import Any

import numpy as np

from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose, aligned
from worker.model import KvType, SlotStart, cached, kv_bytes_per_token, kv_row_bytes
from worker.ops import KV_BLOCK, Attention, Batch, Ints
from worker.sampling import DrawRequest, Sampling

REQUEST = np.dtype(
    [
        *((name, "f8") for name in ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")),
        ("seed", "u8"),
        *((name, "i4") for name in ("index", "min_tokens", "top_k", "logprobs", "forced", "penalized", "biased")),
        ("masked", "i4"),
    ]
)
"""`Request` of kernels/sampling.cuh."""

ENDS = 16
"""End ids of a slot that the device knows."""

PINNED_SLOTS = 4
"""Uploads that may be in flight before the next one waits."""

_DTYPES: Mapping[KvType, type[np.generic]] = {"f16": np.float16, "q8": np.uint8}
_NO_LIMIT = np.iinfo(np.int32).max
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyKind


class KvCache:
    """The paged KV cache: K and V of each layer as [blocks, Hk, B, D] f16 or, if `kv_type` is q8,
    [blocks, Hk, B·(D + 2)] u8.

    No result depends on unwritten slots.
    """

    def __init__(self, memory: DeviceMemory, layers: Sequence[Attention], blocks: int, kv_type: KvType = "f16") -> None:
        self.kv_type = kv_type
        shapes = [(2, blocks, spec.n_kv_heads, *head_block_shape(spec.head_dim, kv_type)) for spec in cached(layers)]
        nbytes, dtype = blocks * KV_BLOCK * kv_bytes_per_token(layers, kv_type), _DTYPES[kv_type]
        slab = memory.reserve(nbytes, Purpose.KV)
        self.array: DeviceArray = slab.array((nbytes // np.dtype(dtype).itemsize,), dtype)
        """All layers: [layers, 2, blocks, Hk, …] if they have one shape, else flat."""
        ends = list(accumulate(map(math.prod, shapes)))
        parts = (self.array[end - math.prod(shape) : end] for shape, end in zip(shapes, ends, strict=True))
        pairs = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        self._layers = [(pair[0], pair[1]) for pair in pairs]
        if len(set(shapes)) == 1:
            self.array = self.array.reshape(len(shapes), *shapes[0])

    def layer(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """The keys and values of one layer."""
        return self._layers[layer]


def head_block_shape(dim: int, kv_type: KvType) -> tuple[int, ...]:
    """The shape of one head in one KV block."""
    return (KV_BLOCK * kv_row_bytes(dim, kv_type),) if kv_type == "q8" else (KV_BLOCK, dim)


class PinnedRing:
    """Page-locked buffers in turn; each is rewritten only after the device has finished with it."""

    def __init__(self, nbytes: int, slots: int = PINNED_SLOTS) -> None:
        import cupy  # noqa: PLC0415

        self._runtime = cupy.cuda.runtime
        self._size = aligned(nbytes)
        self._memory = cupy.cuda.alloc_pinned_memory(self._size * slots)
        whole = np.frombuffer(self._memory, np.uint8, self._size * slots)
        whole.fill(0)  # gaps between the uploaded arrays are copied too, and must hold valid ids
        self._views = [whole[at : at + nbytes] for at in range(0, self._size * slots, self._size)]
        self._writable = [view.data for view in self._views]
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(slots)]
        self._next = 0

    def wait(self) -> None:
        """Wait until the newest copy is complete."""
        self._events[self._next - 1].synchronize()

    def upload(self, arrays: Sequence[tuple[int, np.ndarray[Any, Any]]], target: DeviceArray, stream: Any) -> None:
        """Copy `arrays`, each to its byte offset, into `target`, in stream order."""
        slot = self._turn()
        self._events[slot].synchronize()
        end = max(self._write(slot, offset, array) for offset, array in arrays)
        self._runtime.memcpyAsync(target.data.ptr, self._address(slot), end, _TO_DEVICE, stream.ptr)
        self._events[slot].record(stream)

    def scatter(self, arrays: Sequence[tuple[int, np.ndarray[Any, Any]]], stream: Any) -> None:
        """Copy `arrays`, each to its device address, in stream order."""
        slot = self._turn()
        self._events[slot].synchronize()
        at = 0
        for address, array in arrays:
            end = self._write(slot, at, array)
            self._runtime.memcpyAsync(address, self._address(slot) + at, end - at, _TO_DEVICE, stream.ptr)
            at = aligned(end)
        self._events[slot].record(stream)

    def writable(self) -> np.ndarray[Any, Any]:
        """Wait for the next buffer and return its bytes, for `upload_written`."""
        self._events[self._next].synchronize()
        return self._views[self._next]

    def upload_written(self, nbytes: int, target: DeviceArray, stream: Any) -> None:
        """Copy the first bytes of the buffer of `writable` to `target`, in stream order."""
        slot = self._turn()
        self._runtime.memcpyAsync(target.data.ptr, self._address(slot), nbytes, _TO_DEVICE, stream.ptr)
        self._events[slot].record(stream)

    def upload_column(self, values: np.ndarray[Any, Any], address: int, pitch: int, stream: Any) -> None:
        """Copy the elements of `values` to `address`, each `pitch` bytes after the last."""
        slot = self._turn()
        self._events[slot].synchronize()
        self._write(slot, 0, values)
        width, rows = values.itemsize, len(values)
        self._runtime.memcpy2DAsync(address, pitch, self._address(slot), width, width, rows, _TO_DEVICE, stream.ptr)
        self._events[slot].record(stream)

    def download(self, source: DeviceArray, stream: Any) -> tuple[np.ndarray[Any, Any], Any]:
        """Copy `source` to the host in stream order: a view, valid once the event has completed.

        The view is overwritten after as many downloads as there are slots.
        """
        slot = self._turn()
        self._runtime.memcpyAsync(self._address(slot), source.data.ptr, source.nbytes, _TO_HOST, stream.ptr)
        self._events[slot].record(stream)
        return self._views[slot][: source.nbytes], self._events[slot]

    def _turn(self) -> int:
        slot, self._next = self._next, (self._next + 1) % len(self._views)
        return slot

    def _address(self, slot: int) -> int:
        return int(self._memory.ptr) + slot * self._size

    def _write(self, slot: int, offset: int, array: np.ndarray[Any, Any]) -> int:
        """Write `array` to a buffer and return where it ends."""
        end = offset + array.nbytes
        self._writable[slot][offset:end] = array.tobytes()
        return end


class _Inputs:
    """Arrays at fixed offsets of one zeroed slab."""

    def __init__(self, memory: DeviceMemory, shapes: Sequence[tuple[tuple[int, ...], Any]]) -> None:
        sizes = [aligned(int(np.prod(shape)) * np.dtype(dtype).itemsize) for shape, dtype in shapes]
        ends = np.cumsum(sizes).tolist()
        self.offsets = [0, *ends[:-1]]
        slab = memory.reserve(ends[-1], Purpose.WORKSPACE)
        self.bytes = slab.array((ends[-1],), np.uint8)
        self.bytes.fill(0)
        self.arrays = [slab.array(*shape, at) for shape, at in zip(shapes, self.offsets, strict=True)]
        self.address = slab.address


class WholeInputs(_Inputs):
    """Arrays that are uploaded together in one copy."""

    def __init__(
        self, memory: DeviceMemory, shapes: Sequence[tuple[tuple[int, ...], Any]], uploads: int = PINNED_SLOTS
    ) -> None:
        super().__init__(memory, shapes)
        self._ring = PinnedRing(self.bytes.nbytes, uploads)

    def upload(self, values: Sequence[np.ndarray[Any, Any]], stream: Any) -> None:
        """Upload a value, or the beginning of one, for each array."""
        self._ring.upload(list(zip(self.offsets, values, strict=True)), self.bytes, stream)

    def wait(self) -> None:
        """Wait until the newest upload is complete."""
        self._ring.wait()


class _SlotInputs(_Inputs):
    """Arrays [S, …] of which one slot's elements are uploaded at a time."""

    def __init__(self, memory: DeviceMemory, shapes: Sequence[tuple[tuple[int, ...], Any]], uploads: int) -> None:
        super().__init__(memory, shapes)
        self._pitches = [array.nbytes // len(array) for array in self.arrays]
        self._ring = PinnedRing(sum(map(aligned, self._pitches)), uploads)

    def upload(self, slot: int, values: Sequence[np.ndarray[Any, Any]], stream: Any) -> None:
        """Upload a value, or the beginning of one, for the slot's element of each array.

        That is one copy if there is one slot, else one for each array.
        """
        if len(self.arrays[0]) == 1:
            self._ring.upload(list(zip(self.offsets, values, strict=True)), self.bytes, stream)
            return
        places = zip(self.offsets, self._pitches, values, strict=True)
        self._ring.scatter([(self.address + at + slot * pitch, value) for at, pitch, value in places], stream)


def rows_of(slots: int) -> int:
    """Rows of the largest decode step: the power of two from `slots` on."""
    return 1 << (slots - 1).bit_length()


class StepState:
    """Inputs of decode steps of at most R rows, whose sequences have S slots.

    Of each slot: `tokens` [S] i32, the newest token, and its position in `positions` [S] i32,
    negative if the slot is inactive; `limits` [S] i32 and `ends` [S, ENDS] i32, -1 padded: a
    sequence ends with the token at this position, or with one of these ids; `requests` [S] (bytes
    of REQUEST); `tables` [S, blocks] i32. `row_slots` [R] i32: the slot of each row, -1 for none;
    `first_rows` [F] i32: the slots whose first tokens are drawn, -1 for none. With one slot, row 0
    always is slot 0. `draft_slots` further slots are those of draft tokens (`drafts.py`).
    """

    def __init__(
        self, memory: DeviceMemory, slots: int, blocks: int, draft_slots: int = 0, first_rows: int = 1
    ) -> None:
        self.slots, count = slots, slots + draft_slots
        each = ((count,), np.int32)
        ends, requests = ((count, ENDS), np.int32), ((count, REQUEST.itemsize), np.uint8)
        shapes = (each, each, each, ends, requests, ((count, blocks), np.int32))
        self._inputs = _SlotInputs(memory, shapes, max(PINNED_SLOTS, first_rows))
        self.tokens, self.positions, self.limits, self.ends, self.requests, self.tables = self._inputs.arrays
        self.positions.fill(-1)
        self._rows = WholeInputs(memory, [((rows_of(slots),), np.int32)])
        self._first = WholeInputs(memory, [((first_rows,), np.int32)], slots)
        (self.row_slots,), (self.first_rows,) = self._rows.arrays, self._first.arrays
        self._forced = PinnedRing(4 * slots)
        self._tables = PinnedRing(4 * blocks)
        self._mapped: list[int] = [0] if slots == 1 else []
        """The slots of the rows on the device."""

    def start(self, start: SlotStart, table: Ints, stream: Any) -> None:
        """Upload what generation in a slot needs; the first draw follows the last prompt token."""
        first = start.replay[0] if start.replay else None
        request = DrawRequest(start.sampling, 0, start.prompt, (), first)
        last = len(start.prompt) - 1
        ends = sorted(start.end_ids)[:ENDS]  # the engine stops the slot after an end id beyond these
        fields = start.prompt[-1], last, last + start.max_tokens
        self._upload(start.slot, *fields, ends, request, table, stream)

    def map_first_rows(self, slots: Sequence[int], stream: Any) -> None:
        """Let row r of the next first draws belong to slot `slots[r]`, and further rows to none."""
        if self.slots > 1:
            self._first.upload([_padded(slots, len(self.first_rows))], stream)

    def extend(self, slot: int, table: Ints, stream: Any) -> None:
        """Upload a slot's block table."""
        self._tables.upload([(0, table)], self.tables[slot], stream)

    def force(self, ids: Ints, stream: Any) -> None:
        """Upload the id of each slot's next draw, -1 where it is to be drawn."""
        at, pitch = REQUEST.fields["forced"][1], REQUEST.itemsize  # type: ignore[index]
        self._forced.upload_column(ids, self.requests.data.ptr + at, pitch, stream)

    def map_rows(self, slots: Sequence[int], stream: Any) -> None:
        """Let row r of the next steps belong to slot `slots[r]`, and further rows to none."""
        if slots == self._mapped:
            return
        self._rows.upload([_padded(slots, len(self.row_slots))], stream)
        self._mapped = list(slots)

    def slots_of_rows(self, rows: int) -> DeviceArray | None:
        """[rows] i32: the slot of each row; None if row 0 is slot 0."""
        return self.row_slots[:rows] if self.slots > 1 or rows > 1 else None

    def with_rows(self, row_slots: DeviceArray) -> "StepState":
        """The same slots, for steps whose rows have the slots `row_slots` [R] i32."""
        state = copy(self)
        state.row_slots = row_slots
        return state

    def load(self, batch: Batch, requests: Sequence[DrawRequest], stream: Any) -> None:
        """Upload a whole step: row r is slot r, and no sequence ends."""
        rows = len(batch.tokens)
        if rows > self.slots:
            raise ValueError(f"a step of {rows} sequences exceeds the step state's {self.slots}")
        for row, table in enumerate(batch.block_tables):
            request = requests[row] if requests else DrawRequest(Sampling(), 0, (), ())
            token, position = int(batch.tokens[row]), int(batch.positions[row])
            self._upload(row, token, position, _NO_LIMIT, [], request, table, stream)
        self.map_rows(list(range(rows)), stream)

    def _upload(
        self,
        slot: int,
        token: int,
        position: int,
        limit: int,
        ends: Sequence[int],
        request: DrawRequest,
        table: Ints,
        stream: Any,
    ) -> None:
        fields = (np.array([value], np.int32) for value in (token, position, limit))
        self._inputs.upload(slot, (*fields, _padded(ends, ENDS), np.array(pack(request), REQUEST), table), stream)


def _padded(values: Sequence[int], size: int) -> Ints:
    """`values`, followed by -1: [size] i32."""
    return np.array([*values, *[-1] * (size - len(values))], np.int32)


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
        *(penalized(s), bool(s.logit_bias), s.grammar is not None),
    )
