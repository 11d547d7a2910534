"""Compile CUDA C++ to a shared library with g++, behind the interface of `cupy.cuda.nvrtc`.

The kernels' text is used unchanged, except for PTX, which becomes calls of `ptx.h`, and dynamic
shared memory. `fibers.cpp` is a library of its own, since all kernels share its state. Next:
`cuda.h`.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
OPTIONS = (
    *("-std=c++17", "-O2", "-mavx2", "-mf16c", "-mfma", "-ffp-contract=off", "-w", "-fPIC", "-shared"),
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    *("-U_FORTIFY_SOURCE", "-fno-stack-protector"),  # which would report a switch of fibers as an attack
)
PTX = {
    "cvt.f32.f16": "cvt_f32_f16",
    "cvt.rn.f16.f32": "cvt_f16_f32",
    "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16": "cvt_f32x2_f16x2",
    "cvt.rn.f16x2.f32": "cvt_f16x2_f32",
    "sub.rn.f16x2": "sub_f16x2",
    "mul.rn.f16x2": "mul_f16x2",
    "fma.rn.f16x2": "fma_f16x2",
    "prmt.b32": "prmt",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "mma_m16n8k16",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": "mma_m16n8k32_s8",
    "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32": "mma_m16n8k16_s8",
    "ldmatrix.sync.aligned.m8n8.x4.shared": "ldmatrix<false>",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared": "ldmatrix<true>",
    "cp.async.cg.shared.global": "cp_async_16",
    "cp.async.bulk.tensor.2d": "copy_box",
    "cp.async.bulk": "nothing",
    "mbarrier.init": "mbarrier_init",
    "mbarrier.arrive.expect_tx": "mbarrier_expect",
    "mbarrier.arrive": "mbarrier_arrive",
    "{ .reg .pred p; mbarrier.try_wait": "mbarrier_try_wait",
    "bar.sync": "bar_sync",
    "rcp.approx": "rcp",
    "st.shared.u32": "st_shared_u32",
    "fence.proxy.async": "nothing",
    "cp.async.commit_group": "nothing",
    "cp.async.wait_group": "nothing",
    "prefetch.global.L2": "nothing",
    "griddepcontrol": "nothing",
    "atom.acq_rel.gpu.global.inc.u32": "atom_inc",
    "ld.acquire.gpu.global.u32": "ld_acquire",
    "red.release.gpu.global.add.u32": "red_release",
}
"""Prefixes of PTX statements, and the functions of `ptx.h` that implement them."""

POLLING = "while (load_acquire("
"""Part of the text of kernels whose blocks wait for each other."""
_WGMMA = re.compile(r'#line 1 "wgmma\.cuh"\n.*?(?=^#line )', re.S | re.M)  # replaced by wgmma.h
_ASM = re.compile(r'asm(?:\s+volatile)?\s*\(\s*"(?P<text>[^"]*)"(?P<rest>.*?)\);', re.S)
_CONSTRAINT = re.compile(r'"[=+]?\w"\s*\(')
_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(?P<type>[\w ]+?) (?P<name>\w+)\[\];")


def why_no_compiler() -> str | None:
    """The reason why kernels cannot be compiled here, or None."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "kernels are emulated on x86-64 Linux only"
    return None if shutil.which("g++") else "g++ is not installed"


def on_host(text: str) -> str:
    """CUDA C++ converted for g++. Raises: ValueError for PTX that `ptx.h` does not implement."""
    shared = r"\g<type>* const \g<name> = (\g<type>*)emu::dynamic_shared;"
    text = _WGMMA.sub('#include "wgmma.h"\n', text)
    return _SHARED.sub(shared, _ASM.sub(_call, text)).replace('extern "C"', "")


def _call(asm: re.Match[str]) -> str:
    """An asm statement as a call with its operands in order."""
    function = next((name for start, name in PTX.items() if asm["text"].startswith(start)), None)
    if function is None:
        raise ValueError(f"the emulator does not implement the PTX statement {asm['text']!r}")
    operands = []
    for constraint in _CONSTRAINT.finditer(asm["rest"]):
        depth, end = 1, constraint.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(asm["rest"][end], 0)
            end += 1
        operands.append(asm["rest"][constraint.end() : end - 1])
    return f"ptx_{function}({', '.join(operands)});"


class GxxError(Exception):
    """g++ reported errors in a kernel."""


class GxxNvrtc:
    """`cupy.cuda.nvrtc`: a program is one kernel, its machine code a shared library."""

    NVRTCError = GxxError

    def __init__(self) -> None:
        sources = [path.read_bytes() for path in sorted(HERE.glob("*.h"))]
        compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
        table = repr((OPTIONS, PTX)).encode()
        self._version = hashlib.sha256(b"".join([*sources, compiler, table])).hexdigest()

    def getVersion(self) -> tuple[str, str]:  # noqa: N802
        """A version that covers everything that a kernel's library depends on except its text."""
        return "g++", self._version

    def createProgram(self, src, name, headers, include_names):  # noqa: N802
        return SimpleNamespace(text=src, expression=None, log="", image=b"")

    def addNameExpression(self, prog, name):  # noqa: N802
        prog.expression = name

    def compileProgram(self, prog, options):  # noqa: N802
        source = "\n".join(
            [
                *('#include "cuda.h"', '#include "ptx.h"', "namespace {", on_host(prog.text), "}"),
                f"EMULATED_KERNEL({str(POLLING in prog.text).lower()}, {prog.expression})\n",
            ]
        )
        defines = [option for option in options if option.startswith("-D")]
        arch = "900" if options[-1].endswith("a") else "800"  # sm_…a: the kernels with wgmma
        prog.image, prog.log = compiled(source, [*defines, f"-D__CUDA_ARCH__={arch}"])
        if not prog.image:
            raise GxxError(prog.expression)

    def getProgramLog(self, prog):  # noqa: N802
        return prog.log

    def getCUBIN(self, prog):  # noqa: N802
        return prog.image

    def getLoweredName(self, prog, name):  # noqa: N802
        return name

    def destroyProgram(self, prog):  # noqa: N802
        pass


def compiled(source: str, defines: Sequence[str] = ()) -> tuple[bytes, str]:
    """A shared library (empty if g++ reports errors), and g++'s messages."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernel.so"
        command = ["g++", *OPTIONS, *defines, f"-I{HERE}", "-x", "c++", "-", "-o", str(library)]
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        return library.read_bytes() if done.returncode == 0 else b"", done.stderr


def fibers(cache: Path) -> ctypes.CDLL:
    """The fiber scheduler, compiled into `cache` once, with its symbols visible to the kernels."""
    source = (HERE / "fibers.cpp").read_text()
    version = GxxNvrtc().getVersion()[1]
    library = cache / f"fibers-{hashlib.sha256((source + version).encode()).hexdigest()}.so"
    if not library.exists():
        image, log = compiled(source)
        assert image, log
        part = library.with_suffix(f".{id(image)}.part")
        part.write_bytes(image)
        part.replace(library)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
