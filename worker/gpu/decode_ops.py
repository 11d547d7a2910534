"""`worker.ops.Ops` of generated tokens on the GPU: compositions of launchers, and nothing computed here.

Products read 8-bit activations on CUDA cores. Where a batch's tokens stand, the device knows: of the batch itself only
shapes are read, so a captured step serves every token after it. Twin: `worker/cpu/ops.py`; prompts: `prefill_ops.py`.
"""

from __future__ import annotations

from worker.gpu import matvec
from worker.gpu.attention import AttentionLauncher
from worker.gpu.embedding import embed
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.gpu.norms import rows_for
from worker.gpu.quantized import Activations, wants
from worker.gpu.routing import routed
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
        return n, routed(self._kernels, self._pool, n, router, k)

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
