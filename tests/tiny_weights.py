"""Random weights in every GGUF type: blocks of random bytes under scales that give the values a wanted spread.

The same bits on every machine and with every NumPy: nothing here but PCG64's raw stream (whose values NumPy guarantees,
unlike its distributions') and arithmetic that IEEE 754 rounds exactly. Knows no model; next: `tests/tiny_models.py`.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


@dataclass(frozen=True)
class BlockScales:
    """Where a block keeps its f16 scale and f16 offset, and what its values are with random quants and a scale of 1."""

    spread: float  # their standard deviation
    scale_at: int = 0
    offset_at: int | None = None
    offset: float = 0.0  # in scales: what makes their mean about 0


SCALES = {
    Type.Q4_0: BlockScales(4.61),
    Type.Q4_1: BlockScales(4.61, offset_at=2, offset=-7.5),
    Type.Q5_0: BlockScales(9.23),
    Type.Q5_1: BlockScales(9.23, offset_at=2, offset=-15.5),
    Type.Q8_0: BlockScales(73.9),
    Type.Q2_K: BlockScales(13.9, scale_at=80, offset_at=82, offset=1.5),
    Type.Q3_K: BlockScales(43.3, scale_at=108),
    Type.Q4_K: BlockScales(258.0, offset_at=2, offset=7.5),
    Type.Q5_K: BlockScales(526.0, offset_at=2, offset=15.5),
    Type.Q6_K: BlockScales(1366.0, scale_at=208),
    Type.IQ1_S: BlockScales(7.2),
    Type.IQ2_XXS: BlockScales(53.2),
    Type.IQ2_XS: BlockScales(55.8),
    Type.IQ2_S: BlockScales(56.4),
    Type.IQ3_XXS: BlockScales(142.4),
    Type.IQ3_S: BlockScales(140.3),
    Type.IQ4_NL: BlockScales(67.3),
    Type.IQ4_XS: BlockScales(1246.0),
    Type.TQ1_0: BlockScales(0.818, scale_at=52),
    Type.TQ2_0: BlockScales(0.707, scale_at=64),
}
MXFP4_SPREAD = 4.63  # at exponents of 0 and 1
NVFP4_SPREAD = 2.92
IQ1_M_SPREAD = 7.2


class RandomWeights:
    """One tensor's own stream of randomness, from the file's seed and the tensor's name."""

    def __init__(self, seed: int, name: str) -> None:
        self._bits = np.random.PCG64([seed, zlib.crc32(name.encode())])

    def bytes(self, count: int) -> np.ndarray:
        """Uniform bytes, [count] u8."""
        return self._bits.random_raw(-(-count // 8)).astype("<u8", copy=False).view(np.uint8)[:count]

    def normal(self, shape: tuple[int, ...], std: float, mean: float = 0.0) -> np.ndarray:
        """About normal (the sum of four uniform numbers, so never beyond 3.5 std), f32."""
        sums = self.bytes(8 * math.prod(shape)).view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64)
        unit = (sums - 2 * 65535) / (65536 / math.sqrt(3))
        return (mean + std * unit).astype(np.float32).reshape(shape)

    def matrix(self, kind: Type, shape: tuple[int, ...], std: float) -> np.ndarray:
        """Rows of the last axis in GGUF type `kind`, with values of spread `std`: floats, or the blocks' bytes.

        A type that no table here knows gets random bytes throughout: for tests of loaders that must refuse it.
        """
        if kind in (Type.F32, Type.F16):
            return self.normal(shape, std).astype(np.float32 if kind is Type.F32 else np.float16)
        if kind is Type.BF16:
            return gguf.quants.quantize(self.normal(shape, std), kind)
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = self.bytes(math.prod(shape) // elements * size).reshape(-1, size)
        if kind is Type.MXFP4:
            blocks[:, 0] = 127 + round(math.log2(std / MXFP4_SPREAD)) + blocks[:, 0] % 2
        elif kind is Type.NVFP4:
            blocks[:, :4] = max(0, 7 + round(math.log2(std / NVFP4_SPREAD))) << 3 | blocks[:, :4] % 8
        elif kind is Type.IQ1_M:
            self._set_iq1_m_scales(blocks, std)
        elif kind in SCALES:
            self._set_scales(blocks, SCALES[kind], std)
        if kind is Type.TQ2_0:  # codes 0 to 2 stand for -1 to 1, and 3 does not occur: here it becomes 1
            codes = blocks[:, :64]
            codes ^= (codes & codes >> 1 & 0x55) << 1
        return blocks.reshape(*shape[:-1], -1)

    def _set_scales(self, blocks: np.ndarray, scales: BlockScales, std: float) -> None:
        jitter = 0.75 + self.bytes(len(blocks)) / 512  # 0.75 to 1.25, so that no two blocks are alike
        scale = (std / scales.spread * jitter)[:, None]
        at = scales.scale_at
        blocks[:, at : at + 2] = scale.astype("<f2").view(np.uint8)
        if scales.offset_at is not None:
            at = scales.offset_at
            blocks[:, at : at + 2] = (scale * scales.offset).astype("<f2").view(np.uint8)

    def _set_iq1_m_scales(self, blocks: np.ndarray, std: float) -> None:
        """The four nibbles of a block's f16 scale are the upper ones of its last four words."""
        scale = np.array(std / IQ1_M_SPREAD, "<f2").view("<u2")
        words = np.ascontiguousarray(blocks[:, 48:]).view("<u2")
        for i in range(4):
            words[:, i] = words[:, i] & 0xFFF | (scale >> 4 * i & 15) << 12
        blocks[:, 48:] = words.view(np.uint8)
