"""Launchers of decode's products: matrix-vector forms that read each weight once a token, no tensor cores.

Norm, products and what follows them are one launch. The block types meet 8-bit activations, F32, F16 and BF16 meet f32
(`kernels/staged.cuh`). How a matrix is shared out among warps follows from its shape alone, so a token's bits never
depend on what shares the call. Twins: the ops of `worker/cpu/ops.py`, and `worker/cpu/quantized.py`. Kernels:
`matvec.cu`, `glu.cu`, `experts_add.cu`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import MIXED, PLANES, address, plane_bytes, unit_elements
from worker.gpu.memory import DeviceArray
from worker.gpu.quantized import Activations, activations_like
from worker.ops import Activation, Linear, RmsNorm, Routes
from worker.quants import MXFP4, Q8_0, QUANT_TYPES, QuantType

_WARPS = 16
_THREADS = 32 * _WARPS
_BLOCKS = 264  # two for each of an H100's multiprocessors; where fewer fit they take turns
_FEW_BLOCKS = 132
_MANY_BYTES = 4 << 20  # from here on a matrix takes all blocks
_ENOUGH_WARPS = 10  # of a block's
_GLU_ROWS = 32  # elements of h that a block makes
_EXPERT_WARPS = 8  # of a block that makes them of an expert

_MATRIX = np.dtype(
    [
        *(("planes", PLANES), ("bias", "u8"), ("residual", "u8"), ("out", "u8")),
        *(("rows", "i4"), ("first_block", "i4"), ("blocks", "i4"), ("unused", "i4")),
    ]
)
_BRANCH = np.dtype([("planes", PLANES), ("bias", "u8")])
_ROWS = np.dtype([("x", "u8"), ("q", "u8"), ("meta", "u8"), ("norm", "u8"), ("eps", "f4"), ("cols", "i4")])
_HIDDEN = np.dtype([("x", "u8"), ("q", "u8"), ("meta", "u8")])
GATE = np.dtype([("limit", "f4"), ("alpha", "f4")])
"""`Gate` of kernels/gated.cuh."""

_TILES, _GLU_TILES = ("3, 1", "2, 2", "1, 3", "1, 1"), ("4, 1", "2, 2", "1, 3")  # ROWS, DEPTH: what 64 registers hold
_ANY_TILE, _SHORT_TILE = "1, 3", "1, 1"  # the second where a lane has one load a row: less code to fetch
INSTANTIATIONS: tuple[KernelName, ...] = (
    *(("matvec.cu", f"matvec<{tile}, {kind.name}>") for kind in QUANT_TYPES for tile in _TILES),
    *(
        ("matvec.cu", f"matvec<{tile}, {', '.join(kind.name for kind in kinds)}>")
        for kinds in MIXED
        for tile in (_ANY_TILE, _SHORT_TILE)
    ),
    *(("glu.cu", f"glu<{_WARPS}, {tile}, {kind.name}>") for kind in QUANT_TYPES for tile in _GLU_TILES),
    *(("glu.cu", f"glu<{_EXPERT_WARPS}, {tile}, {kind.name}>") for kind in (MXFP4, Q8_0) for tile in _GLU_TILES),
    *(("experts_add.cu", f"experts_add<3, {kind.name}>") for kind in (MXFP4, Q8_0)),
)


@dataclass(frozen=True, slots=True)
class _Shares:
    """How matrices are shared out: blocks of each, warps that share a row, and a warp's rows and loads at once."""

    blocks: tuple[int, ...]
    parts: int
    tile: str


