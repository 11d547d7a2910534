"""`worker.ops.Ops` of generated tokens on the GPU: compositions of launchers.

Products read Q8 activations on CUDA cores. The slots of the rows, their tokens and positions are
read from device state; of the batch only shapes are read, so that a captured step can be replayed.
Twin: `worker/cpu/ops.py`. Prompts: `prefill_ops.py`.
"""

from dataclasses import dataclass

from worker.gpu import decode_experts, matvec
from worker.gpu.activations import Q8Activations, Q8Tiles
from worker.gpu.decode_attention import DecodeAttention
from worker.gpu.decode_experts import ActiveRows, PairRows, RoutedRows
from worker.gpu.decode_products import DecodeProducts
from worker.gpu.head_norms import may_fuse_norms, normalize_heads
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layer_inputs import add_normed_groups, gate_group
from worker.gpu.layouts import embed
from worker.gpu.matvec import RouterLogits
from worker.gpu.memory import DeviceArray
from worker.gpu.norms import branches_norm_add, norm_add
from worker.gpu.softcap import softcap
from worker.gpu.state import StepState
from worker.ops import SWIGLU, Activation, Attention, Batch, Branch, Linear, QTensor, RmsNorm, Router, Routes

_MAX_PROJECTIONS = 3  # of one launch


@dataclass(frozen=True, slots=True)
class LazyNorm:
    """norm(x), computed by the product that reads it."""

    x: DeviceArray
    norm: RmsNorm


