"""Decode of many sequences at once, beside the floor: a part of `worker bench`, alone.

    python -m benchmarks.throughput MODEL.gguf… [--max-running 256] [--context 1024] [--out FOLDER]

Prints one line a model and number of sequences. With --out, also writes a result for each model to
FOLDER, from which `benchmarks.throughput_report` makes the tables and the plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from pathlib import Path

from worker.bench.bench import run_throughput
from worker.bench.result import Result, number
from worker.config import load_settings


def measure(path: Path, max_running: int, context: int) -> Result:
    """The result of one model, with the figures `throughput` only."""
    settings = load_settings(flags={"engine.max_running": max_running, "model.context": context})
    return run_throughput(path, settings, lambda what: print(f"{path.stem}: {what}", file=sys.stderr))


def lines(result: Result) -> list[str]:
    """One line for each number of sequences."""
    return [
        f"{result.model.file.removesuffix('.gguf'):16} N {figure.at:>3}  {number(figure.median):>8} tokens/s"
        f"  {figure.step_us:9,.0f} µs a step  floor {number(figure.floor or 0):>8}  {figure.floor_percent:5.1f} %"
        f"  {figure.gb_s:6,.0f} GB/s"
        for figure in result.figures["throughput"]
    ]


def main() -> None:
    """Parse the arguments, print the lines and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--max-running", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write MODEL.json for each model")
    parser.add_argument("--commit", help="commit to record in the results; by default that of the git checkout")
    chosen = parser.parse_args()
    for path in chosen.models:
        result = measure(path, chosen.max_running, chosen.context)
        if chosen.commit is not None:
            result = dataclasses.replace(result, commit=chosen.commit)
        print("\n".join(lines(result)), flush=True)
        if chosen.out is not None:
            chosen.out.mkdir(parents=True, exist_ok=True)
            (chosen.out / f"{path.stem}.json").write_text(json.dumps(result.to_json()) + "\n", "utf-8")
        gc.collect()


if __name__ == "__main__":
    main()
