"""A pool of poisoned and fenced arrays: reveals unwritten elements and writes out of bounds.

Every byte of a new array is 0xFF (a NaN in every float type, -1 in integers), and so are 256 bytes
on either side of it, which `check` compares.
"""

from __future__ import annotations

import math

import numpy as np

FENCE = 256
POISON = 0xFF


class GuardedPool:
    """`worker.gpu.launch.Allocator` for tests of single ops; memory is never reused."""

    def __init__(self):
        self._fenced = []

    def empty(self, shape, dtype=np.float32):
        import cupy

        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = cupy.full(FENCE + -(-size // FENCE) * FENCE + FENCE, POISON, np.uint8)
        self._fenced.append((buffer, size))
        return cupy.ndarray(shape, dtype, memptr=buffer.data + FENCE)

    def put(self, values):
        """Copy an input to a fenced array."""
        array = self.empty(values.shape, values.dtype)
        array.set(np.ascontiguousarray(values))
        return array

    def check(self):
        """Assert that no byte outside an array was written."""
        for buffer, size in self._fenced:
            raw = buffer.get()
            assert (raw[:FENCE] == POISON).all(), "bytes before an array were written"
            assert (raw[FENCE + size :] == POISON).all(), "bytes after an array were written"
