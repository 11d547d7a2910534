"""The launcher of the sampler: draw one token per row of logits in device memory, without the host.

It keeps what a draw depends on besides its request: padding and end masks, token counts, biases.
Rows of sequences with a grammar are drawn by a launch of their own, with the masks of `masks.py`.
Twin: `worker/cpu/sampler.py`. Kernels: `sample.cu` and `sample_masked.cu`.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from worker.errors import Internal
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Launcher
from worker.gpu.masks import MaskInputs
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose
from worker.gpu.state import ENDS, REQUEST, PinnedRing, StepState, penalized
from worker.sampling import Draw, DrawRequest, Sampling
from worker.token_masks import SlotMasks

_TOP = 20
_THREADS = 256
_SLICES = 128  # of the vocabulary, in sums of log-probabilities; also the most blocks of a launch
_LISTED = 1024
"""Biased ids and stop tokens of a slot that need no allocation of their own."""
_ROW_BLOCKS = 3
"""Blocks of a launch on each multiprocessor."""
_SPREAD_SHARED = 96 << 10
"""Dynamic shared memory, unused, with which a multiprocessor of 228 KB holds one block only.

In a decode step the output head's first blocks to end would otherwise make room for three blocks of
one row on each of a third of the multiprocessors.
"""
_PADDING, _END = 1, 2

NOT_FINITE, INACTIVE = -1, -2
"""Ids of rows without a draw: the logits were not finite; the row's slot is not active."""

