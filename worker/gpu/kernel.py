"""One kernel, ready to launch: in the ordinary way, or early, while the launch before it still runs.

An early launch is CUDA's programmatic dependent launch: its blocks start as the predecessor's end, and their first
weights are on their way when the predecessor's results arrive (`kernels/pdl.cuh`). CuPy has no such attribute, so
that call goes through `cuda.bindings`. Knows no kernel by name.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

_EARLY_LAUNCHES = 90
_ORDINARY_SHARED = 32 << 10  # bytes that a block may have without asking: 48 KiB with what the kernel declares itself

_SLOT = 16  # bytes, at multiples of which arguments begin: the most that a parameter asks for

Shape = tuple[int, ...]


def can_launch_early(arch: str) -> bool:
    """Whether the device knows early launches; where it does and `cuda-bindings` is missing, a warning says so."""
    if int(arch.removeprefix("sm_")) < _EARLY_LAUNCHES:
        return False
    try:
        import cuda.bindings.driver  # noqa: F401, PLC0415
    except ImportError:
        warnings.warn("cuda-bindings is not installed, so decode is a quarter slower: see .[gpu]", stacklevel=2)
        return False
    return True


class Kernel:
    """`raw` is a `cupy.RawKernel`; `early` says whether the device knows early launches (sm_90)."""

    def __init__(self, raw: Any, *, early: bool) -> None:
        self._raw = raw
        self._early = early
        self._most_shared = _ORDINARY_SHARED

    def __call__(
        self, grid: Shape, block: Shape, args: Sequence[Any], *, shared_mem: int = 0, early: bool = False
    ) -> None:
        """Launch on the current stream; a launch that fails raises the driver's error.

        `args` are device arrays, None for a null pointer, NumPy scalars of the parameter's width, and 0-d arrays for
        structures. `early` is for kernels that call `grid_dependency_wait`.
        """
        if shared_mem > self._most_shared:
            self._raw.max_dynamic_shared_size_bytes = self._most_shared = shared_mem
        if early and self._early:
            launch_early(self._raw.kernel.ptr, grid, block, args, shared_mem)
        else:
            self._raw(grid, block, tuple(args), shared_mem=shared_mem)


def launch_early(function: int, grid: Shape, block: Shape, args: Sequence[Any], shared_mem: int) -> None:
    """cuLaunchKernelEx with programmatic stream serialization, on CuPy's current stream; it copies the arguments.

    The configuration is each launch's own: threads may launch one kernel side by side, and the call lets them in.
    """
    import cupy  # noqa: PLC0415
    from cuda.bindings import driver  # noqa: PLC0415

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = (*grid, 1, 1)[:3]
    config.blockDimX, config.blockDimY, config.blockDimZ = (*block, 1, 1)[:3]
    config.sharedMemBytes = shared_mem
    config.hStream = cupy.cuda.get_current_stream().ptr
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config.attrs, config.numAttrs = [attribute], 1
    values = [_value(arg) for arg in args]
    packed = np.frombuffer(b"".join(values), np.uint8)
    pointers = array("Q", accumulate(map(len, values[:-1]), initial=packed.__array_interface__["data"][0]))
    (status,) = driver.cuLaunchKernelEx(config, function, pointers.buffer_info()[0], 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise cupy.cuda.driver.CUDADriverError(int(status))


def _value(arg: Any) -> bytes:
    """An argument's bytes as the kernel's parameter has them, whole slots of them.

    Asking each structure where its bytes lie would take a third of a launch: NumPy describes the type with the address.
    """
    if arg is None:
        return bytes(_SLOT)
    if isinstance(arg, (np.ndarray, np.generic)):
        return arg.tobytes().ljust(-(-arg.nbytes // _SLOT) * _SLOT)
    return int(arg.data.ptr).to_bytes(_SLOT, "little")