def _shares(linears: Sequence[Linear]) -> _Shares:
    """Blocks by bytes, more warps a row until most of a block's are at work, several rows a warp where short."""
    rows = [linear.weight.shape[0] for linear in linears]
    units = max(linear.weight.shape[1] // unit_elements(linear.weight.kind) for linear in linears)
    sizes = [sum(plane_bytes(linear.weight.kind, math.prod(linear.weight.shape))) for linear in linears]
    blocks = _BLOCKS if sum(sizes) > _MANY_BYTES else _FEW_BLOCKS
    each = [min(n, max(1, round(blocks * size / sum(sizes)))) for n, size in zip(rows, sizes, strict=True)]
    of_block = sum(rows) / sum(each)
    parts = next(p for p in (1, 2, 4, 8, _WARPS) if of_block * p >= _ENOUGH_WARPS or 32 * p >= units or p == _WARPS)
    tile = _SHORT_TILE if 32 * parts >= units else _ANY_TILE
    alike = len({linear.weight.kind for linear in linears}) == 1
    if alike and units <= 64 and of_block * parts >= 2 * _WARPS:
        tile = "2, 2"
    if alike and units <= 32 and of_block * parts >= 3 * _WARPS:
        tile = "3, 1"
    return _Shares(tuple(each), parts, tile)


def matvec(
    kernels: Launcher,
    pool: Allocator,
    x: Activations,
    norm: RmsNorm | None,
    linears: Sequence[Linear],
    residual: DeviceArray | None = None,
) -> tuple[DeviceArray, ...]:
    """y_j = W_j·norm(x) + b_j for up to three projections of one input: y_j [T, rows_j] f32.

    `residual` [T, rows] is added to the only projection's result.
    """
    tokens, cols = x.shape
    kinds = [linear.weight.kind for linear in linears]
    shares = _shares(linears)
    results, matrices, first = [], [], 0
    for linear, blocks in zip(linears, shares.blocks, strict=True):
        rows = linear.weight.shape[0]
        results.append(pool.empty((tokens, rows), np.float32))
        pointers = (address(_bias(linear)), address(residual), address(results[-1]))
        matrices.append(np.array((linear.weight.data.addresses(), *pointers, rows, first, blocks, 0), _MATRIX))
        first += blocks
    nothing = np.array(((0, 0, 0, 0), 0, 0, 0, 0, first, 0, 0), _MATRIX)
    matrices += [nothing] * (3 - len(linears))
    types = kinds if len(set(kinds)) > 1 else kinds[:1]
    kernel = kernels.get("matvec.cu", f"matvec<{shares.tile}, {', '.join(kind.name for kind in types)}>")
    args = (*matrices, _rows(x, norm), np.int32(shares.parts))
    kernel((first, tokens), (_THREADS,), args, shared_mem=_staged(cols, kinds), pdl=True)
    return tuple(results)


def glu(
    kernels: Launcher,
    pool: Allocator,
    x: Activations,
    norm: RmsNorm | None,
    gate: Linear,
    up: Linear,
    activation: Activation,
    routes: Routes | None = None,
) -> Activations:
    """activation(gate(n), up(n)) of n = norm(x): h [T, f] in both forms; with routes [T·k, f], each token's experts."""
    tokens, cols = x.shape
    rows = gate.weight.shape[-2]
    k = 1 if routes is None else routes.experts.shape[1]
    kinds = [gate.weight.kind, up.weight.kind]
    h = activations_like(pool, tokens * k, rows)
    branches = [np.array((b.weight.data.addresses(), address(_bias(b))), _BRANCH) for b in (gate, up)]
    hidden = np.array((address(h.x), address(h.q), address(h.meta)), _HIDDEN)
    units = cols // unit_elements(gate.weight.kind)
    tile = _ANY_TILE if units > 64 or kinds[0] is not kinds[1] else ("2, 2" if units > 32 else "4, 1")
    types = kinds if kinds[0] is not kinds[1] else kinds[:1]
    experts, warps = (None, _WARPS) if routes is None else (routes.experts, _EXPERT_WARPS)
    kernel = kernels.get("glu.cu", f"glu<{warps}, {tile}, {', '.join(kind.name for kind in types)}>")
    args = (*branches, _rows(x, norm), gate_of(activation), experts, np.int32(k), np.int32(rows), hidden)
    grid = (-(-rows // _GLU_ROWS), tokens * k)
    kernel(grid, (32 * warps,), args, shared_mem=_staged(cols, kinds), pdl=True)
    return h


def experts_add(
    kernels: Launcher,
    pool: Allocator,
    h: Activations,
    routes: Routes,
    down: Linear,
    residual: DeviceArray,
) -> DeviceArray:
    """residual + Σ_j weights[:, j]·down_e(h[:, j]): x [T, d] f32 from h [T·k, f].

    Neither the routes nor the residual are what the launch before this one made.
    """
    tokens, k = routes.experts.shape
    if k > _WARPS:
        raise ModelLoadFailed(f"{k} experts a token", "the GPU's experts", f"at most {_WARPS}")
    rows, kind = down.weight.shape[-2], down.weight.kind
    x = pool.empty((tokens, rows), np.float32)
    planes = np.array(down.weight.data.addresses(), PLANES)
    sizes = (np.int32(k), np.int32(rows))
    kernels.get("experts_add.cu", f"experts_add<3, {kind.name}>")(
        (min(_BLOCKS, rows), tokens),
        (_THREADS,),
        (planes, _bias(down), _rows(h, None), routes.experts, routes.weights, *sizes, residual, x),
        shared_mem=_staged(k * h.shape[1], (kind,)),
        pdl=True,
    )
    return x


def gate_of(activation: Activation) -> np.ndarray[Any, Any]:
    """An activation as kernels take it: a value of GATE."""
    return np.array((np.inf if activation.limit is None else activation.limit, activation.alpha), GATE)


def _rows(x: Activations, norm: RmsNorm | None) -> np.ndarray[Any, Any]:
    weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
    return np.array((address(x.x), address(x.q), address(x.meta), address(weight), eps, x.shape[1]), _ROWS)


def _staged(elements: int, kinds: Iterable[QuantType]) -> int:
    """Bytes of shared memory that a block's input takes in the forms that these types read."""
    forms = {kind.block_size > 1 for kind in kinds}
    return elements * 4 * (False in forms) + elements * 5 // 4 * (True in forms)


def _bias(linear: Linear) -> DeviceArray | None:
    return None if linear.bias is None else linear.bias.data
