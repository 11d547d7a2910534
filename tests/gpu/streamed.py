"""References for a GPU model of any size: its weights are copied to the host slab by slab as f32.

gpt-oss-20b takes 84 GB as f32, more than a host's memory. Each slab serves three runs at once,
which are rows of one batch (`ThreeRuns`). The device's dequantization equals `gguf.quants` bitwise
(`test_layouts.py`), and `test_full_logits.py` compares the device's weights with the file. The runs
follow a trail: see `trail.py`.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from tests.quantized_ops import QuantizedOps
from worker.cpu.kv_cache import KvCache
from worker.cpu.ops import CpuOps
from worker.cpu.plain import gated, rms_norm, softmax
from worker.cpu.threads import Threads
from worker.ops import Routes

SLAB = 4 << 20
THREADS = 12
RUNS = 3


class DeviceRows:
    """Weights of a GPU model as f32 on the host, a slab at a time; close with `with`."""

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
        """A matrix [rows, cols] of at most SLAB bytes; this thread's next fetch overwrites it."""
        if not hasattr(self._lanes, "mine"):
            self._lanes.mine = _Lane(self._memory)
        return self._lanes.mine.fetch(self._kernels, matrix)

    def vector(self, tensor):
        """A norm's weight, a bias or sinks: [n] or [E, n]."""
        return tensor.data.get()

    def expert(self, weight, expert):
        """The matrix [rows, cols] of one expert."""
        planes = tuple(None if plane is None else plane[expert] for plane in weight.data.planes)
        return replace(weight, shape=weight.shape[1:], data=replace(weight.data, planes=planes))

    def product(self, x, matrix):
        """x·Wᵀ: y [n, rows] f32 of x [n, cols]."""
        rows, cols = matrix.shape
        y = np.empty((len(x), rows), np.float32)
        step = SLAB // (4 * cols)
        self.fetch(matrix.rows(0, 1))  # compiles the kernel, which only one thread may do

        def fill(start):
            slab = self.fetch(matrix.rows(start, min(start + step, rows)))
            y[:, start : start + len(slab)] = x @ slab.T

        list(self._threads.map(fill, range(0, rows, step)))
        return y


