"""The CPU's ops with activations rounded where the GPU rounds them: 8-bit blocks in decode, scaled f16 in prefill.

Beside the exact ops, which stay the definition: with these a comparison sees the kernels' own error and not the
rounding's. Twins of `worker/gpu/kernels/q8_activations.cuh` and of `scale_to_f16.cu`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from worker.cpu.kv_cache import KvCache
from worker.cpu.ops import CpuOps
from worker.cpu.plain import top_k
from worker.cpu.threads import Threads
from worker.ops import Linear, Phase, RmsNorm, Routes

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]

BLOCK = 32
_TINY = np.float32(1e-30)  # a block below it is zeros: 127/amax must be a number
_HALF_EXPONENT = 10


def quantize(x: F32) -> tuple[I8, F32]:
    """Blocks of 32 along the last axis: q [..., cols] and scale [..., cols/32] with x ≈ scale·q, |q| ≤ 127."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    amax: F32 = np.abs(blocks).max(axis=-1)
    some = amax >= _TINY
    divisor = np.where(some, amax, np.float32(1))
    inverse = np.where(some, np.float32(127) / divisor, np.float32(0))
    q: I8 = np.rint(blocks * inverse[..., None]).astype(np.int8).reshape(x.shape)
    return q, np.where(some, amax / np.float32(127), np.float32(0))


def in_8_bits(x: F32) -> F32:
    """x as decode's products of quantized weights see it."""
    q, scale = quantize(x)
    result: F32 = (q.reshape(*scale.shape, BLOCK) * scale[..., None]).reshape(x.shape)
    return result


def in_f16(x: F32) -> F32:
    """x as prefill's products see it: f16 under a power of two that puts the row's largest in [1024, 2048)."""
    amax = np.abs(x).max(axis=-1, keepdims=True)
    _, exponent = np.frexp(amax)  # amax in [2^(exponent-1), 2^exponent)
    scale = np.where(amax > 0, np.ldexp(np.float32(1), exponent - 1 - _HALF_EXPONENT), np.float32(1))
    result: F32 = (x / scale).astype(np.float16).astype(np.float32) * scale
    return result


class QuantizedOps(CpuOps):
    """`worker.ops.Ops` on NumPy with the GPU's rounding of what enters a product."""

    def __init__(self, cache: KvCache, phase: Phase, threads: Threads) -> None:
        super().__init__(cache, phase, threads)
        self._phase = phase

    def norm_route(self, x: F32, norm: RmsNorm, router: Linear, k: int) -> tuple[F32, Routes]:
        """See `Ops.norm_route`; a router's input is not rounded: near ties would choose other experts."""
        n = self._norm(x, norm)
        return n, Routes(*top_k(super()._linear(n, router), k))

    def _linear(self, x: F32, linear: Linear) -> F32:
        return super()._linear(self._rounded(x, linear), linear)

    def _expert(self, x: F32, linear: Linear, expert: int) -> F32:
        return super()._expert(self._rounded(x, linear), linear, expert)

    def _rounded(self, x: F32, linear: Linear) -> F32:
        if self._phase is Phase.PREFILL:
            return in_f16(x)
        return in_8_bits(x) if linear.weight.kind.block_size > 1 else x
