"""The GPU backend: launchers of every op over this project's CUDA kernels, and a runner over them.

- `backend.py`: the device as the worker sees it; `upload.py` brings the weights.
- `runner.py`: the model runner: prepares memory and kernels, captures the CUDA graphs of a prefill
  batch and of a decode step, runs steps, and launches one step ahead.
- `memory.py`: every allocation of VRAM, accounted by purpose; `state.py`: KV cache and step inputs;
  `prefill_state.py`: inputs of a prefill batch.
- `compiler.py`, `kernel.py`, `launch.py`: from a kernel file to a launch; kernels: `kernels/`.
- `decode_ops.py`, `prefill_ops.py`: ops as compositions of launchers (`decode_attention.py`,
  `prefill_attention.py`, `matvec.py`, `matmul.py`, …); `sampler.py`: from logits to tokens.
- `numerics.py`: the facts that decide the bits of the results.

No other package imports CuPy. This module imports none either; the others are imported only if the
GPU was chosen.
"""

import contextlib
import ctypes
import threading

_DRIVER = "libcuda.so.1"


def create_context_in_background() -> None:
    """Start to create the first device's primary context on a thread, before CuPy is imported.

    It takes a quarter of a second without the GIL, beside the imports. Errors are not reported: the
    backend meets them again. The process does not exit before the thread ends.
    """
    threading.Thread(target=_create_context, name="cuda-context").start()


def _create_context() -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    with contextlib.suppress(OSError):  # no driver
        cuda = ctypes.CDLL(_DRIVER)
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
