"""Parameters of a launch of `matmul.cu` or `matmul_wgmma.cu`: `kernels/matmul_params.cuh`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from worker.gpu.activations import ScaledF16
from worker.gpu.layouts import PLANES, address
from worker.gpu.matvec import GATE
from worker.gpu.memory import DeviceArray
from worker.ops import Linear

MAX_PROJECTIONS = 3  # of one launch
_PROJECTION = np.dtype([("planes", PLANES), ("bias", "u8"), ("out", "u8"), ("rows", "i4"), ("first_block", "u4")])
"""`Projection` of matmul_params.cuh."""
_PARAMS = np.dtype(
    [
        *(("projections", _PROJECTION, 3), ("residual", "u8"), ("scale", "u8"), ("h_scale", "u8"), ("count", "u8")),
        *(("cols", "i4"), ("gate", GATE)),
    ],
    align=True,
)
"""`MatmulParams` of matmul_params.cuh."""
_SLOT_TILES = np.dtype([("order", "u8"), ("table", "u8"), ("parts", "i4")], align=True)
"""`SlotTiles` of slot_tiles.cuh."""


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """The T·k slots of routes sorted by expert: the rows of the experts' products.

    `order` [T·k]: the slot of each row; `places` [T·k]: the row of each slot. `table`
    has their tiles, each of at most `tile_rows` rows of one expert. `count` [1] i32 is the number
    of valid tokens; None means all.
    """

    k: int
    tile_rows: int
    order: DeviceArray
    places: DeviceArray
    table: DeviceArray
    count: DeviceArray | None


def matmul_params(
    x: ScaledF16,
    linears: Sequence[Linear],
    ys: Sequence[DeviceArray | None],
    blocks: Sequence[int],
    *,
    residual: DeviceArray | None,
    gate: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """A value of _PARAMS: a y for each of the projections of x, or one y of two that are gated.

    `blocks`: how many blocks compute each projection.
    """
    gated = len(ys) < len(linears)
    outs = (ys[0], ys[0]) if gated else ys
    first_blocks = (0, 0) if gated else accumulate(blocks, initial=0)
    projections = [_projection(*each) for each in zip(linears, outs, first_blocks, strict=False)]
    absent = np.array(((0, 0, 0, 0), 0, 0, 0, sum(blocks)), _PROJECTION)
    projections += [absent] * (MAX_PROJECTIONS - len(projections))
    pointers = (address(residual), address(x.scale), address(x.h_scale if gated else None), address(x.count))
    return np.array((projections, *pointers, linears[0].weight.shape[-1], gate), _PARAMS)


def slot_tiles(table: DeviceArray | None, order: DeviceArray | None = None, parts: int = 1) -> np.ndarray[Any, Any]:
    """A value of _SLOT_TILES: y in order of rows, or with `order` of slots. No table: dense.

    `parts`: tiles of the launch for each one of the table.
    """
    return np.array((address(order), address(table), parts), _SLOT_TILES)


def _projection(linear: Linear, y: DeviceArray | None, first_block: int) -> np.ndarray[Any, Any]:
    """A value of _PROJECTION."""
    bias = address(None if linear.bias is None else linear.bias.data)
    return np.array(
        (linear.weight.data.addresses(), bias, address(y), linear.weight.shape[-2], first_block), _PROJECTION
    )
