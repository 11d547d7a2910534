"""Launchers of RoPE, KV writes and attention of decode steps: split KV.

Kernels: `attention_decode.cu` for one row, for several `attention_items.cu` and
`attention_few_rows.cu` or `attention_rows.cu`; `attention_512.cu` for heads of 512 elements;
`kv_rows.cu` before them (see there when). `query_scales.py` precedes. Caller: `decode_ops.py`.
"""

from collections.abc import Mapping

import numpy as np

from worker.gpu.activations import (
    Q8_TILES,
    Q8Activations,
    Q8Tiles,
    empty_q8,
    empty_q8_tiles,
    fills_tiles,
    q8_tiles,
    quantize_rows,
    quantize_tiles,
)
from worker.gpu.attention import (
    FLAGS,
    MAX_GROUP,
    TILED_DIMS,
    WIDEST_DIM,
    WIDEST_THREADS,
    AttentionMemory,
    adjacent_flags,
    group_size,
    sinks_of,
)
from worker.gpu.compiler import KernelName
from worker.gpu.head_norms import HEAD_DIMS, check_head_dim, norm_arguments, normalize_heads
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray, Purpose
from worker.gpu.prefill_state import DEFINES as _BATCH_DEFINES
from worker.gpu.state import StepState
from worker.model import kv_row_bytes
from worker.ops import KV_BLOCK, Attention

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
    "attention_512": "tiles of 128 positions, oldest first",
    "decode_splits": f"min({_MAX_DECODE_SPLITS}, {_DECODE_BLOCKS} // (heads / group)) splits, tiles dealt in turn",
}
"""The orders of sums that `worker.gpu.numerics` reports."""

INSTANTIATIONS: tuple[KernelName, ...] = (
    *(("attention_512.cu", f"attention_512_rows<{group}, F16Kv>") for group in range(1, 5)),
    *(("kv_rows.cu", f"kv_rows<{dim}, {adjacent}, F16Kv>") for dim in HEAD_DIMS for adjacent in adjacent_flags(dim)),
    ("attention_items.cu", "attention_items"),
    *(
        (f"{kernel}.cu", f"{kernel}<{dim}, {group}, {adjacent}, F16Kv>")
        for kernel in ("attention_decode", "attention_rows")
        for dim in TILED_DIMS
        for group in range(1, MAX_GROUP[dim] + 1)
        for adjacent in adjacent_flags(dim)
    ),
    *(
        ("attention_few_rows.cu", f"attention_few_rows<{_WIDE_DIM}, {group}, {adjacent}>")
        for group in range(_WIDE_GROUP, MAX_GROUP[_WIDE_DIM] + 1)
        for adjacent in FLAGS
    ),
    # With codes, which few workers use, those of the smallest and the largest groups.
    *(("kv_rows.cu", f"kv_rows<{dim}, false, Q8Kv>") for dim in HEAD_DIMS),
    ("attention_512.cu", "attention_512_rows<4, Q8Kv>"),
    *(
        (f"{kernel}.cu", f"{kernel}<{dim}, {group}, false, Q8Kv>")
        for kernel in ("attention_decode", "attention_rows")
        for dim in TILED_DIMS
        for group in (1, MAX_GROUP[dim])
    ),
)


