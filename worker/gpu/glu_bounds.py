"""Bounds of a gated FFN's result h, from which prefill derives the scales of h before its products.

|gate| ≤ G·‖n‖ + a and |up| ≤ U·‖n‖ + b for an input row n, where G and U are the greatest norms of
a row of the weights (of all experts) and a and b the greatest biases; |h| is at most their product.
A gate with a limit has a constant bound. So `scale_to_f16` knows a row's scale of h, and the
product writes h as f16. Kernel: `row_norms.cu`. Twin: `greatest_norms` in `tests/quantized_ops.py`.
"""

import math

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Launcher
from worker.gpu.layouts import PLANES, STORED_TYPES, unit_elements
from worker.gpu.memory import DeviceArray, DeviceMemory, Purpose
from worker.ops import Activation, Linear

INSTANTIATIONS: tuple[KernelName, ...] = tuple(("row_norms.cu", f"row_norms<{kind.name}>") for kind in STORED_TYPES)
_ROWS = 8  # of a block
_FFNS = 2  # of a layer at most: a dense one and experts
_LEAST_SWISH = 0.3
"""gate·σ(alpha·gate) is above -0.3/alpha."""


def bounds_bytes(layers: int) -> int:
    """Device memory of the bounds of a model with so many layers."""
    return 16 * _FFNS * layers


class GluBounds:
    """The bounds of a model's gated FFNs: a dry run assigns them, `launch` computes them."""

    def __init__(self, memory: DeviceMemory, layers: int) -> None:
        slab = memory.reserve(bounds_bytes(layers), Purpose.WORKSPACE)
        self._unassigned = iter(slab.array((_FFNS * layers, 4), np.float32))
        self._bounds: dict[tuple[int, int], tuple[Linear, Linear, DeviceArray]] = {}
        """By the identities of gate and up, which the values keep alive."""
        self._limits: dict[Activation, DeviceArray] = {}

    def of(self, gate: Linear, up: Linear, activation: Activation) -> DeviceArray:
        """G, U, a, b: [4] f32, assigned by the first call and zeros until `launch`."""
        if activation.limit is not None:
            if activation not in self._limits:
                swish = max(activation.limit, _LEAST_SWISH / activation.alpha)
                self._limits[activation] = self._assign(0, 0, swish, activation.limit + 1)
            return self._limits[activation]
        key = id(gate), id(up)
        if key not in self._bounds:
            self._bounds[key] = (gate, up, self._assign(0, 0, 0, 0))
        return self._bounds[key][-1]

    def launch(self, kernels: Launcher) -> None:
        """Compute the bounds from the weights, which must be on the device."""
        for gate, up, bounds in self._bounds.values():
            for at, linear in enumerate((gate, up)):
                row_norms(kernels, linear, bounds[at:])

    def _assign(self, *values: float) -> DeviceArray:
        bounds = next(self._unassigned, None)
        assert bounds is not None, f"more than {_FFNS} gated FFNs a layer"
        bounds.set(np.array(values, np.float32))
        return bounds


def row_norms(kernels: Launcher, linear: Linear, greatest: DeviceArray) -> None:
    """Raise greatest[0] to the greatest norm of a row, greatest[2] to the greatest |bias|."""
    weight = linear.weight
    rows, units = math.prod(weight.shape[:-1]), weight.shape[-1] // unit_elements(weight.kind)
    planes, bias = np.array(weight.data.addresses(), PLANES), None if linear.bias is None else linear.bias.data
    kernels.get("row_norms.cu", f"row_norms<{weight.kind.name}>")(
        (-(-rows // _ROWS),), (32 * _ROWS,), (planes, bias, np.int32(rows), np.int32(units), greatest)
    )
