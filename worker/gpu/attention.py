"""What prefill attention and decode attention share: KV cache, RoPE tables, query scales, scratch.

The phase chooses the kernels; the arithmetic of a token depends on its position alone. Launchers:
`prefill_attention.py`, `decode_attention.py`. `head_norms.py` says where heads are normalized.
Twin: `worker/cpu/attention.py`.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose, aligned
from worker.gpu.query_scales import QueryScales, query_scale_bytes
from worker.gpu.state import KvCache
from worker.model import KvType
from worker.ops import Attention
from worker.rope import Rope

TILED_DIMS = (64, 96, 128, 256)
"""Head sizes of the kernels on tensor cores; `attention_512.cu` computes heads of WIDEST_DIM."""
WIDEST_DIM, WIDEST_THREADS = 512, 256
MAX_GROUP = {64: 8, 96: 8, 128: 8, 256: 4, 512: 4}
"""Query heads of a block that computes several, by head size: their results fit 48 KB."""
FLAGS = ("false", "true")
KV_FORMS: Mapping[KvType, str] = {"f16": "F16Kv", "q8": "Q8Kv"}
"""Kv, a template argument: kernels/kv_cache.cuh."""


def adjacent_flags(dim: int) -> tuple[str, ...]:
    """Values of the template argument ADJACENT: no architecture with wide heads has such pairs."""
    return FLAGS if dim <= 128 else FLAGS[:1]


def group_size(spec: Attention) -> int:
    """GROUP: how many query heads of one KV head a block computes."""
    heads = spec.n_heads // spec.n_kv_heads
    return max(size for size in range(1, MAX_GROUP[spec.head_dim] + 1) if heads % size == 0)


def table_bytes(layers: Iterable[Attention]) -> int:
    """Device memory of the tables of RoPE and of query scales that the layers need."""
    specs = tuple(layers)
    ropes = sum(aligned(rope.nbytes) for rope in {spec.rope for spec in specs})
    return ropes + query_scale_bytes(specs)


def sinks_of(spec: Attention) -> DeviceArray | None:
    """The sink logits of the heads [H] f32, or None."""
    return None if spec.sinks is None else spec.sinks.data


class AttentionMemory:
    """Device memory of a model's attention that layers and phases share."""

    def __init__(self, memory: DeviceMemory, cache: KvCache) -> None:
        self.memory, self.cache = memory, cache
        self.kv, self.quantized = KV_FORMS[cache.kv_type], cache.kv_type == "q8"
        self.query_scales = QueryScales(memory)
        self._ropes: dict[int, tuple[Rope, DeviceArray, DeviceArray]] = {}

    def rope(self, rope: Rope) -> tuple[DeviceArray, DeviceArray, np.int32]:
        """The device copy of a Rope's tables, uploaded on first use and shared by the layers."""
        if id(rope) not in self._ropes:
            cos, sin = self.memory.reserve(rope.nbytes, Purpose.WORKSPACE).array((2, *rope.cos.shape), np.float32)
            cos.set(rope.cos)
            sin.set(rope.sin)
            self._ropes[id(rope)] = (rope, cos, sin)  # keeps the Rope alive, so its id stays unique
        _, cos, sin = self._ropes[id(rope)]
        return cos, sin, np.int32(rope.dims)

    def scratch(self, nbytes: int, counters: int) -> tuple[DeviceArray, DeviceArray]:
        """Uninitialized f32 memory, and `counters` u32 zeros."""
        floats = self.memory.reserve(nbytes, Purpose.WORKSPACE).array((nbytes // 4,), np.float32)
        zeros = self.memory.reserve(4 * counters, Purpose.WORKSPACE).array((counters,), np.uint32)
        zeros.fill(0)
        return floats, zeros
