"""Launchers of decode's experts for two rows and more: each distinct expert is loaded once.

The pairs of a row and one of its experts are sorted by expert on the device and cut into tiles:

| pairs an expert, on average | weights | kernel | pairs of a tile |
| --- | --- | --- | --- |
| 1 and more | MXFP4, gate and up without GELU | `experts_mma.cu` (int8 MMAs) | 16, above 8: 32 |
| any | block types, but for the row above | `grouped_experts.cu` (dp4a) | 8 |
| any | others, or rows too long for shared memory | those of `matvec.py`, a row at a time | – |

Every row has the bits of the launchers in `matvec.py` for that row alone. Other kernels:
`route_rows.cu`, `group_pairs.cu`, `add_experts.cu`. Twins: the ops of `worker/cpu/ops.py`,
`tests/quantized_ops.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.gpu import matvec
from worker.gpu.activations import DECODE_WARPS, Q8_BLOCK, Q8Activations, empty_q8, input_rows, quantize_rows
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import EXPERT_TYPES, PLANES, address
from worker.gpu.matvec import GATE, GELU_TYPES, check_experts, gate_of, is_gelu, split_k_of
from worker.gpu.matvec_mma import MAX_SHARED
from worker.gpu.memory import DeviceArray
from worker.ops import SWIGLU, Activation, Linear, RmsNorm, Router, Routes
from worker.quants import F32, MXFP4, QuantType

_EXPERT_WARPS = 8  # those of glu for experts in matvec.py, since the sum of a norm's squares depends on it
_TILE_PAIRS = _EXPERT_WARPS  # pairs of a tile, a warp finishes each
_CHUNK_COST = 8  # of a chunk's weights in units of the arithmetic of a pair, by estimate
_MMA_THREADS, _MMA_BLOCKS = 640, 132  # one block for each of an H100's multiprocessors
_MMA_SLICES, _MMA_STAGE_ROWS = 16, 16
_MMA_SLOTS = {2: 5, 4: 3}  # stages in shared memory, by the MMAs along a tile's pairs
_MMA_CHUNK_COST = 24
_MMA_N = 8  # pairs of an MMA
_MMA_ROWS, _MMA_COLS, _MMA_MIN_COLS = 32, 64, 512  # weights have multiples of rows and columns, and a minimum
_MMA_MEAN_PAIRS = 1  # pairs an expert from which experts_mma.cu is faster
_MMA_TILES = ((4, 8), (2, 0))  # MMAs along a tile's pairs, 8 each, and the mean above which to use them
DEFINES = {
    "DECODE_WARPS": DECODE_WARPS,
    "EXPERT_WARPS": _EXPERT_WARPS,
    "TILE_PAIRS": _TILE_PAIRS,
    "MMA_SLOTS": _MMA_SLOTS[2],
    "MMA_WIDE_SLOTS": _MMA_SLOTS[4],
}
_THREADS = 256
_GROUP_THREADS = 1024
_GRID_BLOCKS = 264  # two for each of an H100's multiprocessors

_NORMED_ROWS = np.dtype([("q", "u8"), ("meta", "u8"), ("factor", "u8")])
"""`NormedRows` of route_rows.cu."""
_CHOICES = np.dtype([("experts", "u8"), ("weights", "u8"), ("k", "i4")], align=True)
"""`Choices` of route_rows.cu."""
_ACTIVE_ROWS = np.dtype([("row_slots", "u8"), ("positions", "u8")])
"""`ActiveRows` of active_rows.cuh."""
_EXPERT_TILE = np.dtype([("expert", "i4"), ("first", "i4"), ("count", "i4"), ("start", "i4")])
"""`ExpertTile` of expert_tiles.cuh."""
_TILES = np.dtype(
    [("order", "u8"), ("table", "u8"), ("tiles", "i4"), ("tile_pairs", "i4"), ("chunk_cost", "i4")], align=True
)
"""`ExpertTiles` of expert_tiles.cuh."""
_PRODUCT = np.dtype(
    [
        *(("planes", PLANES, (2,)), ("bias", "u8", (2,)), ("q", "u8"), ("meta", "u8"), ("factor", "u8")),
        *(("weights", "u8"), ("out", "u8"), ("out_q", "u8"), ("out_meta", "u8")),
        *(("rows", "i4"), ("cols", "i4"), ("pairs_per_row", "i4"), ("gate", GATE)),
    ],
    align=True,
)
"""`PairProduct` of pair_product.cuh."""


def _router_name(kind: QuantType) -> KernelName:
    return "route_rows.cu", f"route_rows<{kind.name}>"


def _product_name(kind: QuantType, *, gated: bool, gelu: bool = False) -> KernelName:
    return "grouped_experts.cu", f"grouped_experts<{kind.name}, {str(gated).lower()}{', true' if gelu else ''}>"


def _mma_name(mmas: int, *, gated: bool) -> KernelName:
    return "experts_mma.cu", f"experts_mma<{mmas}, {str(gated).lower()}>"


INSTANTIATIONS: tuple[KernelName, ...] = (
    _router_name(F32),
    *(_product_name(kind, gated=gated) for kind in EXPERT_TYPES for gated in (True, False)),
    *(_product_name(kind, gated=True, gelu=True) for kind in GELU_TYPES),
    *(_mma_name(mmas, gated=gated) for mmas, _ in _MMA_TILES for gated in (True, False)),
    ("quantize_rows.cu", f"quantize_rows<true, false, {_EXPERT_WARPS}>"),
    ("group_pairs.cu", "group_pairs"),
    ("add_experts.cu", "add_experts"),
)


@dataclass(frozen=True, slots=True)
class ActiveRows:
    """Rows r whose slot `row_slots[r]` (-1: none) has a position of at least 0: [R], [S] i32."""

    row_slots: DeviceArray
    positions: DeviceArray


@dataclass(frozen=True, slots=True)
class WideTiles:
    """A table of tiles of up to `pairs` pairs for `experts_mma.cu`."""

    table: DeviceArray
    pairs: int

    @property
    def mmas(self) -> int:
        """MMAs along a tile's pairs."""
        return self.pairs // _MMA_N


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """The active pairs of routes sorted by expert (`order` [R·k]) and cut into tiles (`table`).

    `max_shared`: bytes of shared memory of a block on the device.
    """

    order: DeviceArray
    table: DeviceArray
    active: ActiveRows | None
    wide: WideTiles | None
    max_shared: int

    def parameter(self, *, wide: bool = False) -> np.ndarray[Any, Any]:
        """A value of _TILES for `table`, or for `wide`, whose address is 0 if there is none."""
        table, pairs, chunk_cost = self.table, _TILE_PAIRS, _CHUNK_COST
        if wide:
            if self.wide is None:
                return np.zeros((), _TILES)
            table, pairs, chunk_cost = self.wide.table, self.wide.pairs, _MMA_CHUNK_COST
        return np.array((address(self.order), address(table), len(table) - 1, pairs, chunk_cost), _TILES)


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """Input rows of the experts' products; `norm` is part of `rows` where these are Q8 blocks."""

    rows: Q8Activations
    norm: RmsNorm
    tiles: ExpertTiles


