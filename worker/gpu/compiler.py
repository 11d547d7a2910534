"""Compile kernels with NVRTC, cache the machine code on disk, and load it.

A kernel is `(file, expression)`, such as ("matvec.cu", "matvec<Q4_K, 4>"). The headers of
`kernels/` are inlined with `#line`, so the cache key covers them and compile errors name their
lines. Each kernel is a program of its own: kernels compile in parallel, and only those that a model
uses. Constants that Python and CUDA share are passed as `-D` options: see `launcher_modules`. Next:
`kernel.py`, `launch.py`.
"""

import hashlib
import importlib
import json
import os
import pkgutil
import re
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from worker.errors import Internal
from worker.gpu.kernel import Kernel, supports_pdl

KernelName = tuple[str, str]
"""A file of `kernels/` and a name expression in it."""

WGMMA_ARCH = "sm_90"
WGMMA_FILES = ("matmul_wgmma.cu", "matmul_wgmma_rope.cu", "matmul_wgmma_short.cu", "attention_wgmma.cu")
"""Files for devices of WGMMA_ARCH alone: `wgmma` is compiled for sm_90a."""

OPTIONS = ("-std=c++17", "-ftz=true", "-lineinfo")
_INCLUDE = re.compile(r'^#include "(?P<file>[\w.]+)"\s*$')


class Nvrtc(Protocol):
    """The functions of `cupy.cuda.nvrtc` that a compilation uses."""

    NVRTCError: type[Exception]

    def getVersion(self) -> tuple[int, int]: ...  # noqa: N802, D102
    def createProgram(self, src: str, name: str, headers: tuple[()], include_names: tuple[()]) -> int: ...  # noqa: N802, D102
    def addNameExpression(self, prog: int, name: str) -> None: ...  # noqa: N802, D102
    def compileProgram(self, prog: int, options: tuple[str, ...]) -> None: ...  # noqa: N802, D102
    def getProgramLog(self, prog: int) -> str: ...  # noqa: N802, D102
    def getCUBIN(self, prog: int) -> bytes: ...  # noqa: N802, D102
    def getLoweredName(self, prog: int, name: str) -> str: ...  # noqa: N802, D102
    def destroyProgram(self, prog: int) -> None: ...  # noqa: N802, D102


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code, the mangled name of its kernel, and the compiler's log."""

    image: bytes
    symbol: str
    log: str


def inlined(file: str) -> str:
    """The text of a kernel file with its headers inlined once each, with `#line` directives."""
    return "\n".join(_lines(file, set())) + "\n"


def _lines(file: str, seen: set[str]) -> Iterable[str]:
    text = (resources.files("worker.gpu") / "kernels" / file).read_text("utf-8")
    yield f'#line 1 "{file}"'
    for number, line in enumerate(text.splitlines(), 1):
        include = _INCLUDE.match(line) if line.startswith("#") else None
        if include is None:
            yield "" if line.startswith("#pragma once") else line
            continue
        if include["file"] not in seen:
            seen.add(include["file"])
            yield from _lines(include["file"], seen)
        yield f'#line {number + 1} "{file}"'


@cache
def launcher_modules() -> tuple[ModuleType, ...]:
    """This package's launcher modules: those with `INSTANTIATIONS`, the kernels they launch.

    A launcher module may also have `DEFINES: Mapping[str, int]`: constants for every .cu file of
    its INSTANTIATIONS. Launchers import this module, so they are imported here on the first call.
    """
    package = __name__.rpartition(".")[0]
    paths = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(paths)]
    return tuple(module for module in modules if hasattr(module, "INSTANTIATIONS"))


@cache
def defines_of(file: str) -> tuple[str, ...]:
    """The `-DNAME=VALUE` options of a .cu file, in order of name."""
    defines: dict[str, int] = {}
    for module in launcher_modules():
        if any(file == kernel_file for kernel_file, _ in module.INSTANTIATIONS):
            defines |= getattr(module, "DEFINES", {})
    return tuple(f"-D{name}={value}" for name, value in sorted(defines.items()))


