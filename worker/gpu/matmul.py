"""Launchers of prefill's products: f16 MMAs on tensor cores, weights dequantized in registers.

The split of a row's sum along K follows from the matrix alone. The tile also follows from the
number of tokens, which does not change a bit: each element is one chain of MMAs a split. On sm_90
`matmul_wgmma.py` launches the products of dense matrices, and of experts with many rows. Kernels:
`matmul.cu`, `group_routes.cu`, `gated.cu`, `combine.cu`. Twins: the ops of `worker/cpu/ops.py`
without their norms, `tests/quantized_ops.py`.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from worker.gpu import matmul_wgmma
from worker.gpu.activations import ScaledF16, padded
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import EXPERT_TYPES, MIXED, STORED_TYPES
from worker.gpu.matmul_params import MAX_PROJECTIONS, ExpertGroups, matmul_params, slot_tiles
from worker.gpu.matvec import GELU_TYPES, gate_of, is_gelu
from worker.gpu.memory import DeviceArray
from worker.ops import SWIGLU, Activation, Linear, Routes
from worker.quants import QuantType


class _Tile(NamedTuple):
    """Tile of a block of matmul.cu: 16·frags_m·warps_m rows (half with GLU) × tile_n tokens of y.

    K is cut into split_k·passes splits: `split_k` warps work side by side along K, each makes
    `passes` passes over K.
    """

    warps_m: int
    split_k: int
    tile_n: int
    passes: int = 1
    frags_m: int = 2
    min_blocks: int = 80
    """Blocks that occupy the device; with fewer, a smaller tile is faster."""

    @property
    def stages(self) -> int:
        """Buffers of x: the current step and those in flight, more for small tiles."""
        return 2 if self.tile_n > 32 or self.split_k > 4 else 3

    @property
    def shared_bytes(self) -> int:
        """256 bytes a token, stage and split; with several passes also their saved sums."""
        saved = 64 * self.frags_m * self.warps_m if self.passes > 1 else 0
        return (256 * self.stages + saved) * self.tile_n * self.split_k


# Measured on an H100 with the shapes of the supported models. The larger a tile, the fewer bytes
# are read again. Matrices of few rows have more splits of K; all tiles of a matrix have the same
# number of splits, so its bits do not depend on the tile. Experts have few slots each, where small
# tiles waste least. A short chunk is limited by a warp's instructions: one fragment a warp. Tiles
# of 16 tokens serve rows of logits.
_GATED_TILES = (
    _Tile(8, 1, 128, min_blocks=256),
    _Tile(4, 1, 64),
    _Tile(4, 1, 32, frags_m=1),
    _Tile(8, 1, 16, frags_m=1),
)
_TILES_1_SPLIT = _GATED_TILES[1:]
_TILES_2_SPLITS = (_Tile(4, 2, 64), _Tile(4, 2, 32, frags_m=1))
_TILES_4_SPLITS = (_Tile(4, 2, 64, passes=2, min_blocks=250), _Tile(2, 4, 64), _Tile(2, 4, 32, frags_m=1))
_TILES_8_SPLITS = (
    _Tile(4, 2, 64, passes=4),
    _Tile(4, 2, 32, passes=4),
    _Tile(2, 8, 32, frags_m=1),
    _Tile(1, 8, 16, frags_m=1),
)
_TILES_BY_ROWS = ((8192, _TILES_1_SPLIT), (4096, _TILES_2_SPLITS), (1536, _TILES_4_SPLITS), (0, _TILES_8_SPLITS))
"""Minimum of rows, and the tiles of such matrices."""
_DENSE_TILES = tuple(tile for _, tiles in _TILES_BY_ROWS for tile in tiles)
_EXPERT_TILES = ((24, _Tile(4, 1, 64)), (8, _Tile(4, 1, 32)), (0, _Tile(8, 1, 16, frags_m=1)))
"""Slots an expert that a tile needs more of, and the tile."""
_GROUP_THREADS = 1024
_THREADS = 256


def _name(
    kind: QuantType, tile: _Tile, *, experts: bool, gated: bool, gelu: bool = False, last: QuantType | None = None
) -> KernelName:
    sizes = (tile.frags_m, tile.warps_m, tile.split_k, tile.passes, tile.tile_n, tile.stages)
    arguments = [kind.name, *map(str, sizes), str(experts).lower(), "2" if gelu else str(gated).lower()]
    if last not in (None, kind):
        arguments.append(last.name)
    return "matmul.cu", f"matmul<{', '.join(arguments)}>"


INSTANTIATIONS: tuple[KernelName, ...] = (
    *(_name(kind, tile, experts=False, gated=False) for kind in STORED_TYPES for tile in _DENSE_TILES),
    *(_name(first, tile, experts=False, gated=False, last=last) for first, _, last in MIXED for tile in _DENSE_TILES),
    *(_name(kind, tile, experts=False, gated=True) for kind in STORED_TYPES for tile in _GATED_TILES),
    *(_name(kind, tile, experts=False, gated=True, gelu=True) for kind in GELU_TYPES for tile in _GATED_TILES),
    *(
        _name(kind, tile, experts=True, gated=gated)
        for kind in EXPERT_TYPES
        for _, tile in _EXPERT_TILES
        for gated in (False, True)
    ),
    *(_name(kind, tile, experts=True, gated=True, gelu=True) for kind in GELU_TYPES for _, tile in _EXPERT_TILES),
    ("group_routes.cu", "group_routes"),
    *(("gated.cu", f"gated_elements<{gelu}>") for gelu in ("false", "true")),
    ("combine.cu", "combine"),
)


def group_routes(
    kernels: Launcher, pool: Allocator, routes: Routes, n_experts: int, count: DeviceArray | None = None
) -> ExpertGroups:
    """Sort the routes' slots by expert."""
    tokens, k = routes.experts.shape
    slots = tokens * k
    tile_rows = next(tile.tile_n for min_slots, tile in _EXPERT_TILES if slots > min_slots * n_experts)
    if kernels.wgmma:
        tile_rows = matmul_wgmma.rows_of_expert_tiles(slots / n_experts) or tile_rows
    tiles = slots // tile_rows + min(n_experts, slots)
    order, places = (pool.empty((slots,), np.int32) for _ in range(2))
    table = pool.empty((tiles, 3), np.int32)
    sizes = (np.int32(k), np.int32(n_experts), np.int32(tile_rows), np.int32(tiles))
    args = (routes.experts, np.int32(slots), count, *sizes, order, places, table)
    shared = 4 * n_experts * (_GROUP_THREADS // 32 + 3)
    kernels.get("group_routes.cu", "group_routes")((1,), (_GROUP_THREADS,), args, shared_mem=shared, pdl=True)
    return ExpertGroups(k, tile_rows, order, places, table, count)


def matmul(
    kernels: Launcher, pool: Allocator, x: ScaledF16, linear: Linear, residual: DeviceArray | None = None
) -> DeviceArray:
    """W·x + b + residual: y [T, rows] f32 of x [T, cols]."""
    y = pool.empty((x.x.shape[0], linear.weight.shape[0]), np.float32)
    _launch(kernels, x, (linear,), (y,), residual=residual)
    return y


def projections(kernels: Launcher, pool: Allocator, x: ScaledF16, linears: Sequence[Linear]) -> tuple[DeviceArray, ...]:
    """W_j·x + b_j: y_j [T, rows_j] f32 of one x.

    One launch computes up to three adjacent projections of one type, or q, k and v with a
    combination of MIXED.
    """
    results: list[DeviceArray] = []
    mixed = tuple(linear.weight.kind for linear in linears) in MIXED
    for _, same in groupby(linears, key=lambda linear: mixed or linear.weight.kind.name):
        group = list(same)
        for launched in (group[at : at + MAX_PROJECTIONS] for at in range(0, len(group), MAX_PROJECTIONS)):
            ys = [pool.empty((x.x.shape[0], linear.weight.shape[0]), np.float32) for linear in launched]
            _launch(kernels, x, launched, ys)
            results += ys
    return tuple(results)


def glu(
    kernels: Launcher,
    pool: Allocator,
    x: ScaledF16,
    gate: Linear,
    up: Linear,
    activation: Activation,
    groups: ExpertGroups | None = None,
) -> ScaledF16:
    """activation(gate(x), up(x)) scaled by x.h_scale: h [T, f], with groups of their rows."""
    assert x.h_scale is not None, "x is scaled for a gated FFN"
    tokens, rows = x.x.shape[0], gate.weight.shape[-2]
    h = ScaledF16(pool.empty((tokens, padded(rows)), np.float16), x.h_scale, x.count)
    if gate.weight.kind == up.weight.kind:
        _launch(kernels, x, (gate, up), (h.x,), activation=activation, groups=groups)
        return h
    ys = [pool.empty((tokens, rows), np.float32) for _ in range(2)]
    for linear, y in zip((gate, up), ys, strict=True):
        _launch(kernels, x, (linear,), (y,), groups=groups)
    gelu = is_gelu(activation)
    args = (*ys, x.h_scale, gate_of(activation, gelu=gelu), np.int32(rows), h.x)
    grid = (tokens, -(-padded(rows) // 2 // _THREADS))
    kernels.get("gated.cu", f"gated_elements<{str(gelu).lower()}>")(grid, (_THREADS,), args, pdl=True)
    return h


def experts_add(
    kernels: Launcher,
    pool: Allocator,
    h: ScaledF16,
    routes: Routes,
    groups: ExpertGroups,
    down: Linear,
    residual: DeviceArray | None,
) -> DeviceArray:
    """residual + Σ_j weights[:, j]·down_e(h_j): x [T, d] f32 from the groups' rows h [T·k, f]."""
    tokens, k = routes.experts.shape
    d = down.weight.shape[1]
    x, y = pool.empty((tokens, d), np.float32), pool.empty((tokens * k, d), np.float32)
    _launch(kernels, h, (down,), (y,), groups=groups, order=groups.order)
    quads = d // 4
    args = (y, routes.weights, groups.count, np.int32(k), np.int32(quads), residual, x)
    kernels.get("combine.cu", "combine")((-(-quads // _THREADS), tokens), (_THREADS,), args, pdl=True)
    return x


def _launch(
    kernels: Launcher,
    x: ScaledF16,
    linears: Sequence[Linear],
    ys: Sequence[DeviceArray],
    *,
    residual: DeviceArray | None = None,
    activation: Activation = SWIGLU,
    groups: ExpertGroups | None = None,
    order: DeviceArray | None = None,
) -> None:
    """Launch the products of one x: a y for each, or one y of two that are gated.

    With groups, y is in order of their rows, or with their `order` in order of slots.
    """
    gated, tokens = len(ys) < len(linears), x.x.shape[0]
    rows = [linear.weight.shape[-2] for linear in linears]
    first, last = linears[0].weight.kind, linears[-1].weight.kind
    if kernels.wgmma and (groups is None or matmul_wgmma.multiplies_groups(first, groups)):
        matmul_wgmma.launch(
            kernels, x, linears, ys, residual=residual, activation=activation, groups=groups, order=order
        )
        return
    if groups is None:
        tile = _tile(rows, tokens, gated=gated)
        n_tiles, slots = -(-tokens // tile.tile_n), slot_tiles(None)
    else:
        tile = next(tile for _, tile in _EXPERT_TILES if groups.tile_rows % tile.tile_n == 0)
        parts = groups.tile_rows // tile.tile_n
        n_tiles, slots = parts * len(groups.table), slot_tiles(groups.table, order, parts)
    gelu = is_gelu(activation)
    kernel = kernels.get(*_name(first, tile, experts=groups is not None, gated=gated, gelu=gelu, last=last))
    blocks = [_blocks(tile, n, gated=gated) for n in rows]
    params = matmul_params(x, linears, ys, blocks, residual=residual, gate=gate_of(activation, gelu=gelu))
    grid, threads = (blocks[0] if gated else sum(blocks), n_tiles), 32 * tile.warps_m * tile.split_k
    args = (params, x.x, np.int32(tokens), slots)
    kernel(grid, (threads,), args, shared_mem=tile.shared_bytes, pdl=True)


def _tile(rows: Sequence[int], tokens: int, *, gated: bool) -> _Tile:
    """The largest tile that makes enough blocks and has at most half of the tokens, or 32."""
    tiles, matrices = _tiles(rows, gated=gated), rows[:1] if gated else rows
    max_tile_n = max(tokens // 2, min(tokens, 32))

    def blocks(tile: _Tile) -> int:
        return sum(_blocks(tile, n, gated=gated) for n in matrices) * -(-tokens // tile.tile_n)

    return next((tile for tile in tiles if tile.tile_n <= max_tile_n and blocks(tile) >= tile.min_blocks), tiles[-1])


def _tiles(rows: Sequence[int], *, gated: bool) -> tuple[_Tile, ...]:
    """The tiles of matrices of these rows that share a launch, the largest first."""
    if gated:
        return _GATED_TILES
    return next(tiles for min_rows, tiles in _TILES_BY_ROWS if sum(rows) >= min_rows)


def _blocks(tile: _Tile, rows: int, *, gated: bool) -> int:
    """Blocks along the rows of a matrix; a gated one interleaves two matrices, padded."""
    return -(-(padded(rows) if gated else rows) // (tile.warps_m * tile.frags_m * (8 if gated else 16)))