@dataclass(frozen=True, slots=True)
class PairRows:
    """h [R·k, f] of all pairs, f32 and Q8."""

    rows: Q8Activations
    tiles: ExpertTiles


def norm_route(
    kernels: Launcher,
    pool: Allocator,
    x: DeviceArray,
    norm: RmsNorm,
    router: Router,
    k: int,
    active: ActiveRows | None = None,
    max_shared: int = MAX_SHARED,
) -> tuple[RoutedRows, Routes]:
    """norm(x) [R, d] as Q8 blocks, and the k experts of each row, grouped; None: all rows active.

    Inactive rows have valid routes but are in no group. `max_shared`: bytes of shared memory of a
    block on the device. Raises: ModelLoadFailed.
    """
    (rows, cols), experts = x.shape, router.linear.weight.shape[0]
    if router.norm is None and router.scales is None:
        n, routes = _normed_and_routed(kernels, pool, x, norm, router.linear, k)
    else:
        n = quantize_rows(kernels, pool, x, norm, q8=True, f32=False, warps=_EXPERT_WARPS)
        routes = matvec.norm_route(kernels, pool, x, norm, router, k)
    wide_pairs = _wide_pairs(rows * k / experts, cols, max_shared)
    tiles = group_pairs(kernels, pool, routes, experts, active, wide_pairs, max_shared)
    return RoutedRows(n, norm, tiles), routes


