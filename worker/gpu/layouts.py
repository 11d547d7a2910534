"""Weight layout in VRAM, planes whose loads are wide and aligned, and its dequantization.

The layout is drawn in `kernels/codes.cuh` and `kernels/scales.cuh`; here are the sizes. They add up
to the file's bytes exactly, except for the types with codebooks (IQ1, IQ2, IQ3) and TQ1_0: their
values are stored as codes of 2 to 4 bits, so that products need no codebook. `upload.py` fills
planes, launchers pass their addresses to kernels.
Kernel: `dequantize.cu`. Twins: `embed` in `worker/cpu/ops.py`, `dequantize` in `worker/quants.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gguf_file import TensorInfo
from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.memory import DeviceArray, aligned
from worker.ops import QTensor
from worker.quants import (
    F32,
    IQ1_M,
    IQ1_S,
    IQ2_S,
    IQ2_XS,
    IQ2_XXS,
    IQ4_XS,
    MXFP4,
    Q4_K,
    Q5_0,
    Q6_K,
    Q8_0,
    QUANT_TYPES,
    TQ1_0,
    TQ2_0,
    QuantType,
)

UNIT = 32
"""Elements that a thread loads at once; a row is a whole number of units."""
_SUPER = 256
_THREADS = 128
IQ1, IQ2 = QuantType("IQ1", -1, _SUPER, 106), QuantType("IQ2", -2, _SUPER, 106)
"""Formats of VRAM alone: the values of all IQ1 and all IQ2 types as codes of 3 bits."""
_STORED_AS = {IQ1_S: IQ1, IQ1_M: IQ1, IQ2_XXS: IQ2, IQ2_XS: IQ2, IQ2_S: IQ2, TQ1_0: TQ2_0}


def stored_type(kind: QuantType) -> QuantType:
    """The format in VRAM of weights of a file's type, which kernels are made for."""
    return _STORED_AS.get(kind, kind)


STORED_TYPES = tuple(dict.fromkeys(map(stored_type, QUANT_TYPES)))
INSTANTIATIONS: tuple[KernelName, ...] = tuple(
    ("dequantize.cu", f"{kernel}<{kind.name}>") for kernel in ("dequantize", "scaled_rows") for kind in STORED_TYPES
)
PLANES = np.dtype([("low", "u8"), ("high", "u8"), ("scales", "u8"), ("supers", "u8")])
"""`Planes` of kernels/codes.cuh."""
EXPERT_TYPES = (MXFP4, Q8_0, Q4_K, Q6_K, IQ4_XS)
"""Types of experts whose kernels are compiled in tests; others are compiled on first use."""
MIXED = ((Q5_0, Q5_0, Q8_0), (Q4_K, Q4_K, Q6_K))
"""Combinations of types of q, k and v in published files: there are kernels for each."""

# Bytes of 256 elements in each plane: low bits, high bits, scales of units, supers.
_BYTES = {
    "F32": (1024, 0, 0, 0),
    "F16": (512, 0, 0, 0),
    "BF16": (512, 0, 0, 0),
    "Q4_0": (128, 0, 16, 0),
    "Q4_1": (128, 0, 32, 0),
    "Q5_0": (128, 32, 16, 0),
    "Q5_1": (128, 32, 32, 0),
    "Q8_0": (128, 128, 16, 0),
    "Q2_K": (64, 0, 16, 4),
    "Q3_K": (64, 32, 12, 2),
    "Q4_K": (128, 0, 0, 16),
    "Q5_K": (128, 32, 0, 16),
    "Q6_K": (128, 64, 16, 2),
    "IQ1": (64, 32, 8, 2),
    "IQ2": (64, 32, 8, 2),
    "IQ3_XXS": (128, 0, 8, 2),
    "IQ3_S": (128, 0, 8, 2),
    "IQ4_NL": (128, 0, 16, 0),
    "IQ4_XS": (128, 0, 0, 8),
    "TQ2_0": (64, 0, 0, 2),
    "MXFP4": (128, 0, 8, 0),
    "NVFP4": (128, 0, 16, 0),
}