DRAWN = np.dtype(
    [("id", "i4"), ("count", "i4"), ("logprob", "f8"), ("top_logprobs", "f8", _TOP), ("top_ids", "i4", _TOP)]
)
"""`Drawn` of sampling.cuh."""
_BEST = np.dtype([("score", "f8"), ("raw", "f8"), ("id", "i4"), ("broken", "i4")])
_BUCKETS, _LISTED_IDS = 1024, 1024
_HISTOGRAM = np.dtype([("mass", "u8", _BUCKETS), ("count", "u4", _BUCKETS)])
_LIST = np.dtype([("keys", "u8", _LISTED_IDS), ("weights", "u8", _LISTED_IDS), ("ids", "i4", _LISTED_IDS)])
_ROW_EXCHANGE = np.dtype(
    [
        *((name, "i4") for name in ("met", "drawn", "ended", "id", "listed", "unused")),
        *(("target", "u8"), ("bests", _BEST, _SLICES)),
        *(("slice_sums", "f8", _SLICES), ("sums", "u8", _SLICES * _THREADS // 32)),
        *(("histograms", _HISTOGRAM, 2), ("list", _LIST)),
    ]
)
"""`RowExchange` of row_exchange.cuh."""
SPECIAL = np.dtype([("bias", "f8"), ("id", "i4"), ("stop", "i4")])
"""`Special` of sampling.cuh."""
_SPECIALS = np.dtype([("list", "u8"), ("count", "i4"), ("unused", "i4")])
_SLOT_ARRAYS = np.dtype(
    [
        *((name, "u8") for name in ("mask", "marks", "specials", "counts", "tokens", "positions", "requests")),
        *((name, "u8") for name in ("ends", "limits", "allowed_rows", "allowed")),
    ]
)

ROW_BYTES = _ROW_EXCHANGE.itemsize + DRAWN.itemsize
"""Device memory of a row."""
SLOT_BYTES = _LISTED * SPECIAL.itemsize + _SPECIALS.itemsize
"""Device memory of a slot, besides counts, marks and mask of the vocabulary."""

DEFINES: Mapping[str, int] = {
    "THREADS": _THREADS,
    "TOP": _TOP,
    "ENDS": ENDS,
    "LOGPROB_SLICES": _SLICES,
    "REQUEST_BYTES": REQUEST.itemsize,
    "DRAWN_BYTES": DRAWN.itemsize,
    "ROW_EXCHANGE_BYTES": _ROW_EXCHANGE.itemsize,
    "ROW_BLOCKS": _ROW_BLOCKS,
    "SPECIAL_BYTES": SPECIAL.itemsize,
    "SPECIALS_BYTES": _SPECIALS.itemsize,
    "SLOT_ARRAYS_BYTES": _SLOT_ARRAYS.itemsize,
}
FIXED_ORDERS: Mapping[str, str] = {
    "logprob_slices": f"sums over {_SLICES} slices of the vocabulary, {_THREADS} threads each, slices in order"
}
"""The orders of sums that `worker.gpu.numerics` reports."""

INSTANTIATIONS: tuple[KernelName, ...] = (
    ("sample.cu", "sample"),
    ("sample_masked.cu", "sample"),
)


class SamplerLauncher:
    """Draws for one vocabulary, `sequences` slots and launches of at most `rows` rows.

    At most `masked` rows of a launch have masks.

    `processors` is the device's number of multiprocessors, `max_shared` the most shared memory of a
    block in bytes: they determine a launch's blocks and where these run, but no bit of a result.

    Device memory of a slot: counts [V] i32, two bits an id, a list of _LISTED ids. The counts are
    dense because any number of ids can repeat up to the longest context, and a slot must never wait
    for memory: 608 KB of Qwen2.5's vocabulary are the KV of 50 tokens. Biases and stop tokens are a
    sorted list; a longer list than _LISTED ids has an allocation of its own until the slot's next
    `load`.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        vocab_size: int,
        padding_ids: Iterable[int],
        end_ids: Iterable[int],
        *,
        sequences: int,
        processors: int,
        max_shared: int,
        rows: int | None = None,
        masked: int | None = None,
    ) -> None:
        def array(shape: tuple[int, ...], dtype: Any, fill: int = 0) -> DeviceArray:
            made = memory.reserve(math.prod(shape) * np.dtype(dtype).itemsize, Purpose.WORKSPACE).array(shape, dtype)
            made.fill(fill)
            return made

        self._memory = memory
        self.vocab_size = vocab_size
        padding_ids, end_ids = tuple(padding_ids), tuple(end_ids)
        mask = np.zeros(vocab_size, np.uint8)
        mask[[i for i in padding_ids if i < vocab_size]] |= _PADDING
        mask[[i for i in end_ids if i < vocab_size]] |= _END
        self._masked = np.flatnonzero(mask)
        self._mask = array((vocab_size,), np.uint8)
        self._mask.set(mask)
        self._marks = array((sequences, -(-vocab_size // 32)), np.uint32)
        self._marks.set(np.tile(self._packed_marks(()), (sequences, 1)))
        self._lists = array((sequences, _LISTED * SPECIAL.itemsize), np.uint8)
        self._specials = array((sequences, _SPECIALS.itemsize), np.uint8)
        self._loaded: list[dict[int, tuple[float, int, int]]] = [{} for _ in range(sequences)]
        """The ids in each slot's list, by id."""
        self._long: list[tuple[DeviceArray, PinnedRing] | None] = [None] * sequences
        """Lists of more than _LISTED ids, and the buffers that they are uploaded from."""
        self._counts = array((sequences, vocab_size), np.int32)
        rows = rows or sequences
        self._exchanges = array((rows, _ROW_EXCHANGE.itemsize), np.uint8)
        self._ticket = array((1,), np.uint32)
        self.drawn = array((rows, DRAWN.itemsize), np.uint8)
        self.slot_masks = SlotMasks(vocab_size, padding_ids, end_ids)
        """Starts the masks of sequences that have a grammar."""
        self.masks = MaskInputs(memory, self.slot_masks, masked or sequences, rows)
        self._ring = PinnedRing(max(4 * vocab_size, self._lists[0].nbytes))
        self._processors = processors
        self._spread = _SPREAD_SHARED if processors >= _SLICES and max_shared >= 2 * _SPREAD_SHARED else 0

    @property
    def copied(self) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
        """What a draft slot copies: marks, specials and counts of the slots."""
        return self._marks, self._specials, self._counts

    def load(self, slot: int, request: DrawRequest, stream: Any) -> None:
        """Upload what the draws of a sequence depend on besides `StepState`: once, when it starts.

        That is its masked stop tokens, its biases, and the counts of `generated` and, if they are
        penalized, of the prompt's ids. Later draws and forced ids are counted on the device.
        """
        sampling = request.sampling
        self._load_specials(slot, sampling, request.index, stream)
        if penalized(sampling):
            seen = [*request.prompt, *request.generated] if sampling.penalize_prompt else request.generated
            counts = np.bincount(np.asarray(seen, np.int64), minlength=self.vocab_size).astype(np.int32)
            self._ring.upload([(0, counts)], self._counts[slot], stream)

    def _load_specials(self, slot: int, sampling: Sampling, index: int, stream: Any) -> None:
        """Upload the list of biased ids and stop tokens, if the slot has another list."""
        stops = sampling.stop_token_ids if index < sampling.min_tokens else frozenset[int]()
        bias = sampling.logit_bias
        special = {i: (bias.get(i, 0.0), i, int(i in stops)) for i in sorted({*bias, *stops}) if i < self.vocab_size}
        if special == self._loaded[slot]:
            return
        entries = np.array(list(special.values()), SPECIAL)
        target, ring, self._long[slot] = self._lists[slot], self._ring, None
        if len(special) > _LISTED:
            slab = self._memory.reserve(entries.nbytes, Purpose.WORKSPACE)
            target, ring = self._long[slot] = slab.array((entries.nbytes,), np.uint8), PinnedRing(entries.nbytes, 1)
        if special:
            ring.upload([(0, entries)], target, stream)
        header = np.array((target.data.ptr, len(special), 0), _SPECIALS)
        self._ring.upload([(0, header)], self._specials[slot], stream)
        self._ring.upload([(0, self._packed_marks(special))], self._marks[slot], stream)
        self._loaded[slot] = special

    def _packed_marks(self, special: Collection[int]) -> np.ndarray[Any, Any]:
        """Bit i [V / 32 u32]: id i is masked for all slots, or is one of `special`."""
        bits = np.zeros(-(-self.vocab_size // 32) * 32, np.uint8)
        bits[self._masked] = 1
        bits[list(special)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def launch(
        self,
        kernels: Launcher,
        logits: DeviceArray,
        state: StepState,
        row_slots: DeviceArray | None = None,
        *,
        masked: bool = False,
    ) -> None:
        """Draw from each row of logits [R, V] f32, into `drawn` [R] and the state's next step.

        Row r belongs to slot `row_slots[r]` ([R] i32 on the device, -1: none), or to slot r without
        `row_slots`. A row without an active slot is not read; its drawn id is INACTIVE. A slot
        becomes inactive after one of its `ends`, at its limit, and with NOT_FINITE.

        A row of a sequence with a grammar counts as inactive, unless its id is forced. It is drawn
        by another launch, `masked`, with the masks in `masks`; the results of other rows remain.
        """
        rows = len(logits)
        kernel = kernels.get("sample_masked.cu" if masked else "sample.cu", "sample")
        state_args = (row_slots, self._slot_arrays(state), self.drawn, self._exchanges, self._ticket)
        args, shared = (logits, np.int32(self.vocab_size), *state_args), self._spread if rows == 1 else 0
        kernel((self._blocks(rows), rows), (_THREADS,), args, shared_mem=shared, pdl=True)

    def _blocks(self, rows: int) -> int:
        """Blocks of each row, so that about one wave of blocks covers the device."""
        return min(_SLICES, max(1, _ROW_BLOCKS * self._processors // rows))

    def _slot_arrays(self, state: StepState) -> np.ndarray[Any, Any]:
        arrays = (
            *(self._mask, self._marks, self._specials, self._counts),
            *(state.tokens, state.positions, state.requests, state.ends, state.limits),
            *(self.masks.rows, self.masks.words),
        )
        return np.array(tuple(array.data.ptr for array in arrays), _SLOT_ARRAYS)


def unpack(raw: np.ndarray[Any, Any], request: DrawRequest) -> Draw:
    """The draw in a row of `drawn` [bytes].

    Raises: Internal if the logits were not finite.
    """
    drawn = raw.view(DRAWN)[0]
    token = int(drawn["id"])
    if token < 0:
        raise Internal("the model's logits are not finite, so no token can be drawn")
    if request.sampling.logprobs is None:
        return Draw(token)
    count = int(drawn["count"])
    top = zip(drawn["top_ids"][:count].tolist(), drawn["top_logprobs"][:count].tolist(), strict=True)
    return Draw(token, float(drawn["logprob"]), tuple(top))
