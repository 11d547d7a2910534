"""`worker.ops.Ops` of one piece of a prompt on the GPU: compositions of launchers, and nothing computed here.

Products read f16 activations on tensor cores; a router stays on decode's path, so that which experts a token takes is
decided in f32. Twin: `worker/cpu/ops.py`; generated tokens: `decode_ops.py`.
"""

from __future__ import annotations

import numpy as np

from worker.gpu import matmul
from worker.gpu.attention import AttentionLauncher, PromptPiece
from worker.gpu.embedding import embed
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.gpu.norms import halved_rows
from worker.gpu.quantized import Halved
from worker.gpu.routing import routed
from worker.ops import SWIGLU, Activation, Attention, Batch, Linear, QTensor, RmsNorm, Routes


class PrefillOps:
    """Ops of one piece of a prompt: `tokens` [T] i32 on the device, at the piece's positions."""

    def __init__(
        self,
        kernels: Launcher,
        pool: Allocator,
        attention: AttentionLauncher,
        tokens: DeviceArray,
        piece: PromptPiece,
    ) -> None:
        self._kernels = kernels
        self._pool = pool
        self._attention = attention
        self._tokens = tokens
        self._piece = piece

    def embed(self, table: QTensor, batch: Batch) -> DeviceArray:
        """See `Ops.embed`."""
        return embed(self._kernels, self._pool, table, self._tokens[: len(batch.tokens)])

    def norm_linear(self, x: DeviceArray, norm: RmsNorm, *linears: Linear) -> tuple[DeviceArray, ...]:
        """See `Ops.norm_linear`; of no rows, as where no logits are wanted, nothing is computed."""
        if len(x) == 0:
            return tuple(self._pool.empty((0, linear.weight.shape[0]), np.float32) for linear in linears)
        n = halved_rows(self._kernels, self._pool, x, norm)
        return tuple(matmul.matmul(self._kernels, self._pool, n, linear) for linear in linears)

    def attention(self, q: DeviceArray, k: DeviceArray, v: DeviceArray, spec: Attention, batch: Batch) -> DeviceArray:
        """See `Ops.attention`."""
        return self._attention.prefill(self._kernels, self._pool, q, k, v, spec, self._piece)

    def linear_add(self, y: DeviceArray, linear: Linear, residual: DeviceArray) -> DeviceArray:
        """See `Ops.linear_add`."""
        return matmul.matmul(self._kernels, self._pool, halved_rows(self._kernels, self._pool, y), linear, residual)

    def norm_glu(
        self, x: DeviceArray, norm: RmsNorm, gate: Linear, up: Linear, activation: Activation = SWIGLU
    ) -> DeviceArray:
        """See `Ops.norm_glu`."""
        n = halved_rows(self._kernels, self._pool, x, norm)
        return matmul.glu(self._kernels, self._pool, n, gate, up, activation)

    def norm_route(self, x: DeviceArray, norm: RmsNorm, router: Linear, k: int) -> tuple[Halved, Routes]:
        """See `Ops.norm_route`; n is what `experts_glu` takes."""
        n = halved_rows(self._kernels, self._pool, x, norm)
        return n, routed(self._kernels, self._pool, x, norm, router, k)

    def experts_glu(self, n: Halved, routes: Routes, gate: Linear, up: Linear, activation: Activation) -> DeviceArray:
        """See `Ops.experts_glu`."""
        return matmul.glu(self._kernels, self._pool, n, gate, up, activation, routes)

    def experts_add(self, h: DeviceArray, routes: Routes, down: Linear, residual: DeviceArray) -> DeviceArray:
        """See `Ops.experts_add`."""
        rows = halved_rows(self._kernels, self._pool, h.reshape(-1, h.shape[-1]))
        return matmul.experts_add(self._kernels, self._pool, rows, routes, down, residual)

    def take_rows(self, x: DeviceArray, batch: Batch) -> DeviceArray:
        """See `Ops.take_rows`: neighbours are a view, others are copied one by one."""
        rows = batch.logit_rows
        if len(rows) == 0 or np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            return x[int(rows[0]) :][: len(rows)] if len(rows) else x[:0]
        taken = self._pool.empty((len(rows), x.shape[1]), np.float32)
        for i, row in enumerate(rows.tolist()):
            taken[i] = x[row]
        return taken
