"""Inputs of matrix products: Q8 blocks for decode, scaled f16 rows for prefill (with its launcher).

Layouts: `kernels/q8_activations.cuh`, `kernels/fragments.cuh`. Kernel: `scale_to_f16.cu`. Twins:
`tests/quantized_ops.py`, `rms_norm` in `worker/cpu/plain.py`. Next: `matvec.py`, `matmul.py`.
"""

from dataclasses import dataclass

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.ops import RmsNorm

Q8_BLOCK = 32
"""Elements that share a scale; a row is a whole number of blocks."""
_COLUMN_GROUP = 128  # kColumnGroup of fragments.cuh
_THREADS = 256
_QUADS_KEPT = (1, 2, 4, 8)  # float4s that a thread keeps in registers: few, since code is fetched too
DEFINES = {"SCALE_THREADS": _THREADS}
INSTANTIATIONS: tuple[KernelName, ...] = tuple(("scale_to_f16.cu", f"scale_to_f16<{kept}>") for kept in _QUADS_KEPT)


@dataclass(frozen=True, slots=True)
class Q8Activations:
    """Input rows of a decode product: `x` [T, cols] f32, and optionally the same rows as Q8 blocks.

    `q` [T, cols] i8 and `meta` [T, cols/32], 8 bytes a block: an f32 scale and two i16 sums. A
    product whose input has no Q8 blocks quantizes `x` itself.
    """

    x: DeviceArray
    q: DeviceArray | None = None
    meta: DeviceArray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(T, cols)."""
        return int(self.x.shape[0]), int(self.x.shape[1])


def empty_q8(pool: Allocator, rows: int, cols: int) -> Q8Activations:
    """Allocate `rows` rows, with Q8 blocks if `cols` is a multiple of 32."""
    x = pool.empty((rows, cols), np.float32)
    if cols % Q8_BLOCK:
        return Q8Activations(x)
    meta = pool.empty((rows, cols // Q8_BLOCK), np.int64)
    return Q8Activations(x, pool.empty((rows, cols), np.int8), meta)


@dataclass(frozen=True, slots=True)
class ScaledF16:
    """Input rows of a prefill product: `x` [T, padded cols] f16, to multiply by `scale` [T] f32.

    Scales are powers of two; None means 1. `count` [1] i32 is the number of valid rows, those
    before the padding to a captured length; None means all.
    """

    x: DeviceArray
    scale: DeviceArray | None
    count: DeviceArray | None = None


def padded(cols: int) -> int:
    """Columns of a row in memory: whole groups of 128, the last one padded with zeros."""
    return -(-cols // _COLUMN_GROUP) * _COLUMN_GROUP


def scale_to_f16(
    kernels: Launcher,
    pool: Allocator,
    x: DeviceArray,
    norm: RmsNorm | None = None,
    count: DeviceArray | None = None,
    rows_per_token: int = 1,
) -> ScaledF16:
    """norm(x), or x, of x [T, cols] f32; the first `count`·`rows_per_token` rows are valid."""
    rows, cols = x.shape
    y = ScaledF16(pool.empty((rows, padded(cols)), np.float16), pool.empty((rows,), np.float32), count)
    weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
    args = (y.x, y.scale, x, weight, count, np.int32(rows_per_token), np.int32(cols), np.float32(eps))
    kept = next((kept for kept in _QUADS_KEPT if padded(cols) <= 4 * _THREADS * kept), _QUADS_KEPT[-1])
    kernels.get("scale_to_f16.cu", f"scale_to_f16<{kept}>")((rows,), (_THREADS,), args, pdl=True)
    return y
