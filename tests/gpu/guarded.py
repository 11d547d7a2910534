"""A pool whose arrays come poisoned and fenced: an element left unwritten or a write beside an array shows.

Knows no op. Every byte of a fresh array is 0xFF (a NaN in every float type, -1 in integers), and so are 256 bytes on
either side of it, which `check` looks at.
"""

from __future__ import annotations

import math

import numpy as np

FENCE = 256
POISON = 0xFF


class GuardedPool:
    """`worker.gpu.launch.Allocator` for tests of single ops: nothing is ever taken back."""

    def __init__(self):
        self._fenced = []

    def empty(self, shape, dtype=np.float32):
        import cupy

        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        room = cupy.full(FENCE + -(-size // FENCE) * FENCE + FENCE, POISON, np.uint8)
        self._fenced.append((room, size))
        return cupy.ndarray(shape, dtype, memptr=room.data + FENCE)

    def put(self, values):
        """An input, fenced as well."""
        array = self.empty(values.shape, values.dtype)
        array.set(np.ascontiguousarray(values))
        return array

    def check(self):
        """No byte beside an array was written."""
        for room, size in self._fenced:
            raw = room.get()
            assert (raw[:FENCE] == POISON).all(), "bytes before an array were written"
            assert (raw[FENCE + size :] == POISON).all(), "bytes after an array were written"
