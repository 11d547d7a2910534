"""Every instantiation of every kernel compiles for every architecture, without a GPU."""

from __future__ import annotations

import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from tests.gpu.nvrtc_wheel import NvrtcWheel, library
from worker.errors import Internal
from worker.gpu.compiler import (
    OPTIONS,
    WGMMA_ARCH,
    WGMMA_FILES,
    Compiled,
    Kernels,
    compile_kernel,
    defines_of,
    inlined,
    launcher_modules,
    target,
)
from worker.gpu.kernel import Kernel, supports_pdl
from worker.gpu.launch import PdlInMatmulOnly

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Their code differs from that of other formats in unpacking alone, or, with GELU, from that of other
# gates in one expression.
SM_90_ONLY = re.compile(r"\b(IQ[123]\w*|TQ2_0|NVFP4)\b|\b(glu|glu_rows)<.*, true>$|\b(matmul|matvec_mma\w*)<.*, 2>$")
# Bytes per thread: stack frame, spill stores and spill loads together. Decode products are limited
# to 64 registers, so that two blocks share a multiprocessor and one loads while the other adds; the
# spill loads come from L1, a few words per row.
SPILL_ALLOWANCE = {"sm_80": 256, "sm_90": 96, "sm_100": 256}
# With 64 or 128 sums a thread, addresses that only the end of a row tile needs are spilled. Two blocks of
# glu_rows a multiprocessor were faster than one without spills, with 8 rows on an H100.
# The products of one row quantize their input beside 32 weights a lane.
SPILL_ALLOWANCE_OF = {
    "matvec_mma.cu": 704,
    "matvec_mma_wide.cu": 640,
    "experts_mma.cu": 192,
    "glu_rows.cu": 128,
    "glu.cu": 128,
    "matvec.cu": 128,
    # Three blocks a multiprocessor leave 80 registers, of which the mask takes some.
    "sample_masked.cu": 192,
    # Of addresses that only the begin and end of a segment or block need.
    "attention_wgmma.cu": 352,
    # Sums and queries of 256 elements take 192 registers.
    "attention_prefill<256, true, F16Kv>": 224,
    "attention_prefill<256, true, Q8Kv>": 224,
}
REPORT = ("--ptxas-options=-v",)
KERNEL_FILES = sorted(file.name for file in (resources.files("worker.gpu") / "kernels").iterdir())


INSTANTIATIONS = tuple(dict.fromkeys(name for module in launcher_modules() for name in module.INSTANTIATIONS))


@pytest.fixture(scope="module")
def nvrtc():
    path = library()
    if path is None:
        pytest.skip("the wheel nvidia-cuda-nvrtc is not installed here")
    return NvrtcWheel(path)


def local_bytes(log):
    """Bytes of stack frame and spills in ptxas' report."""
    return sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log))