def _normed_and_routed(
    kernels: Launcher, pool: Allocator, x: DeviceArray, norm: RmsNorm, router: Linear, k: int
) -> tuple[Q8Activations, Routes]:
    """norm(x) as Q8 blocks and the k experts of each row, both of one norm, in one launch."""
    (rows, cols), experts = x.shape, router.weight.shape[0]
    check_experts(experts, k, 32)
    q, meta = pool.empty((rows, cols), np.int8), pool.empty((rows, cols // Q8_BLOCK), np.int64)
    n = Q8Activations(x, q, meta, pool.empty((rows,), np.float32))
    routes = Routes(pool.empty((rows, k), np.int32), pool.empty((rows, k), np.float32))
    split_k, kind = split_k_of((router,)), router.weight.kind
    weights = np.array(router.weight.data.addresses(), PLANES)
    source = input_rows(Q8Activations(x), norm)
    out = np.array((address(n.q), address(n.meta), address(n.factor)), _NORMED_ROWS)
    choices = np.array((address(routes.experts), address(routes.weights), k), _CHOICES)
    staged = cols * 5 // 4 + 4 * cols * (kind.block_size == 1)
    shared = staged + 4 * experts * (split_k + 1)
    args = (source, weights, _bias(router), np.int32(experts), np.int32(split_k), out, choices)
    kernels.get(*_router_name(kind))((rows,), (32 * DECODE_WARPS,), args, shared_mem=shared, pdl=True)
    return n, routes


def group_pairs(
    kernels: Launcher,
    pool: Allocator,
    routes: Routes,
    experts: int,
    active: ActiveRows | None = None,
    wide_pairs: int = 0,
    max_shared: int = MAX_SHARED,
) -> ExpertTiles:
    """Sort the active pairs of the routes by expert, with wide tiles if `wide_pairs` is not 0."""
    rows, k = routes.experts.shape
    pairs = rows * k

    def table(tile_pairs: int) -> DeviceArray:
        return pool.empty((pairs // tile_pairs + min(experts, pairs) + 1,), _EXPERT_TILE)

    order = pool.empty((pairs,), np.int32)
    wide = WideTiles(table(wide_pairs), wide_pairs) if wide_pairs else None
    tiles = ExpertTiles(order, table(_TILE_PAIRS), active, wide, max_shared)
    sizes = (np.int32(pairs), np.int32(k), np.int32(experts))
    args = (routes.experts, *sizes, _active(active), tiles.parameter(), tiles.parameter(wide=True))
    shared = 4 * (pairs + 2 * experts)
    kernels.get("group_pairs.cu", "group_pairs")((1,), (_GROUP_THREADS,), args, shared_mem=shared, pdl=True)
    return tiles


def experts_glu(
    kernels: Launcher,
    pool: Allocator,
    n: RoutedRows,
    routes: Routes,
    gate: Linear,
    up: Linear,
    activation: Activation,
) -> PairRows:
    """activation(gate_e(n), up_e(n)) of each pair: h [R·k, f].

    Rows of inactive pairs are undefined. The preceding launches must be those of `norm_route`.
    """
    if not is_grouped((gate, up), n.tiles.max_shared):
        plain = matvec.glu(kernels, pool, Q8Activations(n.rows.x), n.norm, gate, up, activation, routes)
        return PairRows(plain, n.tiles)
    k, f = routes.experts.shape[1], gate.weight.shape[1]
    h = empty_q8(pool, n.rows.shape[0] * k, f)
    _launch(kernels, n.tiles, (gate, up), n.rows, h, k, activation=activation)
    return PairRows(h, n.tiles)


def experts_add(
    kernels: Launcher, pool: Allocator, h: PairRows, routes: Routes, down: Linear, residual: DeviceArray | None
) -> DeviceArray:
    """residual + Σ_j weights[:, j]·down_e(h[:, j]): x [R, d] f32, zeros in inactive rows.

    The preceding launch must be `experts_glu`: the kernel reads the routes before its wait
    (`kernels/grouped_experts.cu`).
    """
    (rows, k), d = routes.experts.shape, down.weight.shape[1]
    if is_grouped((down,), h.tiles.max_shared):
        y = pool.empty((rows * k, d), np.float32)
        _launch(kernels, h.tiles, (down,), h.rows, Q8Activations(y), 1, weights=routes.weights)
    else:  # of inactive rows the sums are undefined, as h is: add_experts adds nothing and writes zeros
        y, k, residual = None, 0, matvec.experts_add(kernels, pool, h.rows, routes, down, residual)
    x = pool.empty((rows, d), np.float32)
    args = (y, _active(h.tiles.active), np.int32(k), np.int32(d), residual, x)
    kernels.get("add_experts.cu", "add_experts")((-(-d // _THREADS), rows), (_THREADS,), args, pdl=True)
    return x


def is_grouped(linears: Sequence[Linear], max_shared: int) -> bool:
    """Whether there is a grouped kernel for these weights of one input: block types, all alike.

    `max_shared`: bytes of shared memory of a block, which hold the input rows of a tile.
    """
    kinds = {linear.weight.kind for linear in linears}
    return len(kinds) == 1 and kinds.pop().block_size > 1 and _shared_bytes(linears) <= max_shared


def _launch(
    kernels: Launcher,
    tiles: ExpertTiles,
    linears: Sequence[Linear],
    x: Q8Activations,
    out: Q8Activations,
    pairs_per_row: int,
    *,
    activation: Activation = SWIGLU,
    weights: DeviceArray | None = None,
) -> None:
    """Launch a product of all tiles: of two matrices with their gate, or of one with `weights`."""
    first, last = linears[0], linears[-1]
    product = np.zeros((), _PRODUCT)
    product["planes"] = [linear.weight.data.addresses() for linear in (first, last)]
    product["bias"] = [address(_bias(linear)) for linear in (first, last)]
    for name, array in (("q", x.q), ("meta", x.meta), ("factor", x.factor), ("weights", weights)):
        product[name] = address(array)
    for name, array in (("out", out.x), ("out_q", out.q), ("out_meta", out.meta)):
        product[name] = address(array)
    product["rows"], product["cols"], product["pairs_per_row"] = *first.weight.shape[1:], pairs_per_row
    gelu, gated = is_gelu(activation), len(linears) > 1
    product["gate"] = gate_of(activation, gelu=gelu)
    if tiles.wide is not None and not gelu and _has_mma(linears, tiles.wide.mmas, tiles.max_shared):
        shared = _mma_bytes(first.weight.shape[-1] // Q8_BLOCK, tiles.wide.mmas)
        kernel, args = kernels.get(*_mma_name(tiles.wide.mmas, gated=gated)), (product, tiles.parameter(wide=True))
        kernel((_MMA_BLOCKS,), (_MMA_THREADS,), args, shared_mem=shared, pdl=True)
    else:
        kernel = kernels.get(*_product_name(first.weight.kind, gated=gated, gelu=gelu))
        args = (product, tiles.parameter())
        kernel((_GRID_BLOCKS,), (_THREADS,), args, shared_mem=_shared_bytes(linears), pdl=True)


def _wide_pairs(mean: float, cols: int, max_shared: int) -> int:
    """Pairs of a wide tile for `mean` pairs an expert and rows of `cols`; 0: no wide tiles."""
    if mean < _MMA_MEAN_PAIRS:
        return 0
    fitting = (n for n, least in _MMA_TILES if mean > least and _mma_bytes(cols // Q8_BLOCK, n) <= max_shared)
    return _MMA_N * next(fitting, 0)


def _has_mma(linears: Sequence[Linear], mmas: int, max_shared: int) -> bool:
    """Whether `experts_mma.cu` computes these products with tiles of `mmas` MMAs."""
    *_, rows, cols = linears[0].weight.shape
    fits = _mma_bytes(cols // Q8_BLOCK, mmas) <= max_shared
    whole = rows % _MMA_ROWS == 0 and cols % _MMA_COLS == 0 and cols >= _MMA_MIN_COLS
    return linears[0].weight.kind is MXFP4 and whole and fits


def _mma_bytes(units: int, mmas: int) -> int:
    """Bytes of `MmaShared` of experts_mma.cu with scales and activations of `units` units."""
    partials = 16 * _MMA_SLICES * 32 * mmas
    pairs = 2 * 4 * _MMA_N * mmas
    bias, barriers = 32, 112
    stage = 16 * (_MMA_STAGE_ROWS * units + _MMA_STAGE_ROWS // 4) + _MMA_STAGE_ROWS * units
    x = units * mmas * (352 if mmas <= 2 else 288)
    return partials + pairs + bias + barriers + _MMA_SLOTS[mmas] * stage + x


def _shared_bytes(linears: Sequence[Linear]) -> int:
    """Bytes of `ChunkSums` of grouped_experts.cu and `PairRows` of expert_dots.cuh."""
    units = int(linears[0].weight.shape[-1]) // Q8_BLOCK
    sums = 4 * _TILE_PAIRS * (2 * len(linears) * Q8_BLOCK + 2 * _THREADS)
    return sums + units * (16 * (2 * _TILE_PAIRS + 1) + 8 * (_TILE_PAIRS + 1))


def _active(active: ActiveRows | None) -> np.ndarray[Any, Any]:
    """A value of _ACTIVE_ROWS."""
    if active is None:
        return np.zeros((), _ACTIVE_ROWS)
    return np.array((address(active.row_slots), address(active.positions)), _ACTIVE_ROWS)


def _bias(linear: Linear) -> DeviceArray | None:
    return None if linear.bias is None else linear.bias.data
