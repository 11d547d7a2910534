"""Interface between models and devices: the ops that adapters call, and the glossary of shapes.

An op has one name in this protocol, in its NumPy twin in `worker/cpu/` (the definition), in its
CuPy launcher in `worker/gpu/`, which names its kernels, and in its test. Next:
`worker/adapters/llama.py`.

Glossary, used everywhere:
    T tokens in the batch     S sequences            d model width      f FFN width
    H query heads             Hk KV heads            D head width       V vocabulary
    E, k experts and active   B tokens in a KV block
A shape is written `x [T, d] f32`. Activations are f32; products accumulate in f32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from worker.quants import QuantType
from worker.rope import Rope

Array: TypeAlias = Any
"""An array on the device that the ops belong to: `numpy.ndarray` or `cupy.ndarray`."""

Ints: TypeAlias = npt.NDArray[np.int32]

KV_BLOCK = 16
"""B: tokens in a KV block, and the row tile in which prompt tokens are computed: the token at
position p is row p mod B of a tile, whatever is computed with it."""


class Phase(Enum):
    """The path that computes a token. Its kind decides, so batching changes no bits."""

    PREFILL = "prefill"
    """Prompt tokens."""
    DECODE = "decode"
    """Generated tokens, and published tokens that a later worker replays."""


@dataclass(frozen=True, slots=True)
class QTensor:
    """A weight on its device; `shape` is row-major: (rows, cols), (E, rows, cols) or (n,).

    `kind` is the type in the file, or the format that the backend stores it in. The backend defines
    the format of `data`, whose first axis can be sliced.
    """

    name: str
    shape: tuple[int, ...]
    kind: QuantType
    data: Any

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows [start, stop) as a tensor that shares storage, for splitting fused projections."""
        data = None if self.data is None else self.data[start:stop]
        return replace(self, name=f"{self.name}[{start}:{stop}]", shape=(stop - start, *self.shape[1:]), data=data)


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x·Wᵀ + b with W [rows, cols], b [rows]; for experts W [E, rows, cols], b [E, rows]."""

    weight: QTensor
    bias: QTensor | None = None

    def rows(self, start: int, stop: int) -> Linear:
        """Output features [start, stop) as a projection that shares storage."""
        return Linear(self.weight.rows(start, stop), self.bias and self.bias.rows(start, stop))


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """y = x / sqrt(mean(x²) + eps) · weight [d] (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    weight: QTensor
    eps: float


@dataclass(frozen=True, slots=True)
class PositionScale:
    """1 + scale · ln(1 + ⌊position / length⌋), the temperature of attention of Llama 4."""

    scale: float
    length: int

    def at(self, positions: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """The factors of `positions`, computed in f64: the same shape, f32."""
        factors: npt.NDArray[np.float32] = (1 + self.scale * np.log1p(positions // self.length)).astype(np.float32)
        return factors


@dataclass(frozen=True, slots=True)
class Attention:
    """A layer's causal attention, scaled by D^-0.5. Query head h reads KV head h // (H/Hk)."""

    layer: int
    """The layer whose keys and values are read: its own, or with `reads_only` an earlier one."""
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope
    window: int = 0
    """Number of newest keys that a token attends to, itself included; 0 is all."""
    sinks: QTensor | None = None
    """[H] f32: a logit per query head, added to the denominator of the softmax without a value."""
    q_norm: RmsNorm | None = None
    """Norm [D] of each query head, before RoPE."""
    k_norm: RmsNorm | None = None
    """Norm [D] of each key head, before RoPE."""
    query_scale: PositionScale | None = None
    """Multiplies the queries of a position, after their norm and before RoPE."""
    v_epsilon: float | None = None
    """The epsilon of a norm of each value head, without a weight; None: values have no norm."""
    reads_only: bool = False
    """The layer has no keys and values of its own. Such layers come after all others."""

    @property
    def n_written(self) -> int:
        """KV heads that the layer writes."""
        return 0 if self.reads_only else self.n_kv_heads

    @property
    def q_width(self) -> int:
        """H·D, the width of all query heads; not necessarily d."""
        return self.n_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Hk·D, the width of all KV heads."""
        return self.n_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Activation:
    """Activation of a gated FFN: gate·σ(`alpha`·gate)·up.

    With `limit` L (gpt-oss): gate ≤ L and -L ≤ up ≤ L first, and up + 1 for up. With `cubic` c:
    σ(`alpha`·gate·(1 + c·gate²)), which with the constants of `GELU_GLU` is the tanh form of GELU
    (Hendrycks and Gimpel 2016, arXiv:1606.08415), since (1 + tanh x)/2 = σ(2x).
    """

    limit: float | None = None
    alpha: float = 1.0
    cubic: float = 0.0


SWIGLU = Activation()
GELU_GLU = Activation(alpha=2 * math.sqrt(2 / math.pi), cubic=0.044715)


@dataclass(frozen=True, slots=True)
class Router:
    """The choice of a token's experts: those with the highest logits of linear(norm(x))."""

    linear: Linear  # [E, d]
    norm: RmsNorm | None = None
    """None: the norm of the experts' input."""
    scales: QTensor | None = None
    """[E] f32: multiplies the weight of each expert."""


Branch: TypeAlias = tuple[Array, RmsNorm]
"""One of several results of a layer [T, d] f32 that are added, and its norm."""


@dataclass(frozen=True, slots=True)
class Routes:
    """Each token's experts [T, k] i32, by falling logit (ties: lower id); weights [T, k] f32."""

    experts: Array
    weights: Array


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one forward pass.

    PREFILL: consecutive tokens of one sequence, from a multiple of B on. DECODE: the newest token
    of each sequence, and draft tokens after it. `tokens`, `positions` [T] i32; `block_tables`: the
    KV blocks of positions 0, B, 2B, … of the sequence, in DECODE of each token's; `logit_rows` [R]:
    rows of the batch whose logits are requested.
    """

    phase: Phase
    tokens: Ints
    positions: Ints
    block_tables: tuple[Ints, ...]
    logit_rows: Ints


class Ops(Protocol):
    """The ops of one device for one phase, bound to its KV cache."""

    def embed(self, table: QTensor, batch: Batch, scale: float = 1.0) -> Array:
        """Rows of `table` [V, d] for the batch's tokens, times `scale`: x [T, d] f32."""

    def layer_inputs(self, x: Array, linear: Linear, norm: RmsNorm, rows: Array) -> Array:
        """rows + norm(linear(x)) by groups of P elements, the norm's width: [T, layers·P] f32.

        `rows` is a result of `embed`, and may be overwritten.
        """

    def linear_gate(self, x: Array, gate: Linear, inputs: Array, layer: int, activation: Activation) -> Array:
        """activation(gate(x), up) with the layer's group of `inputs` for up: h [T, P] f32."""

    def norm_linear(self, x: Array, norm: RmsNorm, *linears: Linear) -> tuple[Array, ...]:
        """Several projections of one norm: y_j [T, rows_j] f32."""

    def norm_attention(
        self, x: Array, norm: RmsNorm, linears: tuple[Linear, Linear, Linear], spec: Attention, batch: Batch
    ) -> Array:
        """`norm_linear` for q, k and v, then `attention` of them: y [T, H·D] f32."""

    def attention(self, q: Array, k: Array | None, v: Array | None, spec: Attention, batch: Batch) -> Array:
        """Rotate q [T, H·D] and k [T, Hk·D], write k and v to the cache, attend: y [T, H·D] f32.

        The norms of `spec`, if any, come first. q and k may be overwritten. v may be k: the values
        are then the keys before their norm and RoPE. k and v are None if `spec` reads only.
        """

    def linear_add(self, y: Array, linear: Linear, residual: Array | None) -> Array:
        """residual + linear(y): x [T, d] f32. Without a residual, y is a result of `norm_glu`."""

    def linear_norm_add(self, y: Array, linear: Linear, norm: RmsNorm, residual: Array, scale: float = 1.0) -> Array:
        """(residual + norm(linear(y))) · scale: x [T, d] f32."""

    def norm_glu(self, x: Array, norm: RmsNorm, gate: Linear, up: Linear, activation: Activation = SWIGLU) -> Array:
        """activation(gate(n), up(n)) of n = norm(x): h [T, f] f32."""

    def norm_route(self, x: Array, norm: RmsNorm, router: Router, k: int) -> tuple[Array, Any]:
        """n = norm(x) [T, d] and its `k` experts, weighted by the softmax of their logits: Routes.

        A device may have a form of its own, from which the next two ops make the choice.
        """

    def experts_glu(self, n: Array, routes: Any, gate: Linear, up: Linear, activation: Activation) -> Array:
        """Each token's gated FFN in each of its experts: h [T, k, f] f32."""

    def experts_add(self, h: Array, routes: Any, down: Linear, residual: Array | None) -> Array:
        """residual + Σ_j weights[:, j] · down_{experts[:, j]}(h[:, j]): x [T, d] f32.

        The op before is the `experts_glu` of h, and `residual` is older than that: a device may
        read it while `experts_glu` runs.
        """

    def branches_norm_add(
        self, branches: tuple[Branch, Branch], norm: RmsNorm, residual: Array, scale: float = 1.0
    ) -> Array:
        """(residual + norm(Σ_i norm_i(y_i))) · scale of the branches (y_i, norm_i): x [T, d] f32.

        y_i are results of `linear_add` and `experts_add` without a residual.
        """

    def softcap(self, logits: Array, cap: float) -> Array:
        """cap · tanh(logits / cap): [R, V] f32. `logits` may be overwritten."""

    def gather_rows(self, x: Array, batch: Batch) -> Array:
        """The batch's `logit_rows` of x [T, …], a residual or a result of `attention`: [R, …]."""
