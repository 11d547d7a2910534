"""The launcher that makes rows ready for prefill's products: RMSNorm or none, then f16 under a power of two.

Decode's products do that for themselves (`kernels/staged.cuh`). Twins: `rms_norm` in `worker/cpu/plain.py`, `in_f16` in
`worker/cpu/quantized.py`. Kernel: `norms.cu`.
"""

from __future__ import annotations

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.gpu.quantized import Halved, halved_like
from worker.ops import RmsNorm

_THREADS = 256
INSTANTIATIONS: tuple[KernelName, ...] = (("norms.cu", "norm_halve"),)


def halved_rows(kernels: Launcher, pool: Allocator, x: DeviceArray, norm: RmsNorm | None = None) -> Halved:
    """norm(x), or x itself, [T, cols] as f16 with a power of two a row."""
    rows, cols = x.shape
    y = halved_like(pool, rows, cols)
    weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
    kernels.get("norms.cu", "norm_halve")(
        (rows,), (_THREADS,), (y.x, y.scale, x, weight, np.int32(cols), np.float32(eps))
    )
    return y
