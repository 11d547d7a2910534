"""Time from a worker's process start to `ready`, and the phases that it consists of.

    python -m benchmarks.startup MODEL.gguf… [--runs 5] [--backend auto|cpu|gpu] [--json FILE]

Each start is a `worker run` process against an embedded server. The first start of a file is a
warm-up: it compiles kernels and brings the file into the page cache. One more start is
instrumented: it records when each phase began and ended, and how long it was busy. Phases overlap;
the last column lists their threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

IMPORTS = (
    *("typer", "asyncio", "pydantic", "pydantic_settings", "worker.config", "numpy", "structlog", "prometheus_client"),
    *("redis", "cupy", "cuda.bindings.driver", "tokenizers", "sentencepiece", "jinja2"),
)
PHASES = {
    "worker.gpu": {"_create_context": "CUDA context"},
    "worker.gguf_file": {"GgufFile.open": "header", "GgufFile.fingerprint": "fingerprint"},
    "worker.runtime": {
        "open_backend": "backend",
        "plan": "plan",
        "read_vocabulary": "vocabulary",
        "build_tokenizer": "tokenizer",
    },
    "worker.rope": {"rope_tables": "rotary tables"},
    "worker.gpu.upload": {
        "Upload.__init__": "lanes",
        "Upload.__call__": "weights: queued",
        "Upload._run": "weights: chunks",
        "Upload.close": "weights: wait",
    },
    "worker.gpu.compiler": {"Kernels._compile_and_load": "kernels: load", "Kernels.prepare": "kernels: wait"},
    "worker.gpu.runner": {
        "GpuRunner.__init__": "runner (total)",
        "GpuRunner._prepare": "dry runs, kernels",
        "GpuRunner._capture_decode": "capture: decode step",
        "GpuRunner._capture_chunk": "capture: chunks",
    },
    "worker.service.service": {"Service._ready": "ready"},
}
"""Module → function → label in the table."""
START_S = 300.0


class Timeline:
    """Instrument modules when they are imported; times are seconds since `began`."""

    def __init__(self, began: float) -> None:
        self.phases: dict[str, dict[str, Any]] = {}
        self._began = began
        self._lock = threading.Lock()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """Implement a finder of `sys.meta_path`: the default spec with instrumented execution."""
        if name not in PHASES and name not in IMPORTS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        return spec and self._instrumented(name, spec)

    def _instrumented(self, name: str, spec: ModuleSpec) -> ModuleSpec:
        assert spec.loader is not None, "namespace packages are not instrumented"
        execute = spec.loader.exec_module
        if name in IMPORTS:
            execute = self._timed(execute, f"import {name}")

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for path, label in PHASES.get(name, {}).items():
                *owners, last = path.split(".")
                owner: Any = getattr(module, owners[0], None) if owners else module
                function = vars(owner).get(last) if owner else None
                if function is None:  # renamed: the table lacks a row, the start is still measured
                    continue
                is_classmethod = isinstance(function, classmethod)
                timed = self._timed(function.__func__ if is_classmethod else function, label)
                setattr(owner, last, classmethod(timed) if is_classmethod else timed)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _timed(self, function: Any, label: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(label, began, time.monotonic())

        return call

    def _add(self, label: str, began: float, ended: float) -> None:
        with self._lock:
            phase = self.phases.setdefault(label, {"from": began - self._began, "busy": 0.0, "calls": 0, "threads": []})
            phase["to"] = ended - self._began
            phase["busy"] += ended - began
            phase["calls"] += 1
            thread = threading.current_thread().name.partition("_")[0]
            if thread not in phase["threads"]:
                phase["threads"].append(thread)


def child(began: str, *arguments: str) -> None:
    """Run `worker ARGUMENTS` instrumented; print the phases to stdout at the end."""
    timeline = Timeline(float(began))
    timeline._add("interpreter, this file", timeline._began, time.monotonic())
    sys.meta_path.insert(0, timeline)
    sys.argv[1:] = arguments
    from worker.cli import main as worker  # noqa: PLC0415

    try:
        worker()
    finally:
        print(json.dumps(timeline.phases))


class Start(NamedTuple):
    """One start: seconds from process start to `ready`, seconds of loading, and the output."""

    ready_s: float
    load_s: float
    stdout: str


def start(module: Sequence[str], path: Path, backend: str, url: str) -> Start:
    """Start a worker and stop it as soon as it is ready. Exits if it does not become ready."""
    arguments = ["run", "--model", str(path), "--backend", backend, "--redis-url", url]
    began = time.monotonic()
    child_arguments = [str(began)] if len(module) > 1 else []
    command = [sys.executable, "-m", *module, *child_arguments, *arguments, "--http-port", "0", "--log-format", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None, "stderr is a pipe"
    limit = threading.Timer(START_S, process.kill)
    limit.start()
    log = []
    try:
        for line in process.stderr:
            ready_s = time.monotonic() - began
            log.append(line)
            if '"event": "worker_ready"' in line:
                process.send_signal(signal.SIGTERM)
                return Start(ready_s, json.loads(line)["load_s"], process.communicate(timeout=START_S)[0])
    finally:
        limit.cancel()
        process.kill()
        process.wait()
    raise SystemExit(f"{path.name} did not become ready:\n{''.join(log)}")


def measure(path: Path, backend: str, runs: int, url: str) -> dict[str, Any]:
    """Measure all starts of one file."""
    start(["worker"], path, backend, url)
    starts = [start(["worker"], path, backend, url) for _ in range(runs)]
    phases = json.loads(start(["benchmarks.startup", "--child"], path, backend, url).stdout.splitlines()[-1])
    ready, load = [each.ready_s for each in starts], [each.load_s for each in starts]
    return {
        "model": path.stem,
        "bytes": path.stat().st_size,
        "ready_s": {"median": statistics.median(ready), "min": min(ready), "max": max(ready), "runs": ready},
        "load_s": {"median": statistics.median(load), "min": min(load), "max": max(load)},
        "phases": phases,
    }


def show(result: dict[str, Any]) -> None:
    ready, load, size = result["ready_s"], result["load_s"], result["bytes"]
    print(f"\n{result['model']} ({size / 1e9:.2f} GB): {ready['median']:.3f} s to ready", end="")
    print(f" ({ready['min']:.3f} to {ready['max']:.3f}), of which {load['median']:.3f} s loading")
    print(f"  {'phase':28}{'from ms':>8}{'to ms':>8}{'busy ms':>9}{'calls':>7}  threads")
    for label, phase in sorted(result["phases"].items(), key=lambda item: item[1]["from"]):
        times = f"{1e3 * phase['from']:8.0f}{1e3 * phase['to']:8.0f}{1e3 * phase['busy']:9.0f}{phase['calls']:7}"
        print(f"  {label:28}{times}  {', '.join(phase['threads'])}")
    chunks = result["phases"].get("weights: chunks")
    if chunks:
        rate = size / (result["phases"]["weights: wait"]["to"] - chunks["from"])
        print(f"  weights at {rate / 1e9:.1f} GB/s from the first chunk to the last")


def byte_code_is_cached() -> bool:
    """Whether Python could write its cache; otherwise each start compiles every import."""
    spec = importlib.util.find_spec("numpy")
    return spec is not None and spec.cached is not None and Path(spec.cached).exists()


def main() -> None:
    from worker.embedded import embedded_server  # noqa: PLC0415  # not imported by the child before it starts its clock

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--backend", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    options = parser.parse_args()
    with embedded_server() as url:
        results = []
        for path in options.models:
            results.append(measure(path, options.backend, options.runs, url))
            show(results[-1])
    cached = byte_code_is_cached()
    print(f"\nPython {sys.version.split()[0]}, byte code {'cached' if cached else 'NOT cached: imports count twice'}")
    if options.json:
        figures = {"python": sys.version.split()[0], "byte_code_cached": cached, "models": results}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
