"""The paged KV cache: blocks of B tokens of every layer, in f16, addressed through block tables.

One slab of device memory, laid out as in `kernels/kv_cache.cuh`. Unwritten slots are never read.
"""

from __future__ import annotations

import numpy as np

from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose
from worker.model import Hparams
from worker.ops import KV_BLOCK

ELEMENT_BYTES = 2
"""Bytes of an f16."""


class KvCache:
    """K and V of each layer as [blocks, Hk, B, D] f16."""

    def __init__(self, memory: DeviceMemory, hp: Hparams, blocks: int) -> None:
        shape = (hp.block_count, 2, blocks, hp.head_count_kv, KV_BLOCK, hp.head_dim)
        slab = memory.reserve(blocks * KV_BLOCK * hp.kv_bytes_per_token(ELEMENT_BYTES), Purpose.KV)
        self.array: DeviceArray = slab.array(shape, np.float16)
        self._layers = [(self.array[layer, 0], self.array[layer, 1]) for layer in range(hp.block_count)]

    def layer(self, layer: int) -> tuple[DeviceArray, DeviceArray]:
        """One layer's keys and values."""
        return self._layers[layer]
