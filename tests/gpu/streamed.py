"""The twins over weights that lie on the device: a slab of rows comes as f32 when its product is taken, and goes again.

So a model has its reference on a host that could not hold it: gpt-oss-20b is 84 GB as f32. The device's way back to f32
is `gguf.quants`' to the bit (`test_layouts.py`), and `test_full_size.py` compares what the device holds with the file.
A prompt brings every expert once, a step those in use; a few threads overlap copies and products. Knows no test.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from worker.cpu.ops import CpuOps
from worker.cpu.plain import gated, rms_norm
from worker.cpu.quantized import QuantizedOps
from worker.cpu.runner import CpuRunner
from worker.cpu.threads import Threads
from worker.ops import SWIGLU, Phase

SLAB = 4 << 20
THREADS = 12


class DeviceRows:
    """Weights of a model on the GPU as f32 on the host, a slab at a time; a context, which ends its threads."""

    def __init__(self, kernels, memory):
        self._kernels = kernels
        self._memory = memory
        self._lanes = threading.local()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="slabs")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._threads.shutdown()

    def fetch(self, matrix):
        """A matrix [rows, cols] of at most SLAB bytes; overwritten by this thread's next one."""
        if not hasattr(self._lanes, "mine"):
            self._lanes.mine = _Lane(self._memory)
        return self._lanes.mine.fetch(self._kernels, matrix)

    def vector(self, tensor):
        """A norm's weight, a bias, sinks: [n] or [E, n]."""
        return tensor.data.get()

    def expert(self, weight, expert):
        """One matrix [rows, cols] of [E, rows, cols]."""
        planes = tuple(None if plane is None else plane[expert] for plane in weight.data.planes)
        return replace(weight, shape=weight.shape[1:], data=replace(weight.data, planes=planes))

    def product(self, x, matrix):
        """x·Wᵀ: y [n, rows] f32 of x [n, cols]."""
        rows, cols = matrix.shape
        y = np.empty((len(x), rows), np.float32)
        step = SLAB // (4 * cols)

        def fill(start):
            slab = self.fetch(matrix.rows(start, min(start + step, rows)))
            y[:, start : start + len(slab)] = x @ slab.T

        list(self._threads.map(fill, range(0, rows, step)))
        return y


class _Lane:
    """One thread's way from the device: a stream, room for a slab there, page-locked room for it here."""

    def __init__(self, memory):
        import cupy

        from worker.gpu.memory import Pool, Purpose

        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._pool = Pool(memory, SLAB, Purpose.WORKSPACE)
        self._host = np.frombuffer(cupy.cuda.alloc_pinned_memory(SLAB), np.float32, SLAB // 4)

    def fetch(self, kernels, matrix):
        from worker.gpu.embedding import dequantized

        host = self._host[: np.prod(matrix.shape)].reshape(matrix.shape)
        with self._stream:
            return dequantized(kernels, self._pool, matrix).get(self._stream, out=host)


class StreamedOps(CpuOps):
    """The exact ops over weights that `rows` fetches; each expert takes all its tokens at once."""

    def __init__(self, cache, phase, rows):
        super().__init__(cache, phase, Threads(1))
        self._rows = rows

    def embed(self, table, batch):
        return np.concatenate([self._rows.fetch(table.rows(i, i + 1)).copy() for i in batch.tokens.tolist()])

    def attention(self, q, k, v, spec, batch):
        sinks = spec.sinks and replace(spec.sinks, data=self._rows.vector(spec.sinks))
        return super().attention(q, k, v, replace(spec, sinks=sinks), batch)

    def experts_glu(self, n, routes, gate, up, activation=SWIGLU):
        h = np.empty((*routes.experts.shape, gate.weight.shape[1]), np.float32)
        for expert, (tokens, slots) in by_expert(routes):
            g, u = (self._expert(n[tokens], linear, expert) for linear in (gate, up))
            h[tokens, slots] = gated(g, u, activation)
        return h

    def experts_add(self, h, routes, down, residual):
        y = np.empty((*routes.experts.shape, down.weight.shape[1]), np.float32)
        for expert, at in by_expert(routes):
            y[at] = self._expert(h[at], down, expert)
        return residual + (routes.weights[:, :, None] * y).sum(axis=1, dtype=np.float32)

    def _norm(self, x, norm):
        return rms_norm(x, self._rows.vector(norm.weight), norm.eps)

    def _linear(self, x, linear):
        y = self._rows.product(x, linear.weight)
        return y if linear.bias is None else y + self._rows.vector(linear.bias)

    def _expert(self, x, linear, expert):
        y = self._rows.product(x, self._rows.expert(linear.weight, expert))
        return y if linear.bias is None else y + self._rows.vector(linear.bias)[expert]


class StreamedTwin(QuantizedOps, StreamedOps):
    """The same with activations rounded where the GPU rounds them."""


def by_expert(routes):
    """Each expert in use, and where: (tokens, slots), both [n]."""
    return [(expert, np.nonzero(routes.experts == expert)) for expert in np.unique(routes.experts).tolist()]


def references(model, hparams, rows, *, blocks=16):
    """The exact f32 runner and the one that rounds as the GPU does, over the weights of one model."""
    exact = CpuRunner(model, hparams, kv_blocks=blocks)
    twin = CpuRunner(model, hparams, kv_blocks=blocks, kv_dtype=np.float16)
    for runner, ops in ((exact, StreamedOps), (twin, StreamedTwin)):
        runner._ops = {phase: ops(runner.cache, phase, rows) for phase in Phase}
    return exact, twin
