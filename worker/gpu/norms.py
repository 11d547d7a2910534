"""Launchers of the norms before an addition, in both phases.

Kernels: `norm_add.cu`, `branches_norm_add.cu`. Twins: `linear_norm_add`, `branches_norm_add` in
`worker/cpu/ops.py`. The norms of products' inputs are part of `activations.py` and `matvec.py`,
those of heads of `attention.py` and `head_norms.py`.
"""

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.ops import Branch, RmsNorm

_THREADS = 256
_QUADS_KEPT = (1, 2, 4, 8)  # float4s of each operand that a thread keeps in registers
DEFINES = {"NORM_THREADS": _THREADS}
_FLAGS = ("false", "true")
INSTANTIATIONS: tuple[KernelName, ...] = (
    *(("norm_add.cu", f"norm_add<{kept}, {scaled}>") for kept in _QUADS_KEPT for scaled in _FLAGS),
    *(("branches_norm_add.cu", f"branches_norm_add<{kept}>") for kept in _QUADS_KEPT),
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
    kept = _quads_kept(cols)
    args = (x, y, norm.weight.data, residual, count, np.int32(cols), np.float32(norm.eps), np.float32(scale))
    kernels.get("norm_add.cu", f"norm_add<{kept}, {_FLAGS[scale != 1.0]}>")((rows,), (_THREADS,), args, pdl=True)
    return x


def branches_norm_add(
    kernels: Launcher,
    pool: Allocator,
    branches: tuple[Branch, Branch],
    norm: RmsNorm,
    residual: DeviceArray,
    count: DeviceArray | None = None,
    scale: float = 1.0,
) -> DeviceArray:
    """(residual + norm(Σ_i norm_i(y_i))) · scale of branches (y_i [T, d], norm_i): x [T, d] f32.

    `count` as in `norm_add`.
    """
    rows, cols = residual.shape
    x = pool.empty((rows, cols), np.float32)
    operands = [part for y, own in branches for part in (y, own.weight.data)]
    epsilons = [np.float32(each.eps) for each in (*(own for _, own in branches), norm)]
    args = (x, *operands, norm.weight.data, residual, count, np.int32(cols), *epsilons, np.float32(scale))
    kernels.get("branches_norm_add.cu", f"branches_norm_add<{_quads_kept(cols)}>")((rows,), (_THREADS,), args, pdl=True)
    return x


def _quads_kept(cols: int) -> int:
    """float4s of each operand that a thread keeps; further columns are read twice."""
    return next((kept for kept in _QUADS_KEPT if cols <= 4 * _THREADS * kept), _QUADS_KEPT[-1])
