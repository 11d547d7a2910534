"""How long is it from a worker's process start to `ready`, and what does the time go to?

    python -m benchmarks.startup MODEL.gguf… [--runs 5] [--backend auto|cpu|gpu] [--json FILE]

Each start is `worker run` in a process of its own, against an embedded server. The first of a file is not counted: it
compiles kernels and brings the file into the page cache. One more start is watched from inside: when each phase began
and ended, and how long it was busy. Phases overlap; the last column lists the threads.
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
        "Upload.__call__": "weights: begun",
        "Upload._run": "weights: chunks",
        "Upload.close": "weights: waited for",
    },
    "worker.gpu.compiler": {"Kernels._compile_and_load": "kernels: loaded", "Kernels.prepare": "kernels: waited for"},
    "worker.gpu.runner": {
        "GpuRunner.__init__": "runner, all of it",
        "GpuRunner._prepare": "dry runs, kernels",
        "GpuRunner._capture_decode": "capture: decode step",
        "GpuRunner._capture_chunk": "capture: chunks",
    },
    "worker.service.service": {"Service._ready": "ready"},
}
"""Module → function → what it is called in the table."""
START_S = 300.0


class Timeline:
    """Watches modules from the moment they are imported; all times are seconds since `began`."""

    def __init__(self, began: float) -> None:
        self.phases: dict[str, dict[str, Any]] = {}
        self._began = began
        self._lock = threading.Lock()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """As a finder of `sys.meta_path`: the usual spec, its execution watched."""
        if name not in PHASES and name not in IMPORTS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        return spec and self._watched_import(name, spec)

    def _watched_import(self, name: str, spec: ModuleSpec) -> ModuleSpec:
        assert spec.loader is not None, "no namespace package is watched"
        execute = spec.loader.exec_module
        if name in IMPORTS:
            execute = self._watched(execute, f"import {name}")

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for path, label in PHASES.get(name, {}).items():
                *owners, last = path.split(".")
                owner: Any = getattr(module, owners[0], None) if owners else module
                function = vars(owner).get(last) if owner else None
                if function is None:  # renamed since: the table lacks a row, and the start is still measured
                    continue
                bound = isinstance(function, classmethod)
                watched = self._watched(function.__func__ if bound else function, label)
                setattr(owner, last, classmethod(watched) if bound else watched)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _watched(self, function: Any, label: str) -> Any:
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
    """`worker ARGUMENTS`, watched; the phases go to stdout at its end."""
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
    """One start: seconds from the process's to `ready`, those of them spent loading, and what it printed."""

    ready_s: float
    load_s: float
    stdout: str


def start(module: Sequence[str], path: Path, backend: str, url: str) -> Start:
    """Start a worker, and end it as soon as it is ready."""
    arguments = ["run", "--model", str(path), "--backend", backend, "--redis-url", url]
    began = time.monotonic()
    given = [str(began)] if len(module) > 1 else []
    command = [sys.executable, "-m", *module, *given, *arguments, "--http-port", "0", "--log-format", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None, "it was given a pipe"
    limit = threading.Timer(START_S, process.kill)
    limit.start()
    said = []
    try:
        for line in process.stderr:
            ready_s = time.monotonic() - began
            said.append(line)
            if '"event": "worker_ready"' in line:
                process.send_signal(signal.SIGTERM)
                return Start(ready_s, json.loads(line)["load_s"], process.communicate(timeout=START_S)[0])
    finally:
        limit.cancel()
        process.kill()
        process.wait()
    raise SystemExit(f"{path.name} never became ready:\n{''.join(said)}")


def measured(path: Path, backend: str, runs: int, url: str) -> dict[str, Any]:
    """All starts of one file."""
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
    print(f"\n{result['model']} ({size / 1e9:.2f} GB): ready after {ready['median']:.3f} s", end="")
    print(f" ({ready['min']:.3f} to {ready['max']:.3f}), {load['median']:.3f} s of them loading")
    print(f"  {'phase':28}{'from ms':>8}{'to ms':>8}{'busy ms':>9}{'calls':>7}  threads")
    for label, phase in sorted(result["phases"].items(), key=lambda item: item[1]["from"]):
        times = f"{1e3 * phase['from']:8.0f}{1e3 * phase['to']:8.0f}{1e3 * phase['busy']:9.0f}{phase['calls']:7}"
        print(f"  {label:28}{times}  {', '.join(phase['threads'])}")
    chunks = result["phases"].get("weights: chunks")
    if chunks:
        rate = size / (result["phases"]["weights: waited for"]["to"] - chunks["from"])
        print(f"  weights at {rate / 1e9:.1f} GB/s from the first chunk to the last")


def byte_code_is_cached() -> bool:
    """Whether the largest import has to be compiled at each start, as where Python may not write its cache."""
    spec = importlib.util.find_spec("numpy")
    return spec is not None and spec.cached is not None and Path(spec.cached).exists()


def main() -> None:
    from worker.embedded import embedded_server  # noqa: PLC0415  # the child waits for no import of ours

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--backend", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    chosen = parser.parse_args()
    with embedded_server() as url:
        results = []
        for path in chosen.models:
            results.append(measured(path, chosen.backend, chosen.runs, url))
            show(results[-1])
    cached = byte_code_is_cached()
    print(f"\nPython {sys.version.split()[0]}, byte code {'cached' if cached else 'NOT cached: imports count twice'}")
    if chosen.json:
        figures = {"python": sys.version.split()[0], "byte_code_cached": cached, "models": results}
        chosen.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
