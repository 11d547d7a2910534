"""The masks of grammars on their way to the sampler: computed in pinned memory, then uploaded.

A step's masks are one copy: the number of each row's mask, then the masks. Only `sample_masked.cu`
reads them. Next: `worker/token_masks.py`, `sampler.py`.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from worker.gpu.memory import DeviceMemory, Purpose, aligned
from worker.gpu.state import PINNED_SLOTS, PinnedRing
from worker.token_masks import SlotMask, SlotMasks

_STEPS = 2
"""Steps whose masks have a pinned buffer; the draws of the step before are complete."""


class MaskInputs:
    """The masks of at most `sequences` rows, of launches of at most `rows` rows.

    Device memory: `rows` [R] i32, the number of each row's mask, -1 for none; `words`
    [sequences, ⌈V/32⌉] u32. Pinned memory is allocated when the first mask is computed.
    """

    def __init__(self, memory: DeviceMemory, masks: SlotMasks, sequences: int, rows: int) -> None:
        self._masks = masks
        self._sequences, self._row_count = sequences, rows
        self._first_mask = aligned(4 * rows)
        nbytes = self._first_mask + 4 * masks.words * sequences
        slab = memory.reserve(nbytes, Purpose.WORKSPACE)
        self._bytes = slab.array((nbytes,), np.uint8)
        self.rows = slab.array((rows,), np.int32)
        self.words = slab.array((sequences, masks.words), np.uint32, self._first_mask)
        self.rows.fill(-1)

    def load(self, masks: Mapping[int, SlotMask], stream: Any) -> None:
        """Compute and upload the masks of rows, by row. Rows whose masks have errors get none."""
        ring = self._of_one if list(masks) == [0] else self._of_many
        buffer = ring.writable()
        rows = buffer[: 4 * self._row_count].view(np.int32)
        words = buffer[self._first_mask :].view(np.uint32).reshape(-1, self._masks.words)
        self._masks.fill(list(masks.values()), words)
        rows.fill(-1)
        for number, (row, mask) in enumerate(masks.items()):
            rows[row] = -1 if mask.error else number
        ring.upload_written(self._first_mask + 4 * self._masks.words * len(masks), self._bytes, stream)

    @cached_property
    def _of_one(self) -> PinnedRing:
        return PinnedRing(self._first_mask + 4 * self._masks.words, PINNED_SLOTS)

    @cached_property
    def _of_many(self) -> PinnedRing:
        return PinnedRing(self._first_mask + 4 * self._masks.words * self._sequences, _STEPS)
