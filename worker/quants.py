"""Block formats of GGUF tensors: their names, sizes and dequantization to f32.

`gguf.quants` defines the bits of every format. It is imported on first use, since importing it
takes longer than the rest of this module. Next: `worker/gguf_file.py`.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]

_STEP = 1 << 18  # elements dequantized at once: temporaries stay at a few MiB


@dataclass(frozen=True, slots=True)
class QuantType:
    """A tensor type: rows of blocks, each of `block_size` elements in `block_bytes` bytes."""

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` elements. Raises ValueError if they are not whole blocks."""
        blocks, rest = divmod(cols, self.block_size)
        if rest:
            raise ValueError(f"a row of {cols} elements does not consist of {self.name} blocks of {self.block_size}")
        return blocks * self.block_bytes


F32 = QuantType("F32", 0, 1, 4)
F16 = QuantType("F16", 1, 1, 2)
BF16 = QuantType("BF16", 30, 1, 2)
Q4_0 = QuantType("Q4_0", 2, 32, 18)
Q4_1 = QuantType("Q4_1", 3, 32, 20)
Q5_0 = QuantType("Q5_0", 6, 32, 22)
Q5_1 = QuantType("Q5_1", 7, 32, 24)
Q8_0 = QuantType("Q8_0", 8, 32, 34)
Q2_K = QuantType("Q2_K", 10, 256, 84)
Q3_K = QuantType("Q3_K", 11, 256, 110)
Q4_K = QuantType("Q4_K", 12, 256, 144)
Q5_K = QuantType("Q5_K", 13, 256, 176)
Q6_K = QuantType("Q6_K", 14, 256, 210)
IQ1_S = QuantType("IQ1_S", 19, 256, 50)
IQ1_M = QuantType("IQ1_M", 29, 256, 56)
IQ2_XXS = QuantType("IQ2_XXS", 16, 256, 66)
IQ2_XS = QuantType("IQ2_XS", 17, 256, 74)
IQ2_S = QuantType("IQ2_S", 22, 256, 82)
IQ3_XXS = QuantType("IQ3_XXS", 18, 256, 98)
IQ3_S = QuantType("IQ3_S", 21, 256, 110)
IQ4_NL = QuantType("IQ4_NL", 20, 32, 18)
IQ4_XS = QuantType("IQ4_XS", 23, 256, 136)
TQ1_0 = QuantType("TQ1_0", 34, 256, 54)
TQ2_0 = QuantType("TQ2_0", 35, 256, 66)
MXFP4 = QuantType("MXFP4", 39, 32, 17)
NVFP4 = QuantType("NVFP4", 40, 64, 36)

_FLOATS = (F32, F16, BF16)
_K_QUANTS = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
_I_QUANTS = (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ4_NL, IQ4_XS)
QUANT_TYPES = (
    *(*_FLOATS, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, *_K_QUANTS),
    *(*_I_QUANTS, TQ1_0, TQ2_0, MXFP4, NVFP4),
)
CODEBOOK_TYPES = (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S)
"""Types whose blocks have indices of codebook rows."""
_BY_ID = {kind.ggml_id: kind for kind in QUANT_TYPES}


def quant_type(ggml_id: int) -> QuantType:
    """The type with this ggml id: one of `QUANT_TYPES`, or the name and size of an unsupported one.

    An id that `gguf` does not know has the name "type ID" and a size of 0 bytes.
    """
    if (kind := _BY_ID.get(ggml_id)) is not None:
        return kind
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415

    known = next((each for each in GGMLQuantizationType if each == ggml_id), None)
    if known is None:
        return QuantType(f"type {ggml_id}", ggml_id, 1, 0)
    return QuantType(known.name, ggml_id, *GGML_QUANT_SIZES[known])


def dequantize(data: Bytes, kind: QuantType, *, out: Floats | None = None) -> Floats:
    """Dequantize `data` [rows, row_bytes] u8 to f32 [rows, cols], bit for bit like `gguf.quants`.

    The result shares no memory with `data`. With `out`, a contiguous array of as many elements, the
    values are written there. A row is whole blocks, so the conversion treats all rows as one.
    """
    rows, row_bytes = data.shape
    if out is None:
        out = np.empty((rows, row_bytes // kind.block_bytes * kind.block_size), np.float32)
    if kind is F32:  # no import of `gguf` for the vectors of a file
        out.reshape(-1)[:] = np.ascontiguousarray(data).view(np.dtype("<f4")).reshape(-1)
        return out
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415

    flat_in, flat_out = data.reshape(-1), out.reshape(-1)
    in_step = kind.row_bytes(_STEP)
    # Infinities and NaNs in weights are legal, and converted as gguf.quants converts them.
    with np.errstate(all="ignore"):
        for start in range(0, flat_out.size, _STEP):
            blocks = flat_in[start // _STEP * in_step :][:in_step]
            flat_out[start : start + _STEP] = quants.dequantize(blocks, GGMLQuantizationType(kind.ggml_id))
    return out


def codebook(kind: QuantType) -> Bytes:
    """The codebook of one of CODEBOOK_TYPES: [rows, 8 or 4] u8, each the index of a magnitude.

    The magnitudes of a type rise with their index.
    """
    from gguf import quants  # noqa: PLC0415

    definition = getattr(quants, kind.name)
    definition.init_grid()
    rows = definition.grid.reshape(definition.grid_shape)
    return np.ascontiguousarray(np.searchsorted(definition.grid_map, rows).astype(np.uint8))