def plane_bytes(kind: QuantType, elements: int) -> tuple[int, ...]:
    """Bytes of `elements` elements (whole blocks) in each of the four planes."""
    return tuple(elements * each // _SUPER for each in _BYTES[stored_type(kind).name])


def unit_elements(kind: QuantType) -> int:
    """Elements of a kernel's `Unit`: 32 for the block types, 16 bytes for the others."""
    return UNIT if kind.block_size > 1 else 16 // kind.block_bytes


def is_vector(info: TensorInfo) -> bool:
    """Whether a tensor is stored as f32 values: norms, sinks and biases, also those of experts."""
    return len(info.shape) == 1 or info.name.endswith(".bias")


def weight_bytes(info: TensorInfo) -> int:
    """VRAM of a tensor in bytes. Raises: ModelLoadFailed if its rows are not whole units."""
    if is_vector(info):
        return aligned(4 * math.prod(info.shape))
    cols = info.shape[-1]
    if cols % UNIT:
        raise ModelLoadFailed(f"rows of {cols} elements", f"tensor {info.name!r}", f"a multiple of {UNIT}, on the GPU")
    rows = math.prod(info.shape[:-1])
    return sum(aligned(rows * row) for row in plane_bytes(info.kind, cols))


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """`QTensor.data` of a matrix: planes [..., rows, row bytes] u8, None where a format has none.

    Slices along the first axis, rows or experts, share storage. Vectors are f32 arrays instead.
    """

    kind: QuantType
    planes: tuple[DeviceArray | None, ...]

    def __getitem__(self, part: slice) -> BlockMatrix:
        return BlockMatrix(self.kind, tuple(None if plane is None else plane[part] for plane in self.planes))

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.nbytes for plane in self.planes if plane is not None)

    def addresses(self) -> tuple[int, ...]:
        """Device addresses of the planes, as a value of PLANES."""
        return tuple(address(plane) for plane in self.planes)


def address(array: Any) -> int:
    """Device address of an array; 0 for None and for the placeholder arrays of a dry run."""
    return 0 if array is None else int(getattr(array.data, "ptr", 0))


def embed(
    kernels: Launcher,
    pool: Allocator,
    table: QTensor,
    tokens: DeviceArray,
    row_slots: DeviceArray | None = None,
    scale: float = 1.0,
) -> DeviceArray:
    """Rows of `table` [V, d] for `tokens` [T] i32, times `scale`: x [T, d] f32.

    With `row_slots` [R] i32, row r is that of tokens[row_slots[r]], or zeros if that is negative.
    """
    out = pool.empty((len(tokens if row_slots is None else row_slots), table.shape[-1]), np.float32)
    _dequantize(kernels, table, tokens, out, row_slots, scale)
    return out


def gather_rows(kernels: Launcher, pool: Allocator, x: DeviceArray, rows: DeviceArray) -> DeviceArray:
    """x[rows] of x [T, …] and rows [R] i32, copied as f32: row sizes are multiples of 4 bytes."""
    out = pool.empty((len(rows), x.shape[-1]), x.dtype)
    words = x.shape[-1] * x.dtype.itemsize // 4
    _dequantize(kernels, QTensor("x", (len(x), words), F32, BlockMatrix(F32, (x, None, None, None))), rows, out)
    return out


def dequantize(kernels: Launcher, pool: Allocator, matrix: QTensor) -> DeviceArray:
    """The whole matrix [..., rows, cols] as f32, for comparisons."""
    out = pool.empty(matrix.shape, np.float32)
    _dequantize(kernels, matrix, None, out)
    return out


def _dequantize(
    kernels: Launcher,
    matrix: QTensor,
    rows: DeviceArray | None,
    out: DeviceArray,
    row_slots: DeviceArray | None = None,
    scale: float = 1.0,
) -> None:
    units = matrix.shape[-1] // unit_elements(matrix.kind)
    planes = np.array(matrix.data.addresses(), PLANES)
    kernel, factor = ("dequantize", ()) if scale == 1.0 else ("scaled_rows", (np.float32(scale),))
    kernels.get("dequantize.cu", f"{kernel}<{matrix.kind.name}>")(
        (math.prod(out.shape[:-1]), -(-units // _THREADS)),
        (_THREADS,),
        (planes, rows, row_slots, out, np.int32(units), *factor),
        pdl=True,
    )
