"""Activations as decode's products take them: 8-bit blocks, or f32. Shapes only. Prefill's: `halved.py`.

The layout is drawn in `kernels/quantized.cuh`; `norms.py` fills it, `matvec.py` reads it. Twin:
`worker/cpu/quantized.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from worker.gpu.launch import Allocator
from worker.gpu.memory import DeviceArray
from worker.ops import Linear


@dataclass(frozen=True, slots=True)
class Activations:
    """Decode's rows, in the forms that some weight wants: the block types 8-bit blocks, the others `x` [T, cols] f32.

    The blocks of 32 are `q` [T, cols] i8 and `meta` [T, cols/32], 8 bytes a block: f32 scale, two i16 sums.
    """

    q: DeviceArray | None
    meta: DeviceArray | None
    x: DeviceArray | None

    @property
    def shape(self) -> tuple[int, int]:
        """(T, cols)."""
        form = self.q if self.q is not None else self.x
        assert form is not None, "a product's input has at least one form"
        return int(form.shape[0]), int(form.shape[1])


def wants(linears: Iterable[Linear]) -> tuple[bool, bool]:
    """(8-bit blocks, f32): which forms of its input the weights of a decode product read."""
    block_types = {linear.weight.kind.block_size > 1 for linear in linears}
    return True in block_types, False in block_types


def activations_like(pool: Allocator, rows: int, cols: int, *, quantized: bool, plain: bool) -> Activations:
    """Room for `rows` rows in the wanted forms; cols is a multiple of 32."""
    return Activations(
        pool.empty((rows, cols), np.int8) if quantized else None,
        pool.empty((rows, cols // 32), np.int64) if quantized else None,
        pool.empty((rows, cols), np.float32) if plain else None,
    )
