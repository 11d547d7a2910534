"""Rotary frequencies and the cosine and sine tables made of them, in float64, rounded once.

Plain arithmetic over positions: knows no device. The adapters choose among the scalings here; the ops only look the
tables up, so every backend turns by the same bits.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from worker.model import Hparams, RopeScaling
from worker.ops import Rope

F64 = npt.NDArray[np.float64]

_AT_ONCE = 4096  # positions, of which one thread makes the rows; what it needs besides stays in its core's cache
_THREADS = 8


def frequencies(base: float, dims: int) -> F64:
    """base^(-2i/dims) for i < dims/2, in radians a position (Su et al. 2021, eq. 15)."""
    result: F64 = base ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    return result


def tables(inv_freq: F64, context: int, *, magnitude: float = 1.0, adjacent: bool = False) -> Rope:
    """Cosines and sines of every position below `context`: two tables [context, dims/2] f32."""
    cos, sin = (np.empty((context, len(inv_freq)), np.float32) for _ in range(2))

    def fill(start: int) -> None:
        angles = np.outer(np.arange(start, min(start + _AT_ONCE, context), dtype=np.float64), inv_freq)
        cos[start : start + _AT_ONCE] = np.cos(angles) * magnitude
        sin[start : start + _AT_ONCE] = np.sin(angles) * magnitude

    # 131072 positions take one thread a quarter of a second of a start. Each element is its own: no bit moves.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(fill, range(0, context, _AT_ONCE)))
    return Rope(cos=cos, sin=sin, adjacent=adjacent)


def scaled_tables(hp: Hparams, context: int, *, truncate: bool = True, divisors: F64 | None = None) -> Rope:
    """Neighbouring-half tables under the scaling that the file names: none, linear or YaRN.

    `divisors` [dims/2] divide the frequencies first. GGUF's `llama` files alone pair adjacent elements instead.
    """
    inv_freq = frequencies(hp.rope_freq_base, hp.rope_dims)
    if divisors is not None:
        inv_freq = inv_freq / divisors
    scaling, magnitude = hp.rope_scaling, 1.0
    if scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling.kind == "yarn":
        inv_freq, magnitude = yarn(inv_freq, hp.rope_freq_base, scaling, truncate=truncate)
    return tables(inv_freq, context, magnitude=magnitude, adjacent=hp.architecture == "llama")


def yarn(inv_freq: F64, base: float, scaling: RopeScaling, *, truncate: bool) -> tuple[F64, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): scaled frequencies and the magnitude of cos and sin.

    Pairs that turn more than `beta_fast` times within the original context stay, those below `beta_slow` are divided by
    the factor, a ramp joins them. `truncate` rounds the ramp's bounds outwards, as HF does by default.
    """
    dims = 2 * len(inv_freq)

    def pair_that_turns(times: float) -> float:
        return dims * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(len(inv_freq)) - low) / max(high - low, 1e-3), 0.0, 1.0)
    magnitude = (0.1 * math.log(scaling.factor) + 1.0) if scaling.factor > 1 else 1.0
    return inv_freq / scaling.factor * ramp + inv_freq * (1.0 - ramp), magnitude * (scaling.attn_factor or 1.0)


def longrope_magnitude(context: int, original: int) -> float:
    """LongRoPE's magnitude of cos and sin (Ding et al. 2024, arXiv:2402.13753) of a model with that full context."""
    if context <= original:
        return 1.0
    return math.sqrt(1.0 + math.log(context / original) / math.log(original))
