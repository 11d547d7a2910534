"""Speed of the GPU's products by tensor type, beside the bytes that they read.

    python -m benchmarks.gpu_products [--only TYPE…] [--shape ROWS COLS] [--record FILE]
    python -m benchmarks.models_report --into docs/models.md

Decode with 1, 8 and 64 rows of activations, prefill with 1,024. Launches in a CUDA graph multiply
copies of a matrix in turn, which together exceed the L2 cache. Activations are quantized before; a
launch's overhead is included. Every product is compared with f64 before it is timed. The speeds
replace those of the same type, shape and device in `benchmarks/results/models/products.json`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recorded import DECODE_ROWS, PREFILL_ROWS, PRODUCTS, ProductSpeeds, read_products, write_products
from tests.gpu.activations import rows_of
from tests.gpu.products import PREFILL_OWN, rounded
from tests.gpu.suite import why_no_gpu
from tests.gpu.weights import Projection, error
from tests.quantized_ops import in_f16
from worker.bench.bench import checkout_commit
from worker.bench.result import Bandwidth, Figure, number
from worker.gpu import matvec_mma, upload
from worker.gpu.activations import quantize_rows, quantize_tiles, scale_to_f16
from worker.gpu.bandwidth import read_seconds
from worker.gpu.compiler import Kernels
from worker.gpu.decode_products import DecodeProducts
from worker.gpu.kernel import capture_graph
from worker.gpu.launch import Allocator, Launcher, Requirements, dry_run
from worker.gpu.layouts import BlockMatrix, address, plane_bytes, stored_type
from worker.gpu.matmul import matmul
from worker.gpu.memory import DeviceArray, DeviceMemory, Pool, Purpose, aligned
from worker.ops import Linear, QTensor
from worker.quants import QUANT_TYPES, QuantType

CACHE = Path.home() / ".cache" / "worker" / "kernels"
READ_BYTES = 2 << 30
DISTINCT_ROWS = 512
"""Rows of random weights; the other rows of a matrix repeat them."""
_BLOCK = 256  # columns of the longest blocks
_ON_DEVICE = 3  # cudaMemcpyDeviceToDevice

Product = Callable[[Linear], DeviceArray]
"""W·x of a fixed x: y [T, rows] f32."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a measurement: the matrix, and how much is launched."""

    rows: int = 14336
    cols: int = 4096
    prefill_rows: int = PREFILL_ROWS
    copies_bytes: int = 400 << 20
    """Least bytes of all copies of the matrix: eight times the L2 cache of an H100."""
    launches: int = 32
    """Least launches of a graph."""
    runs: int = 9

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.rows, self.cols

    @property
    def products(self) -> tuple[tuple[str, int], ...]:
        """The measured products: phase and rows of activations."""
        return (*(("decode", tokens) for tokens in DECODE_ROWS), ("prefill", self.prefill_rows))


def product(launcher: Launcher, pool: Allocator, phase: str, x: DeviceArray, max_shared: int) -> Product:
    """The product of a phase with x [T, cols] f32, which is quantized or scaled here."""
    if phase == "prefill":
        return partial(matmul, launcher, pool, scale_to_f16(launcher, pool, x))
    products = DecodeProducts(launcher, pool, max_shared)
    if len(x) >= matvec_mma.MIN_ROWS:
        tiles = quantize_tiles(launcher, pool, x, None)
        return lambda linear: products.multiply(tiles, None, (linear,))[0]
    rows = quantize_rows(launcher, pool, x, None, q8=True, f32=False)
    return lambda linear: products.multiply(rows, None, (linear,))[0]


def requirements(kind: QuantType, sizes: Sizes, max_shared: int, *, wgmma: bool) -> Requirements:
    """Kernels of all products of a type, and bytes of the pool for activations."""
    planes = BlockMatrix(stored_type(kind), (None,) * 4)
    linear = Linear(QTensor("w", sizes.shape, stored_type(kind), planes))

    def forward(launcher: Launcher, pool: Allocator) -> None:
        for phase, tokens in sizes.products:
            x = pool.empty((tokens, sizes.cols))
            product(launcher, pool, phase, x, max_shared)(linear)

    return dry_run(forward, wgmma=wgmma)


