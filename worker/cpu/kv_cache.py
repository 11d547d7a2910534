"""The CPU's KV storage: blocks of B tokens for every layer, read and written through block tables.

f32 by default, which makes the CPU the exact reference; f16 mirrors the GPU's cache in tests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from worker.model import Hparams
from worker.ops import KV_BLOCK, Batch, Ints

F32 = npt.NDArray[np.float32]


class KvCache:
    """K and V as [layers, blocks, B, Hk, D]. Memory is touched as blocks are written, not before."""

    def __init__(self, hp: Hparams, blocks: int, dtype: type[np.floating[Any]] = np.float32) -> None:
        shape = (hp.block_count, blocks, KV_BLOCK, hp.head_count_kv, hp.head_dim)
        self.k = np.zeros(shape, dtype)
        self.v = np.zeros(shape, dtype)

    def write(self, layer: int, batch: Batch, k: F32, v: F32) -> None:
        """Store k, v [T, Hk, D] at the batch's positions."""
        tables = batch.block_tables if len(batch.block_tables) == len(k) else batch.block_tables * len(k)
        offsets = batch.positions % KV_BLOCK
        blocks = [table[at] for table, at in zip(tables, batch.positions // KV_BLOCK, strict=True)]
        self.k[layer, blocks, offsets] = k
        self.v[layer, blocks, offsets] = v

    def read(self, layer: int, table: Ints, start: int, stop: int, valid: int) -> tuple[F32, F32]:
        """K and V [stop - start, Hk, D] f32 of positions [start, stop); those from `valid` on are zeros.

        `start` and `stop` are multiples of B. Zeros, because what an unwritten slot holds may not even be a number.
        """
        blocks = table[start // KV_BLOCK : stop // KV_BLOCK]
        k, v = (cache[layer, blocks].reshape(-1, *cache.shape[3:]).astype(np.float32) for cache in (self.k, self.v))
        k[valid - start :] = 0
        v[valid - start :] = 0
        return k, v
