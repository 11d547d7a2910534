"""What launchers need of the world: kernels by name, and arrays for their results. The dry run gives them stand-ins.

`dry_run` plays a forward with kernels that only note their names and NumPy arrays that nobody touches: so a model's
kernels and the bytes of its activations are known before either exists.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Needs:
    """What a forward needs: its kernels, in the order of their first use, and the pool's bytes at their highest."""

    kernels: tuple[KernelName, ...]
    pool_bytes: int


def dry_run(forward: Callable[[Launcher, Allocator], object]) -> Needs:
    """Play `forward` on nothing."""
    kernels, pool = _Names(), _NoMemory()
    forward(kernels, pool)
    return Needs(tuple(kernels.names), pool.peak)


class _Names:
    """Kernels that do nothing but be remembered."""

    def __init__(self) -> None:
        self.names: dict[KernelName, None] = {}

    def get(self, file: str, expression: str) -> Callable[..., None]:
        self.names[file, expression] = None
        return lambda *args, **options: None


class _NoMemory:
    """Cuts a slab that does not exist as a `Pool` cuts a real one; an array's pages are never touched."""

    def __init__(self) -> None:
        self._holes = FreeList(_ENDLESS)
        self.peak = 0

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        array = np.empty(shape, dtype)
        size = aligned(max(1, array.nbytes))
        offset = self._holes.take(size)
        assert offset is not None, "the slab is endless"
        self.peak = max(self.peak, offset + size)
        weakref.finalize(array, self._holes.give, offset, size)
        return array
