"""Speed of the GPU's products by weight type: decode in percent of bandwidth, prefill in TFLOP/s.

    python -m benchmarks.gpu_products

Decode: µs and percent of the read bandwidth that this run measures, in a graph of launches over
copies of the matrix that together exceed the L2 cache; a launch's overhead of 2.4 µs is included.
Prefill: 64, 512 and 2,048 tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from worker.gpu import matmul as prefill
from worker.gpu import matvec as decode
from worker.gpu.activations import empty_q8, scale_to_f16
from worker.gpu.bandwidth import read_seconds
from worker.gpu.compiler import Kernels
from worker.gpu.layouts import BlockMatrix, plane_bytes
from worker.gpu.memory import DeviceMemory, Pool, Purpose, aligned
from worker.ops import Linear, QTensor
from worker.quants import QUANT_TYPES, QuantType

SHAPES = ((32064, 3072), (8192, 3072), (3072, 8192), (2048, 2048), (1152, 1024))
TOKENS = (64, 512, 2048)
READ = 2 << 30
COLD = 400 << 20  # bytes of the copies that a graph reads
RUNS = 7
CACHE = Path.home() / ".cache" / "worker" / "kernels"


class Bench:
    """The device, random bytes on it, and the kernels."""

    def __init__(self) -> None:
        self.kernels = Kernels(CACHE)
        self.kernels.prepare((*decode.INSTANTIATIONS, *prefill.INSTANTIATIONS))
        self.pool = Pool(DeviceMemory(), 1 << 30, Purpose.ACTIVATIONS)
        self.bytes = cupy.random.randint(0, 255, 2 << 30, dtype=np.uint8)
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def matrices(self, kind: QuantType, rows: int, cols: int) -> list[Linear]:
        """Copies of a matrix that together exceed the L2 cache."""
        found, at = [], 0
        sizes = [rows * row for row in plane_bytes(kind, cols)]
        while at + 2 * sum(sizes) < min(self.bytes.size, COLD + 3 * sum(sizes)):
            planes = []
            for size in sizes:
                planes.append(self.bytes[at : at + size].reshape(rows, -1) if size else None)
                at += aligned(size)
            found.append(Linear(QTensor("w", (rows, cols), kind, BlockMatrix(kind, tuple(planes)))))
        return found

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Seconds for each call, captured in one graph."""
        with self.stream:
            calls[0]()
            self.stream.synchronize()
            self.stream.begin_capture()
            for call in calls:
                call()
            graph = self.stream.end_capture()
            graph.launch(self.stream)
            return self.median(partial(graph.launch, self.stream)) / len(calls)

    def median(self, work: Callable[[], Any]) -> float:
        """Median time of `work` on the device in seconds."""
        times = []
        for _ in range(RUNS):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(self.stream)
            with self.stream:
                work()
            end.record(self.stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
        return float(statistics.median(times))


def decode_row(bench: Bench, kind: QuantType, bandwidth: float) -> str:
    cells = []
    for rows, cols in SHAPES:
        x = empty_q8(bench.pool, 1, cols)
        for array in (x.q, x.meta, x.x):
            if array is not None:
                array.fill(1)
        linears = bench.matrices(kind, rows, cols)
        calls = [partial(decode.matvec, bench.kernels, bench.pool, x, None, [linear]) for linear in linears]
        seconds = bench.seconds(calls)
        percent = 100 * rows * sum(plane_bytes(kind, cols)) / seconds / bandwidth
        cells.append(f"{seconds * 1e6:6.1f} µs {percent:3.0f} %")
    return "  ".join(cells)


def prefill_row(bench: Bench, kind: QuantType) -> str:
    cells = []
    for rows, cols in SHAPES[1:4]:
        linear = bench.matrices(kind, rows, cols)[0]
        for tokens in TOKENS:
            x = scale_to_f16(bench.kernels, bench.pool, cupy.random.standard_normal((tokens, cols), dtype=np.float32))
            call = partial(prefill.matmul, bench.kernels, bench.pool, x, linear)
            cells.append(f"{2e-12 * rows * cols * tokens / bench.seconds([call] * 3):4.0f}")
    return " ".join(cells)


def main() -> None:
    nbytes, seconds = read_seconds(CACHE, READ, RUNS)
    bandwidth = nbytes / statistics.median(seconds)
    bench = Bench()
    print(f"read bandwidth {bandwidth / 1e9:,.0f} GB/s")
    print("decode, a token:", "  ".join(f"{rows}x{cols}" for rows, cols in SHAPES))
    for kind in QUANT_TYPES:
        print(f"{kind.name:6}", decode_row(bench, kind, bandwidth))
    print(f"prefill, TFLOP/s: {TOKENS} tokens each of", "  ".join(f"{rows}x{cols}" for rows, cols in SHAPES[1:4]))
    for kind in QUANT_TYPES:
        print(f"{kind.name:6}", prefill_row(bench, kind))


if __name__ == "__main__":
    main()
