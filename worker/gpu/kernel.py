"""Launch kernels, with or without PDL; capture CUDA graphs; translate driver errors.

PDL is CUDA's programmatic dependent launch: the blocks of a kernel start while the preceding kernel
still runs, so its first weights are loading when the predecessor's results become visible (rules:
`kernels/pdl.cuh`). CuPy has no such launch attribute, so PDL launches go through `cuda.bindings`.
Next: `compiler.py`, `launch.py`.
"""

import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np

from worker.errors import CudaError, VramOom

_PDL_CAPABILITY = 90
_DEFAULT_SHARED = 48 << 10  # bytes of shared memory, static and dynamic, that need no attribute
_SLOT = 16  # bytes: the largest alignment of a kernel parameter
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, and also CUDA_ERROR_OUT_OF_MEMORY

Shape = tuple[int, ...]


def supports_pdl(arch: str) -> bool:
    """Whether the device supports PDL; warn if it does and `cuda-bindings` is missing."""
    if int(arch.removeprefix("sm_")) < _PDL_CAPABILITY:
        return False
    try:
        import cuda.bindings.driver  # noqa: F401, PLC0415
    except ImportError:
        message = "cuda-bindings is not installed: decode is about 25 % slower; install the extra `gpu`"
        warnings.warn(message, stacklevel=2)
        return False
    return True


class Kernel:
    """A loaded kernel. `raw` is a `cupy.RawKernel`; `pdl`: the device supports PDL."""

    def __init__(self, raw: Any, *, pdl: bool) -> None:
        self._raw = raw
        self._pdl = pdl
        self._max_shared = _DEFAULT_SHARED - raw.shared_size_bytes

    def __call__(
        self, grid: Shape, block: Shape, args: Sequence[Any], *, shared_mem: int = 0, pdl: bool = False
    ) -> None:
        """Launch on the current stream.

        `args` are device arrays, None for a null pointer, NumPy scalars of the parameter's width,
        and 0-d arrays for structs. `pdl` requires a kernel that calls `grid_dependency_wait`.

        Raises: the driver's error if the launch fails.
        """
        if shared_mem > self._max_shared:
            self._raw.max_dynamic_shared_size_bytes = self._max_shared = shared_mem
        if pdl and self._pdl:
            launch_with_pdl(self._raw.kernel.ptr, grid, block, args, shared_mem)
        else:
            self._raw(grid, block, tuple(args), shared_mem=shared_mem)


def launch_with_pdl(function: int, grid: Shape, block: Shape, args: Sequence[Any], shared_mem: int) -> None:
    """cuLaunchKernelEx with programmatic stream serialization, on CuPy's current stream.

    The driver copies the arguments. Each launch has its own configuration: the call releases the
    GIL, and several threads may launch one kernel at the same time.
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
    values = [_parameter_bytes(arg) for arg in args]
    packed = np.frombuffer(b"".join(values), np.uint8)
    pointers = array("Q", accumulate(map(len, values[:-1]), initial=packed.__array_interface__["data"][0]))
    (status,) = driver.cuLaunchKernelEx(config, function, pointers.buffer_info()[0], 0)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise cupy.cuda.driver.CUDADriverError(int(status))


def _parameter_bytes(arg: Any) -> bytes:
    """The bytes of one kernel parameter, padded to whole slots.

    `tobytes` avoids `__array_interface__` of each struct, which describes its dtype and would take
    a third of the launch time.
    """
    if arg is None:
        return bytes(_SLOT)
    if isinstance(arg, (np.ndarray, np.generic)):
        return arg.tobytes().ljust(-(-arg.nbytes // _SLOT) * _SLOT)
    return int(arg.data.ptr).to_bytes(_SLOT, "little")


def capture_graph(enqueue: Callable[[], None], stream: Any) -> Any:
    """Capture all that `enqueue` launches on `stream`, without running it.

    Launch the graph with `graph.launch(stream)`.

    Before the capture, the kernels must be loaded and the scratch memory reserved (see `dry_run`).
    All memory that the graph uses must outlive it at the same address.
    """
    stream.begin_capture()
    try:
        enqueue()
    except BaseException:
        stream.end_capture()  # otherwise the stream stays in capture mode
        raise
    graph = stream.end_capture()
    graph.upload(stream)
    return graph


@contextmanager
def device_errors() -> Iterator[None]:
    """Translate the driver's errors: VramOom for a failed allocation, CudaError for all others.

    An error of an earlier kernel surfaces at a later launch or synchronization, and every call
    after it fails too: after CudaError the process must end.
    """
    try:
        yield
    except Exception as error:
        from cupy.cuda import driver, memory, runtime  # noqa: PLC0415

        if isinstance(error, memory.OutOfMemoryError):
            raise VramOom(str(error)) from error
        if not isinstance(error, (runtime.CUDARuntimeError, driver.CUDADriverError)):
            raise
        if error.status == _OUT_OF_MEMORY:
            raise VramOom(str(error)) from error
        raise CudaError(str(error), {"status": error.status}) from error
