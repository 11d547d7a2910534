"""Unfused operations: each formula once, in plain NumPy. `worker/cpu/ops.py` composes them.

Row t of a result depends on row t of the operands alone, and its instructions do not depend on the
number of rows. Matrix products use tiles of fixed height (`tile`), since BLAS changes bits with
shapes.
"""

import numpy as np
import numpy.typing as npt

from worker.cpu.threads import Threads
from worker.ops import Activation
from worker.rope import Rope

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


def rms_norm(x: F32, weight: F32 | np.float32, eps: float) -> F32:
    """x / sqrt(mean(x²) + eps) · weight over the last axis: [T, d] f32."""
    mean: F32 = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    result: F32 = x * (np.float32(1) / np.sqrt(mean + np.float32(eps))) * weight
    return result


def matmul(x: F32, weight: F32, bias: F32 | None, tile: int, threads: Threads) -> F32:
    """y = x·Wᵀ + b [T, rows] f32 for x [T, cols], W [rows, cols], in tiles of `tile` rows of x."""
    rows, cols = weight.shape
    y = np.empty((len(x), rows), np.float32)
    padded = np.zeros((-(-len(x) // tile), tile, cols), np.float32)
    padded.reshape(-1, cols)[: len(x)] = x

    def fill(start: int, stop: int) -> None:
        slab = weight[start:stop]
        for i, part in enumerate(padded):
            out = y[i * tile : (i + 1) * tile, start:stop]
            out[:] = slab @ part[0] if tile == 1 else (part @ slab.T)[: len(out)]

    threads.over_rows(rows, cols, fill)
    if bias is not None:
        y += bias
    return y


def rotate(x: F32, positions: I32, rope: Rope) -> F32:
    """Rotate the first `rope.dims` elements of every head of x [T, heads, D] by the position."""
    dims, half = rope.dims, rope.dims // 2
    pairs = (slice(0, dims, 2), slice(1, dims, 2)) if rope.adjacent else (slice(0, half), slice(half, dims))
    cos, sin = rope.cos[positions][:, None, :], rope.sin[positions][:, None, :]
    a, b = (x[..., each] for each in pairs)
    rotated = x.copy()
    rotated[..., pairs[0]] = a * cos - b * sin
    rotated[..., pairs[1]] = b * cos + a * sin
    return rotated


def softmax(scores: F32, sinks: F32 | None = None) -> F32:
    """Softmax over the last axis; `sinks` (broadcast, last axis 1) adds to the denominator only."""
    peak = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        peak = np.maximum(peak, sinks)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks - peak)
    result: F32 = weights / total
    return result


def gated(gate: F32, up: F32, activation: Activation) -> F32:
    """The gated product of an FFN; see `Activation`."""
    if activation.limit is not None:
        limit = np.float32(activation.limit)
        gate = np.minimum(gate, limit)
        up = np.clip(up, -limit, limit) + np.float32(1)
    exponent = -np.float32(activation.alpha) * gate
    with np.errstate(over="ignore"):  # exp of a large negative gate overflows: σ is 0
        if activation.cubic:
            exponent *= np.float32(1) + np.float32(activation.cubic) * np.square(gate)
        sigma = np.float32(1) / (np.float32(1) + np.exp(exponent))
    result: F32 = gate * sigma * up
    return result


def top_k(logits: F32, k: int) -> tuple[I32, F32]:
    """Ids of each row's k largest logits (ties: lower id) and their softmax: two arrays [T, k]."""
    experts = np.argsort(-logits, axis=-1, kind="stable")[:, :k].astype(np.int32)
    return experts, softmax(np.take_along_axis(logits, experts, axis=-1))
