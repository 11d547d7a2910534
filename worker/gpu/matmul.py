"""Launchers of prefill's products: tensor cores over f16 activations, weights de-quantized on their way.

How a row's sum over columns is cut among warps (a tile's depths) follows from the matrix alone; how many rows and
tokens a block takes also from how many tokens there are, which moves no bit: an element is one chain of products.
Twins: the ops of `worker/cpu/ops.py` without their norms, `worker/cpu/quantized.py`. Kernels: `matmul.cu`,
`group_routes.cu`, `gated.cu`, `combine.cu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import MIXED, PLANES, address
from worker.gpu.matvec import GATE, gate_of
from worker.gpu.memory import DeviceArray
from worker.gpu.scaled_f16 import ScaledF16
from worker.ops import SWIGLU, Activation, Linear, Routes
from worker.quants import MXFP4, Q8_0, QUANT_TYPES, QuantType


class _Tile(NamedTuple):
    """Of matmul.cu: 16·strips·rows × tokens of y a block, its columns cut into depths·turns groups."""

    rows: int
    depths: int
    tokens: int
    turns: int = 1
    strips: int = 2
    enough: int = 80
    """Blocks that occupy the device: with fewer, a smaller tile is faster."""

    @property
    def shared_bytes(self) -> int:
        """256 bytes a token, of the step in hand and of those ahead; and the sums that turns keep."""
        steps = 2 if self.tokens > 32 or self.depths > 4 else 3
        kept = 64 * self.strips * self.rows if self.turns > 1 else 0
        return (256 * steps + kept) * self.tokens * self.depths


# Measured on an H100 over these models' shapes: the larger the tile, the less is read again; the fewer the rows, the
# more groups, which all tiles of a kind of matrix share. Few slots share an expert: small tiles waste the least. Of a
# short piece it is a warp's instructions that take the time: one strip each. The 16 tokens are for a row of logits.
_GATED = (_Tile(8, 1, 128, enough=256), _Tile(4, 1, 64), _Tile(4, 1, 32, strips=1), _Tile(8, 1, 16, strips=1))
_MOST = _GATED[1:]
_MANY = (_Tile(4, 2, 64), _Tile(4, 2, 32, strips=1))
_FEW = (_Tile(4, 2, 64, turns=2, enough=250), _Tile(2, 4, 64), _Tile(2, 4, 32, strips=1))
_LEAST = (
    _Tile(4, 2, 64, turns=4),
    _Tile(4, 2, 32, turns=4),
    _Tile(2, 8, 32, strips=1),
    _Tile(1, 8, 16, strips=1),
)
_FROM_ROWS = ((8192, _MOST), (4096, _MANY), (1536, _FEW), (0, _LEAST))
_EXPERTS = ((24, _Tile(4, 1, 64)), (8, _Tile(4, 1, 32)), (0, _Tile(8, 1, 16, strips=1)))  # for more slots each than
_AT_ONCE = 3  # projections of one x in one launch
_GROUP_THREADS = 1024
_THREADS = 256
_PART = np.dtype([("planes", PLANES), ("bias", "u8"), ("out", "u8"), ("rows", "i4"), ("first", "u4")])
_PRODUCT = np.dtype(
    [("parts", _PART, 3), ("residual", "u8"), ("scale", "u8"), ("count", "u8"), ("cols", "i4"), ("gate", GATE)],
    align=True,
)
_TILES = np.dtype([("order", "u8"), ("table", "u8"), ("per_slot", "i4")], align=True)
_NO_TILES = np.array((0, 0, 1), _TILES)


def _name(kind: QuantType, tile: _Tile, *, experts: bool, gated: bool, last: QuantType | None = None) -> KernelName:
    sizes = (tile.strips, tile.rows, tile.depths, tile.turns, tile.tokens)
    arguments = [kind.name, *map(str, sizes), *(str(flag).lower() for flag in (experts, gated))]
    if last not in (None, kind):
        arguments.append(last.name)
    return "matmul.cu", f"matmul<{', '.join(arguments)}>"


INSTANTIATIONS: tuple[KernelName, ...] = (
    *(
        _name(kind, tile, experts=False, gated=False)
        for kind in QUANT_TYPES
        for tile in (*_MOST, *_MANY, *_FEW, *_LEAST)
    ),
    *(
        _name(first, tile, experts=False, gated=False, last=last)
        for first, _, last in MIXED
        for tile in (*_MOST, *_MANY, *_FEW, *_LEAST)
    ),
    *(_name(kind, tile, experts=False, gated=True) for kind in QUANT_TYPES for tile in _GATED),
    *(
        _name(kind, tile, experts=True, gated=gated)
        for kind in (MXFP4, Q8_0)
        for _, tile in _EXPERTS
        for gated in (False, True)
    ),
    ("group_routes.cu", "group_routes"),
    ("gated.cu", "gated_elements"),
    ("combine.cu", "combine"),
)


@dataclass(frozen=True, slots=True)
class Groups:
    """The T·k slots of routes sorted by expert, `order` [T·k], and cut for `tile`, `table`; see kernels/tiles.cuh.

    Of the tokens the first `count` [1] i32 are real; None: all.
    """

    k: int
    tile: _Tile
    order: DeviceArray
    table: DeviceArray
    count: DeviceArray | None


def grouped(
    kernels: Launcher, pool: Allocator, routes: Routes, n_experts: int, count: DeviceArray | None = None
) -> Groups:
    """Sort the routes' slots by expert."""
    tokens, k = routes.experts.shape
    slots = tokens * k
    tile = next(tile for least, tile in _EXPERTS if slots > least * n_experts)
    tiles = slots // tile.tokens + min(n_experts, slots)
    order, table = pool.empty((slots,), np.int32), pool.empty((tiles, 3), np.int32)
    sizes = (np.int32(k), np.int32(n_experts), np.int32(tile.tokens), np.int32(tiles))
    args = (routes.experts, np.int32(slots), count, *sizes, order, table)
    kernels.get("group_routes.cu", "group_routes")((1,), (_GROUP_THREADS,), args, shared_mem=8 * n_experts, pdl=True)
    return Groups(k, tile, order, table, count)


