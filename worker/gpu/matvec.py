"""Launchers of decode's products: matrix-vector kernels that read each weight once a token.

A norm, the products and their epilogue are one launch. Weights of the block types meet Q8
activations, F32, F16 and BF16 meet f32 (`kernels/stage_activations.cuh`). The distribution of a
matrix over warps follows from its shape and type alone, so a token's bits do not depend on the rest
of the batch. Kernels: `matvec.cu`, `glu.cu`, `experts_add.cu`, `route.cu`. Twins: the ops of
`worker/cpu/ops.py`, `tests/quantized_ops.py`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gpu.activations import DECODE_WARPS, Q8Activations, empty_q8, input_rows, quantize_rows
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import EXPERT_TYPES, MIXED, PLANES, STORED_TYPES, address, plane_bytes, unit_elements
from worker.gpu.memory import DeviceArray
from worker.ops import GELU_GLU, Activation, Linear, QTensor, RmsNorm, Router, Routes
from worker.quants import Q4_K, QuantType

_EXPERT_WARPS = 8  # of a block of glu for experts
_GLU_ELEMENTS = 32  # elements of h that a block computes: one Q8 block
_ROUTE_TOKENS = 4  # tokens of a block of route.cu, a warp each
_MAX_EXPERTS = 256  # that tests cover
DEFINES = {"DECODE_WARPS": DECODE_WARPS, "GLU_ELEMENTS": _GLU_ELEMENTS, "ROUTE_TOKENS": _ROUTE_TOKENS}

_THREADS = 32 * DECODE_WARPS
_GRID_BLOCKS = 264  # two for each of an H100's multiprocessors; the rest of a larger grid waits its turn
_SMALL_GRID_BLOCKS = 132
_LARGE_BYTES = 4 << 20  # matrices of more bytes get the full grid
_MIN_BUSY_WARPS = 10  # of a block's warps
_MAX_PROJECTIONS = 3  # of one launch

_MATRIX = np.dtype(
    [
        *(("planes", PLANES), ("bias", "u8"), ("residual", "u8"), ("out", "u8")),
        *(("rows", "i4"), ("first_block", "i4"), ("blocks", "i4"), ("padding", "i4")),
    ]
)
"""`Matrix` of matvec.cu."""
_BRANCH = np.dtype([("planes", PLANES), ("bias", "u8")])
"""`Branch` of glu.cu."""
_PREPARED_ROWS = np.dtype(
    [
        *(("x", "u8"), ("q", "u8"), ("meta", "u8"), ("factor", "u8")),
        *(("rows", "i4"), ("cols", "i4"), ("norm", "u8"), ("eps", "f4"), ("padding", "i4")),
    ]
)
"""`PreparedRows` of row_tiles.cuh."""
_HIDDEN = np.dtype([("x", "u8"), ("q", "u8"), ("meta", "u8")])
"""`Hidden` of glu.cu."""
_CHOICES = np.dtype(
    [*((name, "u8") for name in ("experts", "weights", "logits", "scales")), ("n_experts", "i4"), ("k", "i4")]
)
"""`ExpertChoices` of expert_choice.cuh."""
GATE = np.dtype([("limit", "f4"), ("alpha", "f4")])
"""`Gate` of gated.cuh."""

GELU_TYPES = (Q4_K,)
"""Types whose kernels with GELU are in INSTANTIATIONS; others are compiled on demand."""

# TILE_M, UNROLL_K of a warp: combinations that fit 64 registers, so that two blocks share a
# multiprocessor.
_TILES, _GLU_TILES = ("3, 1", "2, 2", "1, 3", "1, 1"), ("4, 1", "2, 2", "1, 3")
_EXPERTS_TILE = "2, 3"  # of glu for experts with long rows: 80 registers, three blocks a multiprocessor
_ANY_TILE, _SHORT_TILE = "1, 3", "1, 1"  # the second where a lane has one load a row: less code to fetch
_ROW_TILES = (8, 4, 2)
_MAX_STAGED = 160 << 10  # bytes of shared memory
_MAX_NORMED = 8192  # elements of T rows that several blocks of matvec_rows normalize, each for itself
_NORMED_COLS = 256 * DECODE_WARPS  # of a row that a block of matvec_rows normalizes
# Tiles for T rows. matvec_rows: TILE_M, UNROLL_K and blocks a multiprocessor, for warps with few
# weight rows, with many, and for matrices of several types. glu_rows: warps of a block, elements of
# h together, UNROLL_K, blocks a multiprocessor.
_ROWS_TILES = {2: ("1, 2, 2", "4, 1, 1"), 4: ("1, 2, 2", "4, 1, 1"), 8: ("1, 2, 2", "4, 1, 1")}
_ROWS_MIXED_TILE = "1, 3, 1"
_GLU_ROWS_TILES = {2: "16, 1, 1, 2", 4: "16, 1, 1, 2", 8: "16, 1, 1, 2"}
INSTANTIATIONS: tuple[KernelName, ...] = (
    *(
        ("matvec_rows.cu", f"matvec_rows<{rows}, {tile}, {kind.name}>")
        for rows, tiles in _ROWS_TILES.items()
        for tile in dict.fromkeys(tiles)
        for kind in STORED_TYPES
    ),
    *(
        ("glu_rows.cu", f"glu_rows<{rows}, {tile}, {kind.name}>")
        for rows, tile in _GLU_ROWS_TILES.items()
        for kind in STORED_TYPES
    ),
    *(
        ("matvec_rows.cu", f"matvec_rows<{rows}, {_ROWS_MIXED_TILE}, {', '.join(kind.name for kind in kinds)}>")
        for rows in _ROW_TILES
        for kinds in MIXED
    ),
    *(("matvec.cu", f"matvec<{tile}, {kind.name}>") for kind in STORED_TYPES for tile in _TILES),
    *(("matvec.cu", f"matvec<{tile}, F32, F32, F32, false>") for tile in (_ANY_TILE, _SHORT_TILE)),  # of routers
    *(
        ("matvec.cu", f"matvec<{tile}, {', '.join(kind.name for kind in kinds)}>")
        for kinds in MIXED
        for tile in (_ANY_TILE, _SHORT_TILE)
    ),
    *(("glu.cu", f"glu<{DECODE_WARPS}, {tile}, {kind.name}>") for kind in STORED_TYPES for tile in _GLU_TILES),
    *(("glu.cu", f"glu<{DECODE_WARPS}, {tile}, {k.name}, {k.name}, true>") for k in GELU_TYPES for tile in _GLU_TILES),
    *(
        ("glu_rows.cu", f"glu_rows<{rows}, {tile}, {k.name}, {k.name}, true>")
        for rows, tile in _GLU_ROWS_TILES.items()
        for k in GELU_TYPES
    ),
    *(
        ("glu.cu", f"glu<{_EXPERT_WARPS}, {tile}, {kind.name}>")
        for kind in EXPERT_TYPES
        for tile in (*_GLU_TILES, _EXPERTS_TILE)
    ),
    *(
        ("glu.cu", f"glu<{_EXPERT_WARPS}, {tile}, {kind.name}, {kind.name}, true>")
        for kind in GELU_TYPES
        for tile in (*_GLU_TILES, _EXPERTS_TILE)
    ),
    *(("experts_add.cu", f"experts_add<3, {kind.name}>") for kind in EXPERT_TYPES),
    ("route.cu", "route"),
)


@dataclass(frozen=True, slots=True)
class RouterLogits:
    """The logits [1, E] f32 of a row, whose `k` experts each kernel chooses that needs them.

    `scales` [E] f32: see `Router`.
    """

    logits: DeviceArray
    k: int
    scales: DeviceArray | None


@dataclass(frozen=True, slots=True)
class _Schedule:
    """Distribution of matrices over a grid: blocks of each, warps along K, a warp's tile."""

    blocks: tuple[int, ...]
    split_k: int
    tile: str


