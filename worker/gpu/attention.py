"""Launchers of attention over the KV cache: RoPE, KV write, then FlashAttention (prefill) or split KV (decode).

Which kernel runs follows from the phase alone; its arithmetic for a token from the token's position. Twin:
`worker/cpu/attention.py`. Kernels: `attention_prefill.cu`, `attention_decode.cu`, `rope_kv.cu`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gpu.compiler import KernelName
from worker.gpu.kv_cache import KvCache
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose
from worker.gpu.quantized import Activations, activations_like
from worker.gpu.scaled_f16 import ScaledF16, padded
from worker.ops import KV_BLOCK, Attention, Rope

HEAD_DIMS = (64, 96, 128)
_THREADS = 128
_QUERY_TILE = 64
_STRIPS = {64: 2, 96: 2, 128: 1}  # of 16 queries, a warp's, where a piece is not split
_KEYS = {64: 64, 96: 32, 128: 32}  # keys_per_tile of attention_tiles.cuh
_ROW_PAD = 8  # kPad there
_SEGMENT = 256  # kSegment of attention_prefill.cu
_SPLIT_TOKENS = 128  # of a piece whose segments are spread over blocks: of a longer one there are blocks enough
_BLOCKS_PER_PROCESSOR = 4
MOST_PART_BYTES = 128 << 20
"""Of a split piece's parts. 128 tokens of 64 heads after 14,000 fit in, 32 of 14 after any number."""
_ROPE_PARTS = 4  # blocks of a token in rope_kv
_MAX_PARTS = 64  # kMaxParts in softmax_parts.cuh
_MOST_HEADS = 8  # query heads of a block
_DECODE_THREADS, _WIDE_THREADS = 256, 512  # warps_of in attention_decode.cu
_WIDE_DIM, _WIDE_GROUP = 64, 5

INSTANTIATIONS: tuple[KernelName, ...] = (
    *(
        ("attention_prefill.cu", f"attention_prefill<{dim}, {split}>")
        for dim in HEAD_DIMS
        for split in ("false", "true")
    ),
    *(("rope_kv.cu", f"rope_kv<{dim}, {adjacent}>") for dim in HEAD_DIMS for adjacent in ("false", "true")),
    *(
        ("attention_decode.cu", f"attention_decode<{dim}, {group}, {adjacent}>")
        for dim in HEAD_DIMS
        for group in range(1, _MOST_HEADS + 1)
        for adjacent in ("false", "true")
    ),
)


class DecodeState(Protocol):
    """What the decode kernel reads of the sequences: `positions` [S] i32 and `tables` [S, blocks] i32 on the device."""

    positions: DeviceArray
    tables: DeviceArray


class Prompt(Protocol):
    """What the prefill kernels read of a piece of a prompt, on the device.

    `place` [2] i32: its first token's position and how many tokens there are; `table` [blocks] i32 of its sequence.
    """

    place: DeviceArray
    table: DeviceArray


def group_size(spec: Attention) -> int:
    """GROUP: how many of the query heads that share a KV head one block of the decode kernel takes."""
    heads = spec.n_heads // spec.n_kv_heads
    return max(size for size in range(1, _MOST_HEADS + 1) if heads % size == 0)


