"""Activations as decode's products take them: f32, and 8-bit blocks beside it. Shapes only. Prefill's: `scaled_f16.py`.

The layout is drawn in `kernels/quantized.cuh`. Twin: `worker/cpu/quantized.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worker.gpu.launch import Allocator
from worker.gpu.memory import DeviceArray

QUANTIZED_BLOCK = 32
"""Elements that share a scale; a row is whole blocks."""


@dataclass(frozen=True, slots=True)
class Activations:
    """Rows `x` [T, cols] f32 that a decode product reads, and the same as 8-bit blocks where their maker left those.

    Without them a product quantizes for itself. The blocks are `q` [T, cols] i8 and `meta` [T, cols/32], 8 bytes a
    block: f32 scale, two i16 sums.
    """

    x: DeviceArray
    q: DeviceArray | None = None
    meta: DeviceArray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(T, cols)."""
        return int(self.x.shape[0]), int(self.x.shape[1])


def activations_like(pool: Allocator, rows: int, cols: int) -> Activations:
    """Room for `rows` rows, as 8-bit blocks too where a row is whole blocks."""
    x = pool.empty((rows, cols), np.float32)
    if cols % QUANTIZED_BLOCK:
        return Activations(x)
    meta = pool.empty((rows, cols // QUANTIZED_BLOCK), np.int64)
    return Activations(x, pool.empty((rows, cols), np.int8), meta)
