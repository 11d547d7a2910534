"""The interfaces that launchers use, kernels and result arrays, and the dry run of a forward.

`dry_run` runs a forward with kernels that only record their names and arrays without memory. It
determines the kernels and the activation bytes of a model before either exists.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.memory import DeviceArray, FreeList, aligned

_UNLIMITED = 1 << 50
_PRODUCTS = ("matmul.cu", "matmul_wgmma.cu", "matmul_wgmma_rope.cu", "matmul_wgmma_short.cu")


class Launcher(Protocol):
    """Kernels by name: `worker.gpu.compiler.Kernels`, or the recorder of a dry run."""

    @property
    def wgmma(self) -> bool:
        """Whether prefill uses `wgmma`, which sm_90 has."""
        ...

    @property
    def processors(self) -> int:
        """The device's multiprocessors."""
        ...

    def get(self, file: str, expression: str) -> Any:
        """A kernel, called as `Kernel` is: (grid, block, args)."""
        ...


class Allocator(Protocol):
    """Arrays for results: `worker.gpu.memory.Pool`, or that of a dry run."""

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> DeviceArray:
        """An uninitialized array, whose memory is reused when its last view dies."""
        ...


class PdlInMatmulOnly:
    """Kernels of which only matrix products launch with PDL: in long chunks the fastest choice."""

    def __init__(self, kernels: Launcher) -> None:
        self._kernels = kernels
        self.wgmma, self.processors = kernels.wgmma, kernels.processors

    def get(self, file: str, expression: str) -> Any:
        kernel = self._kernels.get(file, expression)
        return kernel if file in _PRODUCTS else partial(_without_pdl, kernel)


def _without_pdl(kernel: Any, grid: Any, block: Any, args: Any, *, shared_mem: int = 0, pdl: bool = False) -> None:
    kernel(grid, block, args, shared_mem=shared_mem)


@dataclass(frozen=True, slots=True)
class Requirements:
    """The kernels of a forward, in the order of first use, and the peak bytes of its pool."""

    kernels: tuple[KernelName, ...]
    pool_bytes: int


def dry_run(
    forward: Callable[[Launcher, Allocator], object],
    on_kernel: Callable[[KernelName], None] = lambda _: None,
    *,
    wgmma: bool = False,
) -> Requirements:
    """Run `forward` without a device, but as on one that has `wgmma` or not.

    `on_kernel` is called with each kernel's name at its first use.
    """
    kernels, pool = _Recorder(on_kernel, wgmma=wgmma), _DryPool()
    forward(kernels, pool)
    return Requirements(tuple(kernels.names), pool.peak)


class _Recorder:
    """Kernels that do nothing; their names are recorded."""

    def __init__(self, on_kernel: Callable[[KernelName], None], *, wgmma: bool) -> None:
        self.names: dict[KernelName, None] = {}
        self.wgmma, self.processors = wgmma, 1
        self._on_kernel = on_kernel

    def get(self, file: str, expression: str) -> Callable[..., None]:
        name = (file, expression)
        if name not in self.names:
            self.names[name] = None
            self._on_kernel(name)
        return _no_launch


def _no_launch(*args: Any, **options: Any) -> None:
    """A launch in a dry run."""


class _DryPool:
    """Allocates offsets as `Pool` does, without memory.

    All elements of an array are one element, which its views keep alive. Untouched memory would
    also do, but each mapping of pages waits for the threads that read the model's file.
    """

    def __init__(self) -> None:
        self._free_list = FreeList(_UNLIMITED)
        self.peak = 0

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        element = np.empty(1, dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        size = aligned(max(1, math.prod(shape) * element.itemsize))
        offset = self._free_list.allocate(size)
        assert offset is not None, "the slab is unlimited"
        self.peak = max(self.peak, offset + size)
        weakref.finalize(element, self._free_list.release, offset, size)
        return np.ndarray(shape, dtype, element, strides=(0,) * len(shape))
