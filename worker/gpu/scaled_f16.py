"""Rows as prefill's products take them: f16 under a power of two, in the tensor cores' order; and the launcher of them.

The order is drawn in `kernels/fragments.cuh`; `matmul.py` reads it, `attention.py` writes it too. Twins: `rms_norm` in
`worker/cpu/plain.py`, `in_f16` in `worker/cpu/quantized.py`. Kernel: `scale_to_f16.cu`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.ops import RmsNorm

_GROUP = 128  # kGroup of fragments.cuh
_THREADS = 256
_KEPT = (1, 2, 4, 8)  # times 1,024 columns of a row in registers; no more than it has, as code has to be fetched too
INSTANTIATIONS: tuple[KernelName, ...] = tuple(("scale_to_f16.cu", f"scale_to_f16<{kept}>") for kept in _KEPT)


@dataclass(frozen=True, slots=True)
class ScaledF16:
    """Rows as `x` [T, padded cols] f16, each to be multiplied by its power of two in `scale` [T] f32, or by 1 if None.

    Where rows are filled up to a captured length, `count` [1] i32 says how many are real; None: all.
    """

    x: DeviceArray
    scale: DeviceArray | None
    count: DeviceArray | None = None


def padded(cols: int) -> int:
    """Columns of a row in memory: whole groups, the last filled with zeros."""
    return -(-cols // _GROUP) * _GROUP


def scale_to_f16(
    kernels: Launcher,
    pool: Allocator,
    x: DeviceArray,
    norm: RmsNorm | None = None,
    count: DeviceArray | None = None,
    per: int = 1,
) -> ScaledF16:
    """norm(x), or x itself, of x [T, cols] f32; of its rows the first `count`·`per` are real."""
    rows, cols = x.shape
    y = ScaledF16(pool.empty((rows, padded(cols)), np.float16), pool.empty((rows,), np.float32), count)
    weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
    args = (y.x, y.scale, x, weight, count, np.int32(per), np.int32(cols), np.float32(eps))
    kept = next((kept for kept in _KEPT if padded(cols) <= 4 * _THREADS * kept), _KEPT[-1])
    kernels.get("scale_to_f16.cu", f"scale_to_f16<{kept}>")((rows,), (_THREADS,), args, pdl=True)
    return y
