"""Inputs of products on the device, packed on the host from the twin's rounding: so no test leans on another kernel."""

from __future__ import annotations

import numpy as np

from worker.cpu.quantized import BLOCK, in_f16, quantize
from worker.gpu.quantized import Activations
from worker.gpu.scaled_f16 import ScaledF16, padded
from worker.ops import QTensor, RmsNorm
from worker.quants import F32


def rows_of(tokens, cols, seed=3):
    """About normal rows whose scales differ by a thousand, with an outlier in each."""
    rng = np.random.default_rng([seed, tokens, cols])
    x = rng.normal(size=(tokens, cols)) * 10.0 ** rng.uniform(-1.5, 1.5, (tokens, 1))
    x[np.arange(tokens), rng.integers(0, cols, tokens)] *= 20
    return x.astype(np.float32)


def activations(pool, x):
    """Every form of x [T, cols] that decode's products read; the layout is that of kernels/quantized.cuh."""
    tokens, cols = x.shape
    q, scale = quantize(x)
    halves = q.reshape(tokens, cols // BLOCK, 2, BLOCK // 2)
    meta = np.zeros((tokens, cols // BLOCK), [("scale", "<f4"), ("low", "<i2"), ("high", "<i2")])
    meta["scale"] = scale
    meta["low"], meta["high"] = halves.sum(axis=3, dtype=np.int64).transpose(2, 0, 1)
    planes = halves.transpose(0, 2, 1, 3).reshape(tokens, cols)
    return Activations(pool.put(x), pool.put(planes), pool.put(meta.view(np.int64)))


def f32_rows(pool, x):
    """x [T, cols] alone, for a product that quantizes for itself."""
    return Activations(pool.put(x))


def left_blocks(rows):
    """The bytes of the 8-bit blocks that a kernel left beside its f32 rows."""
    return rows.q.get().tobytes(), rows.meta.get().tobytes()


def norm_of(pool, cols, eps=1e-5):
    """Weights of a norm on the host, and the norm."""
    weight = np.random.default_rng(1).normal(1, 0.25, cols).astype(np.float32)
    return weight, RmsNorm(QTensor("norm", (cols,), F32, pool.put(weight)), eps)


def places(cols):
    """Where each column of a prefill row lies; the order is that of kernels/fragments.cuh."""
    column = np.arange(cols)
    unit, element = column // 32 % 4, column % 32
    return column // 128 * 128 + element // 4 * 16 + element // 2 % 2 * 8 + unit * 2 + element % 2


def scaled_f16(pool, x):
    """x [T, cols] as prefill's products read it."""
    scale = 2.0 ** (np.floor(np.log2(np.abs(x).max(axis=1))) - 10)
    scaled = np.zeros((len(x), padded(x.shape[1])), np.float16)
    scaled[:, places(x.shape[1])] = in_f16(x) / scale[:, None]
    return ScaledF16(pool.put(scaled), pool.put(scale.astype(np.float32)))


def values_of(rows, cols):
    """What rows on their way to a prefill product hold: [T, cols] f32. What fills their groups is zeros."""
    x = rows.x.get().astype(np.float32)
    values = x[:, places(cols)]
    assert np.count_nonzero(x) == np.count_nonzero(values)
    return values if rows.scale is None else values * rows.scale.get()[:, None]
