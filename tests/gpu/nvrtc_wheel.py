"""`cupy.cuda.nvrtc` over the wheel's NVRTC library, to compile and check kernels without a GPU."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path


def library():
    """The path of the newest libnvrtc of an installed `nvidia-cuda-nvrtc`, or None."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else [Path(root) for root in spec.submodule_search_locations]
    found = sorted(path for root in roots for path in root.glob("**/libnvrtc.so.*"))
    return found[-1] if found else None


class NvrtcWheel:
    """The functions that `worker.gpu.compiler` uses. Calls release the GIL."""

    class NVRTCError(Exception):
        pass

    def __init__(self, path):
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC would search for it elsewhere
            ctypes.CDLL(str(builtins))
        self._lib = ctypes.CDLL(str(path))

    def _call(self, name, *args):
        status = getattr(self._lib, name)(*args)
        if status:
            raise self.NVRTCError(f"{name} returned {status}")

    def getVersion(self):  # noqa: N802
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def createProgram(self, src, name, headers, include_names):  # noqa: N802
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), src.encode(), name.encode(), 0, None, None)
        return program.value

    def addNameExpression(self, prog, name):  # noqa: N802
        self._call("nvrtcAddNameExpression", ctypes.c_void_p(prog), name.encode())

    def compileProgram(self, prog, options):  # noqa: N802
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        self._call("nvrtcCompileProgram", ctypes.c_void_p(prog), len(options), array)

    def getProgramLog(self, prog):  # noqa: N802
        return self._bytes("nvrtcGetProgramLog", prog).rstrip(b"\0").decode()

    def getCUBIN(self, prog):  # noqa: N802
        return self._bytes("nvrtcGetCUBIN", prog)

    def _bytes(self, name, prog):
        size = ctypes.c_size_t()
        self._call(f"{name}Size", ctypes.c_void_p(prog), ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(name, ctypes.c_void_p(prog), buffer)
        return buffer.raw

    def getLoweredName(self, prog, name):  # noqa: N802
        lowered = ctypes.c_char_p()
        self._call("nvrtcGetLoweredName", ctypes.c_void_p(prog), name.encode(), ctypes.byref(lowered))
        return lowered.value.decode()

    def destroyProgram(self, prog):  # noqa: N802
        self._call("nvrtcDestroyProgram", ctypes.byref(ctypes.c_void_p(prog)))
