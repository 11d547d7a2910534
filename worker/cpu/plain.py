"""The unfused twins: each formula once, in plain NumPy. The ops of `worker/cpu/ops.py` are made of them.

Every function gives row t of its result from row t of its operands alone, by the same instructions whatever the number
of rows is; matrix products get that by tiles of fixed height (`tile`), since BLAS changes bits with its shapes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from worker.cpu.threads import Threads
from worker.ops import Activation
from worker.rope import Rope

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x / sqrt(mean(x²) + eps) · weight over the last axis: [T, d] f32."""
    mean: F32 = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    result: F32 = x * (np.float32(1) / np.sqrt(mean + np.float32(eps))) * weight
    return result


def matmul(x: F32, weight: F32, bias: F32 | None, tile: int, threads: Threads) -> F32:
    """x·Wᵀ + b for x [T, cols], W [rows, cols]: y [T, rows] f32, `tile` rows of x at a time, the last one padded."""
    rows, cols = weight.shape
    y = np.empty((len(x), rows), np.float32)
    tiles = [_padded(x[at : at + tile], tile) for at in range(0, len(x), tile)]

    def fill(start: int, stop: int) -> None:
        slab = weight[start:stop]
        for i, part in enumerate(tiles):
            out = y[i * tile : (i + 1) * tile, start:stop]
            out[:] = slab @ part[0] if tile == 1 else (part @ slab.T)[: len(out)]

    threads.over_rows(rows, cols, fill)
    if bias is not None:
        y += bias
    return y


def _padded(part: F32, tile: int) -> F32:
    if len(part) == tile:
        return part
    return np.concatenate([part, np.zeros((tile - len(part), part.shape[1]), np.float32)])


def rotate(x: F32, positions: I32, rope: Rope) -> F32:
    """Turn the first `rope.dims` elements of every head of x [T, heads, D] by its token's position."""
    half = rope.dims // 2
    cos, sin = rope.cos[positions][:, None, :], rope.sin[positions][:, None, :]
    first, second = (
        (slice(0, rope.dims, 2), slice(1, rope.dims, 2))
        if rope.adjacent
        else (
            slice(0, half),
            slice(half, rope.dims),
        )
    )
    a, b = x[..., first], x[..., second]
    turned = x.copy()
    turned[..., first] = a * cos - b * sin
    turned[..., second] = b * cos + a * sin
    return turned


def softmax(scores: F32, sinks: F32 | None = None) -> F32:
    """Softmax over the last axis; `sinks` (broadcast, last axis 1) joins the denominator alone."""
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
    with np.errstate(over="ignore"):  # exp of a large negative gate: σ is 0 then, as it should be
        sigma = np.float32(1) / (np.float32(1) + np.exp(-np.float32(activation.alpha) * gate))
    result: F32 = gate * sigma * up
    return result


def top_k(logits: F32, k: int) -> tuple[I32, F32]:
    """The k largest of each row, falling, ties to the lower id, and the softmax over them: [T, k] i32, [T, k] f32."""
    experts = np.argsort(-logits, axis=-1, kind="stable")[:, :k].astype(np.int32)
    return experts, softmax(np.take_along_axis(logits, experts, axis=-1))