class DecodeOps:
    """Ops of generated tokens over the step state: one a sequence, with `drafts` several."""

    def __init__(
        self,
        kernels: Launcher,
        pool: Allocator,
        attention: DecodeAttention,
        state: StepState,
        max_shared: int,
        *,
        drafts: bool = False,
    ) -> None:
        self._kernels = kernels
        self._pool = pool
        self._attention = attention
        self._state = state
        self._drafts = drafts
        self._products = DecodeProducts(kernels, pool, max_shared)

    def embed(self, table: QTensor, batch: Batch, scale: float = 1.0) -> DeviceArray:
        slots = self._state.slots_of_rows(len(batch.tokens))
        tokens = self._state.tokens[: self._state.slots] if slots is None else self._state.tokens
        return embed(self._kernels, self._pool, table, tokens, slots, scale)

    def layer_inputs(self, x: DeviceArray, linear: Linear, norm: RmsNorm, rows: DeviceArray) -> DeviceArray:
        (y,) = self._products.multiply(Q8Activations(x), None, (linear,))
        return add_normed_groups(self._kernels, y, norm, rows)

    def linear_gate(
        self, x: DeviceArray, gate: Linear, inputs: DeviceArray, layer: int, activation: Activation
    ) -> Q8Activations:
        """See `Ops.linear_gate`; h is the input of `linear_norm_add`."""
        (y,) = self._products.multiply(Q8Activations(x), None, (gate,))
        return Q8Activations(gate_group(self._kernels, y, inputs, layer, activation))

    def norm_linear(self, x: DeviceArray, norm: RmsNorm, *linears: Linear) -> tuple[DeviceArray, ...]:
        groups = (linears[at : at + _MAX_PROJECTIONS] for at in range(0, len(linears), _MAX_PROJECTIONS))
        rows = Q8Activations(x)
        return tuple(y for group in groups for y in self._products.multiply(rows, norm, group))

    def norm_attention(
        self, x: DeviceArray, norm: RmsNorm, linears: tuple[Linear, Linear, Linear], spec: Attention, batch: Batch
    ) -> Q8Activations | Q8Tiles:
        """See `Ops.norm_attention`; y is f32 and Q8, the input of `linear_add`."""
        q, k, v = self.norm_linear(x, norm, *linears)
        return self.attention(q, k, v, spec, batch)

    def attention(
        self, q: DeviceArray, k: DeviceArray | None, v: DeviceArray | None, spec: Attention, batch: Batch
    ) -> Q8Activations | Q8Tiles:
        """See `Ops.attention`; y is f32 and Q8, the input of `linear_add`."""
        if len(q) > 1 or self._drafts or not may_fuse_norms(spec):
            v, spec = normalize_heads(self._kernels, self._pool, q, k, v, spec)
        self._attention.scale_queries(self._kernels, q, spec, self._state)
        if self._drafts and k is not None and v is not None:
            k, v = self._attention.write_rows(self._kernels, k, v, spec, self._state)
        return self._attention.launch(self._kernels, self._pool, q, k, v, spec, self._state)

    def linear_add(self, y: Q8Activations | Q8Tiles, linear: Linear, residual: DeviceArray | None) -> DeviceArray:
        """See `Ops.linear_add`; y is a result of `attention` or `norm_glu`."""
        (x,) = self._products.multiply(y, None, (linear,), residual)
        return x

    def linear_norm_add(
        self, y: Q8Activations | Q8Tiles, linear: Linear, norm: RmsNorm, residual: DeviceArray, scale: float = 1.0
    ) -> DeviceArray:
        """See `Ops.linear_norm_add`; y is a result of `attention` or `norm_glu`."""
        (z,) = self._products.multiply(y, None, (linear,))
        return norm_add(self._kernels, self._pool, z, norm, residual, scale=scale)

    def norm_glu(
        self, x: DeviceArray, norm: RmsNorm, gate: Linear, up: Linear, activation: Activation = SWIGLU
    ) -> Q8Activations | Q8Tiles:
        """See `Ops.norm_glu`; h is f32 and Q8 rows, the input of `linear_add`."""
        return self._products.gated(Q8Activations(x), norm, gate, up, activation)

    def norm_route(
        self, x: DeviceArray, norm: RmsNorm, router: Router, k: int
    ) -> tuple[LazyNorm | RoutedRows, Routes | RouterLogits]:
        """See `Ops.norm_route`; of one row the next two ops compute norm and choice."""
        if len(x) == 1:
            return LazyNorm(x, norm), matvec.router_logits(self._kernels, self._pool, x, norm, router, k)
        slots = self._state.slots_of_rows(len(x))
        active = None if slots is None else ActiveRows(slots, self._state.positions)
        max_shared = self._products.max_shared
        return decode_experts.norm_route(self._kernels, self._pool, x, norm, router, k, active, max_shared)

    def experts_glu(
        self, n: LazyNorm | RoutedRows, routes: Routes | RouterLogits, gate: Linear, up: Linear, activation: Activation
    ) -> Q8Activations | PairRows:
        """See `Ops.experts_glu`; h [T·k, f] is f32 and Q8 rows, the input of `experts_add`."""
        if isinstance(n, RoutedRows):
            assert isinstance(routes, Routes)
            return decode_experts.experts_glu(self._kernels, self._pool, n, routes, gate, up, activation)
        return matvec.glu(self._kernels, self._pool, Q8Activations(n.x), n.norm, gate, up, activation, routes)

    def experts_add(
        self, h: Q8Activations | PairRows, routes: Routes | RouterLogits, down: Linear, residual: DeviceArray | None
    ) -> DeviceArray:
        if isinstance(h, PairRows):
            assert isinstance(routes, Routes)
            return decode_experts.experts_add(self._kernels, self._pool, h, routes, down, residual)
        return matvec.experts_add(self._kernels, self._pool, h, routes, down, residual)

    def branches_norm_add(
        self, branches: tuple[Branch, Branch], norm: RmsNorm, residual: DeviceArray, scale: float = 1.0
    ) -> DeviceArray:
        return branches_norm_add(self._kernels, self._pool, branches, norm, residual, scale=scale)

    def softcap(self, logits: DeviceArray, cap: float) -> DeviceArray:
        return softcap(self._kernels, logits, cap)

    def gather_rows(self, x: DeviceArray, batch: Batch) -> DeviceArray:
        """See `Ops.gather_rows`: a decode step needs the logits of all its rows."""
        return x
