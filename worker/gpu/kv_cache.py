"""The GPU's KV storage: blocks of B tokens for every layer, f16, found through block tables by the attention kernels.

One plain slab of device memory; layout as in `kernels/kv_cache.cuh`. What an unwritten slot holds is never read.
"""

from __future__ import annotations

import numpy as np

from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose
from worker.model import Hparams
from worker.ops import KV_BLOCK

ELEMENT_BYTES = 2
"""An f16."""


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
