"""NumPy ops with activations rounded as on the GPU: 8-bit blocks in decode, scaled f16 in prefill.

The ops of `worker/cpu/ops.py` are the definition and do not round. A comparison with the ops of
this module shows a kernel's error without that of the rounding. Twins of `q8_activations.cuh` and
`scale_to_f16.cu` in `worker/gpu/kernels/`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from worker.cpu.kv_cache import KvCache
from worker.cpu.ops import CpuOps
from worker.cpu.threads import Threads
from worker.ops import Linear, Phase

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]

BLOCK = 32
_TINY = np.float32(1e-30)  # blocks with a smaller maximum become zeros, so that 127/amax is finite
_HALF_EXPONENT = 10


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


def in_f16(x: F32) -> F32:
    """Round x as the products do in prefill.

    Values are f16 after a scale, a power of two that puts the row's largest |x| in [1024, 2048).
    """
    amax = np.abs(x).max(axis=-1, keepdims=True)
    _, exponent = np.frexp(amax)  # amax in [2^(exponent-1), 2^exponent)
    scale = np.where(amax > 0, np.ldexp(np.float32(1), exponent - 1 - _HALF_EXPONENT), np.float32(1))
    result: F32 = (x / scale).astype(np.float16).astype(np.float32) * scale
    return result


class QuantizedOps(CpuOps):
    """`worker.ops.Ops` on NumPy; the activations of a product are rounded as on the GPU."""

    def __init__(self, cache: KvCache, phase: Phase, threads: Threads) -> None:
        super().__init__(cache, phase, threads)
        self._phase = phase

    def _router_linear(self, n: F32, linear: Linear) -> F32:
        """See `CpuOps`. The router's input is not rounded, which would flip near ties."""
        return super()._linear(n, linear)

    def _linear(self, x: F32, linear: Linear) -> F32:
        return super()._linear(self._rounded(x, linear), linear)

    def _expert(self, x: F32, linear: Linear, expert: int) -> F32:
        return super()._expert(self._rounded(x, linear), linear, expert)

    def _rounded(self, x: F32, linear: Linear) -> F32:
        if self._phase is Phase.PREFILL:
            return in_f16(x)
        return in_8_bits(x) if linear.weight.kind.block_size > 1 else x
