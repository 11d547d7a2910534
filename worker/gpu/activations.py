"""Inputs of matrix products: Q8 blocks for decode, scaled f16 rows for prefill (with its launcher).

Layouts: `kernels/q8_activations.cuh`, `kernels/fragments.cuh`. Kernel: `scale_to_f16.cu`. Twins:
`tests/quantized_ops.py`, `rms_norm` in `worker/cpu/plain.py`. Next: `matvec.py`, `matmul.py`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.gpu.compiler import KernelName
from worker.gpu.launch import Allocator, Launcher
from worker.gpu.layouts import address
from worker.gpu.memory import DeviceArray
from worker.ops import RmsNorm

Q8_BLOCK = 32
"""Elements that share a scale; a row is a whole number of blocks."""
_COLUMN_GROUP = 128  # kColumnGroup of fragments.cuh
_THREADS = 256
_QUADS_KEPT = (1, 2, 4, 8)  # float4s that a thread keeps in registers: few, since code is fetched too
DECODE_WARPS = 16
"""Warps of a block of a decode product; they determine the order of a norm's sum of squares."""
_WARP_COLUMNS = 256  # kOfWarp of quantize_rows.cu
_WARPS_WITHOUT_NORM = 4  # of a block: more blocks a row, which no sum connects
DEFINES = {"SCALE_THREADS": _THREADS, "DECODE_WARPS": DECODE_WARPS}
_FLAGS = ("false", "true")
INSTANTIATIONS: tuple[KernelName, ...] = (
    *(("scale_to_f16.cu", f"scale_to_f16<{kept}, {glu}>") for kept in _QUADS_KEPT for glu in _FLAGS),
    *(
        ("quantize_rows.cu", f"quantize_rows<{forms}, {DECODE_WARPS}>")
        for forms in ("true, false", "false, true", "true, true")
    ),
    ("quantize_rows.cu", f"quantize_tiles<{DECODE_WARPS}>"),
)


@dataclass(frozen=True, slots=True)
class Q8Activations:
    """Input rows of a decode product: `x` [T, cols] f32, and optionally the same rows as Q8 blocks.

    `q` [T, cols] i8 and `meta` [T, cols/32], 8 bytes a block: an f32 scale and two i16 sums. A
    product of one row whose input has no Q8 blocks quantizes `x` itself. `factor` [T] f32, 1 if
    None, multiplies the rows' products: 1/rms of a norm that `quantize_rows` has applied.
    """

    x: DeviceArray
    q: DeviceArray | None = None
    meta: DeviceArray | None = None
    factor: DeviceArray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(T, cols)."""
        return int(self.x.shape[0]), int(self.x.shape[1])


def empty_q8(pool: Allocator, rows: int, cols: int) -> Q8Activations:
    """Allocate `rows` rows, with Q8 blocks if `cols` is a multiple of 32."""
    x = pool.empty((rows, cols), np.float32)
    if cols % Q8_BLOCK:
        return Q8Activations(x)
    meta = pool.empty((rows, cols // Q8_BLOCK), np.int64)
    return Q8Activations(x, pool.empty((rows, cols), np.int8), meta)


INPUT_ROWS = np.dtype([("x", "u8"), ("q", "u8"), ("meta", "u8"), ("norm", "u8"), ("eps", "f4"), ("cols", "i4")])
"""`InputRows` of stage_activations.cuh."""


def input_rows(x: Q8Activations, norm: RmsNorm | None) -> np.ndarray[Any, Any]:
    """The kernel parameter `InputRows`: a value of INPUT_ROWS."""
    weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
    return np.array((address(x.x), address(x.q), address(x.meta), address(weight), eps, x.shape[1]), INPUT_ROWS)


def quantize_rows(
    kernels: Launcher,
    pool: Allocator,
    x: DeviceArray,
    norm: RmsNorm | None,
    *,
    q8: bool,
    f32: bool,
    warps: int = DECODE_WARPS,
) -> Q8Activations:
    """x·norm weight (or x) of x [R, cols] f32, as Q8 blocks, as f32 or both, with the factors.

    The bits are those that a product of one row with `warps` warps computes for itself. Without
    `f32`, the result's `x` is not for products.
    """
    rows, cols = x.shape
    plain = pool.empty((rows, cols), np.float32) if f32 and norm is not None else None
    y = Q8Activations(
        x if plain is None else plain,
        pool.empty((rows, cols), np.int8) if q8 else None,
        pool.empty((rows, cols // Q8_BLOCK), np.int64) if q8 else None,
        None if norm is None else pool.empty((rows,), np.float32),
    )
    kernel = kernels.get("quantize_rows.cu", f"quantize_rows<{_FLAGS[q8]}, {_FLAGS[plain is not None]}, {warps}>")
    args = (input_rows(Q8Activations(x), norm), y.q, y.meta, plain, y.factor)
    blocks, threads = _quantization_blocks(cols, norm, warps)
    kernel((rows, blocks), (threads,), args, pdl=True)
    return y


def _quantization_blocks(cols: int, norm: RmsNorm | None, normed: int = DECODE_WARPS) -> tuple[int, int]:
    """Blocks of a row and threads of a block of `quantize_rows.cu`.

    With a norm: one block of at most `normed` warps.
    """
    warps = -(-cols // _WARP_COLUMNS)
    most = _WARPS_WITHOUT_NORM if norm is None else normed
    return (1 if norm else -(-warps // most)), 32 * min(warps, most)


@dataclass(frozen=True, slots=True)
class Q8Tiles:
    """Input rows of a decode product on the tensor cores: `x` [T, cols] f32, and the same as tiles.

    `q` and `meta` hold whole tiles of 16 rows (`kernels/q8_tiles.cuh`); they are None where cols is
    not a multiple of 32. `factor`: see `Q8Activations`. With a factor, `x` is not for products.
    """

    x: DeviceArray
    q: DeviceArray | None = None
    meta: DeviceArray | None = None
    factor: DeviceArray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(T, cols)."""
        return int(self.x.shape[0]), int(self.x.shape[1])


