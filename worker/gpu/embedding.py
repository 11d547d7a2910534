"""The launchers of de-quantization: rows of a table for tokens, and a whole matrix for comparisons.

Twins: `embed` in `worker/cpu/ops.py`, `dequantize` in `worker/quants.py`. Kernel: `dequantize.cu`.
"""

from __future__ import annotations

import math

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import PLANES, unit_elements
from worker.gpu.memory import DeviceArray
from worker.ops import QTensor
from worker.quants import QUANT_TYPES

_THREADS = 128
INSTANTIATIONS: tuple[KernelName, ...] = tuple(("dequantize.cu", f"dequantize<{kind.name}>") for kind in QUANT_TYPES)


def embed(kernels: Launcher, pool: Allocator, table: QTensor, tokens: DeviceArray) -> DeviceArray:
    """Rows of `table` [V, d] for `tokens` [T] i32: x [T, d] f32."""
    out = pool.empty((len(tokens), table.shape[-1]), np.float32)
    _launch(kernels, table, tokens, out)
    return out


def dequantized(kernels: Launcher, pool: Allocator, matrix: QTensor) -> DeviceArray:
    """The whole matrix [..., rows, cols] as f32."""
    out = pool.empty(matrix.shape, np.float32)
    _launch(kernels, matrix, None, out)
    return out


def _launch(kernels: Launcher, matrix: QTensor, tokens: DeviceArray | None, out: DeviceArray) -> None:
    units = matrix.shape[-1] // unit_elements(matrix.kind)
    rows = math.prod(out.shape[:-1])
    planes = np.array(matrix.data.addresses(), PLANES)
    kernels.get("dequantize.cu", f"dequantize<{matrix.kind.name}>")(
        (rows, -(-units // _THREADS)), (_THREADS,), (planes, tokens, out, np.int32(units)), early=True
    )
