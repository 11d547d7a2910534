"""Philox4x32-10 (Salmon et al., SC'11): the counter-based random numbers of every draw, on every backend.

The draw of index i with seed s uses block (i, 0, 0, 0) under key s and nothing else: so a worker that continues an
answer draws what the first one would have drawn. Random123's known-answer vectors are its test.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Block = tuple[int, int, int, int]


def philox4x32(counter: Block, key: tuple[int, int], rounds: int = 10) -> Block:
    """One block of four uint32 from a counter of four and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, index: int) -> float:
    """The draw's u in [0, 1): the first word's high 24 bits, exact in f32. The key is (seed's low, high half)."""
    x0, *_ = philox4x32((index & _MASK, 0, 0, 0), (seed & _MASK, seed >> 32 & _MASK))
    return (x0 >> 8) * 2.0**-24