def _schedule(linears: Sequence[Linear]) -> _Schedule:
    """Blocks in proportion to bytes, split_k that keeps warps busy, several short rows a warp."""
    rows = [linear.weight.shape[0] for linear in linears]
    units = max(linear.weight.shape[1] // unit_elements(linear.weight.kind) for linear in linears)
    sizes = [sum(plane_bytes(linear.weight.kind, math.prod(linear.weight.shape))) for linear in linears]
    grid = _GRID_BLOCKS if sum(sizes) > _LARGE_BYTES else _SMALL_GRID_BLOCKS
    blocks = _shares(grid, rows, sizes)
    block_rows = sum(rows) / sum(blocks)
    split_k = next(
        n
        for n in (1, 2, 4, 8, DECODE_WARPS)
        if block_rows * n >= _MIN_BUSY_WARPS or 32 * n >= units or n == DECODE_WARPS
    )
    tile = _SHORT_TILE if 32 * split_k >= units else _ANY_TILE
    alike = len({linear.weight.kind for linear in linears}) == 1
    if alike and units <= 64 and block_rows * split_k >= 2 * DECODE_WARPS:
        tile = "2, 2"
    if alike and units <= 32 and block_rows * split_k >= 3 * DECODE_WARPS:
        tile = "3, 1"
    return _Schedule(tuple(blocks), split_k, tile)


def split_k_of(linears: Sequence[Linear]) -> int:
    """Splits of K in the sums of these projections of one input; it fixes their bits."""
    return _schedule(linears).split_k


def _shares(grid: int, rows: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The blocks of each matrix, in proportion to its bytes."""
    return [min(n, max(1, round(grid * size / sum(sizes)))) for n, size in zip(rows, sizes, strict=True)]


def matvec(
    kernels: Launcher,
    pool: Allocator,
    x: Q8Activations,
    norm: RmsNorm | None,
    linears: Sequence[Linear],
    residual: DeviceArray | None = None,
    *,
    release_early: bool = True,
) -> tuple[DeviceArray, ...]:
    """y_j = W_j·norm(x) + b_j for up to three projections of one input: y_j [T, rows_j] f32.

    `residual` [T, rows] is added to the result of a single projection. Without `release_early`, for
    one row, the next launch starts when all launches before this one are complete.
    """
    tokens, cols = x.shape
    kinds = [linear.weight.kind for linear in linears]
    schedule = _schedule(linears)
    tile = _row_tile(tokens, cols, kinds)
    names = ", ".join(kind.name for kind in (kinds if len(set(kinds)) > 1 else kinds[:1]))
    tiles = -(-tokens // tile)
    weights = _weights_tile(linears, schedule.split_k, tile, tiles)
    shares = schedule.blocks if tile == 1 else _resident(linears, int(weights[-1]), tiles)
    results, matrices, first = [], [], 0
    for linear, blocks in zip(linears, shares, strict=True):
        rows = linear.weight.shape[0]
        results.append(pool.empty((tokens, rows), np.float32))
        pointers = (address(_bias(linear)), address(residual), address(results[-1]))
        matrices.append(np.array((linear.weight.data.addresses(), *pointers, rows, first, blocks, 0), _MATRIX))
        first += blocks
    absent = np.array(((0, 0, 0, 0), 0, 0, 0, 0, first, 0, 0), _MATRIX)
    matrices += [absent] * (_MAX_PROJECTIONS - len(linears))
    shared = tile * _staged_bytes(cols, kinds)
    if tile == 1:
        names += "" if release_early else f", {names}, {names}, false"
        kernel, rows_in = kernels.get("matvec.cu", f"matvec<{schedule.tile}, {names}>"), input_rows(x, norm)
    else:
        kernel = kernels.get("matvec_rows.cu", f"matvec_rows<{tile}, {weights}, {names}>")
        own_norm = norm is not None and cols <= _NORMED_COLS and (tile * cols <= _MAX_NORMED or first == 1)
        rows_in = _rows_in(x, norm) if own_norm else _rows_in(prepared(kernels, pool, x, norm, kinds))
    args: tuple[Any, ...] = (*matrices, rows_in, np.int32(schedule.split_k))
    kernel((first, tiles), (_THREADS,), args, shared_mem=shared, pdl=True)
    return tuple(results)


def glu(
    kernels: Launcher,
    pool: Allocator,
    x: Q8Activations,
    norm: RmsNorm | None,
    gate: Linear,
    up: Linear,
    activation: Activation,
    routes: Routes | RouterLogits | None = None,
) -> Q8Activations:
    """activation(gate(n), up(n)) of n = norm(x): h [T, f], or [T·k, f] with routes, f32 and Q8.

    With RouterLogits the preceding launch must be that of `router_logits`: see `kernels/glu.cu`.
    """
    tokens, cols = x.shape
    rows = gate.weight.shape[-2]
    choices = _choices(routes, gate.weight.shape[0])
    k = int(choices["k"])
    kinds = [gate.weight.kind, up.weight.kind]
    h = empty_q8(pool, tokens * k, rows)
    branches = [np.array((b.weight.data.addresses(), address(_bias(b))), _BRANCH) for b in (gate, up)]
    hidden = np.array((address(h.x), address(h.q), address(h.meta)), _HIDDEN)
    units = cols // unit_elements(gate.weight.kind)
    tile = _ANY_TILE if units > 64 or kinds[0] is not kinds[1] else ("2, 2" if units > 32 else "4, 1")
    if routes is not None and units > 64 and kinds[0] is kinds[1]:
        tile = _EXPERTS_TILE
    gelu = is_gelu(activation)
    names = ", ".join(kind.name for kind in (kinds if gelu or kinds[0] is not kinds[1] else kinds[:1]))
    names += ", true" if gelu else ""
    row_tile = 1 if routes is not None else _row_tile(tokens, cols, kinds)
    if row_tile > 1:
        kernel = kernels.get("glu_rows.cu", f"glu_rows<{row_tile}, {_GLU_ROWS_TILES[row_tile]}, {names}>")
        args: tuple[Any, ...] = (
            *branches,
            _rows_in(prepared(kernels, pool, x, norm, kinds)),
            gate_of(activation, gelu=gelu),
            np.int32(rows),
            hidden,
        )
        grid, shared = (-(-rows // _GLU_ELEMENTS), -(-tokens // row_tile)), row_tile * _staged_bytes(cols, kinds)
        kernel(grid, (32 * int(_GLU_ROWS_TILES[row_tile].split(",")[0]),), args, shared_mem=shared, pdl=True)
        return h
    warps = DECODE_WARPS if routes is None else _EXPERT_WARPS
    kernel = kernels.get("glu.cu", f"glu<{warps}, {tile}, {names}>")
    args = (
        *branches,
        input_rows(x, norm),
        gate_of(activation, gelu=gelu),
        choices,
        np.int32(rows),
        hidden,
    )
    grid = (-(-rows // _GLU_ELEMENTS), tokens * k)
    kernel(grid, (32 * warps,), args, shared_mem=_staged_bytes(cols, kinds), pdl=True)
    return h


def experts_add(
    kernels: Launcher,
    pool: Allocator,
    h: Q8Activations,
    routes: Routes | RouterLogits,
    down: Linear,
    residual: DeviceArray | None,
) -> DeviceArray:
    """residual + Σ_j weights[:, j]·down_e(h[:, j]): x [T, d] f32 from h [T·k, f].

    The preceding launch must be `glu` with these routes: the kernel reads the routes and the
    residual before its wait (`kernels/experts_add.cu`). Raises: ModelLoadFailed.
    """
    choices = _choices(routes, down.weight.shape[0])
    k = int(choices["k"])
    check_experts(down.weight.shape[0], k)
    tokens = h.shape[0] // k
    rows, kind = down.weight.shape[-2], down.weight.kind
    x = pool.empty((tokens, rows), np.float32)
    planes = np.array(down.weight.data.addresses(), PLANES)
    kernels.get("experts_add.cu", f"experts_add<3, {kind.name}>")(
        (min(_GRID_BLOCKS, rows), tokens),
        (_THREADS,),
        (planes, _bias(down), input_rows(h, None), choices, np.int32(rows), residual, x),
        shared_mem=_staged_bytes(k * h.shape[1], (kind,)),
        pdl=True,
    )
    return x


def router_logits(
    kernels: Launcher, pool: Allocator, x: DeviceArray, norm: RmsNorm, router: Router, k: int
) -> RouterLogits:
    """The router's logits of norm(x) [1, d], for the next two launches: `glu` and `experts_add`.

    x must be older than this launch: `glu` reads it before its wait. Raises: ModelLoadFailed.
    """
    inputs = Q8Activations(x), router.norm or norm, (router.linear,)
    (logits,) = matvec(kernels, pool, *inputs, release_early=False)
    check_experts(logits.shape[1], k)
    return RouterLogits(logits, k, router.scales and router.scales.data)


def norm_route(kernels: Launcher, pool: Allocator, x: DeviceArray, norm: RmsNorm, router: Router, k: int) -> Routes:
    """The router's choice for norm(x) [T, d], in prefill and in decode of several rows."""
    (logits,) = matvec(kernels, pool, Q8Activations(x), router.norm or norm, (router.linear,))
    return route(kernels, pool, logits, k, router.scales)


def route(kernels: Launcher, pool: Allocator, logits: DeviceArray, k: int, scales: QTensor | None = None) -> Routes:
    """The k highest of logits [T, E] f32, ties to the lower id, and the softmax over them.

    `scales`: see `Router`. Raises: ModelLoadFailed.
    """
    tokens, experts = logits.shape
    check_experts(experts, k, 32)
    routes = Routes(pool.empty((tokens, k), np.int32), pool.empty((tokens, k), np.float32))
    kernels.get("route.cu", "route")(
        (-(-tokens // _ROUTE_TOKENS),),
        (32 * _ROUTE_TOKENS,),
        (
            *(routes.experts, routes.weights, logits, scales and scales.data),
            *map(np.int32, (tokens, experts, k)),
        ),
        pdl=True,
    )
    return routes


def check_experts(experts: int, k: int, max_k: int = DECODE_WARPS) -> None:
    """Raise ModelLoadFailed for more experts than the kernels' blocks and lanes hold."""
    if experts > _MAX_EXPERTS or k > max_k:
        raise ModelLoadFailed(
            f"{k} of {experts} experts a token", "the GPU's experts", f"at most {max_k} of {_MAX_EXPERTS}"
        )


def _choices(routes: Routes | RouterLogits | None, experts: int) -> np.ndarray[Any, Any]:
    """The kernel parameter `ExpertChoices`: a value of _CHOICES. None: a dense FFN."""
    if routes is None:
        return np.array((0, 0, 0, 0, 0, 1), _CHOICES)
    if isinstance(routes, RouterLogits):
        return np.array((0, 0, address(routes.logits), address(routes.scales), experts, routes.k), _CHOICES)
    k = routes.experts.shape[1]
    return np.array((address(routes.experts), address(routes.weights), 0, 0, experts, k), _CHOICES)


def is_gelu(activation: Activation) -> bool:
    """Whether kernels compute the activation by GELU, whose cubic coefficient is their constant."""
    assert activation.cubic in (0, GELU_GLU.cubic), activation
    return activation.cubic != 0


def gate_of(activation: Activation, *, gelu: bool = False) -> np.ndarray[Any, Any]:
    """The activation's kernel parameter: a value of GATE. `gelu`: the kernel has GELU."""
    assert gelu == is_gelu(activation), activation
    return np.array((np.inf if activation.limit is None else activation.limit, activation.alpha), GATE)


def _resident(linears: Sequence[Linear], blocks: int, tiles: int) -> list[int]:
    """The blocks of each matrix for each of `tiles` tiles of rows.

    The grid is resident at once, `blocks` a multiprocessor, if the tiles are not too many for that.
    """
    rows = [linear.weight.shape[0] for linear in linears]
    sizes = [sum(plane_bytes(linear.weight.kind, math.prod(linear.weight.shape))) for linear in linears]
    return _shares(max(1, _SMALL_GRID_BLOCKS * blocks // tiles), rows, sizes)


def _weights_tile(linears: Sequence[Linear], split_k: int, row_tile: int, tiles: int) -> str:
    """TILE_M, UNROLL_K and blocks a multiprocessor of matvec_rows for tiles of T = `row_tile` rows.

    Several weight rows a warp share the loads of activations, which limit products of 8 rows.
    They need enough rows for every warp; of 2 and 4 rows a tile along K loads more at once.
    """
    weight = linears[0].weight
    if len({linear.weight.kind for linear in linears}) > 1 or row_tile == 1:
        return _ROWS_MIXED_TILE
    narrow, wide = _ROWS_TILES[row_tile]
    blocks = max(1, _SMALL_GRID_BLOCKS * int(wide[-1]) // tiles)
    rows = sum(linear.weight.shape[0] for linear in linears) / blocks
    enough = rows * split_k >= int(wide[0]) * DECODE_WARPS
    one_unit = 32 * split_k * unit_elements(weight.kind) >= weight.shape[1]
    return wide if enough and (one_unit or row_tile == _ROW_TILES[0]) else narrow


def _row_tile(rows: int, cols: int, kinds: Sequence[QuantType]) -> int:
    """T: the rows that use a loaded weight together; 1 is the kernels of one row."""
    return next((t for t in _ROW_TILES if t < 2 * rows and t * _staged_bytes(cols, kinds) <= _MAX_STAGED), 1)


def prepared(
    kernels: Launcher, pool: Allocator, x: Q8Activations, norm: RmsNorm | None, kinds: Iterable[QuantType]
) -> Q8Activations:
    """norm(x) in the forms that weights of these types read, by a launch of its own if need be."""
    reads_q8 = {kind.block_size > 1 for kind in kinds}
    if norm is None and (True not in reads_q8 or x.q is not None):
        return x
    return quantize_rows(kernels, pool, x.x, norm, q8=True in reads_q8, f32=False in reads_q8)


def _rows_in(x: Q8Activations, norm: RmsNorm | None = None) -> np.ndarray[Any, Any]:
    """Prepared rows, or rows that the kernel normalizes: a value of _PREPARED_ROWS."""
    weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
    pointers = (address(x.x), address(x.q), address(x.meta), address(x.factor))
    return np.array((*pointers, *x.shape, address(weight), eps, 0), _PREPARED_ROWS)


def _staged_bytes(elements: int, kinds: Iterable[QuantType]) -> int:
    """Bytes of shared memory of a block's input, in the forms that weights of these types read."""
    reads_q8 = {kind.block_size > 1 for kind in kinds}
    return elements * 4 * (False in reads_q8) + elements * 5 // 4 * (True in reads_q8)


def _bias(linear: Linear) -> DeviceArray | None:
    return None if linear.bias is None else linear.bias.data
