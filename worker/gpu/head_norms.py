"""The norms of heads before RoPE, as a part of attention's kernels or a launch; all head widths.

In prefill `rope_kv.cu` applies them, in decode of one row the kernel of attention: these have
`HeadNorms` (`kernels/head_norm.cuh`) as their last template argument and parameter. In decode of
several rows each split of a row would repeat them: they are a launch, `head_norms.cu`, with the
same bits. Twin: `CpuOps.attention` in `worker/cpu/ops.py`. Next: `attention.py`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import address
from worker.gpu.memory import DeviceArray
from worker.ops import Attention

HEAD_DIMS = (64, 96, 128, 256, 512)
_HEAD_WARPS = 4  # of a block, a head each
DEFINES = {"HEAD_WARPS": _HEAD_WARPS}
_GROUPS = {128: (2, 4, 5, 8), 256: (2, 4), 512: (4,)}
"""Sizes of heads that have norms, and of their groups; kernels of others are compiled on demand."""
INSTANTIATIONS: tuple[KernelName, ...] = (
    *(("head_norms.cu", f"head_norms<{dim}>") for dim in HEAD_DIMS),
    *(("rope_kv.cu", f"rope_kv<{dim}, false, F16Kv, HeadNorms>") for dim in _GROUPS),
    *(
        ("attention_512.cu", f"attention_512_rows<{group}, F16Kv, HeadNorms>")
        if dim == 512
        else ("attention_decode.cu", f"attention_decode<{dim}, {group}, false, F16Kv, HeadNorms>")
        for dim, groups in _GROUPS.items()
        for group in groups
    ),
)

_HEAD_NORMS = np.dtype([(kind, [("weight", "u8"), ("eps", "f4"), ("padding", "i4")]) for kind in "qkv"])
"""`HeadNorms` of head_norm.cuh."""
_NO_EPSILON = -1.0  # a kind of heads without a norm


def check_head_dim(dim: int) -> int:
    """Return D. Raises ModelLoadFailed if no kernel is made for it."""
    if dim not in HEAD_DIMS:
        raise ModelLoadFailed(f"heads of {dim} elements", "the GPU's attention", ", ".join(map(str, HEAD_DIMS)))
    return dim


def norm_arguments(spec: Attention, *, always: bool = False) -> tuple[str, Sequence[Any]]:
    """The last template argument and parameter of a kernel that applies the norms of `spec`.

    None if there are no norms, unless `always`.
    """
    return (", HeadNorms", (_head_norms(spec),)) if always or has_norms(spec) else ("", ())


def may_fuse_norms(spec: Attention) -> bool:
    """Whether attention's kernels may apply the norms: to q, k and v, and right before RoPE."""
    return spec.query_scale is None and not spec.reads_only


def normalize_heads(
    kernels: Launcher,
    pool: Allocator,
    q: DeviceArray,
    k: DeviceArray | None,
    v: DeviceArray | None,
    spec: Attention,
) -> tuple[DeviceArray | None, Attention]:
    """Apply the norms to q [T, H·D] and k [T, Hk·D] in place, and to v [T, Hk·D], which may be k.

    Returns v, a copy unless it stays as it is, and `spec` without norms.
    """
    if not has_norms(spec):
        return v, spec
    values = v
    if v is not None and (spec.v_epsilon is not None or v is k):
        values = pool.empty(v.shape, np.float32)
    kernels.get("head_norms.cu", f"head_norms<{check_head_dim(spec.head_dim)}>")(
        (len(q), -(-(spec.n_heads + spec.n_written) // _HEAD_WARPS)),
        (32 * _HEAD_WARPS,),
        (q, k, v, values, _head_norms(spec), np.int32(spec.n_heads), np.int32(spec.n_written)),
        pdl=True,
    )
    return values, replace(spec, q_norm=None, k_norm=None, v_epsilon=None)


def has_norms(spec: Attention) -> bool:
    """Whether heads have norms."""
    return (spec.q_norm, spec.k_norm, spec.v_epsilon) != (None, None, None)


def _head_norms(spec: Attention) -> np.ndarray[Any, Any]:
    """The kernel parameter `HeadNorms`: a value of _HEAD_NORMS."""
    weighted = [
        (0, _NO_EPSILON, 0) if norm is None else (address(norm.weight.data), norm.eps, 0)
        for norm in (spec.q_norm, spec.k_norm)
    ]
    return np.array((*weighted, (0, _NO_EPSILON if spec.v_epsilon is None else spec.v_epsilon, 0)), _HEAD_NORMS)
