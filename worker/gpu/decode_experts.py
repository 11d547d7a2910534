"""Launchers of decode's experts for two rows and more: each distinct expert is loaded once.

The pairs of a row and one of its experts are sorted by expert on the device and computed in tiles
of up to 8 pairs. Every row has the bits of the launchers in `matvec.py` for that row alone. Types
without a grouped kernel (`is_grouped`) use those. Kernels: `route_rows.cu`, `group_pairs.cu`,
`grouped_experts.cu`, `add_experts.cu`. Twins: the ops of `worker/cpu/ops.py`,
`tests/quantized_ops.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.gpu import matvec
from worker.gpu.activations import DECODE_WARPS, Q8_BLOCK, Q8Activations, empty_q8, input_rows
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import PLANES, address
from worker.gpu.matvec import GATE, check_experts, gate_of, split_k_of
from worker.gpu.memory import DeviceArray
from worker.ops import SWIGLU, Activation, Linear, RmsNorm, Routes
from worker.quants import F32, MXFP4, Q8_0, QuantType

_EXPERT_WARPS = 8  # those of glu for experts in matvec.py, since the sum of a norm's squares depends on it
_TILE_PAIRS = _EXPERT_WARPS  # pairs of a tile, a warp finishes each
DEFINES = {"DECODE_WARPS": DECODE_WARPS, "EXPERT_WARPS": _EXPERT_WARPS, "TILE_PAIRS": _TILE_PAIRS}
_PER_LANE = (1, 2, 4, 8)  # experts of a lane of route_rows.cu
_THREADS = 256
_GROUP_THREADS = 1024
_GRID_BLOCKS = 264  # two for each of an H100's multiprocessors
_MAX_SHARED = 160 << 10  # bytes

_NORMED_ROWS = np.dtype([("q", "u8"), ("meta", "u8"), ("factor", "u8")])
"""`NormedRows` of route_rows.cu."""
_CHOICES = np.dtype([("experts", "u8"), ("weights", "u8"), ("k", "i4")], align=True)
"""`Choices` of route_rows.cu."""
_ACTIVE_ROWS = np.dtype([("row_slots", "u8"), ("positions", "u8")])
"""`ActiveRows` of active_rows.cuh."""
_EXPERT_TILE = np.dtype([("expert", "i4"), ("first", "i4"), ("count", "i4"), ("start", "i4")])
"""`ExpertTile` of expert_tiles.cuh."""
_TILES = np.dtype([("order", "u8"), ("table", "u8"), ("tiles", "i4")], align=True)
"""`ExpertTiles` of expert_tiles.cuh."""
_PRODUCT = np.dtype(
    [
        *(("planes", PLANES, (2,)), ("bias", "u8", (2,)), ("q", "u8"), ("meta", "u8"), ("factor", "u8")),
        *(("weights", "u8"), ("out", "u8"), ("out_q", "u8"), ("out_meta", "u8")),
        *(("rows", "i4"), ("cols", "i4"), ("pairs_per_row", "i4"), ("gate", GATE)),
    ],
    align=True,
)
"""`PairProduct` of grouped_experts.cu."""


def _router_name(experts: int, kind: QuantType) -> KernelName:
    per_lane = next(n for n in _PER_LANE if 32 * n >= experts)
    return "route_rows.cu", f"route_rows<{per_lane}, {kind.name}>"


def _product_name(kind: QuantType, *, gated: bool) -> KernelName:
    return "grouped_experts.cu", f"grouped_experts<{kind.name}, {str(gated).lower()}>"


INSTANTIATIONS: tuple[KernelName, ...] = (
    *(_router_name(32 * n, F32) for n in _PER_LANE),
    *(_product_name(kind, gated=gated) for kind in (MXFP4, Q8_0) for gated in (True, False)),
    ("group_pairs.cu", "group_pairs"),
    ("add_experts.cu", "add_experts"),
)


@dataclass(frozen=True, slots=True)
class ActiveRows:
    """Rows r whose slot `row_slots[r]` (-1: none) has a position of at least 0: [R], [S] i32."""

    row_slots: DeviceArray
    positions: DeviceArray


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """The active pairs of routes sorted by expert (`order` [R·k]) and cut into tiles (`table`)."""

    order: DeviceArray
    table: DeviceArray
    active: ActiveRows | None


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
    router: Linear,
    k: int,
    active: ActiveRows | None = None,
) -> tuple[RoutedRows, Routes]:
    """norm(x) [R, d] as Q8 blocks, and the k experts of each row, grouped; None: all rows active.

    Inactive rows have valid routes but are in no group. Raises: ModelLoadFailed.
    """
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
    kernels.get(*_router_name(experts, kind))((rows,), (32 * DECODE_WARPS,), args, shared_mem=shared, pdl=True)
    tiles = group_pairs(kernels, pool, routes, experts, active)
    return RoutedRows(n, norm, tiles), routes


def group_pairs(
    kernels: Launcher, pool: Allocator, routes: Routes, experts: int, active: ActiveRows | None = None
) -> ExpertTiles:
    """Sort the active pairs of the routes by expert."""
    rows, k = routes.experts.shape
    pairs = rows * k
    tiles = pairs // _TILE_PAIRS + min(experts, pairs)
    order, table = pool.empty((pairs,), np.int32), pool.empty((tiles + 1,), _EXPERT_TILE)
    sizes = (np.int32(pairs), np.int32(k), np.int32(experts), np.int32(tiles))
    args = (routes.experts, *sizes, _active(active), order, table)
    shared = 4 * (pairs + 2 * experts)
    kernels.get("group_pairs.cu", "group_pairs")((1,), (_GROUP_THREADS,), args, shared_mem=shared, pdl=True)
    return ExpertTiles(order, table, active)


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
    if not is_grouped((gate, up)):
        plain = matvec.glu(kernels, pool, Q8Activations(n.rows.x), n.norm, gate, up, activation, routes)
        return PairRows(plain, n.tiles)
    k, f = routes.experts.shape[1], gate.weight.shape[1]
    h = empty_q8(pool, n.rows.shape[0] * k, f)
    _launch(kernels, n.tiles, (gate, up), n.rows, h, k, activation=activation)
    return PairRows(h, n.tiles)


def experts_add(
    kernels: Launcher, pool: Allocator, h: PairRows, routes: Routes, down: Linear, residual: DeviceArray
) -> DeviceArray:
    """residual + Σ_j weights[:, j]·down_e(h[:, j]): x [R, d] f32, zeros in inactive rows.

    The preceding launch must be `experts_glu`: the kernel reads the routes before its wait
    (`kernels/grouped_experts.cu`).
    """
    if not is_grouped((down,)):
        return matvec.experts_add(kernels, pool, h.rows, routes, down, residual)
    (rows, k), d = routes.experts.shape, down.weight.shape[1]
    x, y = pool.empty((rows, d), np.float32), pool.empty((rows * k, d), np.float32)
    _launch(kernels, h.tiles, (down,), h.rows, Q8Activations(y), 1, weights=routes.weights)
    args = (y, _active(h.tiles.active), np.int32(k), np.int32(d), residual, x)
    kernels.get("add_experts.cu", "add_experts")((-(-d // _THREADS), rows), (_THREADS,), args, pdl=True)
    return x


def is_grouped(linears: Sequence[Linear]) -> bool:
    """Whether there is a grouped kernel for these weights of one input: block types, all alike."""
    kinds = {linear.weight.kind for linear in linears}
    return len(kinds) == 1 and kinds.pop().block_size > 1 and _shared_bytes(linears) <= _MAX_SHARED


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
    product["gate"] = gate_of(activation)
    lists = np.array((address(tiles.order), address(tiles.table), len(tiles.table) - 1), _TILES)
    kernel = kernels.get(*_product_name(first.weight.kind, gated=len(linears) > 1))
    kernel((_GRID_BLOCKS,), (_THREADS,), (product, lists), shared_mem=_shared_bytes(linears), pdl=True)


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
