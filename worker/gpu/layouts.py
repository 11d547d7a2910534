"""Weights as they lie in VRAM: a matrix is a few planes, each flat over rows, so that every load is wide and aligned.

The drawing is in `kernels/codes.cuh` and `kernels/scales.cuh`; here are the sizes, which add up to the file's to the
byte. `upload.py` fills planes, the launchers pass their addresses on. Knows no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gguf_file import TensorInfo
from worker.gpu.memory import DeviceArray, aligned
from worker.quants import Q4_K, Q5_0, Q6_K, Q8_0, QuantType

UNIT = 32
"""Elements that a thread takes at once; a row is whole units."""

_SUPER = 256
PLANES = np.dtype([("low", "u8"), ("high", "u8"), ("scales", "u8"), ("supers", "u8")])
"""`Planes` of kernels/codes.cuh."""
MIXED = ((Q5_0, Q5_0, Q8_0), (Q4_K, Q4_K, Q6_K))
"""Types of q, k and v in published files, where they are not one: there are kernels for each of these."""

# Bytes of 256 elements in each plane: low bits, high bits, scales of 32, what 256 share.
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
    "MXFP4": (128, 0, 8, 0),
}


def plane_bytes(kind: QuantType, elements: int) -> tuple[int, ...]:
    """Bytes that `elements` of a row, whole blocks of them, take in each of the four planes."""
    return tuple(elements * each // _SUPER for each in _BYTES[kind.name])


def unit_elements(kind: QuantType) -> int:
    """Elements of a kernel's `Unit`: 32 of the block types, 16 bytes of the others."""
    return UNIT if kind.block_size > 1 else 16 // kind.block_bytes


def is_vector(info: TensorInfo) -> bool:
    """Whether a tensor is kept as f32 values: norms, sinks and biases, those of experts too."""
    return len(info.shape) == 1 or info.name.endswith(".bias")


def weight_bytes(info: TensorInfo) -> int:
    """VRAM that a tensor takes, alignment included. ModelLoadFailed where its rows can't be served."""
    if is_vector(info):
        return aligned(4 * math.prod(info.shape))
    cols = info.shape[-1]
    if cols % UNIT:
        raise ModelLoadFailed(f"rows of {cols} elements", f"tensor {info.name!r}", f"a multiple of {UNIT}, on the GPU")
    rows = math.prod(info.shape[:-1])
    return sum(aligned(rows * row) for row in plane_bytes(info.kind, cols))


@dataclass(frozen=True, slots=True)
class BlockMatrix:
    """What `QTensor.data` is for a matrix: planes [..., rows, bytes of a row] u8; absent ones are None.

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
        """Where the planes begin, as a value of PLANES."""
        return tuple(address(plane) for plane in self.planes)


def address(array: Any) -> int:
    """The first byte of a device array; 0 for none, and for a dry run's stand-in."""
    return 0 if array is None else int(getattr(array.data, "ptr", 0))
