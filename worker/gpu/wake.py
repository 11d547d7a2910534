"""Wakes the GPU while Python is still importing: making a context takes a quarter of a second of no Python at all.

The driver's own library, through ctypes: CuPy's import is what this shall go on beside. Whatever goes wrong here is
said later, by `backend.py`, in the worker's words.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading

_DRIVER = "libcuda.so.1"


def wake_device() -> None:
    """Begin to make the first device's primary context, the one that CuPy takes, on a thread; return at once.

    The process does not end before that is done: a driver must not be left in the middle of it.
    """
    threading.Thread(target=_make_context, name="wake").start()


def _make_context() -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    with contextlib.suppress(OSError):  # no driver here
        cuda = ctypes.CDLL(_DRIVER)
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
