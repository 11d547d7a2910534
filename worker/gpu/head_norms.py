"""Launchers of the norms of heads, in both phases, before RoPE; the head widths of all kernels.

Kernels: `head_norms.cu`, `value_norms.cu`. Twin: `CpuOps.attention` in `worker/cpu/ops.py`. Models
without such norms have no launch. Next: `attention.py`.
"""

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.ops import Attention

HEAD_DIMS = (64, 96, 128, 256, 512)
_HEAD_WARPS = 4  # of a block, a head each
DEFINES = {"HEAD_WARPS": _HEAD_WARPS}
INSTANTIATIONS: tuple[KernelName, ...] = tuple(
    (f"{kernel}.cu", f"{kernel}<{dim}>") for kernel in ("head_norms", "value_norms") for dim in HEAD_DIMS
)


def check_head_dim(dim: int) -> int:
    """Return D. Raises ModelLoadFailed if no kernel is made for it."""
    if dim not in HEAD_DIMS:
        raise ModelLoadFailed(f"heads of {dim} elements", "the GPU's attention", ", ".join(map(str, HEAD_DIMS)))
    return dim


def normalize_heads(kernels: Launcher, q: DeviceArray, k: DeviceArray, spec: Attention) -> None:
    """Apply the norms of `spec`, if any, to the heads of q [T, H·D] and k [T, Hk·D], in place."""
    norms = spec.q_norm, spec.k_norm
    if norms == (None, None):
        return
    weights = (None if norm is None else norm.weight.data for norm in norms)
    epsilons = (np.float32(0 if norm is None else norm.eps) for norm in norms)
    kernels.get("head_norms.cu", f"head_norms<{check_head_dim(spec.head_dim)}>")(
        (len(q), -(-(spec.n_heads + spec.n_kv_heads) // _HEAD_WARPS)),
        (32 * _HEAD_WARPS,),
        (q, k, *weights, *epsilons, np.int32(spec.n_heads), np.int32(spec.n_kv_heads)),
        pdl=True,
    )


def normalized_values(kernels: Launcher, pool: Allocator, v: DeviceArray, spec: Attention) -> DeviceArray:
    """v [T, Hk·D] f32, or a normalized copy if `spec` has a norm of values.

    It comes before `normalize_heads`, since v may be k.
    """
    if spec.v_epsilon is None:
        return v
    y = pool.empty(v.shape, np.float32)
    kernels.get("value_norms.cu", f"value_norms<{check_head_dim(spec.head_dim)}>")(
        (len(v), -(-spec.n_kv_heads // _HEAD_WARPS)),
        (32 * _HEAD_WARPS,),
        (y, v, np.float32(spec.v_epsilon), np.int32(spec.n_kv_heads)),
        pdl=True,
    )
    return y
