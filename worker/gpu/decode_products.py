"""Decode's dense products for any number of rows: which launcher computes them.

| rows | launcher | a weight is loaded once for |
| --- | --- | --- |
| 1 | `matvec.py` | one row |
| 2 to 15, or weights that are not of block types | `matvec.py` | up to 8 rows |
| 16 and more | `matvec_mma.py` (int8 tensor cores) | up to 64 rows |

A row's bits are the same in all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from worker.gpu import matvec, matvec_mma
from worker.gpu.activations import Q8Activations, Q8Tiles, quantize_tiles
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.ops import Activation, Linear, RmsNorm


@dataclass(frozen=True, slots=True)
class DecodeProducts:
    """The products of a device that has `max_shared` bytes of shared memory for a block."""

    kernels: Launcher
    pool: Allocator
    max_shared: int

    def multiply(
        self,
        x: Q8Activations | Q8Tiles,
        norm: RmsNorm | None,
        linears: Sequence[Linear],
        residual: DeviceArray | None = None,
    ) -> tuple[DeviceArray, ...]:
        """W_j·norm(x) + b_j of up to three matrices, or W·norm(x) + b + residual: [R, rows_j]."""
        if x.shape[0] < matvec_mma.MIN_ROWS or not matvec_mma.is_supported(linears):
            plain = Q8Activations(x.x) if isinstance(x, Q8Tiles) else x
            return matvec.matvec(self.kernels, self.pool, plain, norm, linears, residual)
        rows = self._tiled(x, norm)
        return matvec_mma.matvec_mma(self.kernels, self.pool, rows, linears, residual, max_shared=self.max_shared)

    def gated(
        self, x: Q8Activations, norm: RmsNorm | None, gate: Linear, up: Linear, activation: Activation
    ) -> Q8Activations | Q8Tiles:
        """activation(gate(n), up(n)) of n = norm(x): h [R, f], f32 and Q8."""
        if x.shape[0] < matvec_mma.MIN_ROWS or not matvec_mma.is_supported((gate, up), gated=True):
            return matvec.glu(self.kernels, self.pool, x, norm, gate, up, activation)
        rows = self._tiled(x, norm)
        return matvec_mma.glu_mma(self.kernels, self.pool, rows, gate, up, activation, max_shared=self.max_shared)

    def _tiled(self, x: Q8Activations | Q8Tiles, norm: RmsNorm | None) -> Q8Tiles:
        return x if isinstance(x, Q8Tiles) else quantize_tiles(self.kernels, self.pool, x.x, norm)