def decode_splits(spec: Attention) -> int:
    """G: the number of blocks over which a sequence's KV tiles are dealt in decode.

    It decides the order of sums, so it depends on the model's shape only, never on the device.
    """
    return min(_MAX_DECODE_SPLITS, max(1, _DECODE_BLOCKS // (spec.n_heads // group_size(spec))))


def decode_partial_bytes(dim: int) -> int:
    """Upper bound of the partial results of a decode row."""
    return 4 * _DECODE_BLOCKS * _part_floats(dim, MAX_GROUP[dim])


def decode_tile(spec: Attention) -> int:
    """The positions of a tile in decode: kTile of the kernels."""
    return 256 if spec.head_dim == _WIDE_DIM else _DECODE_WARPS * KV_BLOCK


class DecodeAttention:
    """Attention of all layers of a model, for at most `slots` rows in a decode step.

    `processors` is the device's number of multiprocessors, `max_shared` the bytes of shared memory
    that a block may have. They shape the grids of several rows, and change no bit of a result.
    """

    def __init__(self, shared: AttentionMemory, slots: int, processors: int, max_shared: int = _MAX_SHARED) -> None:
        self._shared = shared
        self._max_shared = max_shared
        self._slots = slots
        self._processors = processors
        self._most_rows = 1 << (slots - 1).bit_length()  # of a step: graphs have a power of two
        self._work_lists: dict[tuple[int, int, int], tuple[int, DeviceArray]] = {}
        self._scratch: dict[tuple[int, int, int], tuple[DeviceArray, DeviceArray]] = {}

    def scale_queries(self, kernels: Launcher, q: DeviceArray, spec: Attention, state: StepState) -> None:
        """Scale the rows of q [R, H·D] f32 in place, before `launch`, if `spec` has a scale."""
        self._shared.query_scales.decode(kernels, q, spec, state)

    def launch(
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
        if self._shared.quantized and (len(q) > 1 or dim == WIDEST_DIM) and k is not None and v is not None:
            v, spec = normalize_heads(kernels, pool, q, k, v, spec)
            k, v = self.write_rows(kernels, k, v, spec, state)
        if dim == WIDEST_DIM:
            return self._decode_512(kernels, pool, q, k, v, spec, state)
        rows, groups, stored = len(q), spec.n_heads // group, self._stored_splits(spec, state)
        partials, arrivals = self._split(spec, group, stored)
        y: Q8Activations | Q8Tiles = empty_q8_tiles(pool, *q.shape) if fills_tiles(rows) else empty_q8(pool, *q.shape)
        adjacent, heads = FLAGS[spec.rope.adjacent], (np.int32(spec.n_heads), np.int32(spec.n_kv_heads))
        in_rows = (None, None) if isinstance(y, Q8Tiles) else (y.q, y.meta)
        inputs = (y.x, *in_rows, q, k, v, *self._shared.cache.layer(spec.layer), *self._shared.rope(spec.rope))
        tables = (state.tables, np.int32(state.tables.shape[1]), sinks_of(spec))
        scratch = (partials, arrivals, *heads, np.int32(spec.window))
        if rows == 1:
            row_slots = None if self._slots == 1 else state.row_slots
            suffix, norms = norm_arguments(spec)
            kernels.get(
                "attention_decode.cu", f"attention_decode<{dim}, {group}, {adjacent}, {self._shared.kv}{suffix}>"
            )(
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
        kv = "" if few else f", {self._shared.kv}"
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
        """`launch` for heads of 512 elements; y is quantized by a launch of its own."""
        group, stored, rows = group_size(spec), self._stored_splits(spec, state), len(q)
        y = pool.empty(q.shape, np.float32)
        row_slots = None if rows == 1 and self._slots == 1 else state.row_slots
        suffix, norms = norm_arguments(spec)
        kernels.get("attention_512.cu", f"attention_512_rows<{group}, {self._shared.kv}{suffix}>")(
            (stored, spec.n_heads // group, rows),
            (WIDEST_THREADS,),
            (
                *(y, q, k, v, *self._shared.cache.layer(spec.layer), *self._shared.rope(spec.rope)),
                *(row_slots, state.positions, state.tables, np.int32(state.tables.shape[1]), sinks_of(spec)),
                *self._split(spec, group, stored),
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
        wide = _warps(dim, group) == _WIDE_WARPS and not spec.reads_only and not self._shared.quantized
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
        """Write k, v [R, Hk·D] to the cache, before the attention of any row of the step.

        The caller does so if a sequence has several rows, `launch` if the cache has codes.

        Returns the k and v of that `launch`: None if it reads the cache alone.
        """
        dim = check_head_dim(spec.head_dim)
        kernels.get("kv_rows.cu", f"kv_rows<{dim}, {FLAGS[spec.rope.adjacent]}, {self._shared.kv}>")(
            (len(k), spec.n_kv_heads),
            (_Q8_ROW_THREADS if self._shared.quantized else dim,),
            (
                *(k, v, *self._shared.cache.layer(spec.layer), *self._shared.rope(spec.rope)),
                *(state.row_slots, state.positions, state.tables, np.int32(state.tables.shape[1])),
            ),
            pdl=True,
        )
        return (None, None) if self._shared.quantized else (k, v)

    def _ring_bytes(self, dim: int, warps: int) -> int:
        """Dynamic shared memory of a team: the rings of its warps (kv_ring.cuh)."""
        return warps * _RING_SLOTS * 2 * KV_BLOCK * kv_row_bytes(dim, self._shared.cache.kv_type)

    def _work_list(
        self, kernels: Launcher, spec: Attention, state: StepState, rows: int, stored: int, blocks: int
    ) -> DeviceArray:
        """The splits of a step: written by the first layer of its kind, for all such layers."""
        key = spec.window, decode_tile(spec), decode_splits(spec)
        if key not in self._work_lists:
            slab = self._shared.memory.reserve(8 * (1 + self._most_rows * stored), Purpose.WORKSPACE)
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

    def _split(self, spec: Attention, group: int, stored: int) -> tuple[DeviceArray, DeviceArray]:
        """Partial results of splits, and arrival counters.

        A single row has a partial result for each split, several rows for those a context can need.
        """
        key = (spec.n_heads, spec.head_dim, group)
        if key not in self._scratch:
            groups = spec.n_heads // group
            floats = decode_splits(spec) * _partial_floats(spec.head_dim, group)
            if self._most_rows > 1:
                floats = max(floats, self._most_rows * stored * _part_floats(spec.head_dim, group))
            self._scratch[key] = self._shared.scratch(4 * groups * floats, groups * self._most_rows)
        return self._scratch[key]


def _warps(dim: int, group: int) -> int:
    """Warps among which a tile is divided: warps_of in decode_splits.cuh."""
    return _WIDE_WARPS if dim == _WIDE_DIM and group >= _WIDE_GROUP else _DECODE_WARPS


def _partial_floats(dim: int, group: int) -> int:
    """Size of a partial result of attention_decode: partial_floats in softmax_parts.cuh."""
    return -(-group * (dim + 2) // 4) * 4


def _part_floats(dim: int, group: int) -> int:
    """Size of a partial result of several rows: part_floats in team_parts.cuh."""
    return _partial_floats(dim + 8, group)
