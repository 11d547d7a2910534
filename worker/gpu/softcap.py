"""Launcher of the softcap of logits, in both phases.

Kernel: `softcap.cu`. Twin: `softcap` in `worker/cpu/ops.py`.
"""

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Launcher
from worker.gpu.memory import DeviceArray

_THREADS, _MAX_BLOCKS = 256, 1024
INSTANTIATIONS: tuple[KernelName, ...] = (("softcap.cu", "softcap"),)


def softcap(kernels: Launcher, logits: DeviceArray, cap: float) -> DeviceArray:
    """cap · tanh(logits / cap): `logits` [R, V] f32, overwritten."""
    blocks = min(_MAX_BLOCKS, -(-logits.size // _THREADS))
    args = (logits, np.float32(cap), np.int32(logits.size))
    kernels.get("softcap.cu", "softcap")((blocks,), (_THREADS,), args, pdl=True)
    return logits
