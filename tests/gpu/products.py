"""Error bounds of products, and a decode product's input after rounding.

Bounds are relative L2 errors.

- DECODE_OWN, PREFILL_OWN: a kernel's own error, against f64 with the rounded activations. Decode
  adds exact integer sums in f32: 2e-6 (f32 types: a chain of at most 2816 fused additions). Prefill
  rounds scale, minimum and value of a weight to f16, 2^-11 each: 1e-3, and 2e-3 where a minimum
  cancels most of scale·code.
- WHOLE: against f64 with the activations before rounding: 1 %, of which Q8 blocks use 0.5 to 0.9 %.
"""

from __future__ import annotations

import pytest

from tests.quantized_ops import in_8_bits
from worker.ops import Activation
from worker.quants import QUANT_TYPES

EACH_TYPE = pytest.mark.parametrize("kind", QUANT_TYPES, ids=lambda kind: kind.name)
DECODE_OWN, PREFILL_OWN, WHOLE = 3e-6, 2e-3, 1e-2
CLAMPED = Activation(limit=7.0, alpha=1.702)


def rounded(x, kind):
    """x as rounded for a decode product with weights of this type."""
    return in_8_bits(x) if kind.block_size > 1 else x