class ProductBench:
    """The products of one type with random weights on the device."""

    def __init__(self, kernels: Kernels, kind: QuantType, sizes: Sizes, bandwidth: Bandwidth) -> None:
        import cupy  # noqa: PLC0415  (--help needs no CuPy)

        self._cuda = cupy.cuda
        self._kernels, self._kind, self._sizes, self._bandwidth = kernels, kind, sizes, bandwidth
        self._max_shared: int = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
        self._stream = cupy.cuda.Stream(non_blocking=True)
        memory = DeviceMemory()
        self._pool = Pool(
            memory, requirements(kind, sizes, self._max_shared, wgmma=kernels.wgmma).pool_bytes, Purpose.ACTIVATIONS
        )
        self._distinct = Projection(kernels, memory, kind, (math.gcd(sizes.rows, DISTINCT_ROWS), sizes.cols), kind.name)
        self._copies = self._filled_copies(memory)

    def _filled_copies(self, memory: DeviceMemory) -> list[Linear]:
        """Copies of the matrix, `copies_bytes` or more, at least two."""
        small = self._distinct.linear.weight
        planes, rows = small.data.planes, self._sizes.rows
        nbytes = sum(aligned(rows * plane.shape[-1]) for plane in planes if plane is not None)
        count = max(2, -(-self._sizes.copies_bytes // nbytes))
        pool = Pool(memory, count * nbytes, Purpose.WEIGHTS)

        def filled(plane: DeviceArray) -> DeviceArray:
            large = pool.empty((rows, plane.shape[-1]), np.uint8)
            for offset in range(0, large.nbytes, plane.nbytes):
                to, source = address(large) + offset, address(plane)
                self._cuda.runtime.memcpyAsync(to, source, plane.nbytes, _ON_DEVICE, self._stream.ptr)
            return large

        matrices = (tuple(plane if plane is None else filled(plane) for plane in planes) for _ in range(count))
        shape, kind = self._sizes.shape, small.kind
        return [Linear(QTensor("w", shape, kind, BlockMatrix(kind, matrix))) for matrix in matrices]

    def figure(self, phase: str, tokens: int) -> Figure:
        """Check one product, then time it. Exits with one sentence if its result is wrong."""
        sizes, x = self._sizes, rows_of(tokens, self._sizes.cols, self._kind.ggml_id)
        with self._stream:
            on_device = self._pool.empty(x.shape)
            on_device.set(x)
            multiply = product(self._kernels, self._pool, phase, on_device, self._max_shared)
            difference = self.difference(phase, x, multiply(self._copies[0]).get())
            if not difference <= PREFILL_OWN:
                what = f"{self._kind.name}, {phase} of {tokens} rows"
                raise SystemExit(f"{what}: relative error {difference:.1e}, not timed")
            seconds = self._seconds(multiply)
        nbytes = sizes.rows * sum(plane_bytes(self._kind, sizes.cols))
        tflops = 2e-12 * sizes.rows * sizes.cols * tokens / statistics.median(seconds)
        return self._bandwidth.figure(tokens, "µs", lambda each: 1e6 * each, seconds, nbytes, tflops=tflops)

    def difference(self, phase: str, x: Any, y: Any) -> float:
        """Relative L2 error of y [T, rows] against f64 with x [T, cols] rounded as in the phase."""
        exact = self._distinct.exact(in_f16(x) if phase == "prefill" else rounded(x, self._kind))
        y = y.reshape(len(x), -1, exact.shape[-1])
        return float(error(y, np.broadcast_to(exact[:, None], y.shape)))

    def _seconds(self, multiply: Product) -> list[float]:
        """Seconds of a product in each run: a graph of whole passes over the copies."""
        passes = -(-self._sizes.launches // len(self._copies))
        calls = [partial(multiply, linear) for linear in passes * self._copies]

        def enqueue() -> None:
            for call in calls:
                call()

        graph = capture_graph(enqueue, self._stream)
        marks = [self._cuda.Event() for _ in range(self._sizes.runs + 1)]
        for mark in marks:
            graph.launch(self._stream)  # also before the first mark: the stream is never idle between two
            mark.record(self._stream)
        marks[-1].synchronize()
        elapsed = map(self._cuda.get_elapsed_time, marks, marks[1:])
        return [milliseconds / 1e3 / len(calls) for milliseconds in elapsed]


def measure(kernels: Kernels, kind: QuantType, sizes: Sizes, bandwidth: Bandwidth) -> dict[str, list[Figure]]:
    """The figures of `ProductSpeeds`. Exits with one sentence if a result is wrong."""
    bench, figures = ProductBench(kernels, kind, sizes, bandwidth), dict[str, list[Figure]]()
    for phase, tokens in sizes.products:
        figures.setdefault(phase, []).append(bench.figure(phase, tokens))
    return figures


def line(speeds: ProductSpeeds) -> str:
    """The speeds for people."""
    one, *others = speeds.figures["decode"]
    prefill = speeds.figures["prefill"][0]
    batches = "".join(f"  {figure.at:>2} rows {number(figure.median):>5} µs" for figure in others)
    return (
        f"{speeds.type:8}{one.bytes / 1e6:6.1f} MB  1 row {number(one.median):>5} µs {one.gb_s:5,.0f} GB/s "
        f"{one.percent:3.0f} %{batches}  {prefill.at:,} rows {prefill.tflops:4,.0f} TFLOP/s"
    )


def run(kinds: Sequence[QuantType], sizes: Sizes, record: Path, commit: str | None) -> None:
    """Measure types on the card, print their speeds and write each into the record."""
    import cupy  # noqa: PLC0415

    max_shared = cupy.cuda.Device().attributes["MaxSharedMemoryPerBlockOptin"]
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    bandwidth, kernels = Bandwidth(*read_seconds(CACHE, READ_BYTES, sizes.runs)), Kernels(CACHE)
    products = (name for kind in kinds for name in requirements(kind, sizes, max_shared, wgmma=kernels.wgmma).kernels)
    kernels.prepare((*upload.INSTANTIATIONS, *products))
    print(f"{device}, {bandwidth.gb_s:,.0f} GB/s; matrices of {sizes.rows:,} × {sizes.cols:,}", flush=True)
    commit = commit or checkout_commit()
    for kind in kinds:
        speeds = ProductSpeeds(
            type=kind.name,
            rows=sizes.rows,
            cols=sizes.cols,
            device=device,
            date=datetime.now(UTC).date().isoformat(),
            commit=commit,
            bandwidth_gb_s=bandwidth.gb_s,
            figures=measure(kernels, kind, sizes, bandwidth),
        )
        print(line(speeds), flush=True)
        write_products(record, [*read_products(record), speeds])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [kind.name for kind in QUANT_TYPES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TYPE", help="by default all")
    parser.add_argument("--shape", nargs=2, type=int, default=Sizes().shape, metavar=("ROWS", "COLS"))
    parser.add_argument("--record", type=Path, default=PRODUCTS, help="the file of the results")
    parser.add_argument("--commit", help="commit to record; by default that of the git checkout")
    chosen = parser.parse_args()
    sizes = Sizes(*chosen.shape)
    if sizes.rows < 1 or sizes.cols < 1 or sizes.cols % _BLOCK:
        parser.error(f"--shape {sizes.rows} {sizes.cols}: expected rows, and columns that are a multiple of {_BLOCK}")
    if reason := why_no_gpu():
        raise SystemExit(f"the speed of products needs a GPU: {reason}")
    run([kind for kind in QUANT_TYPES if kind.name in chosen.only], sizes, chosen.record, chosen.commit)


if __name__ == "__main__":
    main()
