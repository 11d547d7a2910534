"""Models on the GPU as `worker run` has them: through `runtime.load`, with hands on the backend where a test needs it.

Knows no test. `tests/gpu/loaded.py` is the layer below: a runner without backend and engine.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

from tests.models import ids, run
from tests.service.processes import Process
from worker import runtime
from worker.config import EngineSection, ModelSection
from worker.engine import Sequence

KERNEL_CACHE = Path.home() / ".cache" / "worker" / "kernels"
"""Where `conftest.py` keeps them too; the emulator has a place of its own."""

ONE_CONTEXT = 0
"""`engine.kv_memory` of a pool of one context, so that several models fit a card."""

REPOSITORY = Path(__file__).parents[2]
CHILD_S = 180


def load(path, *, context=512, prefix_cache=False, max_running=1, kv_memory=ONE_CONTEXT):
    """The model as a worker serves it, but that a prompt which comes again is computed again."""
    engine = EngineSection(
        backend="gpu",
        kernel_cache=KERNEL_CACHE,
        prefix_cache=prefix_cache,
        max_running=max_running,
        kv_memory=kv_memory,
    )
    return runtime.load(path, ModelSection(context=context), engine)


def answer(loaded, prompt, sampling, tokens=64, replay=()):
    """The ids of one job; no token ends it early."""
    return ids(run(loaded.engine, Sequence("job", list(prompt), tokens, sampling, replay=list(replay)))["job"])


def settle():
    """Let go of everything that only garbage holds, CuPy's own cache of memory included."""
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.cuda.runtime.deviceSynchronize()


def device_bytes():
    """What the driver says is taken on the card, by anyone."""
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    return total - free


class Child:
    """Another worker process that answers one job, an id a line; see `child.py`."""

    def __init__(self, path, prompt, *, seed, temperature=0.8, tokens=64, replay=(), pause=None, trap=None):
        job = {"prompt": list(prompt), "seed": seed, "temperature": temperature, "tokens": tokens}
        job |= {"replay": list(replay), "pause": pause, "trap": trap}
        command = [sys.executable, "-m", "tests.gpu.child", str(path), json.dumps(job)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=pipe, text=True, bufsize=1
        )

    def read(self, count):
        """Its next `count` ids."""
        return [int(self.process.stdout.readline()) for _ in range(count)]

    def kill(self):
        """SIGKILL; its exit code."""
        self.process.kill()
        return self.finish()[0]

    def finish(self):
        """Exit code, ids that were not read yet, and what it said on stderr."""
        out, err = self.process.communicate(timeout=CHILD_S)
        return self.process.returncode, [int(line) for line in out.split()], err


class GpuWorker(Process):
    """A `worker run` on the GPU, with the tests' kernel cache; with FAULT in its environment, one with that fault."""

    def __init__(self, url, log, path, *arguments, **environment):
        self.module = "tests.gpu.faulty_worker" if "FAULT" in environment else "worker"
        environment["WORKER_ENGINE__KERNEL_CACHE"] = str(KERNEL_CACHE)
        environment["WORKER_ENGINE__KV_MEMORY"] = str(ONE_CONTEXT)
        super().__init__(url, log, "--model", path, "--backend", "gpu", *arguments, **environment)

    @property
    def id(self):
        """The worker's id, by which its own stream is found."""
        return self.await_log("worker_ready")["worker_id"]

    def metric(self, line):
        """The value of a line of /metrics, such as `worker_vram_bytes{purpose="runtime"}`."""
        port = self.await_log("worker_starting")["http_port"]
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            shown = dict(each.rpartition(" ")[::2] for each in answer.read().decode().splitlines())
        return float(shown[line])
