"""Launchers of decode's products: matrix-vector forms that read each weight once a token, no tensor cores.

The block types read 8-bit activations, F32, F16 and BF16 read f32 (`quantized.py`). How a matrix is shared out among
warps follows from its shape alone, so a token's bits never depend on what shares the call. Twins: the ops of
`worker/cpu/ops.py` without norms, and `worker/cpu/quantized.py`. Kernels: `matvec.cu`, `glu.cu`, `experts_add.cu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import PLANES, address, unit_elements
from worker.gpu.memory import DeviceArray
from worker.gpu.quantized import Activations
from worker.ops import Activation, Linear, Routes
from worker.quants import MXFP4, Q4_K, Q5_0, Q6_K, Q8_0, QUANT_TYPES, QuantType

_WARPS = 8
_EXPERT_WARPS = 16  # at most, in a block of experts_add
_UNITS = 64  # units of a row that a warp has in flight at once
_WANTED_PARTS, _WANTED_WARPS = 4096, 2048  # measured on an H100, over these models' shapes and all types

_MATRIX = np.dtype(
    [("planes", PLANES), ("bias", "u8"), ("residual", "u8"), ("out", "u8"), ("rows", "i4"), ("first_block", "i4")]
)
_BRANCH = np.dtype([("planes", PLANES), ("bias", "u8")])
_ACTIVATIONS = np.dtype([("q", "u8"), ("meta", "u8"), ("x", "u8"), ("cols", "i4")], align=True)
GATE = np.dtype([("limit", "f4"), ("alpha", "f4")])
"""`Gate` of kernels/gated.cuh."""

_MIXED = ((Q5_0, Q5_0, Q8_0), (Q4_K, Q4_K, Q6_K))  # q, k and v of published files
INSTANTIATIONS: tuple[KernelName, ...] = (
    *(("matvec.cu", f"matvec<{rows}, {kind.name}>") for kind in QUANT_TYPES for rows in (1, 2, 4)),
    *(
        ("matvec.cu", f"matvec<{rows}, {', '.join(kind.name for kind in kinds)}>")
        for kinds in _MIXED
        for rows in (1, 2, 4)
    ),
    *(("glu.cu", f"glu<{rows}, {kind.name}, {kind.name}>") for kind in QUANT_TYPES for rows in (1, 2)),
    *(("experts_add.cu", f"experts_add<{rows}, {kind.name}>") for kind in (MXFP4, Q8_0) for rows in (1, 2)),
)


@dataclass(frozen=True, slots=True)
class _Shares:
    """How a block's warps share rows: `parts` of them each take a part of `rows` rows' columns."""

    rows: int
    parts: int

    def blocks(self, rows: int) -> int:
        """Blocks that `rows` rows of a matrix take."""
        return -(-rows // (self.rows * (_WARPS // self.parts)))


def _shares(rows: int, cols: int, kinds: Sequence[QuantType], most: int) -> _Shares:
    """More warps a row until enough of them are at work, then more rows a warp while enough remain."""
    units = max(cols // unit_elements(kind) for kind in kinds)
    parts = next((p for p in (1, 2, 4) if rows * p >= _WANTED_PARTS or p * _UNITS >= units), _WARPS)
    each = next((r for r in (4, 2) if r <= most and rows * parts >= r * _WANTED_WARPS), 1)
    return _Shares(each, parts)


def matvec(
    kernels: Launcher,
    pool: Allocator,
    x: Activations,
    linears: Sequence[Linear],
    residual: DeviceArray | None = None,
) -> tuple[DeviceArray, ...]:
    """y_j = W_j·x + b_j for up to three projections of one input: y_j [T, rows_j] f32.

    x has the forms that their types want. `residual` [T, rows] is added to the only projection's result.
    """
    tokens, cols = x.shape
    kinds = [linear.weight.kind for linear in linears]
    shares = _shares(sum(linear.weight.shape[0] for linear in linears), cols, kinds, 4)
    results, matrices, blocks = [], [], 0
    for linear in linears:
        rows = linear.weight.shape[0]
        results.append(pool.empty((tokens, rows), np.float32))
        pointers = (address(_bias(linear)), address(residual), address(results[-1]))
        matrices.append(np.array((linear.weight.data.addresses(), *pointers, rows, blocks), _MATRIX))
        blocks += shares.blocks(rows)
    nothing = np.array(((0, 0, 0, 0), 0, 0, 0, 0, blocks), _MATRIX)
    matrices += [nothing] * (3 - len(linears))
    types = kinds if len(set(kinds)) > 1 else kinds[:1]
    kernel = kernels.get("matvec.cu", f"matvec<{shares.rows}, {', '.join(kind.name for kind in types)}>")
    kernel((blocks, tokens), (32 * _WARPS,), (*matrices, _struct(x), np.int32(shares.parts)))
    return tuple(results)


def glu(
    kernels: Launcher,
    pool: Allocator,
    x: Activations,
    gate: Linear,
    up: Linear,
    activation: Activation,
    routes: Routes | None = None,
) -> DeviceArray:
    """activation(gate(x), up(x)): h [T, f] f32; with routes, in each token's experts: h [T, k, f] f32."""
    tokens, cols = x.shape
    rows = gate.weight.shape[-2]
    k = 1 if routes is None else routes.experts.shape[1]
    h = pool.empty((tokens, rows) if routes is None else (tokens, k, rows), np.float32)
    shares = _shares(2 * rows * k, cols, (gate.weight.kind, up.weight.kind), 2)
    branches = [np.array((b.weight.data.addresses(), address(_bias(b))), _BRANCH) for b in (gate, up)]
    experts = None if routes is None else routes.experts
    kernel = kernels.get("glu.cu", f"glu<{shares.rows}, {gate.weight.kind.name}, {up.weight.kind.name}>")
    sizes = (np.int32(k), np.int32(rows), np.int32(shares.parts))
    kernel(
        (shares.blocks(rows), tokens * k),
        (32 * _WARPS,),
        (*branches, _struct(x), gate_of(activation), experts, *sizes, h),
    )
    return h


def experts_add(
    kernels: Launcher,
    pool: Allocator,
    h: Activations,
    routes: Routes,
    down: Linear,
    residual: DeviceArray,
) -> DeviceArray:
    """residual + Σ_j weights[:, j]·down_e(h[:, j]): x [T, d] f32 from h [T·k, f]."""
    tokens, k = routes.experts.shape
    rows = down.weight.shape[-2]
    x = pool.empty((tokens, rows), np.float32)
    groups = max(1, _WARPS // k)
    each = 2 if rows * k >= _WANTED_PARTS else 1
    planes = np.array(down.weight.data.addresses(), PLANES)
    kernel = kernels.get("experts_add.cu", f"experts_add<{each}, {down.weight.kind.name}>")
    sizes = (np.int32(k), np.int32(rows))
    kernel(
        (-(-rows // (each * groups)), tokens),
        (32 * k * groups,),
        (planes, _bias(down), _struct(h), routes.experts, routes.weights, *sizes, residual, x),
    )
    return x


def gate_of(activation: Activation) -> np.ndarray[Any, Any]:
    """An activation as kernels take it: a value of GATE."""
    return np.array((np.inf if activation.limit is None else activation.limit, activation.alpha), GATE)


def _struct(x: Activations) -> np.ndarray[Any, Any]:
    return np.array((address(x.q), address(x.meta), address(x.x), x.shape[1]), _ACTIVATIONS)


def _bias(linear: Linear) -> DeviceArray | None:
    return None if linear.bias is None else linear.bias.data