def matmul(
    kernels: Launcher, pool: Allocator, x: ScaledF16, linear: Linear, residual: DeviceArray | None = None
) -> DeviceArray:
    """W·x + b + residual: y [T, rows] f32 of x [T, cols]."""
    y = pool.empty((x.x.shape[0], linear.weight.shape[0]), np.float32)
    _launch(kernels, x, (linear,), (y,), residual=residual)
    return y


def projections(kernels: Launcher, pool: Allocator, x: ScaledF16, linears: Sequence[Linear]) -> tuple[DeviceArray, ...]:
    """W_j·x + b_j: y_j [T, rows_j] f32 of one x.

    In one launch go neighbours of one type, and q, k and v as published files mix them.
    """
    results: list[DeviceArray] = []
    together = tuple(linear.weight.kind for linear in linears) in MIXED
    for _, same in groupby(linears, key=lambda linear: together or linear.weight.kind.name):
        group = list(same)
        for some in (group[at : at + _AT_ONCE] for at in range(0, len(group), _AT_ONCE)):
            ys = [pool.empty((x.x.shape[0], linear.weight.shape[0]), np.float32) for linear in some]
            _launch(kernels, x, some, ys)
            results += ys
    return tuple(results)


def glu(
    kernels: Launcher,
    pool: Allocator,
    x: ScaledF16,
    gate: Linear,
    up: Linear,
    activation: Activation,
    groups: Groups | None = None,
) -> DeviceArray:
    """activation(gate(x), up(x)): h [T, f] f32; with groups, in each token's experts: h [T, k, f] f32."""
    tokens, rows = x.x.shape[0], gate.weight.shape[-2]
    h = pool.empty((tokens, rows) if groups is None else (tokens, groups.k, rows), np.float32)
    if gate.weight.kind == up.weight.kind:
        _launch(kernels, x, (gate, up), (h,), activation=activation, groups=groups, shared=True)
        return h
    other = pool.empty(h.shape, np.float32)
    _launch(kernels, x, (gate,), (h,), groups=groups, shared=True)
    _launch(kernels, x, (up,), (other,), groups=groups, shared=True)
    args = (h, other, gate_of(activation), np.uint64(h.size), h)
    kernels.get("gated.cu", "gated_elements")((-(-h.size // _THREADS),), (_THREADS,), args, pdl=True)
    return h


def experts_add(
    kernels: Launcher,
    pool: Allocator,
    h: ScaledF16,
    routes: Routes,
    groups: Groups,
    down: Linear,
    residual: DeviceArray,
) -> DeviceArray:
    """residual + Σ_j weights[:, j]·down_e(h[:, j]): x [T, d] f32 from h [T·k, f]."""
    tokens, k = routes.experts.shape
    d = down.weight.shape[1]
    x, y = pool.empty((tokens, d), np.float32), pool.empty((tokens * k, d), np.float32)
    _launch(kernels, h, (down,), (y,), groups=groups)
    args = (y, routes.weights, groups.count, np.int32(k), np.int32(d), residual, x)
    kernels.get("combine.cu", "combine")((-(-d // _THREADS), tokens), (_THREADS,), args, pdl=True)
    return x


def _launch(
    kernels: Launcher,
    x: ScaledF16,
    linears: Sequence[Linear],
    ys: Sequence[DeviceArray],
    *,
    residual: DeviceArray | None = None,
    activation: Activation = SWIGLU,
    groups: Groups | None = None,
    shared: bool = False,
) -> None:
    """Products of one x, a y each, or two that are gated into one; `shared`: a token's k slots read one row of x."""
    gated, tokens, where = len(ys) < len(linears), x.x.shape[0], _NO_TILES
    rows = [linear.weight.shape[-2] for linear in linears]
    tile = _tile(rows, tokens, gated=gated) if groups is None else groups.tile
    first, last = linears[0].weight.kind, linears[-1].weight.kind
    kernel = kernels.get(*_name(first, tile, experts=groups is not None, gated=gated, last=last))
    tiles = -(-tokens // tile.tokens)
    if groups is not None:
        lists = (address(groups.order), address(groups.table), groups.k if shared else 1)
        tiles, where = len(groups.table), np.array(lists, _TILES)
    blocks = [_blocks(tile, each, gated=gated) for each in rows]
    firsts = (0, 0) if gated else accumulate(blocks, initial=0)
    parts = [_part(*part) for part in zip(linears, ys if not gated else (ys[0], ys[0]), firsts, strict=False)]
    parts += [np.array(((0, 0, 0, 0), 0, 0, 0, sum(blocks)), _PART)] * (_AT_ONCE - len(parts))
    pointers = (address(residual), address(x.scale), address(x.count))
    product = np.array((parts, *pointers, linears[0].weight.shape[-1], gate_of(activation)), _PRODUCT)
    grid = (blocks[0] if gated else sum(blocks), tiles)
    args, threads = (product, x.x, np.int32(tokens), where), 32 * tile.rows * tile.depths
    kernel(grid, (threads,), args, shared_mem=tile.shared_bytes, pdl=True)


def _tile(rows: Sequence[int], tokens: int, *, gated: bool) -> _Tile:
    """The largest tile that still makes enough blocks of these rows, and takes half of the tokens at most, or 32."""
    tiles, matrices = _tiles(rows, gated=gated), rows[:1] if gated else rows
    most = max(tokens // 2, min(tokens, 32))

    def blocks(tile: _Tile) -> int:
        return sum(_blocks(tile, each, gated=gated) for each in matrices) * -(-tokens // tile.tokens)

    return next((tile for tile in tiles if tile.tokens <= most and blocks(tile) >= tile.enough), tiles[-1])


def _tiles(rows: Sequence[int], *, gated: bool) -> tuple[_Tile, ...]:
    """The tiles of matrices of these rows that share a launch, the largest first."""
    if gated:
        return _GATED
    return next(tiles for least, tiles in _FROM_ROWS if sum(rows) >= least)


def _blocks(tile: _Tile, rows: int, *, gated: bool) -> int:
    """Blocks side by side that a matrix of `rows` takes; a gated one is two of them, interleaved."""
    return -(-rows // (tile.rows * tile.strips * (8 if gated else 16)))


def _part(linear: Linear, y: DeviceArray, first: int) -> np.ndarray[Any, Any]:
    """`Part` of matmul.cu."""
    bias = address(None if linear.bias is None else linear.bias.data)
    return np.array((linear.weight.data.addresses(), bias, address(y), linear.weight.shape[-2], first), _PART)
