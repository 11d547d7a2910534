"""Launchers of decode's products for 16 rows and more, on the int8 tensor cores.

Results have the bits of `matvec.matvec` and `matvec.glu`, row by row: the same integer sums, float
expression and order of sums, with the split_k of the same matrices. Weights must be of block types
(`is_supported`) and the input Q8 tiles. Kernels: `matvec_mma.cu` for few weight rows and short K,
`matvec_mma_wide.cu` for the others. Twins: the ops of `worker/cpu/ops.py`,
`tests/quantized_ops.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from worker.gpu.activations import Q8_BLOCK, Q8_TILES, TILE_ROWS, Q8Tiles, empty_q8_tiles, q8_tiles, quantize_tiles
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import MIXED, PLANES, STORED_TYPES, address
from worker.gpu.matvec import GATE, GELU_TYPES, gate_of, is_gelu, split_k_of
from worker.gpu.memory import DeviceArray
from worker.ops import Activation, Linear
from worker.quants import QuantType

MIN_ROWS = 16
"""Rows of activations from which these kernels are worth their tiles."""
MAX_SHARED = 227 << 10
"""Bytes of shared memory of a block on sm_90 and sm_100; sm_80 has 163 KB."""

_MAX_MATRICES = 3  # of one launch
_MULTIPROCESSORS = 132  # of an H100; more row tiles wait for their turn inside of a block
_MATRIX = np.dtype(
    [
        *(("planes", PLANES), ("bias", "u8"), ("residual", "u8"), ("out", "u8")),
        *(("rows", "i4"), ("first_tile", "i4")),
    ]
)
"""`MmaMatrix` of matvec_mma.cu."""
_PARAMS = np.dtype(
    [
        *(("matrices", _MATRIX, (_MAX_MATRICES,)), ("x", Q8_TILES), ("factor", "u8"), ("gate", GATE)),
        *(("h", Q8_TILES), ("tokens", "i4"), ("tiles", "i4"), ("split_k", "i4"), ("last_block", "i4")),
    ]
)
"""`MmaParams` of matvec_mma.cu."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A kernel's tile: weight rows, tokens, splits of K that groups of a block's warps take.

    `warps`: those of a group; the wide kernel has blocks of 8, or of 4, two a multiprocessor.
    """

    rows: int
    tokens: int
    splits: int = 1
    warps: int = 8

    @property
    def is_wide(self) -> bool:
        """Whether the kernel is matvec_mma_wide.cu, which takes one split at a time."""
        return self.rows >= _WARP_ROWS

    @property
    def chain_warps(self) -> int:
        """Warps of the wide kernel that share the sums of 32 rows and 32 tokens."""
        return self.warps * _WARP_ROWS * _WARP_ROWS // (self.rows * self.tokens)

    @property
    def writes_q8(self) -> bool:
        """Whether the gated kernel quantizes h itself: a tile has whole Q8 blocks of h."""
        return self.rows % (2 * Q8_BLOCK) == 0

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * self.splits

    @property
    def resident(self) -> int:
        """Blocks of a multiprocessor, by registers."""
        return (256 if self.is_wide else 512) // self.threads

    def __str__(self) -> str:
        extra = (f"/{self.splits}" if self.splits > 1 else "") + (f", {self.warps} warps" if self.warps != 8 else "")
        return f"{self.rows}x{self.tokens}{extra}"


_WARP_ROWS = 32  # weight rows, and tokens, of a warp of the wide kernel
_MICROSECONDS = {
    Tiles(16, 16): (0.0451, 0.78),
    Tiles(16, 32): (0.0654, 1.09),
    Tiles(32, 32): (0.0631, 1.45),
    Tiles(64, 32): (0.1202, 2.49),
    Tiles(32, 64): (0.1086, 1.86),
    Tiles(64, 64): (0.2005, 3.63),
    Tiles(32, 64, warps=4): (0.2002, 2.94),
    Tiles(16, 16, 2): (0.0112, 4.05),
    Tiles(16, 32, 2): (0.0246, 5.64),
}
"""Of a tile for a unit of K and for the rest, as measured on an H100 with all its tiles busy."""
_QUANTIZATION_US = 2.3  # of h, in its own launch if a tile has no whole Q8 blocks of h
TILES = tuple(_MICROSECONDS)
GATED_TILES = tuple(t for t in TILES if t.splits == 1 and t != Tiles(32, 32))
DEFINES = {"WEIGHTS_BYPASS_L1": 1}
BLOCK_TYPES = tuple(kind for kind in STORED_TYPES if kind.block_size > 1)


def _name(kind: QuantType, t: Tiles, *, gated: bool, gelu: bool = False, last: QuantType | None = None) -> KernelName:
    end = ("2" if gelu else str(gated).lower()) + ("" if last is None else f", {last.name}")
    if t.is_wide:
        return (
            "matvec_mma_wide.cu",
            f"matvec_mma_wide<{kind.name}, {t.warps}, {t.chain_warps}, {t.tokens // 32}, {end}>",
        )
    return "matvec_mma.cu", f"matvec_mma<{kind.name}, {t.splits}, {t.tokens // 8}, {end}>"


INSTANTIATIONS: tuple[KernelName, ...] = (
    *(_name(k, t, gated=False) for k in BLOCK_TYPES for t in TILES),
    *(_name(kinds[0], t, gated=False, last=kinds[-1]) for kinds in MIXED for t in TILES),
    *(_name(k, t, gated=True) for k in BLOCK_TYPES for t in GATED_TILES),
    *(_name(k, t, gated=True, gelu=True) for k in GELU_TYPES for t in GATED_TILES),
)


def is_supported(linears: Sequence[Linear], *, gated: bool = False) -> bool:
    """Whether the weights are of block types, with `gated` of one. Others need `matvec.py`."""
    kinds = {linear.weight.kind for linear in linears}
    return all(kind.block_size > 1 for kind in kinds) and not (gated and len(kinds) > 1)


def matvec_mma(
    kernels: Launcher,
    pool: Allocator,
    x: Q8Tiles,
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
    x: Q8Tiles,
    linears: Sequence[Linear],
    residual: DeviceArray | None,
    split_k: int,
    tiles: Tiles | None,
    max_shared: int,
) -> list[DeviceArray]:
    """One launch: projections of one type, or of two where the last one is of the second."""
    first, last = linears[0].weight.kind, linears[-1].weight.kind
    tokens, rows = x.shape[0], [linear.weight.shape[0] for linear in linears]
    chosen = tiles or chosen_tiles(TILES, linears, tokens, split_k, max_shared, gated=False)
    outs = [pool.empty((tokens, n), np.float32) for n in rows]
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
    x: Q8Tiles,
    gate: Linear,
    up: Linear,
    activation: Activation,
    tiles: Tiles | None = None,
    max_shared: int = MAX_SHARED,
) -> Q8Tiles:
    """activation(gate(x), up(x)) of a dense FFN: h [T, f], f32 and, if f allows, Q8 tiles."""
    rows, tokens = gate.weight.shape[0], x.shape[0]
    chosen = tiles or chosen_tiles(GATED_TILES, (gate, up), tokens, 1, max_shared, gated=True)
    params = _params(x, 1)
    params["tiles"] = -(-2 * rows // chosen.rows)
    h = empty_q8_tiles(pool, tokens, rows) if chosen.writes_q8 else Q8Tiles(pool.empty((tokens, rows), np.float32))
    for j, linear in enumerate((gate, up)):
        params["matrices"][j] = (linear.weight.data.addresses(), address(_bias(linear)), 0, address(h.x), rows, 0)
    gelu = is_gelu(activation)
    params["gate"], params["h"] = gate_of(activation, gelu=gelu), q8_tiles(h)
    _launch(kernels, gate.weight.kind, chosen, params, gated=True, gelu=gelu)
    return h if h.q is not None or rows % Q8_BLOCK else quantize_tiles(kernels, pool, h.x, None)


def chosen_tiles(
    tiles: Sequence[Tiles], linears: Sequence[Linear], tokens: int, split_k: int, max_shared: int, *, gated: bool
) -> Tiles:
    """The tiles with the least estimated time, of those that fit. They change no bit."""
    rows, units = sum(linear.weight.shape[0] for linear in linears), linears[0].weight.shape[1] // Q8_BLOCK

    def estimate(t: Tiles) -> float:
        waves = -(-(-(-rows // t.rows) * -(-tokens // t.tokens)) // (_MULTIPROCESSORS * t.resident))
        per_unit, rest = _MICROSECONDS[t]
        return waves * (units * per_unit + rest) + _QUANTIZATION_US * (gated and not t.writes_q8)

    def fits(t: Tiles) -> bool:
        shared = max(shared_bytes(linear.weight.kind, t) for linear in linears)
        return shared <= max_shared and t.splits <= split_k and t.tokens < 2 * max(tokens, TILE_ROWS)

    return min(filter(fits, tiles), key=estimate)


def _params(x: Q8Tiles, split_k: int) -> np.ndarray[Any, Any]:
    params = np.zeros((), _PARAMS)
    params["x"], params["factor"], params["tokens"] = q8_tiles(x), address(x.factor), x.shape[0]
    params["split_k"] = split_k
    return params


def _launch(
    kernels: Launcher,
    kind: QuantType,
    tiles: Tiles,
    params: np.ndarray[Any, Any],
    *,
    gated: bool,
    gelu: bool = False,
    last: QuantType | None = None,
) -> None:
    covered = int(params["x"]["tiles"]) * TILE_ROWS if gated and tiles.writes_q8 else int(params["tokens"])
    token_tiles, row_tiles = -(-covered // tiles.tokens), int(params["tiles"])
    most = max(2, _MULTIPROCESSORS * tiles.resident // token_tiles)
    row_blocks = -(-row_tiles // -(-row_tiles // most)) if last is None else min(row_tiles, most)
    if last is not None:  # its tiles, at least one, and the others share the blocks
        share = round(row_blocks * int(params["matrices"][2]["first_tile"]) / row_tiles)
        params["last_block"] = min(max(1, share), row_blocks - 1)
    kernels.get(*_name(kind, tiles, gated=gated, gelu=gelu, last=last))(
        (token_tiles, row_blocks),
        (tiles.threads,),
        (params,),
        shared_mem=max(shared_bytes(each, tiles) for each in (kind, last or kind)),
        pdl=True,
    )


_TWO_SCALES = ("Q2_K", "Q3_K", "Q6_K", "IQ1", "IQ2", "NVFP4")
_SUMS_OF_X = {"Q4_1": 1, "Q5_1": 1, "Q4_K": 1, "Q5_K": 1, "Q2_K": 2}
"""Sums of a unit of x that the products of a type need (`RowScales::kSums`)."""


def shared_bytes(kind: QuantType, tiles: Tiles) -> int:
    """Dynamic shared memory of a block in bytes: `MmaShape::kBytes`, `WideShape::kBytes`."""
    unit = 512 + 64 * (4 if kind.name in _TWO_SCALES else 2) + 16
    if not tiles.is_wide:
        return 2 * 32 * tiles.splits * unit + 4 * tiles.threads * tiles.tokens // 2
    units = 4 * tiles.chain_warps
    x = units * tiles.tokens // 16 * (512 + 64 * (1 + _SUMS_OF_X.get(kind.name, 0)))
    level, levels = 128 * tiles.threads, 2 if tiles.chain_warps == 2 else 1
    return 2 * (tiles.rows // 16 * units * unit + x) + levels * level + level // tiles.chain_warps


def _bias(linear: Linear) -> DeviceArray | None:
    return None if linear.bias is None else linear.bias.data
