"""What launchers need of the world: kernels by name, and arrays for their results. The dry run gives them stand-ins.

`dry_run` plays a forward with kernels that only note their names and NumPy arrays without memory: so a model's kernels
and the bytes of its activations are known before either exists.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.free_list import FreeList
from worker.gpu.memory import DeviceArray, aligned

_ENDLESS = 1 << 50


class Launcher(Protocol):
    """`worker.gpu.compiler.Kernels` to those who launch."""

    def get(self, file: str, expression: str) -> Any:
        """A kernel: call it with (grid, block, args)."""
        ...


class Allocator(Protocol):
    """`worker.gpu.memory.Pool` to those who need an array."""

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> DeviceArray:
        """An array of whatever the memory holds, taken back when its last view dies."""
        ...


class EarlyProducts:
    """Kernels of which matmul.cu's alone launch early: in a long piece of a prompt that is faster than all or none."""

    def __init__(self, kernels: Launcher) -> None:
        self._kernels = kernels

    def get(self, file: str, expression: str) -> Any:
        """See `Launcher`."""
        kernel = self._kernels.get(file, expression)
        return kernel if file == "matmul.cu" else partial(_in_order, kernel)


def _in_order(kernel: Any, grid: Any, block: Any, args: Any, *, shared_mem: int = 0, early: bool = False) -> None:
    kernel(grid, block, args, shared_mem=shared_mem)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a forward needs: its kernels, in the order of their first use, and the pool's bytes at their highest."""

    kernels: tuple[KernelName, ...]
    pool_bytes: int


def dry_run(
    forward: Callable[[Launcher, Allocator], object], on_kernel: Callable[[KernelName], None] = lambda _: None
) -> Needs:
    """Play `forward` on nothing. `on_kernel` hears each kernel's name when it is first asked for."""
    kernels, pool = _Names(on_kernel), _NoMemory()
    forward(kernels, pool)
    return Needs(tuple(kernels.names), pool.peak)


class _Names:
    """Kernels that do nothing but be remembered."""

    def __init__(self, on_kernel: Callable[[KernelName], None]) -> None:
        self.names: dict[KernelName, None] = {}
        self._on_kernel = on_kernel

    def get(self, file: str, expression: str) -> Callable[..., None]:
        name = (file, expression)
        if name not in self.names:
            self.names[name] = None
            self._on_kernel(name)
        return _nothing


def _nothing(*args: Any, **options: Any) -> None:
    """A launch."""


class _NoMemory:
    """Cuts a slab that does not exist as a `Pool` cuts a real one.

    All elements of an array are the same one, and views of it refer to that, however they were made. Memory that nobody
    touches would do too, but not for free: mapping some at each op waits for the threads that read the model's file.
    """

    def __init__(self) -> None:
        self._holes = FreeList(_ENDLESS)
        self.peak = 0

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        element = np.empty(1, dtype)
        shape = (shape,) if isinstance(shape, int) else shape
        size = aligned(max(1, math.prod(shape) * element.itemsize))
        offset = self._holes.take(size)
        assert offset is not None, "the slab is endless"
        self.peak = max(self.peak, offset + size)
        weakref.finalize(element, self._holes.give, offset, size)
        return np.ndarray(shape, dtype, element, strides=(0,) * len(shape))
