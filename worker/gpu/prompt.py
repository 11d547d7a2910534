"""A piece of a prompt, held in device memory, and how it gets there: one asynchronous copy.

A captured piece reads all of it when it runs: where it starts, how many of its tokens are real, which rows' logits are
wanted. Knows no model. Next: `prefill_ops.py`, `runner.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from worker.gpu.memory import DeviceMemory, Purpose, aligned
from worker.gpu.state import PinnedRing
from worker.ops import Batch


class PromptState:
    """`tokens` [T], `place` [2] (the first one's position, how many are real), `wanted` [R] rows, `table` [blocks] i32.

    `count` [1] is the second of `place`; `wanted_count` [1] says how many of `wanted` are.
    """

    def __init__(self, memory: DeviceMemory, tokens: int, rows: int, blocks: int) -> None:
        sizes = (4 * tokens, 4 * 2, 4 * (1 + rows), 4 * blocks)
        ends = np.cumsum([aligned(size) for size in sizes]).tolist()
        self._offsets = [0, *ends[:-1]]
        slab = memory.reserve(ends[-1], Purpose.WORKSPACE)
        self._bytes = slab.array((ends[-1],), np.uint8)
        self._bytes.fill(0)  # a piece as captured covers more tokens than are real: their ids must be some
        at = self._offsets
        self.tokens = slab.array((tokens,), np.int32, at[0])
        self.place = slab.array((2,), np.int32, at[1])
        self.count = self.place[1:]
        wanted = slab.array((1 + rows,), np.int32, at[2])
        self.wanted_count, self.wanted = wanted[:1], wanted[1:]
        self.table = slab.array((blocks,), np.int32, at[3])
        self._rows = rows
        self._ring = PinnedRing(ends[-1], slots=1)  # the host is one piece ahead at most: a cancel waits for no more

    def load(self, piece: Batch, stream: Any) -> None:
        """Set all of it. `piece` has at most T tokens and R wanted rows."""
        rows = piece.logit_rows
        if len(rows) > self._rows:
            raise ValueError(f"logits of {len(rows)} rows of a piece where there is room for {self._rows}")
        wanted = np.zeros(1 + self._rows, np.int32)
        wanted[0], wanted[1 : 1 + len(rows)] = len(rows), rows
        place = np.array((piece.positions[0], len(piece.tokens)), np.int32)
        parts = zip(self._offsets, (piece.tokens, place, wanted, piece.block_tables[0]), strict=True)
        self._ring.upload(list(parts), self._bytes, stream)
