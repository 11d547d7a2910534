"""Launcher of prefill's products on sm_90: `wgmma`, weights dequantized in registers.

Each element is one chain of MMAs over ascending columns, so no bit depends on the tile, which is
chosen by the number of tokens. Blocks of `matmul_wgmma.cu` compute several tiles of a dense matrix
one after another, at most one block a multiprocessor. Experts with few rows take matmul.cu, whose
chain of MMAs without a split of K gives the same bits. `launch_rope` includes RoPE and the writes
to the KV cache. Kernels: `matmul_wgmma.cu`, `matmul_wgmma_rope.cu`, `matmul_wgmma_short.cu`.
Callers: `matmul.py`, `prefill_attention.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from worker.gpu.activations import ScaledF16, padded
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Launcher
from worker.gpu.layouts import EXPERT_TYPES, MIXED, STORED_TYPES
from worker.gpu.matmul_params import ExpertGroups, matmul_params, slot_tiles
from worker.gpu.matvec import GELU_TYPES, gate_of, is_gelu
from worker.gpu.memory import DeviceArray
from worker.gpu.prefill_state import DEFINES as _BATCH_DEFINES
from worker.gpu.prefill_state import PREFILL_BATCH
from worker.gpu.tensor_maps import tensor_map
from worker.ops import KV_BLOCK, SWIGLU, Activation, Linear
from worker.quants import BF16, F16, F32, Q4_K, QuantType


class _Tile(NamedTuple):
    """Tile of a block: 128 rows, or 64 with `short` (half of them with GLU) × tile_n tokens."""

    short: bool
    """Whether it is one of matmul_wgmma_short.cu."""
    tile_n: int
    stages: int
    """Panels of 64 columns of x in shared memory; with `short`, steps of 128 columns."""
    step_us: float
    wave_us: float
    """Measured on an H100: a block takes about wave_us + step_us a step of 128 columns."""

    @property
    def rows(self) -> int:
        """Rows of a block, those of gate and up together."""
        return 64 if self.short else 128

    @property
    def threads(self) -> int:
        """Two warpgroups and their producer; one warpgroup and its converters."""
        return 768 if self.short else 384

    @property
    def shared_bytes(self) -> int:
        """The stages, and what their alignment takes."""
        stage = 256 * (self.tile_n + 64) if self.short else 128 * self.tile_n
        return stage * self.stages + 1024


_TILES = (
    _Tile(False, 256, 6, 1.45, 10),
    _Tile(False, 192, 8, 1.25, 11),
    _Tile(False, 128, 12, 1.05, 8),
    _Tile(True, 64, 6, 0.5, 2.5),
    _Tile(True, 32, 8, 0.45, 2.5),
    _Tile(True, 16, 10, 0.4, 2.5),
)
_PROCESSORS = 132  # multiprocessors of an H100; with others, another tile may be a little faster
_MANY_ROWS = 64
"""Rows an expert from which `wgmma` is faster than the smaller tiles of matmul.cu."""
_STEP = 128
_PANEL = 64
_TILE_GRID = np.dtype([("row_tiles", "i4"), ("token_tiles", "i4")])
"""`TileGrid` of wgmma_ring.cuh."""
_PAIR_QUAD = 8
"""Elements of four pairs, which matmul_wgmma_rope.cu writes together: they are of one head."""
HEADS = np.dtype(
    [
        *((name, "u8") for name in ("queries", "k_cache", "v_cache", "cos", "sin")),
        *((name, "i4") for name in ("dims", "padding", "adjacent", "dim", "n_kv_heads")),
        ("batch", PREFILL_BATCH),
    ],
    align=True,
)
"""`Heads` of matmul_wgmma_rope.cu: its outputs, RoPE and the batch."""
DEFINES = {"WEIGHTS_BYPASS_L1": 1, "KV_BLOCK": KV_BLOCK, "HEADS_BYTES": HEADS.itemsize, **_BATCH_DEFINES}
"""With WEIGHTS_BYPASS_L1, loads stay where they are written, behind a fence that waits for all
loads before it."""


def _name(
    kind: QuantType,
    tile: _Tile,
    *,
    gated: bool,
    experts: bool = False,
    gelu: bool = False,
    last: QuantType | None = None,
) -> KernelName:
    kernel = "matmul_wgmma_short" if tile.short else "matmul_wgmma"
    arguments = [kind.name, str(tile.tile_n), str(tile.stages)]
    if not tile.short:
        arguments.append(str(experts).lower())
    arguments.append("2" if gelu else str(int(gated)))
    if last not in (None, kind):
        arguments.append(last.name)
    return f"{kernel}.cu", f"{kernel}<{', '.join(arguments)}>"


def _rope_name(first: QuantType, tile: _Tile, last: QuantType) -> KernelName:
    arguments = [first.name, str(tile.tile_n), str(tile.stages), *([] if last == first else [last.name])]
    return "matmul_wgmma_rope.cu", f"matmul_wgmma_rope<{', '.join(arguments)}>"


def _tiles(kind: QuantType) -> tuple[_Tile, ...]:
    """Tiles of a type: weights of F32 and BF16 take registers, F16 must not be in registers."""
    most = {F32: 64, F16: 64, BF16: 128}.get(kind, 256)
    return tuple(tile for tile in _TILES if tile.tile_n <= most)


def _largest_tiles(kind: QuantType) -> tuple[_Tile, ...]:
    """The largest tile of each kernel, which needs the most registers."""
    return next(tile for tile in _tiles(kind)), next(tile for tile in _tiles(kind) if tile.short)


INSTANTIATIONS: tuple[KernelName, ...] = (
    *(
        _name(kind, tile, gated=gated)
        for kind in STORED_TYPES
        for tile in _largest_tiles(kind)
        for gated in (False, True)
    ),
    *(_name(Q4_K, tile, gated=gated) for tile in _TILES for gated in (False, True)),
    *(_rope_name(kind, _tiles(kind)[0], kind) for kind in STORED_TYPES if not _tiles(kind)[0].short),
    *(_rope_name(first, tile, last) for first, _, last in MIXED for tile in _TILES if not tile.short),
    *(_name(first, tile, gated=False, last=last) for first, _, last in MIXED for tile in _TILES),
    *(_name(kind, tile, gated=True, gelu=True) for kind in GELU_TYPES for tile in _largest_tiles(kind)),
    *(_name(kind, _TILES[0], experts=True, gated=gated) for kind in EXPERT_TYPES for gated in (False, True)),
    *(_name(kind, _TILES[0], experts=True, gated=True, gelu=True) for kind in GELU_TYPES),
)
"""Kernels that are compiled in tests; others are compiled on first use."""


def launch(
    kernels: Launcher,
    x: ScaledF16,
    linears: Sequence[Linear],
    ys: Sequence[DeviceArray],
    *,
    residual: DeviceArray | None,
    activation: Activation,
    groups: ExpertGroups | None = None,
    order: DeviceArray | None = None,
) -> None:
    """Launch the products of one x: a y for each of up to three, or one y of two that are gated.

    With groups, y is in order of their rows, or with their `order` in order of slots.
    """
    gated, tokens = len(ys) < len(linears), x.x.shape[0]
    rows = [linear.weight.shape[-2] for linear in linears]
    first, last = linears[0].weight.kind, linears[-1].weight.kind
    cols, gelu = linears[0].weight.shape[-1], is_gelu(activation)
    if groups is None:
        tile = _tile(first, rows, cols, tokens, gated=gated)
        n_tiles, slots = -(-tokens // tile.tile_n), slot_tiles(None)
    else:
        (tile,) = _expert_tiles(first, groups)
        n_tiles, slots = len(groups.table), slot_tiles(groups.table, order)
    kernel = kernels.get(*_name(first, tile, experts=groups is not None, gated=gated, gelu=gelu, last=last))
    blocks = _blocks(tile, rows, gated=gated)
    params = matmul_params(x, linears, ys, blocks, residual=residual, gate=gate_of(activation, gelu=gelu))
    args: tuple[Any, ...] = (params, tensor_map(x.x, tile.tile_n, _PANEL), np.int32(tokens), slots)
    grid = (sum(blocks), n_tiles)
    if not tile.short:
        args += (np.array(grid, _TILE_GRID),)
        tiles = sum(blocks) * n_tiles
        grid = (tiles if groups else min(tiles, kernels.processors), 1)
    kernel(grid, (tile.threads,), args, shared_mem=tile.shared_bytes, pdl=True)


def rope_tile(linears: Sequence[Linear], tokens: int, head_dim: int, rotary_dims: int) -> _Tile | None:
    """The tile of `launch_rope` for projections q, k and v, or None where there is none."""
    kinds = tuple(linear.weight.kind for linear in linears)
    if head_dim % _PAIR_QUAD or rotary_dims % _PAIR_QUAD or (len(set(kinds)) > 1 and kinds not in MIXED):
        return None
    rows, cols = [linear.weight.shape[0] for linear in linears], linears[0].weight.shape[1]
    tile = _tile(kinds[0], rows, cols, tokens, gated=False)
    return None if tile.short else tile


def launch_rope(
    kernels: Launcher, x: ScaledF16, linears: Sequence[Linear], tile: _Tile, heads: np.ndarray[Any, Any]
) -> None:
    """Launch q, k and v with RoPE; `heads` is a value of HEADS."""
    first, last, tokens = linears[0].weight.kind, linears[-1].weight.kind, x.x.shape[0]
    blocks = _blocks(tile, [linear.weight.shape[0] for linear in linears], gated=False)
    params = matmul_params(x, linears, [None] * len(linears), blocks, residual=None, gate=gate_of(SWIGLU, gelu=False))
    grid = sum(blocks), -(-tokens // tile.tile_n)
    args = (params, tensor_map(x.x, tile.tile_n, _PANEL), np.int32(tokens), np.array(grid, _TILE_GRID), heads)
    kernels.get(*_rope_name(first, tile, last))(
        (min(grid[0] * grid[1], kernels.processors), 1), (tile.threads,), args, shared_mem=tile.shared_bytes, pdl=True
    )


def rows_of_expert_tiles(rows_per_expert: float) -> int | None:
    """Rows that a tile of experts has at most, or None where they are too few for `wgmma`."""
    if rows_per_expert < _MANY_ROWS:
        return None
    tiles = [tile.tile_n for tile in _TILES if not tile.short]
    return min((rows for rows in tiles if rows >= 1.2 * rows_per_expert), default=max(tiles))


def multiplies_groups(kind: QuantType, groups: ExpertGroups) -> bool:
    """Whether these groups are tiles of `wgmma`, and experts of this type have such a kernel."""
    return bool(_expert_tiles(kind, groups))


def _expert_tiles(kind: QuantType, groups: ExpertGroups) -> list[_Tile]:
    """The tile of a type for these groups, if there is one."""
    return [tile for tile in _tiles(kind) if tile.tile_n == groups.tile_rows and not tile.short]


def _tile(kind: QuantType, rows: Sequence[int], cols: int, tokens: int, *, gated: bool) -> _Tile:
    """The tile that takes least time, as far as waves of blocks and steps of a block explain it."""

    def microseconds(tile: _Tile) -> float:
        blocks = sum(_blocks(tile, rows, gated=gated)) * -(-tokens // tile.tile_n)
        return -(-blocks // _PROCESSORS) * (tile.wave_us + -(-cols // _STEP) * tile.step_us)

    return min(_tiles(kind), key=microseconds)


def _blocks(tile: _Tile, rows: Sequence[int], *, gated: bool) -> list[int]:
    """Blocks along the rows of each matrix, or of gate and up, which are interleaved and padded."""
    return [2 * padded(rows[0]) // tile.rows] if gated else [-(-each // tile.rows) for each in rows]