@pytest.mark.kernels
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles_within_its_registers(nvrtc, arch):
    def compiled(name):
        return name, compile_kernel(nvrtc, name, arch, (*OPTIONS, *REPORT))

    chosen = [
        name
        for name in INSTANTIATIONS
        if arch == WGMMA_ARCH or not (SM_90_ONLY.search(name[1]) or name[0] in WGMMA_FILES)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = list(threads.map(compiled, chosen))
    assert all("registers" in result.log for _, result in results)
    assert [name for name, result in results if "serialized" in result.log] == []
    spilling = {name: local_bytes(result.log) for name, result in results}

    def allowance(name):
        return max(SPILL_ALLOWANCE[arch], *(SPILL_ALLOWANCE_OF.get(each, 0) for each in name))

    assert {name: size for name, size in spilling.items() if size > allowance(name)} == {}


def test_no_kernel_file_is_without_an_instantiation():
    assert {file for file, _ in INSTANTIATIONS} == {name for name in KERNEL_FILES if name.endswith(".cu")}


@pytest.mark.parametrize("file", KERNEL_FILES)
def test_kernel_files_are_short_and_open_with_a_description(file):
    lines = (resources.files("worker.gpu") / "kernels" / file).read_text().splitlines()
    assert len(lines) <= 300
    assert lines[0].startswith("// ")


@pytest.fixture
def kernel_files(tmp_path, monkeypatch):
    """A folder of kernels that replaces the package's own."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    monkeypatch.setattr("worker.gpu.compiler.resources.files", lambda _: tmp_path)
    return folder


def test_headers_are_inlined_once_and_lines_keep_their_names(kernel_files):
    (kernel_files / "inner.cuh").write_text("#pragma once\nint inner;\n")
    (kernel_files / "outer.cuh").write_text('#pragma once\n#include "inner.cuh"\nint outer;\n')
    (kernel_files / "k.cu").write_text('#include "outer.cuh"\n#include "inner.cuh"\nint last;\n')
    assert inlined("k.cu").splitlines() == [
        '#line 1 "k.cu"',
        '#line 1 "outer.cuh"',
        "",
        '#line 1 "inner.cuh"',
        "",
        "int inner;",
        '#line 3 "outer.cuh"',
        "int outer;",
        '#line 2 "k.cu"',
        '#line 3 "k.cu"',
        "int last;",
    ]


def test_an_error_in_a_header_is_reported_with_its_file_and_line(nvrtc, kernel_files):
    (kernel_files / "bad.cuh").write_text("#pragma once\n\n__device__ int wrong() { return nothing; }\n")
    (kernel_files / "k.cu").write_text('// k\n#include "bad.cuh"\n__global__ void k() {}\n')
    with pytest.raises(
        Internal, match=r"kernel k of k.cu does not compile for sm_90:\n.*bad.cuh\(3\): error: .*nothing"
    ):
        compile_kernel(nvrtc, ("k.cu", "k"), "sm_90")


def test_constants_of_a_launcher_reach_the_kernel_files_of_its_instantiations(nvrtc, kernel_files, monkeypatch):
    launcher = SimpleNamespace(INSTANTIATIONS=(("k.cu", "k"),), DEFINES={"SEGMENT": 256, "DEPTH": 2})
    monkeypatch.setattr("worker.gpu.compiler.launcher_modules", lambda: (launcher,))
    defines_of.cache_clear()
    assert defines_of("k.cu") == ("-DDEPTH=2", "-DSEGMENT=256")
    assert defines_of("other.cu") == ()
    (kernel_files / "k.cu").write_text('static_assert(SEGMENT == 256 && DEPTH == 2, "");\n__global__ void k() {}\n')
    compile_kernel(nvrtc, ("k.cu", "k"), "sm_90")
    defines_of.cache_clear()


class FakeNvrtc:
    """Only a version: compilations are replaced by a recorder."""

    NVRTCError = RuntimeError

    def __init__(self, version=(13, 0)):
        self.version = version
        self.compiled = []

    def getVersion(self):  # noqa: N802
        return self.version


@pytest.fixture
def cached(monkeypatch, kernel_files, tmp_path):
    """A function that creates Kernels over a fake compiler, and the list of compiled names."""
    (kernel_files / "a.cuh").write_text("#pragma once\nint a;\n")
    (kernel_files / "k.cu").write_text('#include "a.cuh"\n')
    compiled = []

    def fake(_, name, arch):
        compiled.append(name)
        return Compiled(b"code", f"mangled {name[1]}", "")

    monkeypatch.setattr("worker.gpu.compiler.compile_kernel", fake)
    monkeypatch.setattr(Kernels, "_load", lambda self, image, symbol: (image.read_bytes(), symbol))

    def kernels(arch="sm_90", version=(13, 0)):
        made = Kernels.__new__(Kernels)
        here = SimpleNamespace(cuda=SimpleNamespace(Device=lambda: SimpleNamespace(use=lambda: None)))
        made.__dict__.update(arch=arch, _nvrtc=FakeNvrtc(version), _threads=2, _cache=tmp_path, _cupy=here)
        made.__dict__.update(_loaded={}, _pending={}, _digests={}, _pool=None)
        return made

    return kernels, compiled


def test_a_kernel_is_compiled_once_per_machine_and_loaded_once_per_process(cached):
    kernels, compiled = cached
    first = kernels()
    first.prepare([("k.cu", "k<1>"), ("k.cu", "k<2>"), ("k.cu", "k<1>")])
    assert sorted(compiled) == [("k.cu", "k<1>"), ("k.cu", "k<2>")]
    assert first.get("k.cu", "k<2>") == (b"code", "mangled k<2>")
    assert first.get("k.cu", "k<2>") is first.get("k.cu", "k<2>")
    assert kernels().get("k.cu", "k<1>") == (b"code", "mangled k<1>")
    assert len(compiled) == 2


def test_a_preparation_waits_for_kernels_that_have_begun(cached):
    kernels, compiled = cached
    first = kernels()
    for _ in range(2):
        first.begin(("k.cu", "k<1>"))
    first.prepare([("k.cu", "k<2>")])
    assert sorted(compiled) == [("k.cu", "k<1>"), ("k.cu", "k<2>")]
    first.begin(("k.cu", "k<1>"))
    assert first.get("k.cu", "k<1>") == (b"code", "mangled k<1>")
    assert len(compiled) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kernels")]


def test_a_compile_error_fails_the_preparation_and_leaves_no_thread(cached, monkeypatch):
    def refuses(_, name, arch):
        raise Internal("no")

    monkeypatch.setattr("worker.gpu.compiler.compile_kernel", refuses)
    made = cached[0]()
    with pytest.raises(Internal, match="no"):
        made.prepare([("k.cu", "k<1>"), ("k.cu", "k<2>")])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kernels")]


def test_a_changed_header_constant_compiler_or_architecture_compiles_again(cached, kernel_files, monkeypatch):
    kernels, compiled = cached
    kernels().get("k.cu", "k<1>")
    kernels("sm_80").get("k.cu", "k<1>")
    kernels(version=(13, 1)).get("k.cu", "k<1>")
    (kernel_files / "a.cuh").write_text("#pragma once\nint edited;\n")
    kernels().get("k.cu", "k<1>")
    monkeypatch.setattr("worker.gpu.compiler.defines_of", lambda file: ("-DTILE=64",))
    kernels().get("k.cu", "k<1>")
    assert len(compiled) == 5


def test_kernels_are_compiled_loaded_and_launched(gpu, tmp_path, kernel_files):
    (kernel_files / "k.cu").write_text(
        "template <int N> __global__ void add(int* x, int y) { x[threadIdx.x] += N * y; }"
    )
    first = Kernels(tmp_path / "cache")
    x = gpu.zeros(4, "i4")
    for kernels in (first, Kernels(tmp_path / "cache")):
        kernels.get("k.cu", "add<3>")((1,), (4,), (x, x.dtype.type(2)))
    assert x.get().tolist() == [12] * 4
    assert len(list((tmp_path / "cache").glob("*.cubin"))) == 1


@pytest.mark.parametrize(("arch", "supported"), [("sm_80", False), ("sm_89", False), ("sm_90", True), ("sm_100", True)])
def test_pdl_is_used_where_the_device_supports_it(monkeypatch, arch, supported):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", ModuleType("driver"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", ModuleType("bindings"))
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    assert supports_pdl(arch) is supported


def test_threads_launch_one_kernel_at_the_same_time_each_with_its_own_shape(monkeypatch):
    """The driver's call releases the GIL: launches must not share a configuration."""
    both, seen = threading.Barrier(2), {}

    def launch(config, function, arguments, extra):
        both.wait(timeout=10)
        seen[threading.current_thread().name] = (config.gridDimX, config.sharedMemBytes)
        return (0,)

    names = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=0)
    driver = SimpleNamespace(
        CUlaunchConfig=SimpleNamespace,
        CUlaunchAttribute=lambda: SimpleNamespace(value=SimpleNamespace()),
        CUlaunchAttributeID=names,
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        cuLaunchKernelEx=launch,
    )
    stream = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=0))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=stream))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    kernel = Kernel(SimpleNamespace(kernel=SimpleNamespace(ptr=1), shared_size_bytes=0), pdl=True)
    threads = [
        threading.Thread(
            target=kernel, name=f"{n}", args=((n,), (32,), (np.int32(n),)), kwargs={"shared_mem": 16 * n, "pdl": True}
        )
        for n in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"1": (1, 16), "2": (2, 32)}


def test_without_the_bindings_launches_are_ordinary_and_a_warning_is_issued(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.warns(UserWarning, match="cuda-bindings is not installed"):
        assert not supports_pdl("sm_90")


def test_in_long_chunks_only_matmul_launches_with_pdl():
    launched = []

    def kernel(file):
        return lambda *shapes, **options: launched.append((file, options.get("pdl", False)))

    kernels = PdlInMatmulOnly(SimpleNamespace(get=lambda file, _: kernel(file), wgmma=True, processors=132))
    for file in ("scale_to_f16.cu", "matmul.cu", "matmul_wgmma.cu"):
        kernels.get(file, "name")((1,), (32,), (), shared_mem=16, pdl=True)
    assert launched == [("scale_to_f16.cu", False), ("matmul.cu", True), ("matmul_wgmma.cu", True)]
    assert kernels.wgmma
    assert kernels.processors == 132


def test_only_files_with_wgmma_are_compiled_for_one_architecture():
    assert target("matmul_wgmma.cu", "sm_90") == "sm_90a"
    assert target("matmul.cu", "sm_90") == "sm_90"
