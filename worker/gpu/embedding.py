"""The launchers of de-quantization: rows of a table for tokens, rows of any array, a whole matrix for comparisons.

Twins: `embed` in `worker/cpu/ops.py`, `dequantize` in `worker/quants.py`. Kernel: `dequantize.cu`.
"""

from __future__ import annotations

import math

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import PLANES, BlockMatrix, unit_elements
from worker.gpu.memory import DeviceArray
from worker.ops import QTensor
from worker.quants import F32, QUANT_TYPES

_THREADS = 128
INSTANTIATIONS: tuple[KernelName, ...] = tuple(("dequantize.cu", f"dequantize<{kind.name}>") for kind in QUANT_TYPES)


def embed(kernels: Launcher, pool: Allocator, table: QTensor, tokens: DeviceArray) -> DeviceArray:
    """Rows of `table` [V, d] for `tokens` [T] i32: x [T, d] f32."""
    out = pool.empty((len(tokens), table.shape[-1]), np.float32)
    _launch(kernels, table, tokens, out)
    return out


def gather_rows(kernels: Launcher, pool: Allocator, x: DeviceArray, rows: DeviceArray) -> DeviceArray:
    """x[rows] of x [T, …] and rows [R] i32, as from a table of f32: of any type, but rows of whole words."""
    out = pool.empty((len(rows), x.shape[-1]), x.dtype)
    words = x.shape[-1] * x.dtype.itemsize // 4
    _launch(kernels, QTensor("x", (len(x), words), F32, BlockMatrix(F32, (x, None, None, None))), rows, out)
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
        (rows, -(-units // _THREADS)), (_THREADS,), (planes, tokens, out, np.int32(units)), pdl=True
    )
