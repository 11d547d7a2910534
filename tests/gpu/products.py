"""What tests of products share: bounds of their errors, and what a decode product sees of its input.

Bounds are relative L2. OWN is a kernel's own error, against f64 on the activations as it gets them. Decode adds exact
integer sums in f32: 2e-6 (f32 types: a chain of at most 2816 fused additions). Prefill rounds scale, minimum and value
of a weight to f16, 2^-11 each: 1e-3, and 2e-3 where a minimum cancels most of scale·code. WHOLE is against f64 on the
activations before rounding: 1 %, the requirement; 8-bit blocks take 0.5 to 0.9 % of it.
"""

from __future__ import annotations

import pytest

from worker.cpu.quantized import in_8_bits
from worker.ops import Activation
from worker.quants import QUANT_TYPES

EACH_TYPE = pytest.mark.parametrize("kind", QUANT_TYPES, ids=lambda kind: kind.name)
DECODE_OWN, PREFILL_OWN, WHOLE = 3e-6, 2e-3, 1e-2
CLAMPED = Activation(limit=7.0, alpha=1.702)


def seen(x, kind):
    """x as a decode product of this type gets it."""
    return in_8_bits(x) if kind.block_size > 1 else x
