"""`worker.ops.Ops` of a batch of chunks of prompts on the GPU: compositions of launchers.

Products read f16 activations on tensor cores; the router uses decode's kernels, so that experts are
chosen in f32. Chunks, positions and the number of rows are read from device state; of the argument
`batch` only shapes are read, so that a captured batch serves every smaller one. Twin:
`worker/cpu/ops.py`, one chunk at a time. Generated tokens: `decode_ops.py`.
"""

from dataclasses import dataclass

from worker.gpu import matmul, matvec
from worker.gpu.activations import ScaledF16, scale_to_f16
from worker.gpu.glu_bounds import GluBounds
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layer_inputs import add_normed_groups, gate_group
from worker.gpu.layouts import embed, gather_rows
from worker.gpu.matmul_params import ExpertGroups
from worker.gpu.memory import DeviceArray
from worker.gpu.norms import branches_norm_add, norm_add
from worker.gpu.prefill_attention import PrefillAttention
from worker.gpu.prefill_state import PrefillState
from worker.gpu.softcap import softcap
from worker.ops import SWIGLU, Activation, Attention, Batch, Branch, Linear, QTensor, RmsNorm, Router, Routes


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """Rows [R, …] f32 whose logits are requested; device state holds how many of them are valid."""

    x: DeviceArray


Rows = DeviceArray | GatheredRows


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """Rows x [T, d] f32 before their norm, and the groups of their slots."""

    x: DeviceArray
    norm: RmsNorm
    groups: ExpertGroups


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """Input rows of the experts' down products, a row a slot, sorted by expert."""

    rows: ScaledF16
    groups: ExpertGroups


