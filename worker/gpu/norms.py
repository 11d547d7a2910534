"""The norm before an addition: a launch, or for one row in decode a part of the next product.

Kernels: `norm_add.cu`; `matvec.cu` and `glu.cu` with `NormedSum` (`kernels/normed_sum.cuh`). Twin:
`linear_norm_add` in `worker/cpu/ops.py`. The norms of products' inputs are part of `activations.py`
and `matvec.py`, those of heads of `head_norms.py`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import address
from worker.gpu.memory import DeviceArray
from worker.ops import RmsNorm

_THREADS = 256
_QUADS_KEPT = (1, 2, 4, 8)  # float4s of each operand that a thread keeps in registers
DEFINES = {"NORM_THREADS": _THREADS}
"""Also those of products that compute a `NormedSum`."""
_FLAGS = ("false", "true")
INSTANTIATIONS: tuple[KernelName, ...] = tuple(
    ("norm_add.cu", f"norm_add<{kept}, {scaled}>") for kept in _QUADS_KEPT for scaled in _FLAGS
)


_NORMED_SUM = np.dtype([("y", "u8"), ("weight", "u8"), ("residual", "u8"), ("x", "u8"), ("eps", "f4"), ("scale", "f4")])
"""`NormedSum` of normed_sum.cuh."""


@dataclass(slots=True)
class NormedSum:
    """x = (residual + norm(y)) · scale of one row, which the next product computes and stores."""

    x: DeviceArray
    y: DeviceArray
    norm: RmsNorm
    residual: DeviceArray
    scale: float
    stored: bool = False

    def argument(self) -> np.ndarray[Any, Any]:
        """The kernel parameter `NormedSum` of the product that stores x: a value of _NORMED_SUM."""
        self.stored = True
        pointers = (address(array) for array in (self.y, self.norm.weight.data, self.residual, self.x))
        return np.array((*pointers, self.norm.eps, self.scale), _NORMED_SUM)


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
