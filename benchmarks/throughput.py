"""Decode of many sequences at once, beside the bandwidth limit: a part of `worker bench`, alone.

    python -m benchmarks.throughput MODEL.gguf… [--max-running 256] [--context 1024]

Prints one line a model and number of sequences: tokens/s in all, microseconds a step, GB/s.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

from worker import runtime
from worker.bench.bench import SIZES, Bench
from worker.bench.result import Bandwidth, number
from worker.bench.traffic import Traffic
from worker.config import load_settings
from worker.gguf_file import GgufFile


def measure(path: Path, max_running: int, context: int) -> Bench:
    """The figures `throughput` of one model."""
    settings = load_settings(flags={"engine.max_running": max_running, "model.context": context})
    with GgufFile.open(path) as file:
        backend = runtime.open_backend(settings.engine)
        planned = runtime.plan(file, settings.model, backend, settings.engine.kv_memory)
    bandwidth = Bandwidth(3_030_000_000_000, [1.0])  # an H100's; `worker bench` measures the device's own
    bench = Bench(path, settings, SIZES[backend.name], Traffic(planned, backend.weight_bytes), bandwidth, 0, print)
    bench.throughput()
    return bench


def main() -> None:
    """Parse the arguments and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    for path in arguments.models:
        for figure in measure(path, arguments.max_running, arguments.context).figures["throughput"]:
            step_us = 1e6 * int(figure.at) / figure.median
            print(
                f"{path.stem:16} N {figure.at:>3}  {number(figure.median):>8} tokens/s  {step_us:9,.0f} µs a step  "
                f"{figure.gb_s:7,.0f} GB/s  limit {number(figure.limit or 0)}"
            )
        gc.collect()


if __name__ == "__main__":
    main()
