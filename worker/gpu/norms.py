"""Launcher of the norm before an addition, in both phases.

Kernel: `norm_add.cu`. Twin: `linear_norm_add` in `worker/cpu/ops.py`. The norms of products' inputs
are part of `activations.py` and `matvec.py`, those of heads of `attention.py`.
"""

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.ops import RmsNorm

_THREADS = 256
_QUADS_KEPT = (1, 2, 4, 8)  # float4s of each operand that a thread keeps in registers
DEFINES = {"NORM_THREADS": _THREADS}
_FLAGS = ("false", "true")
INSTANTIATIONS: tuple[KernelName, ...] = tuple(
    ("norm_add.cu", f"norm_add<{kept}, {scaled}>") for kept in _QUADS_KEPT for scaled in _FLAGS
)


def norm_add(
    kernels: Launcher,
    pool: Allocator,
    y: DeviceArray,
    norm: RmsNorm,
    residual: DeviceArray,
    count: DeviceArray | None = None,
    scale: float = 1.0,
) -> DeviceArray:
    """(residual + norm(y)) · scale: x [T, d] f32.

    The first `count` [1] i32 rows are valid, all if None.
    """
    rows, cols = y.shape
    x = pool.empty((rows, cols), np.float32)
    kept = next((kept for kept in _QUADS_KEPT if cols <= 4 * _THREADS * kept), _QUADS_KEPT[-1])
    args = (x, y, norm.weight.data, residual, count, np.int32(cols), np.float32(norm.eps), np.float32(scale))
    kernels.get("norm_add.cu", f"norm_add<{kept}, {_FLAGS[scale != 1.0]}>")((rows,), (_THREADS,), args, pdl=True)
    return x
