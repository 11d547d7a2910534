"""Launchers of RoPE, KV writes and attention of prefill batches: FlashAttention.

Kernels: `rope_kv.cu`, or `matmul_wgmma_rope.cu` together with the projections;
`attention_prefill.cu`, or `attention_wgmma.cu` with the same bits; `attention_512.cu` for heads of
512 elements. `query_scales.py` precedes. Caller: `prefill_ops.py`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from worker.gpu import matmul_wgmma
from worker.gpu.activations import ScaledF16, padded
from worker.gpu.attention import (
    FLAGS,
    KV_FORMS,
    TILED_DIMS,
    WIDEST_DIM,
    WIDEST_THREADS,
    AttentionMemory,
    adjacent_flags,
    group_size,
    sinks_of,
)
from worker.gpu.compiler import KernelName
from worker.gpu.head_norms import (
    HEAD_DIMS,
    check_head_dim,
    has_norms,
    may_fuse_norms,
    norm_arguments,
    normalize_heads,
)
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import address
from worker.gpu.memory import DeviceArray
from worker.gpu.prefill_state import DEFINES as _BATCH_DEFINES
from worker.gpu.prefill_state import QUERY_TILE, WIDE_TILE, PrefillState, most_tiles
from worker.gpu.tensor_maps import tensor_map
from worker.model import KvType, kv_row_bytes
from worker.ops import KV_BLOCK, Attention, Linear

MAX_PARTIAL_BYTES = 128 << 20
"""Limit on the partial results of a split chunk: enough for 128 tokens of 64 heads after 14,000."""

_ROPE_THREADS, _ROPE_BLOCKS = 128, 4  # blocks of a token
_STRIPS = {64: 2, 96: 2, 128: 1, 256: 1}  # of 16 queries in a warp, in chunks that are not split
_TILE_KEYS = {64: 64, 96: 32, 128: 32, 256: 16}
_ROW_PAD = 8  # elements after each row of a tile in shared memory
_SEGMENT = 256  # positions of one online softmax
_SPLIT_TOKENS = 128  # longer chunks have enough blocks without splitting their segments
_BLOCKS_PER_PROCESSOR = 4  # of a split chunk's grid
_WGMMA_STAGES = {64: 8, 96: 8, 128: 6}  # tiles of keys and values in shared memory, by head size
_WGMMA_THREADS = 512
_PARTIAL_BYTES = {dim: 16 * 32 * (dim // 8 + 1) for dim in TILED_DIMS}  # of 16 queries and one segment

DEFINES: Mapping[str, int] = {
    "KV_BLOCK": KV_BLOCK,
    **_BATCH_DEFINES,
    "ROW_PAD": _ROW_PAD,
    "SEGMENT": _SEGMENT,
    **{f"STRIPS_{dim}": strips for dim, strips in _STRIPS.items()},
    **{f"TILE_KEYS_{dim}": keys for dim, keys in _TILE_KEYS.items()},
    **{f"PARTIAL_BYTES_{dim}": size for dim, size in _PARTIAL_BYTES.items()},
    **{f"WGMMA_STAGES_{dim}": stages for dim, stages in _WGMMA_STAGES.items()},
}
FIXED_ORDERS: Mapping[str, str] = {
    "attention_segment": f"online softmax over {_SEGMENT} positions, segments oldest first",
}
"""The orders of sums that `worker.gpu.numerics` reports."""

INSTANTIATIONS: tuple[KernelName, ...] = (
    *(
        ("attention_prefill.cu", f"attention_prefill<{dim}, {split}, {kv}>")
        for dim in TILED_DIMS
        for split in FLAGS
        for kv in KV_FORMS.values()
    ),
    *(("attention_wgmma.cu", f"attention_wgmma<{dim}>") for dim in _WGMMA_STAGES),
    *(("attention_512.cu", f"attention_512_chunk<{group}, F16Kv>") for group in range(1, 5)),
    *(("rope_kv.cu", f"rope_kv<{dim}, {adjacent}, F16Kv>") for dim in HEAD_DIMS for adjacent in adjacent_flags(dim)),
    # With codes, which few workers use, those of the largest groups.
    *(("rope_kv.cu", f"rope_kv<{dim}, false, Q8Kv, HeadNorms>") for dim in HEAD_DIMS),
    ("attention_512.cu", "attention_512_chunk<4, Q8Kv>"),
)


class PrefillAttention:
    """Attention of all layers of a model in prefill.

    `processors` is the device's number of multiprocessors. It shapes the grids of split chunks and
    changes no bit of a result.
    """

    def __init__(self, shared: AttentionMemory, processors: int) -> None:
        self._shared = shared
        self._processors = processors
        self._scratch: dict[tuple[int, int, int], tuple[DeviceArray, DeviceArray, int]] = {}

    def launch(
        self,
        kernels: Launcher,
        pool: Allocator,
        q: DeviceArray,
        k: DeviceArray | None,
        v: DeviceArray | None,
        spec: Attention,
        batch: PrefillState,
    ) -> ScaledF16:
        """Write k, v [T, Hk·D] f32, if any, to the cache; return y [T, H·D] of q [T, H·D] f32."""
        if not may_fuse_norms(spec):
            v, spec = normalize_heads(kernels, pool, q, k, v, spec)
        self._shared.query_scales.prefill(kernels, q, spec, batch)
        return self.attend(kernels, pool, self._rotate(kernels, pool, q, k, v, spec, batch), spec, batch)

    def project(
        self,
        kernels: Launcher,
        pool: Allocator,
        x: ScaledF16,
        linears: Sequence[Linear],
        spec: Attention,
        batch: PrefillState,
    ) -> DeviceArray | None:
        """Compute q, k and v of x and RoPE in one launch: k, v to the cache, q [T, H·D] f16.

        None where no kernel does: `launch` takes the projections then, with the same bits. So it is
        for layers with head norms or without RoPE, 8-bit caches and short chunks.
        """
        shared = self._shared
        plain = spec.query_scale is None and not has_norms(spec) and not shared.quantized
        if not (kernels.wgmma and plain):
            return None
        tile = matmul_wgmma.rope_tile(linears, len(x.x), spec.head_dim, spec.rope.dims)
        if tile is None:
            return None
        queries = pool.empty((len(x.x), spec.n_heads * spec.head_dim), np.float16)
        cos, sin, dims = shared.rope(spec.rope)
        addresses = map(address, (queries, *shared.cache.layer(spec.layer), cos, sin))
        sizes = (dims, 0, spec.rope.adjacent, spec.head_dim, spec.n_kv_heads)
        heads = np.array((*addresses, *sizes, batch.params), matmul_wgmma.HEADS)
        matmul_wgmma.launch_rope(kernels, x, linears, tile, heads)
        return queries

    def attend(
        self, kernels: Launcher, pool: Allocator, rotated: DeviceArray, spec: Attention, batch: PrefillState
    ) -> ScaledF16:
        """Return y [T, H·D] of rotated queries [T, H·D] f16; keys and values are in the cache."""
        dim, tokens = check_head_dim(spec.head_dim), len(rotated)
        y = ScaledF16(pool.empty((tokens, padded(rotated.shape[1])), np.float16), None, batch.count)
        if dim == WIDEST_DIM:
            self._attend_512(kernels, y.x, rotated, spec, batch)
        elif kernels.wgmma and dim in _WGMMA_STAGES and tokens > _SPLIT_TOKENS and not self._shared.quantized:
            self._attend_wgmma(kernels, y.x, rotated, spec, batch)
        else:
            self._attend(kernels, y.x, rotated, spec, batch)
        return y

    def _rotate(
        self,
        kernels: Launcher,
        pool: Allocator,
        q: DeviceArray,
        k: DeviceArray | None,
        v: DeviceArray | None,
        spec: Attention,
        batch: PrefillState,
    ) -> DeviceArray:
        """Write k, v to the cache, and return the rotated q [T, H·D] f16."""
        shared, rotated = self._shared, pool.empty(q.shape, np.float16)
        suffix, norms = norm_arguments(spec, always=shared.quantized)
        blocks = -(-32 * (spec.n_heads + spec.n_kv_heads) // _ROPE_THREADS) if norms else _ROPE_BLOCKS
        kernels.get("rope_kv.cu", f"rope_kv<{spec.head_dim}, {FLAGS[spec.rope.adjacent]}, {shared.kv}{suffix}>")(
            (len(q), blocks),
            (_ROPE_THREADS,),
            (
                *(rotated, q, k, v, *shared.cache.layer(spec.layer), *shared.rope(spec.rope), batch.params),
                *(np.int32(spec.n_heads), np.int32(spec.n_written), *norms),
            ),
            pdl=True,
        )
        return rotated

    def _attend_512(
        self, kernels: Launcher, y: DeviceArray, rotated: DeviceArray, spec: Attention, batch: PrefillState
    ) -> None:
        group = group_size(spec)
        kernels.get("attention_512.cu", f"attention_512_chunk<{group}, {self._shared.kv}>")(
            (spec.n_heads // group, len(y)),
            (WIDEST_THREADS,),
            (y, rotated, *self._shared.cache.layer(spec.layer), batch.params, sinks_of(spec), *_sizes(spec)),
            pdl=True,
        )

    def _attend_wgmma(
        self, kernels: Launcher, y: DeviceArray, rotated: DeviceArray, spec: Attention, batch: PrefillState
    ) -> None:
        dim = spec.head_dim
        maps = (tensor_map(each, KV_BLOCK, 32 if dim % 64 else 64) for each in self._shared.cache.layer(spec.layer))
        kernels.get("attention_wgmma.cu", f"attention_wgmma<{dim}>")(
            (spec.n_heads, most_tiles(len(y), batch.chunks, WIDE_TILE)),
            (_WGMMA_THREADS,),
            (y, rotated, *maps, batch.params, sinks_of(spec), *_sizes(spec)),
            shared_mem=_wgmma_bytes(dim),
            pdl=True,
        )

    def _attend(
        self, kernels: Launcher, y: DeviceArray, rotated: DeviceArray, spec: Attention, batch: PrefillState
    ) -> None:
        dim, tokens = spec.head_dim, len(y)
        split = tokens <= _SPLIT_TOKENS
        partials, arrivals, capacity, layers = self._split(spec, tokens, batch)
        warps = QUERY_TILE // 16 // (1 if split else _STRIPS[dim])
        kernels.get("attention_prefill.cu", f"attention_prefill<{dim}, {FLAGS[split]}, {self._shared.kv}>")(
            (max(most_tiles(tokens, batch.chunks), layers * -(-tokens // QUERY_TILE)), spec.n_heads),
            (32 * warps,),
            (
                *(y, rotated, *self._shared.cache.layer(spec.layer), batch.params, sinks_of(spec)),
                *(partials, arrivals, np.int32(capacity), *_sizes(spec)),
            ),
            shared_mem=_tile_bytes(dim, self._shared.cache.kv_type) + QUERY_TILE // 16 * _PARTIAL_BYTES[dim],
            pdl=True,
        )

    def _split(
        self, spec: Attention, tokens: int, batch: PrefillState
    ) -> tuple[DeviceArray | None, DeviceArray | None, int, int]:
        """Partial results, arrival counters, capacity in results, and Z, the blocks of a tile.

        Z is that of a batch of one chunk; the tiles of several share as many blocks. It changes no
        bit, so it may depend on the device. Memory is reserved by the dry run of a batch, before
        graphs are captured.
        """
        tiles, segments = -(-tokens // QUERY_TILE), -(-batch.blocks * KV_BLOCK // _SEGMENT)
        if tokens > _SPLIT_TOKENS or segments == 1:
            return None, None, 0, 1
        key = (spec.n_heads, spec.head_dim, segments)
        if key not in self._scratch:
            size = _PARTIAL_BYTES[spec.head_dim]
            capacity = min(_SPLIT_TOKENS // 16 * spec.n_heads * segments, MAX_PARTIAL_BYTES // size)
            counters = most_tiles(_SPLIT_TOKENS, batch.chunks) * spec.n_heads
            self._scratch[key] = (*self._shared.scratch(capacity * size, counters), capacity)
        layers = max(4, _BLOCKS_PER_PROCESSOR * self._processors // (tiles * spec.n_heads))
        return *self._scratch[key], min(segments, layers)


def _sizes(spec: Attention) -> tuple[np.int32, np.int32, np.int32]:
    """Heads, KV heads and window: the last parameters of the kernels of attention."""
    return np.int32(spec.n_heads), np.int32(spec.n_kv_heads), np.int32(spec.window)


def _tile_bytes(dim: int, kv_type: KvType) -> int:
    """Shared memory of the tiles of a block in prefill: TileStages of attention_tiles.cuh."""
    tile, copied = _TILE_KEYS[dim] * (dim + _ROW_PAD) * 2, _TILE_KEYS[dim] * kv_row_bytes(dim, kv_type)
    return 2 * tile + 4 * copied if kv_type == "q8" else 4 * tile


def _wgmma_bytes(dim: int) -> int:
    """Dynamic shared memory of attention_wgmma.cu: its alignment, stages, and older segments."""
    return 1024 + 4 * _WGMMA_STAGES[dim] * _TILE_KEYS[dim] * dim + WIDE_TILE // 16 * _PARTIAL_BYTES[dim]
