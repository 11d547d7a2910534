"""The launcher of a router's choice among experts. Twin: `top_k` in `worker/cpu/plain.py`. Kernel: `route.cu`."""

from __future__ import annotations

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.matvec import matvec
from worker.gpu.memory import DeviceArray
from worker.gpu.quantized import Activations
from worker.ops import Linear, RmsNorm, Routes

_PER_LANE = (1, 2, 4, 8)
_TOKENS_PER_BLOCK = 4
INSTANTIATIONS: tuple[KernelName, ...] = tuple(("route.cu", f"route<{n}>") for n in _PER_LANE)


def route(kernels: Launcher, pool: Allocator, logits: DeviceArray, k: int) -> Routes:
    """The k highest of logits [T, E] f32, ties to the lower id, and the softmax over them."""
    tokens, experts = logits.shape
    if experts > 32 * _PER_LANE[-1] or k > 32:
        raise ModelLoadFailed(f"{k} of {experts} experts", "the GPU's router", "at most 32 of 256")
    per_lane = next(n for n in _PER_LANE if 32 * n >= experts)
    routes = Routes(pool.empty((tokens, k), np.int32), pool.empty((tokens, k), np.float32))
    kernels.get("route.cu", f"route<{per_lane}>")(
        (-(-tokens // _TOKENS_PER_BLOCK),),
        (32 * _TOKENS_PER_BLOCK,),
        (routes.experts, routes.weights, logits, np.int32(tokens), np.int32(experts), np.int32(k)),
        pdl=True,
    )
    return routes


def routed(kernels: Launcher, pool: Allocator, x: DeviceArray, norm: RmsNorm, router: Linear, k: int) -> Routes:
    """A router's choice for norm(x) [T, d], alike in both phases."""
    (logits,) = matvec(kernels, pool, Activations(x), norm, (router,))
    return route(kernels, pool, logits, k)
