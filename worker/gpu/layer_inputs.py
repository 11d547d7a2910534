"""Launchers of the inputs that layers have beside the residual, in both phases.

Kernels: `add_normed_groups.cu`, `gate_group.cu`. Twins: `layer_inputs`, `linear_gate` in
`worker/cpu/ops.py`.
"""

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Launcher
from worker.gpu.matvec import gate_of, is_gelu
from worker.gpu.memory import DeviceArray
from worker.ops import Activation, RmsNorm

_GROUP_WARPS = 4  # of a block, a group each
_THREADS = 256
DEFINES = {"GROUP_WARPS": _GROUP_WARPS}
INSTANTIATIONS: tuple[KernelName, ...] = (
    ("add_normed_groups.cu", "add_normed_groups"),
    *(("gate_group.cu", f"gate_group<{gelu}>") for gelu in ("false", "true")),
)


def add_normed_groups(
    kernels: Launcher, y: DeviceArray, norm: RmsNorm, rows: DeviceArray, count: DeviceArray | None = None
) -> DeviceArray:
    """rows + norm(y) by groups of P elements, the norm's width: `rows` [T, G·P] f32, overwritten.

    The first `count` [1] i32 rows are valid, all if None.
    """
    width = norm.weight.shape[0]
    groups = y.shape[1] // width
    args = (rows, y, norm.weight.data, count, np.int32(groups), np.int32(width), np.float32(norm.eps))
    grid = (len(y), -(-groups // _GROUP_WARPS))
    kernels.get("add_normed_groups.cu", "add_normed_groups")(grid, (32 * _GROUP_WARPS,), args, pdl=True)
    return rows


def gate_group(
    kernels: Launcher,
    y: DeviceArray,
    inputs: DeviceArray,
    group: int,
    activation: Activation,
    count: DeviceArray | None = None,
) -> DeviceArray:
    """activation(y, up) with one group of `inputs` [T, G·P] for up: `y` [T, P] f32, overwritten.

    `count` as in `add_normed_groups`.
    """
    width, gelu = y.shape[1], is_gelu(activation)
    args = (y, inputs, count, *map(np.int32, (width, inputs.shape[1], group * width)), gate_of(activation, gelu=gelu))
    grid = (len(y), -(-width // _THREADS))
    kernels.get("gate_group.cu", f"gate_group<{str(gelu).lower()}>")(grid, (_THREADS,), args, pdl=True)
    return y
