"""Rotary position embeddings: frequencies, their published scalings, cosine and sine tables.

The arithmetic is float64, rounded to f32 once, so every backend rotates by the same bits. An
adapter chooses the scaling; an op reads `Rope.cos` and `Rope.sin`. Next:
`worker/adapters/llama.py`.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_TABLE_ROWS = 4096  # positions per task: the temporaries fit the cache of a core
_MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The file's `rope.scaling.*` keys; `original_context` is in tokens."""

    kind: str = "none"
    """none, linear, yarn or longrope."""
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0
    """Multiplies cos and sin, with every kind of scaling."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of positions below `context`.

    At position p, pair i of a head rotates by the angle p · inv_freq[i]; only the first `dims` of a
    head's D elements are rotated. The tables are computed on first use.
    """

    inv_freq: F64
    """[dims/2], radians per position."""
    context: int
    magnitude: float = 1.0
    """Multiplies cos and sin, and so the logits of attention by its square."""
    adjacent: bool = False
    """Whether pair i is (2i, 2i + 1); otherwise (i, i + dims/2)."""

    @property
    def dims(self) -> int:
        """Number of rotated elements of a head."""
        return 2 * len(self.inv_freq)

    @property
    def nbytes(self) -> int:
        """Bytes of `cos` and `sin` together; does not compute them."""
        return 2 * self.context * self.inv_freq.size * np.dtype(np.float32).itemsize

    @property
    def cos(self) -> F32:
        """magnitude · cos of each angle: [context, dims/2] f32."""
        return self._tables[0]

    @property
    def sin(self) -> F32:
        """magnitude · sin of each angle: [context, dims/2] f32."""
        return self._tables[1]

    @cached_property
    def _tables(self) -> tuple[F32, F32]:
        return rope_tables(self.inv_freq, self.context, self.magnitude)


def rope_tables(inv_freq: F64, context: int, magnitude: float = 1.0) -> tuple[F32, F32]:
    """Cosines and sines of the positions below `context`: two tables [context, dims/2] f32."""
    cos, sin = (np.empty((context, len(inv_freq)), np.float32) for _ in range(2))

    def fill(start: int) -> None:
        angles = np.outer(np.arange(start, min(start + _TABLE_ROWS, context), dtype=np.float64), inv_freq)
        cos[start : start + _TABLE_ROWS] = np.cos(angles) * magnitude
        sin[start : start + _TABLE_ROWS] = np.sin(angles) * magnitude

    # One thread takes 0.25 s for 131072 positions. Elements are independent: no bit changes.
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(fill, range(0, context, _TABLE_ROWS)))
    return cos, sin


def frequencies(base: float, dims: int) -> F64:
    """base^(-2i/dims) for i < dims/2, in radians per position (Su et al. 2021, eq. 15)."""
    result: F64 = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    return result


def scaled_rope(
    base: float,
    dims: int,
    context: int,
    scaling: RopeScaling,
    *,
    divisors: F64 | None = None,
    adjacent: bool = False,
    truncate: bool = True,
) -> Rope:
    """Rope with the scaling that `scaling.kind` names.

    `divisors` [dims/2] divide the frequencies before scaling: `rope_freqs.weight`, or LongRoPE's
    factors (Ding et al. 2024, arXiv:2402.13753), on top of which `scaling.factor` applies as in
    linear scaling. `truncate` applies to YaRN, see `yarn`.
    """
    inv_freq, magnitude = frequencies(base, dims), 1.0
    if divisors is not None:
        inv_freq = inv_freq / divisors
    if scaling.kind in ("linear", "longrope"):
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind == "yarn":
        inv_freq, magnitude = yarn(inv_freq, base, scaling, truncate=truncate)
    return Rope(inv_freq, context, magnitude * scaling.attn_factor, adjacent)


def yarn(inv_freq: F64, base: float, scaling: RopeScaling, *, truncate: bool) -> tuple[F64, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): scaled frequencies, magnitude of cos and sin.

    Pairs with more than `beta_fast` rotations in the original context keep their frequency, pairs
    with fewer than `beta_slow` are divided by the factor, and a linear ramp joins the two.
    `truncate` rounds the ramp's bounds outwards, as Hugging Face does by default.
    """
    dims = 2 * len(inv_freq)

    def pair_with_rotations(rotations: float) -> float:
        return dims * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with_rotations(scaling.beta_fast), pair_with_rotations(scaling.beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(len(inv_freq)) - low) / max(high - low, 1e-3), 0.0, 1.0)
    magnitude = (0.1 * math.log(scaling.factor) + 1.0) if scaling.factor > 1 else 1.0
    return inv_freq / scaling.factor * ramp + inv_freq * (1.0 - ramp), magnitude
