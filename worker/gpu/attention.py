"""Launchers of RoPE, KV writes and attention: FlashAttention in prefill, split KV in decode.

The phase chooses the kernel; the arithmetic of a token depends on its position alone. Kernels:
`rope_kv.cu`; `attention_prefill.cu`, or `attention_wgmma.cu` with the same bits;
`attention_decode.cu` for one row, for several `attention_items.cu` and `attention_few_rows.cu` or
`attention_rows.cu`, after `kv_rows.cu` if a sequence has several; `attention_512.cu` for heads of
512 elements, in both phases. `head_norms.py` says where heads are normalized; `query_scales.py`
precedes. Twin: `worker/cpu/attention.py`.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from worker.gpu.activations import (
    Q8_TILES,
    Q8Activations,
    Q8Tiles,
    ScaledF16,
    empty_q8,
    empty_q8_tiles,
    fills_tiles,
    padded,
    q8_tiles,
    quantize_rows,
    quantize_tiles,
)
from worker.gpu.compiler import KernelName
from worker.gpu.head_norms import HEAD_DIMS, check_head_dim, may_fuse_norms, norm_arguments, normalize_heads
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose, aligned
from worker.gpu.prefill_state import DEFINES as _BATCH_DEFINES
from worker.gpu.prefill_state import QUERY_TILE, WIDE_TILE, PrefillState, most_tiles
from worker.gpu.query_scales import QueryScales, query_scale_bytes
from worker.gpu.state import KvCache, StepState
from worker.gpu.tensor_maps import tensor_map
from worker.model import KvType, kv_row_bytes
from worker.ops import KV_BLOCK, Attention
from worker.rope import Rope

MAX_PARTIAL_BYTES = 128 << 20
"""Limit on the partial results of a split chunk: enough for 128 tokens of 64 heads after 14,000."""

_TILED_DIMS = (64, 96, 128, 256)  # of kernels on tensor cores
_WIDEST_DIM, _WIDEST_THREADS = 512, 256
_ROPE_THREADS, _ROPE_BLOCKS = 128, 4  # blocks of a token
_STRIPS = {64: 2, 96: 2, 128: 1, 256: 1}  # of 16 queries in a warp, in chunks that are not split
_TILE_KEYS = {64: 64, 96: 32, 128: 32, 256: 16}
_ROW_PAD = 8  # elements after each row of a tile in shared memory
_SEGMENT = 256  # positions of one online softmax
_SPLIT_TOKENS = 128  # longer chunks have enough blocks without splitting their segments
_BLOCKS_PER_PROCESSOR = 4  # of a split chunk's grid
_WGMMA_STAGES = {64: 8, 96: 8, 128: 6}  # tiles of keys and values in shared memory, by head size
_WGMMA_THREADS = 512
_PARTIAL_BYTES = {dim: 16 * 32 * (dim // 8 + 1) for dim in _TILED_DIMS}  # of 16 queries and one segment

_MAX_GROUP = {64: 8, 96: 8, 128: 8, 256: 4, 512: 4}  # query heads of a decode block: their results fit 48 KB
_DECODE_WARPS, _WIDE_WARPS = 8, 16
_WIDE_DIM, _WIDE_GROUP = 64, 5  # wide blocks: heads of this size in groups of at least this many
_DECODE_BLOCKS = 264  # blocks of one sequence's decode grid: two per multiprocessor of an H100
_MAX_DECODE_SPLITS = 64

# Blocks that compute splits of a few rows, with keys and values in registers: one a multiprocessor.
_FEW_ITEMS = 2  # of a multiprocessor, at the longest context: with more of them, teams read faster

# Blocks that compute splits of more rows: teams of warps.
_RING_SLOTS = 2  # KV blocks that a warp copies ahead
_BUSY_WARPS = 16  # of a multiprocessor: more warps a team than these need only cost time
_TEAM_WARPS = 8  # the most warps of a team
# Of a team, by head size: small partial results leave room for many teams.
_LEAST_WARPS = {64: 4, 96: 1, 128: 4, 256: 1}
_MAX_SHARED = 227 << 10  # bytes of shared memory of a block of sm_90
_SYSTEM_SHARED = 1 << 10  # what the system takes from each block's share of a multiprocessor
_ITEMS_THREADS = 256
_Q8_ROW_THREADS = 64  # of kv_rows with codes: a warp for a key and one for a value

DEFINES: Mapping[str, int] = {
    "KV_BLOCK": KV_BLOCK,
    **_BATCH_DEFINES,
    "ROW_PAD": _ROW_PAD,
    "SEGMENT": _SEGMENT,
    **{f"STRIPS_{dim}": strips for dim, strips in _STRIPS.items()},
    **{f"TILE_KEYS_{dim}": keys for dim, keys in _TILE_KEYS.items()},
    **{f"PARTIAL_BYTES_{dim}": size for dim, size in _PARTIAL_BYTES.items()},
    **{f"WGMMA_STAGES_{dim}": stages for dim, stages in _WGMMA_STAGES.items()},
    "DECODE_WARPS": _DECODE_WARPS,
    "DECODE_WIDE_WARPS": _WIDE_WARPS,
    "DECODE_WIDE_DIM": _WIDE_DIM,
    "DECODE_WIDE_GROUP": _WIDE_GROUP,
    "MAX_DECODE_SPLITS": _MAX_DECODE_SPLITS,
    "TEAM_WARPS": _TEAM_WARPS,
    "RING_SLOTS": _RING_SLOTS,
    "ITEMS_THREADS": _ITEMS_THREADS,
}
FIXED_ORDERS: Mapping[str, str] = {
    "attention_segment": f"online softmax over {_SEGMENT} positions, segments oldest first",
    "attention_512": "tiles of 128 positions, oldest first",
    "decode_splits": f"min({_MAX_DECODE_SPLITS}, {_DECODE_BLOCKS} // (heads / group)) splits, tiles dealt in turn",
}
"""The orders of sums that `worker.gpu.numerics` reports."""

_FLAGS = ("false", "true")
KV_FORMS: Mapping[KvType, str] = {"f16": "F16Kv", "q8": "Q8Kv"}
"""Kv, a template argument: kernels/kv_cache.cuh."""


def _adjacent(dim: int) -> tuple[str, ...]:
    """The values of ADJACENT in INSTANTIATIONS: no architecture with wide heads has such pairs."""
    return _FLAGS if dim <= 128 else _FLAGS[:1]


INSTANTIATIONS: tuple[KernelName, ...] = (
    *(
        ("attention_prefill.cu", f"attention_prefill<{dim}, {split}, {kv}>")
        for dim in _TILED_DIMS
        for split in _FLAGS
        for kv in KV_FORMS.values()
    ),
    *(("attention_wgmma.cu", f"attention_wgmma<{dim}>") for dim in _WGMMA_STAGES),
    *(
        ("attention_512.cu", f"attention_512_{part}<{group}, F16Kv>")
        for part in ("rows", "chunk")
        for group in range(1, 5)
    ),
    *(
        (f"{kernel}.cu", f"{kernel}<{dim}, {adjacent}, F16Kv>")
        for kernel in ("rope_kv", "kv_rows")
        for dim in HEAD_DIMS
        for adjacent in _adjacent(dim)
    ),
    ("attention_items.cu", "attention_items"),
    *(
        (f"{kernel}.cu", f"{kernel}<{dim}, {group}, {adjacent}, F16Kv>")
        for kernel in ("attention_decode", "attention_rows")
        for dim in _TILED_DIMS
        for group in range(1, _MAX_GROUP[dim] + 1)
        for adjacent in _adjacent(dim)
    ),
    *(
        ("attention_few_rows.cu", f"attention_few_rows<{_WIDE_DIM}, {group}, {adjacent}>")
        for group in range(_WIDE_GROUP, _MAX_GROUP[_WIDE_DIM] + 1)
        for adjacent in _FLAGS
    ),
    # With codes, which few workers use, those of the smallest and the largest groups.
    *(("kv_rows.cu", f"kv_rows<{dim}, false, Q8Kv>") for dim in HEAD_DIMS),
    *(("rope_kv.cu", f"rope_kv<{dim}, false, Q8Kv, HeadNorms>") for dim in HEAD_DIMS),
    *(("attention_512.cu", f"attention_512_{part}<4, Q8Kv>") for part in ("rows", "chunk")),
    *(
        (f"{kernel}.cu", f"{kernel}<{dim}, {group}, false, Q8Kv>")
        for kernel in ("attention_decode", "attention_rows")
        for dim in _TILED_DIMS
        for group in (1, _MAX_GROUP[dim])
    ),
)


def group_size(spec: Attention) -> int:
    """GROUP: how many query heads of one KV head a block of the decode kernel computes."""
    heads = spec.n_heads // spec.n_kv_heads
    return max(size for size in range(1, _MAX_GROUP[spec.head_dim] + 1) if heads % size == 0)


def decode_splits(spec: Attention) -> int:
    """G: the number of blocks over which a sequence's KV tiles are dealt in decode.

    It decides the order of sums, so it depends on the model's shape only, never on the device.
    """
    return min(_MAX_DECODE_SPLITS, max(1, _DECODE_BLOCKS // (spec.n_heads // group_size(spec))))


def decode_partial_bytes(dim: int) -> int:
    """Upper bound of the partial results of a decode row."""
    return 4 * _DECODE_BLOCKS * _part_floats(dim, _MAX_GROUP[dim])


def table_bytes(layers: Iterable[Attention]) -> int:
    """Device memory of the tables of RoPE and of query scales that the layers need."""
    specs = tuple(layers)
    ropes = sum(aligned(rope.nbytes) for rope in {spec.rope for spec in specs})
    return ropes + query_scale_bytes(specs)


def decode_tile(spec: Attention) -> int:
    """The positions of a tile in decode: kTile of the kernels."""
    return 256 if spec.head_dim == _WIDE_DIM else _DECODE_WARPS * KV_BLOCK


class AttentionLauncher:
    """Attention of all layers of a model, for at most `slots` rows in a decode step.

    `processors` is the device's number of multiprocessors, `max_shared` the bytes of shared memory
    that a block may have. They shape the grids of split chunks and of several rows, and change no
    bit of a result.
    """

    def __init__(
        self, memory: DeviceMemory, cache: KvCache, slots: int, processors: int, max_shared: int = _MAX_SHARED
    ) -> None:
        self._memory = memory
        self._max_shared = max_shared
        self._cache = cache
        self._kv, self._quantized = KV_FORMS[cache.kv_type], cache.kv_type == "q8"
        self._slots = slots
        self._processors = processors
        self.query_scales = QueryScales(memory)
        self._ropes: dict[int, tuple[Rope, DeviceArray, DeviceArray]] = {}
        self._most_rows = 1 << (slots - 1).bit_length()  # of a step: graphs have a power of two
        self._work_lists: dict[tuple[int, int, int], tuple[int, DeviceArray]] = {}
        self._decode_scratch: dict[tuple[int, int, int], tuple[DeviceArray, DeviceArray]] = {}
        self._prefill_scratch: dict[tuple[int, int, int], tuple[DeviceArray, DeviceArray, int]] = {}

    def prefill(
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
        dim, tokens = check_head_dim(spec.head_dim), len(q)
        if not may_fuse_norms(spec):
            v, spec = normalize_heads(kernels, pool, q, k, v, spec)
        self.query_scales.prefill(kernels, q, spec, batch)
        keys, values = self._cache.layer(spec.layer)
        rotated = pool.empty(q.shape, np.float16)
        heads, written = (np.int32(spec.n_heads), np.int32(spec.n_kv_heads)), np.int32(spec.n_written)
        suffix, norms = norm_arguments(spec, always=self._quantized)
        blocks = -(-32 * (spec.n_heads + spec.n_kv_heads) // _ROPE_THREADS) if norms else _ROPE_BLOCKS
        kernels.get("rope_kv.cu", f"rope_kv<{dim}, {_FLAGS[spec.rope.adjacent]}, {self._kv}{suffix}>")(
            (tokens, blocks),
            (_ROPE_THREADS,),
            (
                rotated,
                q,
                k,
                v,
                keys,
                values,
                *self._rope(spec.rope),
                batch.params,
                heads[0],
                written,
                *norms,
            ),
            pdl=True,
        )
        y = ScaledF16(pool.empty((tokens, padded(q.shape[1])), np.float16), None, batch.count)
        if dim == _WIDEST_DIM:
            group = group_size(spec)
            kernels.get("attention_512.cu", f"attention_512_chunk<{group}, {self._kv}>")(
                (spec.n_heads // group, tokens),
                (_WIDEST_THREADS,),
                (y.x, rotated, keys, values, batch.params, _sinks(spec), *heads, np.int32(spec.window)),
                pdl=True,
            )
            return y
        split = tokens <= _SPLIT_TOKENS
        if kernels.wgmma and dim in _WGMMA_STAGES and not (split or self._quantized):
            columns = 32 if dim % 64 else 64
            maps = (tensor_map(each, KV_BLOCK, columns) for each in (keys, values))
            kernels.get("attention_wgmma.cu", f"attention_wgmma<{dim}>")(
                (spec.n_heads, most_tiles(tokens, batch.chunks, WIDE_TILE)),
                (_WGMMA_THREADS,),
                (y.x, rotated, *maps, batch.params, _sinks(spec), *heads, np.int32(spec.window)),
                shared_mem=_wgmma_bytes(dim),
                pdl=True,
            )
            return y
        partials, arrivals, capacity, layers = self._prefill_split(spec, tokens, batch)
        warps = QUERY_TILE // 16 // (1 if split else _STRIPS[dim])
        kernels.get("attention_prefill.cu", f"attention_prefill<{dim}, {_FLAGS[split]}, {self._kv}>")(
            (max(most_tiles(tokens, batch.chunks), layers * -(-tokens // QUERY_TILE)), spec.n_heads),
            (32 * warps,),
            (
                *(y.x, rotated, keys, values, batch.params, _sinks(spec)),
                *(partials, arrivals, np.int32(capacity), *heads, np.int32(spec.window)),
            ),
            shared_mem=_tile_bytes(dim, self._cache.kv_type) + QUERY_TILE // 16 * _PARTIAL_BYTES[dim],
            pdl=True,
        )
        return y

    def decode(
        self,
        kernels: Launcher,
        pool: Allocator,
        q: DeviceArray,
        k: DeviceArray | None,
        v: DeviceArray | None,
        spec: Attention,
        state: StepState,
    ) -> Q8Activations | Q8Tiles:
        """Write k, v [R, Hk·D], if any, to the cache and return y of q [R, H·D] f32, as f32 and Q8.

        The caller has scaled the queries, and normalized the heads of several rows. Rows that are
        whole tiles are stored as tiles.

        Row r is the next token of slot `state.row_slots[r]`; inactive rows return zeros and write
        no keys or values. With one slot, row 0 is slot 0.
        """
        dim, group = check_head_dim(spec.head_dim), group_size(spec)
        if self._quantized and (len(q) > 1 or dim == _WIDEST_DIM) and k is not None and v is not None:
            v, spec = normalize_heads(kernels, pool, q, k, v, spec)
            k, v = self.write_rows(kernels, k, v, spec, state)
        if dim == _WIDEST_DIM:
            return self._decode_512(kernels, pool, q, k, v, spec, state)
        rows, groups, stored = len(q), spec.n_heads // group, self._stored_splits(spec, state)
        partials, arrivals = self._decode_split(spec, group, stored)
        y: Q8Activations | Q8Tiles = empty_q8_tiles(pool, *q.shape) if fills_tiles(rows) else empty_q8(pool, *q.shape)
        adjacent, heads = _FLAGS[spec.rope.adjacent], (np.int32(spec.n_heads), np.int32(spec.n_kv_heads))
        in_rows = (None, None) if isinstance(y, Q8Tiles) else (y.q, y.meta)
        inputs = (y.x, *in_rows, q, k, v, *self._cache.layer(spec.layer), *self._rope(spec.rope))
        tables = (state.tables, np.int32(state.tables.shape[1]), _sinks(spec))
        scratch = (partials, arrivals, *heads, np.int32(spec.window))
        if rows == 1:
            row_slots = None if self._slots == 1 else state.row_slots
            suffix, norms = norm_arguments(spec)
            kernels.get("attention_decode.cu", f"attention_decode<{dim}, {group}, {adjacent}, {self._kv}{suffix}>")(
                (decode_splits(spec), groups // spec.n_kv_heads, spec.n_kv_heads),
                (32 * _warps(dim, group),),
                (*inputs, row_slots, state.positions, *tables, *scratch, *norms),
                pdl=True,
            )
            return y
        tiles = q8_tiles(y) if isinstance(y, Q8Tiles) else np.zeros((), Q8_TILES)
        few = self._are_few(spec, rows, stored)
        warps = _warps(dim, group) if few else self._team_warps(spec, rows)
        resident = 1 if few else self._resident_teams(dim, group, warps)
        blocks = min(max(1, resident * self._processors // groups), rows * stored)
        work = self._work_list(kernels, spec, state, rows, stored, blocks)
        kernel = "attention_few_rows" if few else "attention_rows"
        kv = "" if few else f", {self._kv}"
        kernels.get(f"{kernel}.cu", f"{kernel}<{dim}, {group}, {adjacent}{kv}>")(
            (groups // spec.n_kv_heads, spec.n_kv_heads, blocks),
            (32 * warps,),
            (*inputs, work, *tables, *scratch, np.int32(decode_splits(spec)), np.int32(stored), tiles),
            shared_mem=0 if few else self._ring_bytes(dim, warps),
            pdl=True,
        )
        return y

    def _decode_512(
        self,
        kernels: Launcher,
        pool: Allocator,
        q: DeviceArray,
        k: DeviceArray | None,
        v: DeviceArray | None,
        spec: Attention,
        state: StepState,
    ) -> Q8Activations | Q8Tiles:
        """`decode` for heads of 512 elements; y is quantized by a launch of its own."""
        group, stored, rows = group_size(spec), self._stored_splits(spec, state), len(q)
        y = pool.empty(q.shape, np.float32)
        row_slots = None if rows == 1 and self._slots == 1 else state.row_slots
        suffix, norms = norm_arguments(spec)
        kernels.get("attention_512.cu", f"attention_512_rows<{group}, {self._kv}{suffix}>")(
            (stored, spec.n_heads // group, rows),
            (_WIDEST_THREADS,),
            (
                *(y, q, k, v, *self._cache.layer(spec.layer), *self._rope(spec.rope)),
                *(row_slots, state.positions, state.tables, np.int32(state.tables.shape[1]), _sinks(spec)),
                *self._decode_split(spec, group, stored),
                *map(np.int32, (spec.n_heads, spec.n_kv_heads, spec.window, decode_splits(spec))),
                *norms,
            ),
            pdl=True,
        )
        if fills_tiles(rows):
            return quantize_tiles(kernels, pool, y, None)
        return quantize_rows(kernels, pool, y, None, q8=True, f32=False)

    def _are_few(self, spec: Attention, rows: int, stored: int) -> bool:
        """Whether `attention_few_rows` computes a step of `rows` rows. It changes no bit."""
        dim, group = spec.head_dim, group_size(spec)
        items = rows * (spec.n_heads // group) * stored
        wide = _warps(dim, group) == _WIDE_WARPS and not spec.reads_only and not self._quantized
        return wide and items <= _FEW_ITEMS * self._processors

    def _team_warps(self, spec: Attention, rows: int) -> int:
        """Warps of a team of `attention_rows`: more of them shorten an item, fewer cost less."""
        dim, group = spec.head_dim, group_size(spec)
        warps = _TEAM_WARPS
        fits = self._resident_teams
        while warps > _LEAST_WARPS[dim] and (
            rows * (spec.n_heads // group) * warps > _BUSY_WARPS * self._processors or not fits(dim, group, warps)
        ):
            warps //= 2
        return warps

    def _resident_teams(self, dim: int, group: int, warps: int) -> int:
        """Teams that fit on a multiprocessor at once, by shared memory and registers."""
        queries, newest, weights = 4 * group * dim, 4 * dim, 4 * group * _MAX_DECODE_SPLITS
        results = 4 * _warps(dim, group) * _part_floats(dim, group)
        team = queries + newest + weights + results + self._ring_bytes(dim, warps) + _SYSTEM_SHARED
        warps_by_registers = 8 if dim >= 128 else 16
        return min((self._max_shared + _SYSTEM_SHARED) // team, warps_by_registers // warps)

    def write_rows(
        self, kernels: Launcher, k: DeviceArray, v: DeviceArray, spec: Attention, state: StepState
    ) -> tuple[DeviceArray | None, DeviceArray | None]:
        """Write k, v [R, Hk·D] to the cache, before `decode` if a sequence has several rows.

        Returns the k and v of that `decode`: None if it reads the cache alone.
        """
        dim = check_head_dim(spec.head_dim)
        kernels.get("kv_rows.cu", f"kv_rows<{dim}, {_FLAGS[spec.rope.adjacent]}, {self._kv}>")(
            (len(k), spec.n_kv_heads),
            (_Q8_ROW_THREADS if self._quantized else dim,),
            (
                *(k, v, *self._cache.layer(spec.layer), *self._rope(spec.rope)),
                *(state.row_slots, state.positions, state.tables, np.int32(state.tables.shape[1])),
            ),
            pdl=True,
        )
        return (None, None) if self._quantized else (k, v)

    def _ring_bytes(self, dim: int, warps: int) -> int:
        """Dynamic shared memory of a team: the rings of its warps (kv_ring.cuh)."""
        return warps * _RING_SLOTS * 2 * KV_BLOCK * kv_row_bytes(dim, self._cache.kv_type)

    def _work_list(
        self, kernels: Launcher, spec: Attention, state: StepState, rows: int, stored: int, blocks: int
    ) -> DeviceArray:
        """The splits of a step: written by the first layer of its kind, for all such layers."""
        key = spec.window, decode_tile(spec), decode_splits(spec)
        if key not in self._work_lists:
            slab = self._memory.reserve(8 * (1 + self._most_rows * stored), Purpose.WORKSPACE)
            self._work_lists[key] = spec.layer, slab.array((1 + self._most_rows * stored, 2), np.int32)
        layer, work = self._work_lists[key]
        if spec.layer == layer and not spec.reads_only:
            sizes = rows, state.tables.shape[1], spec.window, decode_tile(spec), decode_splits(spec), blocks
            kernels.get("attention_items.cu", "attention_items")(
                (1,), (_ITEMS_THREADS,), (work, state.row_slots, state.positions, *map(np.int32, sizes)), pdl=True
            )
        return work

    def _stored_splits(self, spec: Attention, state: StepState) -> int:
        """The number of splits that the longest context can need."""
        positions = int(state.tables.shape[1]) * KV_BLOCK
        return min(decode_splits(spec), -(-positions // decode_tile(spec)))

    def _rope(self, rope: Rope) -> tuple[DeviceArray, DeviceArray, np.int32]:
        """The device copy of a Rope's tables, uploaded on first use and shared by the layers."""
        if id(rope) not in self._ropes:
            cos, sin = self._memory.reserve(rope.nbytes, Purpose.WORKSPACE).array((2, *rope.cos.shape), np.float32)
            cos.set(rope.cos)
            sin.set(rope.sin)
            self._ropes[id(rope)] = (rope, cos, sin)  # keeps the Rope alive, so its id stays unique
        _, cos, sin = self._ropes[id(rope)]
        return cos, sin, np.int32(rope.dims)

    def _prefill_split(
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
        if key not in self._prefill_scratch:
            size = _PARTIAL_BYTES[spec.head_dim]
            capacity = min(_SPLIT_TOKENS // 16 * spec.n_heads * segments, MAX_PARTIAL_BYTES // size)
            counters = most_tiles(_SPLIT_TOKENS, batch.chunks) * spec.n_heads
            self._prefill_scratch[key] = (*self._scratch(capacity * size, counters), capacity)
        layers = max(4, _BLOCKS_PER_PROCESSOR * self._processors // (tiles * spec.n_heads))
        return *self._prefill_scratch[key], min(segments, layers)

    def _decode_split(self, spec: Attention, group: int, stored: int) -> tuple[DeviceArray, DeviceArray]:
        """Partial results of splits, and arrival counters.

        A single row has a partial result for each split, several rows for those a context can need.
        """
        key = (spec.n_heads, spec.head_dim, group)
        if key not in self._decode_scratch:
            groups = spec.n_heads // group
            floats = decode_splits(spec) * _partial_floats(spec.head_dim, group)
            if self._most_rows > 1:
                floats = max(floats, self._most_rows * stored * _part_floats(spec.head_dim, group))
            self._decode_scratch[key] = self._scratch(4 * groups * floats, groups * self._most_rows)
        return self._decode_scratch[key]

    def _scratch(self, nbytes: int, counters: int) -> tuple[DeviceArray, DeviceArray]:
        """Uninitialized f32 memory, and `counters` u32 zeros."""
        floats = self._memory.reserve(nbytes, Purpose.WORKSPACE).array((nbytes // 4,), np.float32)
        zeros = self._memory.reserve(4 * counters, Purpose.WORKSPACE).array((counters,), np.uint32)
        zeros.fill(0)
        return floats, zeros


def _warps(dim: int, group: int) -> int:
    """Warps among which a tile is divided: warps_of in decode_splits.cuh."""
    return _WIDE_WARPS if dim == _WIDE_DIM and group >= _WIDE_GROUP else _DECODE_WARPS


def _partial_floats(dim: int, group: int) -> int:
    """Size of a partial result of attention_decode: partial_floats in softmax_parts.cuh."""
    return -(-group * (dim + 2) // 4) * 4


def _part_floats(dim: int, group: int) -> int:
    """Size of a partial result of several rows: part_floats in team_parts.cuh."""
    return _partial_floats(dim + 8, group)


def _tile_bytes(dim: int, kv_type: KvType) -> int:
    """Shared memory of the tiles of a block in prefill: TileStages of attention_tiles.cuh."""
    tile, copied = _TILE_KEYS[dim] * (dim + _ROW_PAD) * 2, _TILE_KEYS[dim] * kv_row_bytes(dim, kv_type)
    return 2 * tile + 4 * copied if kv_type == "q8" else 4 * tile


def _wgmma_bytes(dim: int) -> int:
    """Dynamic shared memory of attention_wgmma.cu: its alignment, stages, and older segments."""
    return 1024 + 4 * _WGMMA_STAGES[dim] * _TILE_KEYS[dim] * dim + WIDE_TILE // 16 * _PARTIAL_BYTES[dim]


def _sinks(spec: Attention) -> DeviceArray | None:
    return None if spec.sinks is None else spec.sinks.data
