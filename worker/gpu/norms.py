"""Launchers that make rows ready for the products: RMSNorm or none, then int8 blocks: decode. Prefill: `halved.py`.

Twins: `rms_norm` in `worker/cpu/plain.py`, `quantize` in `worker/cpu/quantized.py`. Kernels: `norms.cu`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.gpu.quantized import Activations, activations_like
from worker.ops import RmsNorm

_THREADS = 256
INSTANTIATIONS: tuple[KernelName, ...] = (("norms.cu", "norm_forms"),)


def rows_for(
    kernels: Launcher,
    pool: Allocator,
    x: DeviceArray,
    norm: RmsNorm | None,
    *,
    quantized: bool,
    plain: bool,
) -> Activations:
    """norm(x), or x itself, [T, cols] f32 in the forms that a decode product wants: one launch, none if x will do."""
    own = plain and norm is not None
    y = activations_like(pool, *x.shape, quantized=quantized, plain=own)
    if quantized or own:
        _launch(kernels, "norm_forms", (y.q, y.meta, y.x), x, norm)
    return y if norm is not None else replace(y, x=x)


def _launch(kernels: Launcher, kernel: str, results: tuple[Any, ...], x: DeviceArray, norm: RmsNorm | None) -> None:
    rows, cols = x.shape
    weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
    kernels.get("norms.cu", kernel)((rows,), (_THREADS,), (*results, x, weight, np.int32(cols), np.float32(eps)))
