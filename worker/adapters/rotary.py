"""RoPE of a file: the shared keys, and the tensors that divide the frequencies."""

import math
from dataclasses import replace

import numpy as np

from worker.adapters.keys import ArchitectureKeys
from worker.adapters.weights import Weights
from worker.model import Hparams
from worker.rope import Rope, scaled_rope

DIVISORS = "rope_freqs.weight"
MAX_KEY_FACTOR = 16.0
"""What an attention scale may multiply or divide keys by at most."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


def file_rope(
    hp: Hparams, w: Weights, context: int, *, longrope: bool = False, adjacent: bool = False
) -> tuple[Rope, dict[str, str]]:
    """RoPE for a configured `context`, and the choice of LongRoPE factors if the file has them.

    LongRoPE applies if the file's scaling type or `longrope` requires it. The long factors serve
    contexts above the original one. The choice depends neither on a sequence's length nor on free
    memory, so bits do not change while a sequence grows or between machines.
    """
    scaling, pairs = hp.rope_scaling, hp.rope_dims // 2
    divisors, choices = None, {}
    if longrope or scaling.kind == "longrope":
        factors = {"long": w.divisors(LONG_FACTORS, pairs), "short": w.divisors(SHORT_FACTORS, pairs)}
        choices = {"rope_factors": "long" if context > scaling.original_context else "short"}
        divisors = factors[choices["rope_factors"]]
    elif w.has(DIVISORS):
        divisors = w.divisors(DIVISORS, pairs)
    rope = scaled_rope(hp.rope_freq_base, hp.rope_dims, context, scaling, divisors=divisors, adjacent=adjacent)
    return rope, choices


def no_rope(rope: Rope) -> Rope:
    """A Rope that rotates nothing, by the angle 0, for layers without position embeddings."""
    return Rope(np.zeros(1), rope.context, adjacent=rope.adjacent)


def attention_scaled_rope(rope: Rope, scale: float, hp: Hparams, keys: ArchitectureKeys) -> Rope:
    """A Rope with which attention scales logits by `scale` instead of D^-0.5.

    `Rope.magnitude` multiplies queries and keys, so logits are scaled by its square: it grows by
    sqrt(scale · sqrt(D)). All elements of a head must be rotated, others would keep their scale.
    Raises ModelLoadFailed if some are not, and for a scale with which keys could leave the range of
    f16, in which the GPU caches them.
    """
    if rope.dims != hp.head_dim:
        problem, expected = f"is {rope.dims}", f"{hp.head_dim}, the head width, in a file with attention.scale"
        raise keys.error("rope.dimension_count", problem, expected)
    factor = math.sqrt(scale * math.sqrt(hp.head_dim))
    if not 1 / MAX_KEY_FACTOR <= factor <= MAX_KEY_FACTOR:
        least, most = (limit**2 / math.sqrt(hp.head_dim) for limit in (1 / MAX_KEY_FACTOR, MAX_KEY_FACTOR))
        raise keys.error("attention.scale", f"is {scale}", f"{least:.3g} to {most:.3g}")
    return replace(rope, magnitude=rope.magnitude * factor)
