"""NumPy ops with activations rounded as on the GPU: 8-bit blocks in decode, scaled f16 in prefill.

The ops of `worker/cpu/ops.py` are the definition and do not round. A comparison with the ops of
this module shows a kernel's error without that of the rounding. Twins of `q8_activations.cuh`,
`scale_to_f16.cu` and `row_norms.cu` in `worker/gpu/kernels/`.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from worker.cpu.kv_cache import KvCache
from worker.cpu.ops import CpuOps
from worker.cpu.threads import Threads
from worker.ops import SWIGLU, Activation, Linear, Phase, RmsNorm, Routes

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.floating]
I8 = npt.NDArray[np.int8]

BLOCK = 32
_TINY = np.float32(1e-30)  # blocks with a smaller maximum become zeros, so that 127/amax is finite
_HALF_EXPONENT, _H_EXPONENT = 10, 14


def quantize(x: F32) -> tuple[I8, F32]:
    """Quantize blocks of 32 along the last axis: x ≈ scale·q with |q| ≤ 127.

    Returns q [..., cols] i8 and scale [..., cols/32] f32.
    """
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    amax: F32 = np.abs(blocks).max(axis=-1)
    nonzero = amax >= _TINY
    divisor = np.where(nonzero, amax, np.float32(1))
    inverse = np.where(nonzero, np.float32(127) / divisor, np.float32(0))
    q: I8 = np.rint(blocks * inverse[..., None]).astype(np.int8).reshape(x.shape)
    return q, np.where(nonzero, amax / np.float32(127), np.float32(0))


def in_8_bits(x: F32) -> F32:
    """Round x as the products of quantized weights do in decode: quantize and dequantize."""
    q, scale = quantize(x)
    result: F32 = (q.reshape(*scale.shape, BLOCK) * scale[..., None]).reshape(x.shape)
    return result


def in_f16(x: F32, scale: F32 | None = None) -> F32:
    """Round x [..., cols] as the products do in prefill.

    Values are f16 after a scale [...], a power of two. By default it puts the row's largest |x| in
    [1024, 2048).
    """
    divisor = (_power_of_two(np.abs(x).max(axis=-1), _HALF_EXPONENT) if scale is None else scale)[..., None]
    result: F32 = (x / divisor).astype(np.float16).astype(np.float32) * divisor
    return result


def _power_of_two(greatest: F64, top: int) -> F32:
    """The power of two that brings `greatest` into [2^top, 2^(top + 1)); 1 for 0."""
    _, exponent = np.frexp(greatest)  # greatest in [2^(exponent-1), 2^exponent)
    return np.where(greatest > 0, np.ldexp(np.float32(1), np.clip(exponent - 1 - top, -100, 100)), np.float32(1))


def greatest_norms(weight: F64, bias: F64 | None) -> tuple[float, float]:
    """The greatest 2-norm of a row of weight [..., rows, cols], and the greatest |bias| or 0."""
    return float(np.linalg.norm(weight, axis=-1).max()), 0.0 if bias is None else float(np.abs(bias).max())


Weights: TypeAlias = tuple[F64, F64 | None]
"""Weight [..., rows, cols] and bias [..., rows] of a projection."""


def glu_bounds(gate: Weights, up: Weights, activation: Activation) -> tuple[float, float, float, float]:
    """G, U, a, b with |gate| ≤ G·‖n‖ + a and |up| ≤ U·‖n‖ + b, where |h| is at most the product."""
    if activation.limit is not None:
        return 0, 0, max(activation.limit, 0.3 / activation.alpha), activation.limit + 1
    (g, a), (u, b) = greatest_norms(*gate), greatest_norms(*up)
    return g, u, a, b


def h_scales(n: F32, bounds: tuple[float, float, float, float]) -> F32:
    """Scales [...] of the gated FFN's result for inputs n [..., cols]: they bring it below 2^15."""
    norm, (g, u, a, b) = np.linalg.norm(n.astype(np.float64), axis=-1), bounds
    return _power_of_two((g * norm + a) * (u * norm + b), _H_EXPONENT)


class QuantizedOps(CpuOps):
    """`worker.ops.Ops` on NumPy; the activations of a product are rounded as on the GPU."""

    def __init__(self, cache: KvCache, phase: Phase, threads: Threads) -> None:
        super().__init__(cache, phase, threads)
        self._phase = phase

    def _router_linear(self, n: F32, linear: Linear) -> F32:
        """See `CpuOps`. The router's input is not rounded, which would flip near ties."""
        return super()._linear(n, linear)

    def norm_glu(self, x: F32, norm: RmsNorm, gate: Linear, up: Linear, activation: Activation = SWIGLU) -> F32:
        return self._rounded_h(
            super().norm_glu(x, norm, gate, up, activation), self._norm(x, norm), gate, up, activation
        )

    def experts_glu(self, n: F32, routes: Routes, gate: Linear, up: Linear, activation: Activation) -> F32:
        h = super().experts_glu(n, routes, gate, up, activation)
        return self._rounded_h(h, n[:, None], gate, up, activation)

    def _rounded_h(self, h: F32, n: F32, gate: Linear, up: Linear, activation: Activation) -> F32:
        if self._phase is not Phase.PREFILL:
            return h
        weights = [(linear.weight.data, None if linear.bias is None else linear.bias.data) for linear in (gate, up)]
        return in_f16(h, h_scales(n, glu_bounds(*weights, activation)))

    def _linear(self, x: F32, linear: Linear) -> F32:
        return super()._linear(self._rounded(x, linear), linear)

    def _expert(self, x: F32, linear: Linear, expert: int) -> F32:
        return super()._expert(self._rounded(x, linear), linear, expert)

    def _rounded(self, x: F32, linear: Linear) -> F32:
        if self._phase is Phase.PREFILL:
            return in_f16(x)
        return in_8_bits(x) if linear.weight.kind.block_size > 1 else x
