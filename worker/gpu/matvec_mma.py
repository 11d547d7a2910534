"""Launchers of decode's products for 16 rows and more, on the int8 tensor cores.

Results have the bits of `matvec.matvec` and `matvec.glu`, row by row: the same integer sums, float
expression and order of sums, with the split_k of the same matrices. Weights must be of block types
(`is_supported`) and the input Q8 blocks. Kernel: `matvec_mma.cu`. Twins: the ops of
`worker/cpu/ops.py`, `tests/quantized_ops.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from worker.gpu.activations import Q8Activations, empty_q8
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import MIXED, PLANES, address
from worker.gpu.matvec import GATE, gate_of, split_k_of
from worker.gpu.memory import DeviceArray
from worker.ops import Activation, Linear
from worker.quants import QUANT_TYPES, QuantType

MIN_ROWS = 16
"""Rows of activations from which these kernels are worth their tiles."""

MAX_SHARED = 227 << 10
"""Bytes of shared memory of a block on sm_90 and sm_100; sm_80 has 163 KB."""
_MMA_M, _MMA_N = 16, 8
_MAX_MATRICES = 3  # of one launch
_BLOCKS = 132  # an H100's multiprocessors; more row tiles wait for their turn inside of a block
_WARPS = 16  # of all blocks of a multiprocessor, with 128 registers a thread
_MMAS_OF_128_REGISTERS = 8
_MATRIX = np.dtype(
    [
        *(("planes", PLANES), ("bias", "u8"), ("residual", "u8"), ("out", "u8")),
        *(("rows", "i4"), ("first_tile", "i4")),
    ]
)
"""`MmaMatrix` of matvec_mma.cu."""
_ROWS = np.dtype([("q", "u8"), ("meta", "u8"), ("factor", "u8"), ("rows", "i4"), ("cols", "i4")])
"""`Q8Rows` of matvec_mma_stages.cuh."""
_PARAMS = np.dtype(
    [
        *(("matrices", _MATRIX, (_MAX_MATRICES,)), ("x", _ROWS), ("gate", GATE)),
        *(("q", "u8"), ("meta", "u8"), ("tiles", "i4"), ("split_k", "i4")),
        *(("last_block", "i4"), ("padding", "i4")),
    ]
)
"""`MmaParams` of matvec_mma.cu."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A block's warps along K, weight rows and tokens; MMAs of a warp along rows and tokens.

    `ahead`: stages between a weight's load and its use.
    """

    warps_k: int
    warps_m: int
    warps_n: int
    frags_m: int
    mmas_n: int
    ahead: int

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return _MMA_M * self.frags_m * self.warps_m

    @property
    def tokens(self) -> int:
        """Rows of activations of a block."""
        return _MMA_N * self.mmas_n * self.warps_n

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps_k * self.warps_m * self.warps_n

    @property
    def mmas(self) -> int:
        """MMAs of a warp for a unit of K. More than 8 need 255 registers."""
        return self.frags_m * self.mmas_n

    @property
    def resident(self) -> int:
        """Blocks of a multiprocessor, by registers."""
        return 32 * _WARPS // self.threads // (2 if self.mmas > _MMAS_OF_128_REGISTERS else 1)

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}"


# Tiles of 64 rows also serve the gated product, whose blocks of 32 elements they are.
T64X64, T64X32, T64X16 = Tiles(4, 2, 1, 2, 8, 1), Tiles(8, 1, 1, 4, 4, 1), Tiles(8, 2, 1, 2, 2, 2)
T32X32, T16X32, T16X16 = Tiles(8, 2, 1, 1, 4, 2), Tiles(8, 1, 1, 1, 4, 2), Tiles(8, 1, 1, 1, 2, 2)
GATED_TILES = (T64X64, T64X32, T64X16)
TILES = (*GATED_TILES, T32X32, T16X32, T16X16)
_INSTRUCTIONS = {T64X64: 0.42, T64X32: 0.36, T64X16: 0.34, T32X32: 0.4, T16X32: 0.5, T16X16: 0.8}
"""Of a warp for one of its sums and a unit of K; with the waits, by measurement on an H100."""
_WEIGHT_BYTES, _X_BYTES = 18, 40  # of a unit
_L2_BYTES = 24  # a multiprocessor and cycle; half of the reads are hidden
GATED_TILES = (T64X64, T64X32, T64X16)
TILES = (*GATED_TILES, T32X32, T16X32, T16X16)
BLOCK_TYPES = tuple(kind for kind in QUANT_TYPES if kind.block_size > 1)


def _name(kind: QuantType, t: Tiles, *, gated: bool, last: QuantType | None = None) -> str:
    sizes = f"{t.warps_k}, {t.warps_m}, {t.warps_n}, {t.frags_m}, {t.mmas_n}, {t.ahead}"
    last_type = "" if last is None else f", {last.name}"
    return f"matvec_mma<{kind.name}, {sizes}, {str(gated).lower()}{last_type}>"


INSTANTIATIONS: tuple[KernelName, ...] = (
    *(("matvec_mma.cu", _name(k, t, gated=False)) for k in BLOCK_TYPES for t in TILES),
    *(("matvec_mma.cu", _name(kinds[0], t, gated=False, last=kinds[-1])) for kinds in MIXED for t in TILES),
    *(("matvec_mma.cu", _name(k, t, gated=True)) for k in BLOCK_TYPES for t in GATED_TILES),
)


def is_supported(linears: Sequence[Linear], *, gated: bool = False, max_shared: int = MAX_SHARED) -> bool:
    """Whether the weights are of block types, with `gated` of one, and a block fits the device.

    Others need `matvec.matvec` and `matvec.glu`.
    """
    kinds = {linear.weight.kind for linear in linears}
    if any(kind.block_size == 1 for kind in kinds) or (gated and len(kinds) > 1):
        return False
    return bool(_fitting(tuple(kinds), max_shared, GATED_TILES if gated else TILES))


def matvec_mma(
    kernels: Launcher,
    pool: Allocator,
    x: Q8Activations,
    linears: Sequence[Linear],
    residual: DeviceArray | None = None,
    tiles: Tiles | None = None,
    max_shared: int = MAX_SHARED,
) -> tuple[DeviceArray, ...]:
    """y_j = W_j·x + b_j for up to three projections of one input: y_j [T, rows_j] f32.

    Projections of one type, or of MIXED types, are one launch. `residual` [T, rows] is added to the
    result of a single projection. `max_shared`: bytes of shared memory of a block on the device.
    """
    split_k = split_k_of(linears)
    kinds = tuple(linear.weight.kind for linear in linears)
    if kinds in MIXED:
        return tuple(_multiply(kernels, pool, x, linears, residual, split_k, tiles, max_shared))
    results: list[DeviceArray] = []
    for _, group in groupby(linears, key=lambda linear: linear.weight.kind):
        results += _multiply(kernels, pool, x, list(group), residual, split_k, tiles, max_shared)
    return tuple(results)


def _multiply(
    kernels: Launcher,
    pool: Allocator,
    x: Q8Activations,
    linears: Sequence[Linear],
    residual: DeviceArray | None,
    split_k: int,
    tiles: Tiles | None,
    max_shared: int,
) -> list[DeviceArray]:
    """One launch: projections of one type, or of two where the last one is of the second."""
    first, last = linears[0].weight.kind, linears[-1].weight.kind
    rows = [linear.weight.shape[0] for linear in linears]
    chosen = tiles or _tiles((first, last), x.shape[0], sum(rows), max_shared)
    outs = [pool.empty((x.shape[0], n), np.float32) for n in rows]
    params = _params(x, split_k)
    for j in range(_MAX_MATRICES):
        if j >= len(linears):
            params["matrices"][j]["first_tile"] = params["tiles"]
            continue
        pointers = (address(_bias(linears[j])), address(residual), address(outs[j]))
        params["matrices"][j] = (linears[j].weight.data.addresses(), *pointers, rows[j], params["tiles"])
        params["tiles"] += -(-rows[j] // chosen.rows)
    _launch(kernels, first, chosen, params, gated=False, last=None if last is first else last)
    return outs


def glu_mma(
    kernels: Launcher,
    pool: Allocator,
    x: Q8Activations,
    gate: Linear,
    up: Linear,
    activation: Activation,
    tiles: Tiles | None = None,
    max_shared: int = MAX_SHARED,
) -> Q8Activations:
    """activation(gate(x), up(x)) of a dense FFN: h [T, f], f32 and Q8; both of one type."""
    rows = gate.weight.shape[0]
    chosen = tiles or _tiles((gate.weight.kind,), x.shape[0], 2 * rows, max_shared, GATED_TILES)
    h = empty_q8(pool, x.shape[0], rows)
    params = _params(x, 1)
    params["tiles"] = -(-2 * rows // chosen.rows)
    for j, linear in enumerate((gate, up)):
        params["matrices"][j] = (linear.weight.data.addresses(), address(_bias(linear)), 0, address(h.x), rows, 0)
    params["gate"], params["q"], params["meta"] = gate_of(activation), address(h.q), address(h.meta)
    _launch(kernels, gate.weight.kind, chosen, params, gated=True)
    return h


def _tiles(
    kinds: Sequence[QuantType], tokens: int, rows: int, max_shared: int, tiles: Sequence[Tiles] = TILES
) -> Tiles:
    """The tile with the least estimated time. It changes no bit."""
    return min(_fitting(kinds, max_shared, tiles), key=lambda t: _cost(t, tokens, rows))


def _fitting(kinds: Sequence[QuantType], max_shared: int, tiles: Sequence[Tiles]) -> list[Tiles]:
    return [t for t in tiles if max(shared_bytes(kind, t) for kind in kinds) <= max_shared]


def _cost(t: Tiles, tokens: int, rows: int) -> float:
    """Estimated cycles of the busiest multiprocessor for a unit of K: instructions and L2 reads."""
    blocks = -(-rows // t.rows) * -(-tokens // t.tokens)
    share = -(-blocks // _BLOCKS)
    warps = min(_WARPS, share * t.threads // 32 * (2 if t.mmas > _MMAS_OF_128_REGISTERS else 1))
    issued = 3 * (_WARPS // 4 + warps) / (_WARPS // 4 + _WARPS)  # a cycle
    instructions = t.rows * t.tokens * _INSTRUCTIONS[t]
    return share * (instructions / issued + (_WEIGHT_BYTES * t.rows + _X_BYTES * t.tokens) / (2 * _L2_BYTES))


def _params(x: Q8Activations, split_k: int) -> np.ndarray[Any, Any]:
    params = np.zeros((), _PARAMS)
    params["x"] = (address(x.q), address(x.meta), address(x.factor), *x.shape)
    params["split_k"] = split_k
    return params


def _launch(
    kernels: Launcher,
    kind: QuantType,
    tiles: Tiles,
    params: np.ndarray[Any, Any],
    *,
    gated: bool,
    last: QuantType | None = None,
) -> None:
    token_tiles, row_tiles = -(-int(params["x"]["rows"]) // tiles.tokens), int(params["tiles"])
    row_blocks = min(row_tiles, max(2, _BLOCKS * tiles.resident // token_tiles))
    if last is not None:  # its tiles, at least one, and the others share the blocks
        share = round(row_blocks * int(params["matrices"][2]["first_tile"]) / row_tiles)
        params["last_block"] = min(max(1, share), row_blocks - 1)
    kernels.get("matvec_mma.cu", _name(kind, tiles, gated=gated, last=last))(
        (token_tiles, row_blocks),
        (tiles.threads,),
        (params,),
        shared_mem=max(shared_bytes(each, tiles) for each in (kind, last or kind)),
        pdl=True,
    )


_MINIMUM = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
_TWO_SCALES = ("Q2_K", "Q3_K", "Q6_K")


def shared_bytes(kind: QuantType, tiles: Tiles) -> int:
    """`StageShape::kBytes` of matvec_mma_stages.cuh."""
    words = 4 if kind.name in _TWO_SCALES else 2
    sums = (kind.name in _MINIMUM) * (2 if kind.name in _TWO_SCALES else 1)
    unit = 32 * tiles.rows + 4 * words * tiles.rows + 4 * (1 + sums) * tiles.tokens + 3 * 16
    q, levels = 32 * tiles.tokens + 16, max(1, 8 // tiles.warps_k)
    return 2 * tiles.warps_k * (2 * unit + 3 * q) + levels * tiles.threads * 4 * tiles.mmas * 4


def _bias(linear: Linear) -> DeviceArray | None:
    return None if linear.bias is None else linear.bias.data
