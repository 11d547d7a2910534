"""Launchers of prefill's products: tensor cores over f16 activations, weights de-quantized on their way.

A matrix has one tile configuration, by its shape; a token's bits depend on its own row alone, however many share the
call. Twins: the ops of `worker/cpu/ops.py` without their norms, `worker/cpu/quantized.py`. Kernels: `matmul.cu`,
`group_routes.cu`, `gated.cu`, `combine.cu`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import PLANES, address
from worker.gpu.matvec import gate_of
from worker.gpu.memory import DeviceArray
from worker.gpu.quantized import Halved
from worker.ops import Activation, Linear, Routes
from worker.quants import MXFP4, Q8_0, QUANT_TYPES

_TOKENS, _ROW_BYTES = 128, 128  # kTokens, kRowBytes of matmul.cu
_MANY_ROWS = 4096  # from here on, tiles of 128 rows occupy the device even for one tile of tokens
_MANY, _FEW = (4, 1), (2, 2)  # COLUMNS, DEPTHS of matmul.cu
_GROUP_THREADS = 1024
_THREADS = 256
_PRODUCT = np.dtype(
    [("planes", PLANES), ("bias", "u8"), ("residual", "u8"), ("out", "u8"), ("rows", "i4"), ("cols", "i4")]
)
_TILES = np.dtype([("order", "u8"), ("table", "u8"), ("per_slot", "i4")], align=True)
_NO_TILES = np.array((0, 0, 1), _TILES)
INSTANTIATIONS: tuple[KernelName, ...] = (
    *(("matmul.cu", f"matmul<{kind.name}, {c}, {d}, false>") for kind in QUANT_TYPES for c, d in (_MANY, _FEW)),
    *(("matmul.cu", f"matmul<{kind.name}, {c}, {d}, true>") for kind in (MXFP4, Q8_0) for c, d in (_MANY, _FEW)),
    ("group_routes.cu", "group_routes"),
    ("gated.cu", "gated_elements"),
    ("combine.cu", "combine"),
)


def matmul(
    kernels: Launcher, pool: Allocator, x: Halved, linear: Linear, residual: DeviceArray | None = None
) -> DeviceArray:
    """W·x + b + residual: y [T, rows] f32 of x [T, cols]."""
    tokens = x.x.shape[0]
    y = pool.empty((tokens, linear.weight.shape[0]), np.float32)
    _launch(kernels, x, linear, residual, y, None)
    return y


def glu(
    kernels: Launcher,
    pool: Allocator,
    x: Halved,
    gate: Linear,
    up: Linear,
    activation: Activation,
    routes: Routes | None = None,
) -> DeviceArray:
    """activation(gate(x), up(x)): h [T, f] f32; with routes, in each token's experts: h [T, k, f] f32."""
    tokens, rows = x.x.shape[0], gate.weight.shape[-2]
    shape = (tokens, rows) if routes is None else (*routes.experts.shape, rows)
    grouped = None if routes is None else _group(kernels, pool, routes, gate.weight.shape[0], shared=True)
    h, other = pool.empty(shape, np.float32), pool.empty(shape, np.float32)
    _launch(kernels, x, gate, None, h, grouped)
    _launch(kernels, x, up, None, other, grouped)
    args = (h, other, gate_of(activation), np.uint64(h.size), h)
    kernels.get("gated.cu", "gated_elements")((-(-h.size // _THREADS),), (_THREADS,), args)
    return h


def experts_add(
    kernels: Launcher, pool: Allocator, h: Halved, routes: Routes, down: Linear, residual: DeviceArray
) -> DeviceArray:
    """residual + Σ_j weights[:, j]·down_e(h[:, j]): x [T, d] f32 from h [T·k, f]."""
    tokens, k = routes.experts.shape
    n_experts, d = down.weight.shape[:2]
    x = pool.empty((tokens, d), np.float32)
    y = pool.empty((tokens * k, d), np.float32)
    _launch(kernels, h, down, None, y, _group(kernels, pool, routes, n_experts, shared=False))
    args = (y, routes.weights, np.int32(k), np.int32(d), residual, x)
    kernels.get("combine.cu", "combine")((-(-d // _THREADS), tokens), (_THREADS,), args)
    return x


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Slots sorted by expert, and their tiles; see kernels/tiles.cuh."""

    order: DeviceArray
    table: DeviceArray
    per_slot: int

    def struct(self) -> np.ndarray[Any, Any]:
        return np.array((address(self.order), address(self.table), self.per_slot), _TILES)


def _group(kernels: Launcher, pool: Allocator, routes: Routes, n_experts: int, *, shared: bool) -> _Grouped:
    """Sort the routes' slots by expert; `shared`: a token's k slots read one row of the input."""
    tokens, k = routes.experts.shape
    slots = tokens * k
    tiles = slots // _TOKENS + min(n_experts, slots)
    grouped = _Grouped(pool.empty((slots,), np.int32), pool.empty((tiles, 3), np.int32), k if shared else 1)
    sizes = (np.int32(slots), np.int32(n_experts), np.int32(_TOKENS), np.int32(tiles))
    kernels.get("group_routes.cu", "group_routes")(
        (1,),
        (_GROUP_THREADS,),
        (routes.experts, *sizes, grouped.order, grouped.table),
        shared_mem=8 * n_experts,
    )
    return grouped


def _launch(
    kernels: Launcher,
    x: Halved,
    linear: Linear,
    residual: DeviceArray | None,
    y: DeviceArray,
    grouped: _Grouped | None,
) -> None:
    rows, cols = linear.weight.shape[-2:]
    columns, depths = _MANY if rows >= _MANY_ROWS else _FEW
    pointers = (address(None if linear.bias is None else linear.bias.data), address(residual), address(y))
    product = np.array((linear.weight.data.addresses(), *pointers, rows, cols), _PRODUCT)
    tokens = x.x.shape[0]
    tiles = -(-tokens // _TOKENS) if grouped is None else grouped.table.shape[0]
    where = _NO_TILES if grouped is None else grouped.struct()
    experts = "false" if grouped is None else "true"
    kernel = kernels.get("matmul.cu", f"matmul<{linear.weight.kind.name}, {columns}, {depths}, {experts}>")
    shared = depths * 2 * (_TOKENS + 32 * columns) * _ROW_BYTES
    if getattr(kernel, "max_dynamic_shared_size_bytes", shared) < shared:
        kernel.max_dynamic_shared_size_bytes = shared
    grid = (-(-rows // (32 * columns)), tiles)
    kernel(grid, (64 * columns * depths,), (product, x.x, x.scale, np.int32(tokens), where), shared_mem=shared)