class PrefillOps:
    """Ops of the batch that `state` holds when the kernels run."""

    def __init__(
        self,
        kernels: Launcher,
        pool: Allocator,
        attention: PrefillAttention,
        glu_bounds: GluBounds,
        state: PrefillState,
    ) -> None:
        self._kernels = kernels
        self._pool = pool
        self._attention = attention
        self._glu_bounds = glu_bounds
        self._state = state

    def embed(self, table: QTensor, batch: Batch, scale: float = 1.0) -> DeviceArray:
        return embed(self._kernels, self._pool, table, self._state.tokens[: len(batch.tokens)], scale=scale)

    def layer_inputs(self, x: DeviceArray, linear: Linear, norm: RmsNorm, rows: DeviceArray) -> DeviceArray:
        y = matmul.matmul(self._kernels, self._pool, self._scaled(x), linear)
        return add_normed_groups(self._kernels, y, norm, rows, self._state.count)

    def linear_gate(self, x: Rows, gate: Linear, inputs: Rows, layer: int, activation: Activation) -> Rows:
        y = matmul.matmul(self._kernels, self._pool, self._scaled(x), gate)
        return _like(x, gate_group(self._kernels, y, _array(inputs), layer, activation, self._count(x)))

    def norm_linear(self, x: Rows, norm: RmsNorm, *linears: Linear) -> tuple[DeviceArray, ...]:
        return matmul.projections(self._kernels, self._pool, self._scaled(x, norm), linears)

    def norm_attention(
        self, x: DeviceArray, norm: RmsNorm, linears: tuple[Linear, Linear, Linear], spec: Attention, batch: Batch
    ) -> ScaledF16:
        """See `Ops.norm_attention`; y is the input of `linear_add`."""
        rows = self._scaled(x, norm)
        queries = self._attention.project(self._kernels, self._pool, rows, linears, spec, self._state)
        if queries is None:
            q, k, v = matmul.projections(self._kernels, self._pool, rows, linears)
            return self.attention(q, k, v, spec, batch)
        return self._attention.attend(self._kernels, self._pool, queries, spec, self._state)

    def attention(
        self, q: DeviceArray, k: DeviceArray | None, v: DeviceArray | None, spec: Attention, batch: Batch
    ) -> ScaledF16:
        """See `Ops.attention`; y is the input of `linear_add`."""
        return self._attention.launch(self._kernels, self._pool, q, k, v, spec, self._state)

    def linear_add(self, y: Rows | ScaledF16, linear: Linear, residual: Rows | None) -> Rows:
        rows = y if isinstance(y, ScaledF16) else self._scaled(y)
        x = matmul.matmul(self._kernels, self._pool, rows, linear, None if residual is None else _array(residual))
        return _like(y if residual is None else residual, x)

    def linear_norm_add(
        self, y: Rows | ScaledF16, linear: Linear, norm: RmsNorm, residual: Rows, scale: float = 1.0
    ) -> Rows:
        rows = y if isinstance(y, ScaledF16) else self._scaled(y)
        z = matmul.matmul(self._kernels, self._pool, rows, linear)
        x = norm_add(self._kernels, self._pool, z, norm, _array(residual), self._count(residual), scale)
        return _like(residual, x)

    def branches_norm_add(
        self, branches: tuple[Branch, Branch], norm: RmsNorm, residual: Rows, scale: float = 1.0
    ) -> Rows:
        (a, a_norm), (b, b_norm) = branches
        arrays = (_array(a), a_norm), (_array(b), b_norm)
        count = self._count(residual)
        x = branches_norm_add(self._kernels, self._pool, arrays, norm, _array(residual), count, scale)
        return _like(residual, x)

    def norm_glu(self, x: Rows, norm: RmsNorm, gate: Linear, up: Linear, activation: Activation = SWIGLU) -> ScaledF16:
        """See `Ops.norm_glu`; h is the input of `linear_add` or `linear_norm_add`."""
        bounds = self._glu_bounds.of(gate, up, activation)
        n = scale_to_f16(self._kernels, self._pool, _array(x), norm, self._count(x), glu_bounds=bounds)
        return matmul.glu(self._kernels, self._pool, n, gate, up, activation)

    def norm_route(self, x: Rows, norm: RmsNorm, router: Router, k: int) -> tuple[RoutedTokens, Routes]:
        """See `Ops.norm_route`; n is the input of `experts_glu`."""
        routes = matvec.norm_route(self._kernels, self._pool, _array(x), norm, router, k)
        experts = router.linear.weight.shape[0]
        groups = matmul.group_routes(self._kernels, self._pool, routes, experts, self._count(x))
        return RoutedTokens(_array(x), norm, groups), routes

    def experts_glu(
        self, n: RoutedTokens, routes: Routes, gate: Linear, up: Linear, activation: Activation
    ) -> RoutedRows:
        """See `Ops.experts_glu`; h is the input of `experts_add`."""
        groups, bounds = n.groups, self._glu_bounds.of(gate, up, activation)
        rows = scale_to_f16(
            *(self._kernels, self._pool, n.x, n.norm, groups.count, groups.k, groups.places), glu_bounds=bounds
        )
        return RoutedRows(matmul.glu(self._kernels, self._pool, rows, gate, up, activation, groups), groups)

    def experts_add(self, h: RoutedRows, routes: Routes, down: Linear, residual: Rows | None) -> Rows:
        """See `Ops.experts_add`; without a residual, the input of `branches_norm_add`."""
        array = None if residual is None else _array(residual)
        added = matmul.experts_add(self._kernels, self._pool, h.rows, routes, h.groups, down, array)
        return _like(residual, added)

    def softcap(self, logits: DeviceArray, cap: float) -> DeviceArray:
        return softcap(self._kernels, logits, cap)

    def gather_rows(self, x: DeviceArray | ScaledF16, batch: Batch) -> GatheredRows | ScaledF16:
        wanted = self._state.wanted[: len(batch.logit_rows)]
        if not isinstance(x, ScaledF16):
            return GatheredRows(gather_rows(self._kernels, self._pool, x, wanted))
        assert x.scale is None, "attention rows have no scale"
        return ScaledF16(gather_rows(self._kernels, self._pool, x.x, wanted), None, self._state.wanted_count)

    def _scaled(self, x: Rows, norm: RmsNorm | None = None) -> ScaledF16:
        return scale_to_f16(self._kernels, self._pool, _array(x), norm, self._count(x))

    def _count(self, x: Rows) -> DeviceArray:
        """[1] i32: the number of valid rows of x."""
        return self._state.wanted_count if isinstance(x, GatheredRows) else self._state.count


def _array(x: Rows) -> DeviceArray:
    return x.x if isinstance(x, GatheredRows) else x


def _like(x: Rows | ScaledF16 | None, y: DeviceArray) -> Rows:
    """y as rows of the same tokens as x."""
    return GatheredRows(y) if isinstance(x, GatheredRows) else y