def target(file: str, arch: str) -> str:
    """The architecture that a file's kernels are compiled for, on a device of `arch`."""
    return f"{arch}a" if file in WGMMA_FILES else arch


def compile_kernel(nvrtc: Nvrtc, name: KernelName, arch: str, options: tuple[str, ...] = OPTIONS) -> Compiled:
    """Compile one kernel for `arch` (such as sm_90), with the DEFINES of its file.

    Raises: Internal with NVRTC's log, which names file and line.
    """
    file, expression = name
    program = nvrtc.createProgram(inlined(file), file, (), ())
    try:
        nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(program, (*options, *defines_of(file), f"-arch={target(file, arch)}"))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise Internal(f"kernel {expression} of {file} does not compile for {arch}:\n{log}") from error
        symbol = nvrtc.getLoweredName(program, expression)
        return Compiled(nvrtc.getCUBIN(program), symbol, nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


class Kernels:
    """The kernels of one device, compiled once per machine and loaded once per process.

    `kernels.get(file, expression)(grid, block, args)` launches one: see `Kernel`.
    """

    def __init__(self, cache: Path, *, threads: int | None = None) -> None:
        import cupy  # noqa: PLC0415
        from cupy.cuda import nvrtc  # noqa: PLC0415

        self._cupy = cupy
        self._nvrtc: Nvrtc = nvrtc
        self._threads = threads or os.cpu_count() or 1
        self._cache = cache
        self._cache.mkdir(parents=True, exist_ok=True)
        device = cupy.cuda.Device()
        self.arch = f"sm_{device.compute_capability}"
        self.processors: int = device.attributes["MultiProcessorCount"]
        self._pdl = supports_pdl(self.arch)
        self.wgmma = self.arch == WGMMA_ARCH and self._pdl
        self._loaded: dict[KernelName, Any] = {}
        self._pending: dict[KernelName, Future[Any]] = {}
        self._digests: dict[str, str] = {}
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, name: KernelName) -> None:
        """Start to compile and load a kernel on a thread; `prepare` and `get` wait for it."""
        if name in self._loaded or name in self._pending:
            return
        file = name[0]
        if file not in self._digests:
            self._digests[file] = hashlib.sha256(inlined(file).encode()).hexdigest()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "kernels", self._cupy.cuda.Device().use)
        self._pending[name] = self._pool.submit(self._compile_and_load, name, self._digests[file])

    def prepare(self, names: Iterable[KernelName]) -> None:
        """Compile in parallel and load `names` and all kernels that have begun."""
        try:
            for name in names:
                self.begin(name)
            for name, kernel in self._pending.items():
                self._loaded[name] = kernel.result()
        finally:
            self._pending.clear()
            self._digests.clear()  # a later edit of a file applies to its next kernel
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
                self._pool = None

    def get(self, file: str, expression: str) -> Any:
        """The kernel, ready to launch; compiled now if it was not prepared."""
        name = (file, expression)
        if name not in self._loaded:
            self.prepare([name])
        return self._loaded[name]

    def _compile_and_load(self, name: KernelName, digest: str) -> Any:
        return self._load(*self._entry(name, digest))

    def _entry(self, name: KernelName, digest: str) -> tuple[Path, str]:
        """The cubin on disk and its kernel's symbol, compiled unless the cache has them."""
        version = "{}.{}".format(*self._nvrtc.getVersion())
        key = json.dumps([digest, name[1], OPTIONS, defines_of(name[0]), self.arch, version])
        image = self._cache / f"{hashlib.sha256(key.encode()).hexdigest()}.cubin"
        symbol = image.with_suffix(".symbol")
        if not (image.exists() and symbol.exists()):
            compiled = compile_kernel(self._nvrtc, name, self.arch)
            _write_atomically(image, compiled.image)
            _write_atomically(symbol, compiled.symbol.encode())
        return image, symbol.read_text()

    def _load(self, image: Path, symbol: str) -> Any:
        return Kernel(self._cupy.RawModule(path=str(image)).get_function(symbol), pdl=self._pdl)


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that other processes see all of it or none."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