class _Lane:
    """One thread's stream, device slab and page-locked host slab."""

    def __init__(self, memory):
        import cupy

        from worker.gpu.memory import Pool, Purpose

        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._pool = Pool(memory, SLAB, Purpose.WORKSPACE)
        self._host = np.frombuffer(cupy.cuda.alloc_pinned_memory(SLAB), np.float32, SLAB // 4)

    def fetch(self, kernels, matrix):
        from worker.gpu.layouts import dequantize

        host = self._host[: np.prod(matrix.shape)].reshape(matrix.shape)
        with self._stream:
            return dequantize(kernels, self._pool, matrix).get(self._stream, out=host)


@dataclass
class Answers:
    """Logits [R, V] of the three runs, and what the led run found from the GPU's inputs.

    `halves`: per half of a layer, the GPU's distance relative to what the half adds. `tie`: the
    largest router logit by which the GPU's experts fall short of the best ones.
    """

    exact: np.ndarray
    twin: np.ndarray
    led: np.ndarray
    halves: list[float]
    tie: float


class References:
    """Three host runs of a GPU model: exact; a twin with the GPU's roundings; and a led twin.

    The led twin starts each half of a layer with the GPU's own residual stream.
    """

    def __init__(self, model, rows, *, blocks=16):
        self._model = model
        self._rows = rows
        layers = [layer.attention for layer in model.layers]
        self.caches = [KvCache(layers, blocks, kind) for kind in ("f32", "f16", "f16")]

    def set_cache(self, k, v):
        """Copy the GPU's KV cache [layers, blocks, B, Hk, D] into those of the two twins."""
        for cache in self.caches[1:]:
            for own, theirs in zip((*cache.k, *cache.v), (*k, *v), strict=True):
                own[: len(theirs)] = theirs

    def answers(self, batch, trail):
        """The forward of a batch that follows the GPU's trail."""
        ops = ThreeRuns(self.caches, batch.phase, self._rows, trail)
        logits = np.split(self._model.forward(ops, batch), RUNS)
        return Answers(*logits, ops.halves, ops.tie)


class ThreeRuns(CpuOps):
    """Ops of three runs (exact, twin, led) as rows of one batch [3·T, …].

    All use the GPU's experts.
    """

    def __init__(self, caches, phase, rows, trail):
        super().__init__(caches[0], phase, Threads(1))
        self._runs = [CpuOps(cache, phase, Threads(1)) for cache in caches]
        self._twin = QuantizedOps(caches[1], phase, Threads(1))
        self._rows = rows
        self._experts, self._residuals = iter(trail.experts), iter(trail.residuals)
        self.halves, self.tie = [], 0.0

    def embed(self, table, batch, scale=1.0):
        rows = [self._rows.fetch(table.rows(i, i + 1)) * np.float32(scale) for i in batch.tokens.tolist()]
        return np.concatenate(rows * RUNS)

    def attention(self, q, k, v, spec, batch):
        spec = replace(
            spec,
            sinks=spec.sinks and self._host(spec.sinks),
            q_norm=spec.q_norm and replace(spec.q_norm, weight=self._host(spec.q_norm.weight)),
            k_norm=spec.k_norm and replace(spec.k_norm, weight=self._host(spec.k_norm.weight)),
        )
        each = zip(self._runs, *(np.split(part, RUNS) for part in (q, k, v)), strict=True)
        return np.concatenate([ops.attention(*qkv, spec, batch) for ops, *qkv in each])

    def linear_add(self, y, linear, residual):
        x = super().linear_add(y, linear, residual)
        return x if residual is None else self._led(x, residual)

    def linear_norm_add(self, y, linear, norm, residual, scale=1.0):
        return self._led(super().linear_norm_add(y, linear, norm, residual, scale), residual)

    def branches_norm_add(self, branches, norm, residual, scale=1.0):
        return self._led(super().branches_norm_add(branches, norm, residual, scale), residual)

    def norm_route(self, x, norm, router, k):
        n = self._norm(x, norm)
        logits = self._product(self._norm(x, router.norm or norm), router.linear)
        experts = np.concatenate([next(self._experts)] * RUNS)
        chosen = np.take_along_axis(logits, experts, axis=-1)
        behind = np.sort(logits, axis=-1)[:, -k] - chosen.min(axis=-1)
        self.tie = max(self.tie, float(np.split(behind, RUNS)[-1].max()))
        weights = softmax(chosen)
        if router.scales is not None:
            weights = weights * self._rows.vector(router.scales)[experts]
        return n, Routes(experts, weights)

    def experts_glu(self, n, routes, gate, up, activation):
        n = self._rounded(n, gate)
        h = np.empty((*routes.experts.shape, gate.weight.shape[1]), np.float32)
        for expert, (tokens, slots) in by_expert(routes):
            g, u = (self._expert(n[tokens], linear, expert) for linear in (gate, up))
            h[tokens, slots] = gated(g, u, activation)
        return h

    def experts_add(self, h, routes, down, residual):
        h = self._rounded(h, down)
        y = np.empty((*routes.experts.shape, down.weight.shape[1]), np.float32)
        for expert, at in by_expert(routes):
            y[at] = self._expert(h[at], down, expert)
        sums = (routes.weights[:, :, None] * y).sum(axis=1, dtype=np.float32)
        return sums if residual is None else self._led(residual + sums, residual)

    def gather_rows(self, x, batch):
        return np.concatenate([run[batch.logit_rows] for run in np.split(x, RUNS)])

    def _led(self, x, residual):
        """x with the led run's rows replaced by the GPU's, after both were compared."""
        theirs, at = next(self._residuals), len(x) // RUNS * (RUNS - 1)
        added = np.linalg.norm(x[at:] - residual[at:])
        self.halves.append(float(np.linalg.norm(theirs - x[at:]) / added))
        return np.concatenate([x[:at], theirs])

    def _host(self, tensor):
        """A vector with its values on the host."""
        return replace(tensor, data=self._rows.vector(tensor))

    def _rounded(self, x, linear):
        """x as the products round it; the exact run's rows unchanged."""
        at = len(x) // RUNS
        return np.concatenate([x[:at], self._twin._rounded(x[at:], linear)])

    def _norm(self, x, norm):
        return rms_norm(x, self._rows.vector(norm.weight), norm.eps)

    def _linear(self, x, linear):
        return self._product(self._rounded(x, linear), linear)

    def _product(self, x, linear):
        y = self._rows.product(x, linear.weight)
        return y if linear.bias is None else y + self._rows.vector(linear.bias)

    def _expert(self, x, linear, expert):
        y = self._rows.product(x, self._rows.expert(linear.weight, expert))
        return y if linear.bias is None else y + self._rows.vector(linear.bias)[expert]


def by_expert(routes):
    """Each chosen expert with its (tokens, slots), both [n]."""
    return [(expert, np.nonzero(routes.experts == expert)) for expert in np.unique(routes.experts).tolist()]
