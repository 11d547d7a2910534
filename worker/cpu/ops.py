"""The op vocabulary on NumPy: fused ops composed of the functions of `plain.py` and `attention.py`.

The phases differ in the height of a matrix product's tile alone. Weights are f32 arrays.
"""

import numpy as np
import numpy.typing as npt

from worker.cpu.attention import attend
from worker.cpu.kv_cache import KvCache
from worker.cpu.plain import gated, matmul, rms_norm, rotate, top_k
from worker.cpu.threads import Threads
from worker.ops import (
    KV_BLOCK,
    SWIGLU,
    Activation,
    Attention,
    Batch,
    Branch,
    Linear,
    Phase,
    QTensor,
    RmsNorm,
    Router,
    Routes,
)

F32 = npt.NDArray[np.float32]


class CpuOps:
    """`worker.ops.Ops` on NumPy, for one phase, over one KV cache."""

    def __init__(self, cache: KvCache, phase: Phase, threads: Threads) -> None:
        self._cache = cache
        self._threads = threads
        self._tile = KV_BLOCK if phase is Phase.PREFILL else 1

    def embed(self, table: QTensor, batch: Batch, scale: float = 1.0) -> F32:
        x: F32 = table.data[batch.tokens]
        return x if scale == 1.0 else x * np.float32(scale)

    def layer_inputs(self, x: F32, linear: Linear, norm: RmsNorm, rows: F32) -> F32:
        groups = self._linear(x, linear).reshape(len(x), -1, norm.weight.shape[0])
        return rows + self._norm(groups, norm).reshape(rows.shape)

    def linear_gate(self, x: F32, gate: Linear, inputs: F32, layer: int, activation: Activation) -> F32:
        width = gate.weight.shape[0]
        return gated(self._linear(x, gate), inputs[:, layer * width : (layer + 1) * width], activation)

    def norm_linear(self, x: F32, norm: RmsNorm, *linears: Linear) -> tuple[F32, ...]:
        n = self._norm(x, norm)
        return tuple(self._linear(n, linear) for linear in linears)

    def norm_attention(
        self, x: F32, norm: RmsNorm, linears: tuple[Linear, Linear, Linear], spec: Attention, batch: Batch
    ) -> F32:
        q, k, v = self.norm_linear(x, norm, *linears)
        return self.attention(q, k, v, spec, batch)

    def attention(self, q: F32, k: F32 | None, v: F32 | None, spec: Attention, batch: Batch) -> F32:
        queries = q.reshape(len(q), spec.n_heads, spec.head_dim)
        if spec.q_norm is not None:
            queries = self._norm(queries, spec.q_norm)
        if spec.query_scale is not None:
            queries = queries * spec.query_scale.at(batch.positions)[:, None, None]
        if k is not None and v is not None:
            self._write(k, v, spec, batch)
        return attend(rotate(queries, batch.positions, spec.rope), self._cache, spec, batch)

    def _write(self, k: F32, v: F32, spec: Attention, batch: Batch) -> None:
        """Normalize and rotate the keys and write them and the values to the cache."""
        keys = k.reshape(len(k), spec.n_kv_heads, spec.head_dim)
        values = v.reshape(keys.shape)
        if spec.k_norm is not None:
            keys = self._norm(keys, spec.k_norm)
        if spec.v_epsilon is not None:
            values = rms_norm(values, np.float32(1), spec.v_epsilon)
        self._cache.write(spec.layer, batch, rotate(keys, batch.positions, spec.rope), values)

    def linear_add(self, y: F32, linear: Linear, residual: F32 | None) -> F32:
        z = self._linear(y, linear)
        return z if residual is None else residual + z

    def linear_norm_add(self, y: F32, linear: Linear, norm: RmsNorm, residual: F32, scale: float = 1.0) -> F32:
        return (residual + self._norm(self._linear(y, linear), norm)) * np.float32(scale)

    def norm_glu(self, x: F32, norm: RmsNorm, gate: Linear, up: Linear, activation: Activation = SWIGLU) -> F32:
        n = self._norm(x, norm)
        return gated(self._linear(n, gate), self._linear(n, up), activation)

    def norm_route(self, x: F32, norm: RmsNorm, router: Router, k: int) -> tuple[F32, Routes]:
        logits = self._router_linear(self._norm(x, router.norm or norm), router.linear)
        experts, weights = top_k(logits, k)
        if router.scales is not None:
            weights = weights * router.scales.data[experts]
        return self._norm(x, norm), Routes(experts, weights)

    def experts_glu(self, n: F32, routes: Routes, gate: Linear, up: Linear, activation: Activation) -> F32:
        h = np.empty((*routes.experts.shape, gate.weight.shape[1]), np.float32)
        for t, j in np.ndindex(*routes.experts.shape):
            g, u = (self._expert(n[t], linear, routes.experts[t, j]) for linear in (gate, up))
            h[t, j] = gated(g, u, activation)
        return h

    def experts_add(self, h: F32, routes: Routes, down: Linear, residual: F32 | None) -> F32:
        """See `Ops.experts_add`. The experts are added in the order of the routes."""
        x = np.zeros((len(h), down.weight.shape[1]), np.float32) if residual is None else residual.copy()
        for t, j in np.ndindex(*routes.experts.shape):
            x[t] += routes.weights[t, j] * self._expert(h[t, j], down, routes.experts[t, j])
        return x

    def branches_norm_add(
        self, branches: tuple[Branch, Branch], norm: RmsNorm, residual: F32, scale: float = 1.0
    ) -> F32:
        first, second = (self._norm(y, own) for y, own in branches)
        return (residual + self._norm(first + second, norm)) * np.float32(scale)

    def softcap(self, logits: F32, cap: float) -> F32:
        capped: F32 = np.float32(cap) * np.tanh(logits / np.float32(cap))
        return capped

    def gather_rows(self, x: F32, batch: Batch) -> F32:
        return x[batch.logit_rows]

    def _norm(self, x: F32, norm: RmsNorm) -> F32:
        return rms_norm(x, norm.weight.data, norm.eps)

    def _linear(self, x: F32, linear: Linear) -> F32:
        bias = None if linear.bias is None else linear.bias.data
        return matmul(x, linear.weight.data, bias, self._tile, self._threads)

    def _router_linear(self, n: F32, linear: Linear) -> F32:
        """Logits of a router; apart from `_linear` for tests whose products round their inputs."""
        return self._linear(n, linear)

    def _expert(self, x: F32, linear: Linear, expert: int) -> F32:
        """One expert's projection of one token, in both phases, so that routing changes no bits."""
        y: F32 = linear.weight.data[expert] @ x
        return y if linear.bias is None else y + linear.bias.data[expert]
