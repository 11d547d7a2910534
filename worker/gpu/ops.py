"""`worker.ops.Ops` on the GPU, one class a phase: compositions of launchers, and nothing computed here.

Decode multiplies 8-bit activations on CUDA cores, prefill f16 ones on tensor cores; a router stays on decode's path in
both, so that which experts a token takes is decided in f32. Where a batch's tokens stand, the device knows: of the
batch itself only shapes are read, so a captured step serves every token after it. Twin: `worker/cpu/ops.py`.
"""

from __future__ import annotations

import numpy as np

from worker.gpu import matmul, matvec
from worker.gpu.attention import AttentionLauncher, PromptPiece
from worker.gpu.embedding import embed
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.gpu.norms import halved_rows, rows_for
from worker.gpu.quantized import Activations, Halved, wants
from worker.gpu.routing import route
from worker.gpu.state import StepState
from worker.ops import SWIGLU, Activation, Attention, Batch, Linear, QTensor, RmsNorm, Routes

_AT_ONCE = 3  # projections of one input in one launch


class DecodeOps:
    """Ops of generated tokens, one a sequence, over the step state."""

    def __init__(self, kernels: Launcher, pool: Allocator, attention: AttentionLauncher, state: StepState) -> None:
        self._kernels = kernels
        self._pool = pool
        self._attention = attention
        self._state = state

    def embed(self, table: QTensor, batch: Batch) -> DeviceArray:
        """See `Ops.embed`."""
        return embed(self._kernels, self._pool, table, self._state.tokens[: len(batch.tokens)])

    def norm_linear(self, x: DeviceArray, norm: RmsNorm, *linears: Linear) -> tuple[DeviceArray, ...]:
        """See `Ops.norm_linear`."""
        n = self._rows(x, norm, *linears)
        groups = (linears[at : at + _AT_ONCE] for at in range(0, len(linears), _AT_ONCE))
        return tuple(y for group in groups for y in matvec.matvec(self._kernels, self._pool, n, group))

    def attention(self, q: DeviceArray, k: DeviceArray, v: DeviceArray, spec: Attention, batch: Batch) -> Activations:
        """See `Ops.attention`; y comes in the forms that `linear_add` takes."""
        return self._attention.decode(self._kernels, self._pool, q, k, v, spec, self._state)

    def linear_add(self, y: DeviceArray | Activations, linear: Linear, residual: DeviceArray) -> DeviceArray:
        """See `Ops.linear_add`."""
        rows = y if isinstance(y, Activations) else self._rows(y, None, linear)
        (x,) = matvec.matvec(self._kernels, self._pool, rows, (linear,), residual)
        return x

    def norm_glu(
        self, x: DeviceArray, norm: RmsNorm, gate: Linear, up: Linear, activation: Activation = SWIGLU
    ) -> DeviceArray:
        """See `Ops.norm_glu`."""
        return matvec.glu(self._kernels, self._pool, self._rows(x, norm, gate, up), gate, up, activation)

    def norm_route(self, x: DeviceArray, norm: RmsNorm, router: Linear, k: int) -> tuple[Activations, Routes]:
        """See `Ops.norm_route`; n is what `experts_glu` takes."""
        n = rows_for(self._kernels, self._pool, x, norm, quantized=True, plain=True)
        return n, _routed(self._kernels, self._pool, n, router, k)

    def experts_glu(
        self, n: Activations, routes: Routes, gate: Linear, up: Linear, activation: Activation
    ) -> DeviceArray:
        """See `Ops.experts_glu`."""
        return matvec.glu(self._kernels, self._pool, n, gate, up, activation, routes)

    def experts_add(self, h: DeviceArray, routes: Routes, down: Linear, residual: DeviceArray) -> DeviceArray:
        """See `Ops.experts_add`."""
        rows = self._rows(h.reshape(-1, h.shape[-1]), None, down)
        return matvec.experts_add(self._kernels, self._pool, rows, routes, down, residual)

    def take_rows(self, x: DeviceArray, batch: Batch) -> DeviceArray:
        """See `Ops.take_rows`: a decode step wants the logits of all its rows."""
        return x

    def _rows(self, x: DeviceArray, norm: RmsNorm | None, *linears: Linear) -> Activations:
        quantized, plain = wants(linears)
        return rows_for(self._kernels, self._pool, x, norm, quantized=quantized, plain=plain)


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
        quantized, _ = wants((router,))
        n = rows_for(self._kernels, self._pool, x, norm, quantized=quantized, plain=True)
        return halved_rows(self._kernels, self._pool, n.x), _routed(self._kernels, self._pool, n, router, k)

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


def _routed(kernels: Launcher, pool: Allocator, n: Activations, router: Linear, k: int) -> Routes:
    """The router's choice, alike in both phases."""
    (logits,) = matvec.matvec(kernels, pool, n, (router,))
    return route(kernels, pool, logits, k)
