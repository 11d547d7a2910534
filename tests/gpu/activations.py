"""Inputs of products, packed on the host: tests of a product depend on no other kernel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.quantized_ops import BLOCK, glu_bounds, h_scales, in_f16, quantize
from worker.gpu.activations import Q8Activations, Q8Tiles, ScaledF16, padded
from worker.ops import QTensor, RmsNorm
from worker.quants import F32


def rows_of(tokens, cols, seed=3):
    """Roughly normal rows with an outlier each, whose scales differ by a factor of a thousand."""
    rng = np.random.default_rng([seed, tokens, cols])
    x = rng.normal(size=(tokens, cols)) * 10.0 ** rng.uniform(-1.5, 1.5, (tokens, 1))
    x[np.arange(tokens), rng.integers(0, cols, tokens)] *= 20
    return x.astype(np.float32)


def q8_activations(pool, x):
    """x [T, cols] as f32 and as Q8 blocks, in the layout of kernels/q8_activations.cuh."""
    tokens, cols = x.shape
    q, scale = quantize(x)
    halves = q.reshape(tokens, cols // BLOCK, 2, BLOCK // 2)
    meta = np.zeros((tokens, cols // BLOCK), [("scale", "<f4"), ("low", "<i2"), ("high", "<i2")])
    meta["scale"] = scale
    meta["low"], meta["high"] = halves.sum(axis=3, dtype=np.int64).transpose(2, 0, 1)
    planes = halves.transpose(0, 2, 1, 3).reshape(tokens, cols)
    return Q8Activations(pool.put(x), pool.put(planes), pool.put(meta.view(np.int64)))


def q8_tiles(pool, x, factor=None):
    """x [T, cols] as f32 and as Q8 tiles, in the layout of kernels/q8_tiles.cuh."""
    tokens, cols = x.shape
    q, scale = quantize(x)
    units, tiles = cols // BLOCK, -(-tokens // 16)
    tiles = tiles if tiles <= 2 else -(-tiles // 4) * 4
    words = np.zeros((tiles, 8, 2, units, 2, 4, 4), np.int8)  # tile, pair, token of it, unit, half, c, byte
    words.reshape(tiles * 16, cols)[:tokens] = q.reshape(tokens, cols)
    meta = np.zeros((3, units, tiles * 16), np.float32)
    halves = q.reshape(tokens, units, 2, BLOCK // 2).sum(axis=3, dtype=np.int64)
    meta[0, :, :tokens], meta[1, :, :tokens], meta[2, :, :tokens] = scale.T, halves.sum(axis=2).T, halves[:, :, 0].T
    tiled_meta = np.ascontiguousarray(meta.reshape(3, units, tiles, 16).transpose(1, 2, 0, 3))
    packed = np.ascontiguousarray(words.transpose(3, 0, 1, 5, 2, 4, 6)).reshape(tiles * 16, cols)
    return Q8Tiles(pool.put(x), pool.put(packed), pool.put(tiled_meta), None if factor is None else pool.put(factor))


def f32_activations(pool, x):
    """x [T, cols] as f32 only, for a product that quantizes its input."""
    return Q8Activations(pool.put(x))


def q8_bytes(rows):
    """Bytes of the Q8 blocks of rows."""
    return rows.q.get().tobytes(), rows.meta.get().tobytes()


def norm_of(pool, cols, eps=1e-5, seed=1):
    """Random weights of a norm on the host, and the norm."""
    weight = np.random.default_rng(seed).normal(1, 0.25, cols).astype(np.float32)
    return weight, RmsNorm(QTensor("norm", (cols,), F32, pool.put(weight)), eps)


def fragment_order(cols):
    """Index of each column in a stored row: the order of kernels/fragments.cuh."""
    column = np.arange(cols)
    unit, element = column // 32 % 4, column % 32
    return column // 128 * 128 + element // 4 * 16 + element // 2 % 2 * 8 + unit * 2 + element % 2


def scaled_f16(pool, x):
    """x [T, cols] as the input of a prefill product."""
    scale = 2.0 ** (np.floor(np.log2(np.abs(x).max(axis=1))) - 10)
    scaled = np.zeros((len(x), padded(x.shape[1])), np.float16)
    scaled[:, fragment_order(x.shape[1])] = in_f16(x) / scale[:, None]
    return ScaledF16(pool.put(scaled), pool.put(scale.astype(np.float32)))


def glu_rows(pool, x, gate, up, activation):
    """x [T, cols] as the input of a gated FFN of two `Projection`s, with the scales of its result."""
    bounds = glu_bounds((gate.weight, gate.bias), (up.weight, up.bias), activation)
    return replace(scaled_f16(pool, x), h_scale=pool.put(h_scales(x, bounds)))


def values_of(rows, cols):
    """Values [T, cols] f32 of the input of a prefill product. Asserts that its padding is zeros."""
    x = rows.x.get().astype(np.float32)
    values = x[:, fragment_order(cols)]
    assert np.count_nonzero(x) == np.count_nonzero(values)
    return values if rows.scale is None else values * rows.scale.get()[:, None]
