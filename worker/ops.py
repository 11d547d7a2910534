"""Seam 3: the op vocabulary that every model is written in, and the glossary of its shapes.

An adapter calls nothing else. Each op has one name in five places: here, its NumPy twin in `worker/cpu/` (the
definition), its CuPy launcher in `worker/gpu/`, its `.cu` file and its test. Knows no device and no file format.

Glossary, used word for word everywhere:
    T tokens in the batch     S sequences            d model width      f FFN width
    H query heads             Hk KV heads            D head width       V vocabulary
    E, k experts and active   B tokens in a KV block
A shape is written `x [T, d] f32`. Activations are f32; products accumulate in f32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from worker.quants import QuantType

Array: TypeAlias = Any
"""An array on the device that the ops belong to: `numpy.ndarray` or `cupy.ndarray`."""

Ints: TypeAlias = npt.NDArray[np.int32]

KV_BLOCK = 16
"""B: tokens in a KV block, and the row tile in which prompt tokens are computed."""


class Phase(Enum):
    """Which path computes a token. Chosen by what the token is, never by how many there are: so bits don't move."""

    PREFILL = "prefill"
    """Prompt tokens."""
    DECODE = "decode"
    """Generated tokens, and published ones that a later worker replays."""


@dataclass(frozen=True, slots=True)
class QTensor:
    """A weight as its device holds it: `shape` is row-major, (rows, cols) or (E, rows, cols) or (n,) for a vector.

    `kind` is the type in the file. `data` belongs to the backend that made it; its first axis can be sliced.
    """

    name: str
    shape: tuple[int, ...]
    kind: QuantType
    data: Any

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows [start, stop) as a tensor of their own, sharing storage: how fused projections are taken apart."""
        data = None if self.data is None else self.data[start:stop]
        return replace(self, name=f"{self.name}[{start}:{stop}]", shape=(stop - start, *self.shape[1:]), data=data)


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x·Wᵀ + b with W [rows, cols] and b [rows]; for experts W [E, rows, cols] and b [E, rows]."""

    weight: QTensor
    bias: QTensor | None = None

    def rows(self, start: int, stop: int) -> Linear:
        """The output features [start, stop) as a projection of their own."""
        return Linear(self.weight.rows(start, stop), self.bias and self.bias.rows(start, stop))


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """y = x / sqrt(mean(x²) + eps) · weight [d] (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    weight: QTensor
    eps: float


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) as tables over positions, made by `worker/rope.py`.

    `cos`, `sin` [context, dims/2] f32 already hold the magnitude. `adjacent` pairs (2i, 2i+1), else (i, i + dims/2).
    Only the first `dims` of a head's D are turned.
    """

    cos: npt.NDArray[np.float32]
    sin: npt.NDArray[np.float32]
    adjacent: bool

    @property
    def dims(self) -> int:
        """How many of a head's D elements are turned."""
        return 2 * int(self.cos.shape[1])


@dataclass(frozen=True, slots=True)
class Attention:
    """What one layer's attention is: causal, grouped (query head h reads KV head h // (H/Hk)), scaled by D^-0.5."""

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope
    window: int = 0
    """Newest keys that a token sees, itself included; 0 sees all."""
    sinks: QTensor | None = None
    """One logit a query head that joins the softmax's denominator and carries no value."""


@dataclass(frozen=True, slots=True)
class Activation:
    """The gate of a gated FFN. SwiGLU: silu(gate)·up.

    With `limit` L and `alpha` a, gpt-oss's: gate ≤ L, -L ≤ up ≤ L, then gate·σ(a·gate)·(up + 1).
    """

    limit: float | None = None
    alpha: float = 1.0


SWIGLU = Activation()


@dataclass(frozen=True, slots=True)
class Routes:
    """Where a router sends each token: `experts` [T, k] i32 by falling logit (ties: lower id), `weights` [T, k] f32."""

    experts: Array
    weights: Array


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one call. PREFILL: neighbours of one sequence that start at a multiple of B. DECODE: one of each.

    `tokens`, `positions` [T] i32; `block_tables`: for each sequence the KV blocks of its positions 0, B, 2B, …;
    `logit_rows` [R]: the rows of the batch whose logits are wanted.
    """

    phase: Phase
    tokens: Ints
    positions: Ints
    block_tables: tuple[Ints, ...]
    logit_rows: Ints


class Ops(Protocol):
    """One device's ops for one phase, bound to that device's KV cache."""

    def embed(self, table: QTensor, batch: Batch) -> Array:
        """Rows of `table` [V, d] for the batch's tokens: x [T, d] f32."""
        ...

    def norm_linear(self, x: Array, norm: RmsNorm, *linears: Linear) -> tuple[Array, ...]:
        """One norm, several projections of it: y_j [T, rows_j] f32."""
        ...

    def attention(self, q: Array, k: Array, v: Array, spec: Attention, batch: Batch) -> Array:
        """Turn q [T, H·D] and k [T, Hk·D], write k and v to the cache, attend: y [T, H·D] f32."""
        ...

    def linear_add(self, y: Array, linear: Linear, residual: Array) -> Array:
        """residual + linear(y): x [T, d] f32."""
        ...

    def norm_glu(self, x: Array, norm: RmsNorm, gate: Linear, up: Linear, activation: Activation = SWIGLU) -> Array:
        """activation(gate(n), up(n)) of n = norm(x): h [T, f] f32."""
        ...

    def norm_route(self, x: Array, norm: RmsNorm, router: Linear, k: int) -> tuple[Array, Routes]:
        """n = norm(x) [T, d] and its `k` experts: softmax over the chosen logits, after the choice."""
        ...

    def experts_glu(self, n: Array, routes: Routes, gate: Linear, up: Linear, activation: Activation) -> Array:
        """Each token's gated FFN in each of its experts: h [T, k, f] f32."""
        ...

    def experts_add(self, h: Array, routes: Routes, down: Linear, residual: Array) -> Array:
        """residual + Σ_j weights[:, j] · down_{experts[:, j]}(h[:, j]): x [T, d] f32."""
        ...

    def gather_rows(self, x: Array, batch: Batch) -> Array:
        """The rows whose logits are wanted: [R, …] of x [T, …], a residual stream or what `attention` gave."""
        ...