class AttentionLauncher:
    """Attention of every layer of one model, for at most `sequences` at once."""

    def __init__(self, memory: DeviceMemory, cache: KvCache, sequences: int, processors: int) -> None:
        self._memory = memory
        self._cache = cache
        self._sequences = sequences
        self._processors = processors
        self._ropes: dict[int, tuple[Rope, DeviceArray, DeviceArray]] = {}
        self._scratch: dict[tuple[int, int, int], tuple[DeviceArray, DeviceArray]] = {}
        self._prefill_scratch: dict[tuple[int, int, int], tuple[DeviceArray, DeviceArray, int]] = {}

    def prefill(
        self,
        kernels: Launcher,
        pool: Allocator,
        q: DeviceArray,
        k: DeviceArray,
        v: DeviceArray,
        spec: Attention,
        prompt: Prompt,
    ) -> ScaledF16:
        """y [T, H·D] of q [T, H·D], k, v [T, Hk·D] f32; keys and values go to the cache first."""
        dim, tokens = _head_dim(spec), len(q)
        keys, values = self._cache.layer(spec.layer)
        turned = pool.empty(q.shape, np.float16)
        heads = np.int32(spec.n_heads), np.int32(spec.n_kv_heads)
        kernels.get("rope_kv.cu", f"rope_kv<{dim}, {_flag(spec)}>")(
            (tokens, _ROPE_PARTS),
            (_THREADS,),
            (turned, q, k, v, keys, values, *self._rope(spec.rope), prompt.table, prompt.place, *heads),
            early=True,
        )
        y = ScaledF16(pool.empty((tokens, padded(q.shape[1])), np.float16), None, prompt.place[1:])
        parts, arrivals, room, layers = self._split(spec, tokens, len(prompt.table) * KV_BLOCK)
        short = tokens <= _SPLIT_TOKENS
        warps = _QUERY_TILE // 16 // (1 if short else _STRIPS[dim])
        kernels.get("attention_prefill.cu", f"attention_prefill<{dim}, {'true' if short else 'false'}>")(
            (-(-tokens // _QUERY_TILE), spec.n_heads, layers),
            (32 * warps,),
            (
                *(y.x, turned, keys, values, prompt.table, _sinks(spec), prompt.place),
                *(parts, arrivals, np.int32(room), *heads, np.int32(spec.window)),
            ),
            shared_mem=4 * _KEYS[dim] * (dim + _ROW_PAD) * 2 + _QUERY_TILE // 16 * _part_bytes(dim),
            early=True,
        )
        return y

    def decode(
        self,
        kernels: Launcher,
        pool: Allocator,
        q: DeviceArray,
        k: DeviceArray,
        v: DeviceArray,
        spec: Attention,
        state: DecodeState,
    ) -> Activations:
        """y [S, H·D] of one token a sequence, in both forms of a product's input; the same launch writes the cache."""
        dim, group = _head_dim(spec), group_size(spec)
        keys, values = self._cache.layer(spec.layer)
        parts, arrivals, n_parts = self._decode_scratch(spec, group)
        y = activations_like(pool, *q.shape)
        kernels.get("attention_decode.cu", f"attention_decode<{dim}, {group}, {_flag(spec)}>")(
            (n_parts, spec.n_heads // group, len(q)),
            (_WIDE_THREADS if dim == _WIDE_DIM and group >= _WIDE_GROUP else _DECODE_THREADS,),
            (
                *(y.x, y.q, y.meta, q, k, v, keys, values, *self._rope(spec.rope)),
                *(state.positions, state.tables, np.int32(state.tables.shape[1]), _sinks(spec)),
                *(parts, arrivals, np.int32(spec.n_heads), np.int32(spec.n_kv_heads), np.int32(spec.window)),
            ),
            early=True,
        )
        return y

    def _rope(self, rope: Rope) -> tuple[DeviceArray, DeviceArray, np.int32]:
        """The tables on the device, uploaded when a layer first uses them; layers share one Rope."""
        if id(rope) not in self._ropes:
            slab = self._memory.reserve(rope.cos.nbytes + rope.sin.nbytes, Purpose.WORKSPACE)
            cos, sin = slab.array((2, *rope.cos.shape), np.float32)
            cos.set(rope.cos)
            sin.set(rope.sin)
            self._ropes[id(rope)] = (rope, cos, sin)  # the Rope too: its id is its own as long as it lives
        _, cos, sin = self._ropes[id(rope)]
        return cos, sin, np.int32(rope.dims)

    def _split(
        self, spec: Attention, tokens: int, positions: int
    ) -> tuple[DeviceArray | None, DeviceArray | None, int, int]:
        """For a piece's blocks: room for parts, arrival counters, how many parts that is, and Z, the grid's layers.

        Nothing here moves a bit, so Z may follow from the device. Reserved by the dry run of a piece, before captures.
        """
        tiles, segments = -(-tokens // _QUERY_TILE), -(-positions // _SEGMENT)
        if tokens > _SPLIT_TOKENS or segments == 1:
            return None, None, 0, 1
        key = (spec.n_heads, spec.head_dim, segments)
        if key not in self._prefill_scratch:
            part = _part_bytes(spec.head_dim)
            room = min(_SPLIT_TOKENS // 16 * spec.n_heads * segments, MOST_PART_BYTES // part)
            slab = self._memory.reserve(room * part, Purpose.WORKSPACE)
            counters = self._memory.reserve(4 * _SPLIT_TOKENS // _QUERY_TILE * spec.n_heads, Purpose.WORKSPACE)
            arrivals = counters.array((_SPLIT_TOKENS // _QUERY_TILE * spec.n_heads,), np.uint32)
            arrivals.fill(0)
            self._prefill_scratch[key] = (slab.array((room * part // 4,), np.float32), arrivals, room)
        layers = max(4, _BLOCKS_PER_PROCESSOR * self._processors // (tiles * spec.n_heads))
        return *self._prefill_scratch[key], min(segments, layers)

    def _decode_scratch(self, spec: Attention, group: int) -> tuple[DeviceArray, DeviceArray, int]:
        """Room for the blocks' parts and their arrival counters, and G: two blocks a multiprocessor, within bounds."""
        groups = spec.n_heads // group
        n_parts = min(_MAX_PARTS, max(1, 2 * self._processors // groups))
        key = (spec.n_heads, spec.head_dim, group)
        if key not in self._scratch:
            floats = self._sequences * n_parts * groups * _part_floats(spec.head_dim, group)
            slab = self._memory.reserve(4 * floats, Purpose.WORKSPACE)
            counters = self._memory.reserve(4 * self._sequences * groups, Purpose.WORKSPACE)
            arrivals = counters.array((self._sequences * groups,), np.uint32)
            arrivals.fill(0)
            self._scratch[key] = (slab.array((floats,), np.float32), arrivals)
        return *self._scratch[key], n_parts


def _part_floats(head_dim: int, group: int) -> int:
    """f32 values of one part: `part_floats` of kernels/softmax_parts.cuh."""
    return -(-group * (head_dim + 2) // 4) * 4


def _part_bytes(head_dim: int) -> int:
    """What 16 queries leave of one segment: `part_quads` of kernels/running_softmax.cuh."""
    return 16 * 32 * (head_dim // 8 + 1)


def _head_dim(spec: Attention) -> int:
    if spec.head_dim not in HEAD_DIMS:
        raise ModelLoadFailed(f"heads of {spec.head_dim} elements", "the GPU's attention", "64, 96 or 128")
    return spec.head_dim


def _flag(spec: Attention) -> str:
    return "true" if spec.rope.adjacent else "false"


def _sinks(spec: Attention) -> DeviceArray | None:
    return None if spec.sinks is None else spec.sinks.data
