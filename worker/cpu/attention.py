"""Causal grouped attention over the KV cache on the CPU; twin of the GPU's attention kernels.

Prefill computes tiles of B queries that start at multiples of B. The shapes of a tile follow from
its position alone, so its bits do not depend on the chunks of the prompt. Decode computes one query
at a time. Next: `kv_cache.py`.
"""

import numpy as np
import numpy.typing as npt

from worker.cpu.kv_cache import F32, KvCache
from worker.cpu.plain import softmax
from worker.ops import KV_BLOCK, Attention, Batch, Ints, Phase


def attend(q: F32, cache: KvCache, spec: Attention, batch: Batch) -> F32:
    """Attention of rotated queries q [T, H, D] over the cached keys and values: y [T, H·D] f32."""
    y = np.empty((len(q), spec.n_heads * spec.head_dim), np.float32)
    if batch.phase is Phase.DECODE:
        for t, table in enumerate(batch.block_tables):
            y[t : t + 1] = _attend_tile(q[t : t + 1], int(batch.positions[t]), table, cache, spec, 1)
        return y
    start = int(batch.positions[0])
    for t in range(0, len(q), KV_BLOCK):
        y[t : t + KV_BLOCK] = _attend_tile(q[t : t + KV_BLOCK], start + t, batch.block_tables[0], cache, spec, KV_BLOCK)
    return y


def _attend_tile(q: F32, start: int, table: Ints, cache: KvCache, spec: Attention, tile: int) -> F32:
    """Attention of n ≤ `tile` queries from position `start` on, padded to `tile`: [n, H·D] f32."""
    n, groups = len(q), spec.n_heads // spec.n_kv_heads
    oldest = max(0, start - spec.window + 1) if spec.window else 0
    first = oldest // KV_BLOCK * KV_BLOCK
    last = -(-(start + tile) // KV_BLOCK) * KV_BLOCK
    k, v = cache.read(spec.layer, table, first, last, valid=start + n)
    padded = np.zeros((tile, spec.n_kv_heads, groups, spec.head_dim), np.float32)
    padded[:n] = q.reshape(n, spec.n_kv_heads, groups, spec.head_dim)
    queries = padded.transpose(1, 2, 0, 3).reshape(spec.n_kv_heads, groups * tile, spec.head_dim)
    scores = (queries @ k.transpose(1, 2, 0)) * np.float32(spec.head_dim**-0.5)
    scores = scores.reshape(spec.n_kv_heads, groups, tile, last - first)
    scores = np.where(_mask(start, tile, first, last, spec.window), scores, np.float32(-np.inf))
    sinks = None if spec.sinks is None else spec.sinks.data.reshape(spec.n_kv_heads, groups, 1, 1)
    weights = softmax(scores, sinks).reshape(spec.n_kv_heads, groups * tile, last - first)
    y = (weights @ v.transpose(1, 0, 2)).reshape(spec.n_kv_heads, groups, tile, spec.head_dim)
    result: F32 = y.transpose(2, 0, 1, 3).reshape(tile, -1)[:n]
    return result


def _mask(start: int, tile: int, first: int, last: int, window: int) -> npt.NDArray[np.bool_]:
    """Keys [first, last) that each query [start, start + tile) attends to: [tile, last - first]."""
    queries = np.arange(start, start + tile)[:, None]
    keys = np.arange(first, last)[None, :]
    causal = keys <= queries
    return causal & (keys > queries - window) if window else causal