Q8_TILES = np.dtype([("q", "u8"), ("meta", "u8"), ("tiles", "i4"), ("units", "i4")])
"""`Q8Tiles` of q8_tiles.cuh."""
TILE_ROWS = 16
"""Rows of a tile of `Q8Tiles`."""


def _tiled(pool: Allocator, x: DeviceArray, factor: DeviceArray | None = None) -> Q8Tiles:
    """Allocate the tiles of x [T, cols] f32."""
    rows, cols = x.shape
    if cols % Q8_BLOCK:
        return Q8Tiles(x, None, None, factor)
    tiles = _tiles(rows)
    meta = pool.empty((cols // Q8_BLOCK, tiles, 3, TILE_ROWS), np.float32)
    return Q8Tiles(x, pool.empty((tiles * TILE_ROWS, cols), np.int8), meta, factor)


def _tiles(rows: int) -> int:
    """Tiles of `rows` rows: a power of two up to 4, then a multiple of 4, as products take them."""
    tiles = -(-rows // TILE_ROWS)
    return tiles if tiles <= 2 else -(-tiles // 4) * 4


def fills_tiles(rows: int) -> bool:
    """Whether `rows` rows are whole tiles: kernels that write rows leave no padding undefined."""
    return rows > 0 and _tiles(rows) * TILE_ROWS == rows


def empty_q8_tiles(pool: Allocator, rows: int, cols: int) -> Q8Tiles:
    """Allocate `rows` rows, with tiles if `cols` is a multiple of 32."""
    return _tiled(pool, pool.empty((rows, cols), np.float32))


def q8_tiles(x: Q8Tiles) -> np.ndarray[Any, Any]:
    """The kernel parameter `Q8Tiles`: a value of Q8_TILES."""
    rows, cols = x.shape
    return np.array((address(x.q), address(x.meta), _tiles(rows), cols // Q8_BLOCK), Q8_TILES)


def quantize_tiles(kernels: Launcher, pool: Allocator, x: DeviceArray, norm: RmsNorm | None) -> Q8Tiles:
    """x·norm weight (or x) of x [T, cols] f32, cols a multiple of 32, as tiles, with the factors.

    The values are those of `quantize_rows`.
    """
    rows, cols = x.shape
    y = _tiled(pool, x, None if norm is None else pool.empty((rows,), np.float32))
    args = (input_rows(Q8Activations(x), norm), q8_tiles(y), np.int32(rows), y.factor)
    blocks, threads = _quantization_blocks(cols, norm)
    kernel = kernels.get("quantize_rows.cu", f"quantize_tiles<{DECODE_WARPS}>")
    kernel((_tiles(rows) * TILE_ROWS, blocks), (threads,), args, pdl=True)
    return y


@dataclass(frozen=True, slots=True)
class ScaledF16:
    """Input rows of a prefill product: `x` [T, padded cols] f16, to multiply by `scale` [T] f32.

    Scales are powers of two; None means 1. `count` [1] i32 is the number of valid rows, those
    before the padding to a captured length; None means all. The input of a gated FFN has
    `h_scale` [T] f32, the scales of its result.
    """

    x: DeviceArray
    scale: DeviceArray | None
    count: DeviceArray | None = None
    h_scale: DeviceArray | None = None


def padded(cols: int) -> int:
    """Columns of a row in memory: whole groups of 128, the last one padded with zeros."""
    return -(-cols // _COLUMN_GROUP) * _COLUMN_GROUP


def scale_to_f16(
    kernels: Launcher,
    pool: Allocator,
    x: DeviceArray,
    norm: RmsNorm | None = None,
    count: DeviceArray | None = None,
    rows_per_token: int = 1,
    places: DeviceArray | None = None,
    glu_bounds: DeviceArray | None = None,
) -> ScaledF16:
    """norm(x), or x, of x [T, cols] f32; the first `count`·`rows_per_token` rows are valid.

    With `places` [T·rows_per_token] i32, row t of x is `rows_per_token` rows of the result: those
    of its places. `glu_bounds` [4] f32 (`GluBounds.of`): the result is the input of this gated FFN.
    """
    rows, cols = x.shape if places is None else (len(places), x.shape[1])
    h_scale = None if glu_bounds is None else pool.empty((rows,), np.float32)
    y = ScaledF16(pool.empty((rows, padded(cols)), np.float16), pool.empty((rows,), np.float32), count, h_scale)
    weight, eps = (None, 0.0) if norm is None else (norm.weight.data, norm.eps)
    sizes = (np.int32(rows_per_token), places, np.int32(cols), np.float32(eps))
    args = (y.x, y.scale, y.h_scale, x, weight, glu_bounds, count, *sizes)
    kept = next((kept for kept in _QUADS_KEPT if padded(cols) <= 4 * _THREADS * kept), _QUADS_KEPT[-1])
    kernel = kernels.get("scale_to_f16.cu", f"scale_to_f16<{kept}, {_FLAGS[h_scale is not None]}>")
    kernel((len(x),), (_THREADS,), args, pdl=True)
    return y
