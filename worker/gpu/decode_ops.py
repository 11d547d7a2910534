"""`worker.ops.Ops` of generated tokens on the GPU: compositions of launchers, and nothing computed here.

Products read 8-bit activations on CUDA cores. Where a batch's tokens stand, the device knows: of the batch itself only
shapes are read, so a captured step serves every token after it. Twin: `worker/cpu/ops.py`; prompts: `prefill_ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.gpu import matvec
from worker.gpu.attention import AttentionLauncher
from worker.gpu.embedding import embed
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray
from worker.gpu.quantized import Activations
from worker.gpu.routing import routed
from worker.gpu.state import StepState
from worker.ops import SWIGLU, Activation, Attention, Batch, Linear, QTensor, RmsNorm, Routes

_AT_ONCE = 3  # projections of one input in one launch


@dataclass(frozen=True, slots=True)
class Normed:
    """norm(x), not computed yet: the product that reads it norms for itself."""

    x: DeviceArray
    norm: RmsNorm


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
        groups = (linears[at : at + _AT_ONCE] for at in range(0, len(linears), _AT_ONCE))
        rows = Activations(x)
        return tuple(y for group in groups for y in matvec.matvec(self._kernels, self._pool, rows, norm, group))

    def attention(self, q: DeviceArray, k: DeviceArray, v: DeviceArray, spec: Attention, batch: Batch) -> Activations:
        """See `Ops.attention`; y comes in the forms that `linear_add` takes."""
        return self._attention.decode(self._kernels, self._pool, q, k, v, spec, self._state)

    def linear_add(self, y: Activations, linear: Linear, residual: DeviceArray) -> DeviceArray:
        """See `Ops.linear_add`; y is what `attention` or `norm_glu` gave."""
        (x,) = matvec.matvec(self._kernels, self._pool, y, None, (linear,), residual)
        return x

    def norm_glu(
        self, x: DeviceArray, norm: RmsNorm, gate: Linear, up: Linear, activation: Activation = SWIGLU
    ) -> Activations:
        """See `Ops.norm_glu`; h comes in the forms that `linear_add` takes."""
        return matvec.glu(self._kernels, self._pool, Activations(x), norm, gate, up, activation)

    def norm_route(self, x: DeviceArray, norm: RmsNorm, router: Linear, k: int) -> tuple[Normed, Routes]:
        """See `Ops.norm_route`; the norm itself is left to `experts_glu`."""
        return Normed(x, norm), routed(self._kernels, self._pool, x, norm, router, k)

    def experts_glu(self, n: Normed, routes: Routes, gate: Linear, up: Linear, activation: Activation) -> Activations:
        """See `Ops.experts_glu`; h [T·k, f] comes in the forms that `experts_add` takes."""
        return matvec.glu(self._kernels, self._pool, Activations(n.x), n.norm, gate, up, activation, routes)

    def experts_add(self, h: Activations, routes: Routes, down: Linear, residual: DeviceArray) -> DeviceArray:
        """See `Ops.experts_add`."""
        return matvec.experts_add(self._kernels, self._pool, h, routes, down, residual)

    def gather_rows(self, x: DeviceArray, batch: Batch) -> DeviceArray:
        """See `Ops.gather_rows`: a decode step wants the logits of all its rows."""
        return x
