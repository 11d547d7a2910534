"""Parameters of a launch of `matmul.cu` or `matmul_wgmma.cu`: `kernels/matmul_params.cuh`."""

from collections.abc import Sequence
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
        *(("projections", _PROJECTION, 3), ("residual", "u8"), ("scale", "u8"), ("count", "u8")),
        *(("cols", "i4"), ("gate", GATE)),
    ],
    align=True,
)
"""`MatmulParams` of matmul_params.cuh."""


def matmul_params(
    x: ScaledF16,
    linears: Sequence[Linear],
    ys: Sequence[DeviceArray],
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
    pointers = (address(residual), address(x.scale), address(x.count))
    return np.array((projections, *pointers, linears[0].weight.shape[-1], gate), _PARAMS)


def _projection(linear: Linear, y: DeviceArray, first_block: int) -> np.ndarray[Any, Any]:
    """A value of _PROJECTION."""
    bias = address(None if linear.bias is None else linear.bias.data)
    return np.array(
        (linear.weight.data.addresses(), bias, address(y), linear.weight.shape[-2], first_block), _PROJECTION
    )
