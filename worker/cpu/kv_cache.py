"""The CPU's KV cache, and how a key or value is stored in it; twin of kernels/kv_cache.cuh.

f32 is the exact reference, f16 and q8 are the GPU's types. Next: `attention.py`.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from worker.model import KvType, cached
from worker.ops import KV_BLOCK, Attention, Batch, Ints

F32 = npt.NDArray[np.float32]
Stored = npt.NDArray[Any]

_LIMIT = np.float32(65024)  # 127·512: the decoded values are finite in f16


class KvCache:
    """K and V [blocks, B, Hk] of each layer: elements [D] f32 or f16, or records of `q8_rows`.

    The operating system provides memory as blocks are written, not before.
    """

    def __init__(self, layers: Iterable[Attention], blocks: int, kv_type: KvType = "f32") -> None:
        self.blocks = blocks
        self._quantized = kv_type == "q8"
        specs = cached(layers)
        self.k, self.v = ([_empty(blocks, spec, kv_type) for spec in specs] for _ in range(2))

    def write(self, layer: int, batch: Batch, k: F32, v: F32) -> None:
        """Store k, v [T, Hk, D] at the batch's positions."""
        tables = batch.block_tables if len(batch.block_tables) == len(k) else batch.block_tables * len(k)
        offsets = batch.positions % KV_BLOCK
        blocks = [table[i] for table, i in zip(tables, batch.positions // KV_BLOCK, strict=True)]
        for cache, rows in ((self.k[layer], k), (self.v[layer], v)):
            cache[blocks, offsets] = q8_rows(rows) if self._quantized else rows

    def read(self, layer: int, table: Ints, start: int, stop: int, valid: int) -> tuple[F32, F32]:
        """K and V [stop - start, Hk, D] f32 of positions [start, stop), both multiples of B.

        Positions from `valid` on are zeros, since an unwritten slot may hold a NaN.
        """
        blocks = table[start // KV_BLOCK : stop // KV_BLOCK]
        k, v = (self._elements(cache[blocks]) for cache in (self.k[layer], self.v[layer]))
        k[valid - start :] = 0
        v[valid - start :] = 0
        return k, v

    def _elements(self, stored: Stored) -> F32:
        values = from_q8(stored) if self._quantized else stored.astype(np.float32)
        return values.reshape(-1, *values.shape[2:])


def q8_rows(x: F32) -> Stored:
    """Quantize rows [..., D] to records [...] of `codes` [D] u8 and `scale` f16.

    An element is (code - 128) / 64 · scale, with |code - 128| ≤ 127. The scale of a row is its
    greatest magnitude times 64/127, rounded to f16, so a row's bits depend on the row alone. A NaN
    makes it a NaN.
    """
    clamped = np.clip(x, -_LIMIT, _LIMIT)
    peak = np.fmax.reduce(np.abs(clamped), axis=-1, initial=np.float32(0))
    rows = np.empty(x.shape[:-1], _record(x.shape[-1]))
    rows["scale"] = peak * np.float32(64 / 127)
    scale = rows["scale"].astype(np.float32)
    factor = np.divide(np.float32(64), scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.clip(np.rint(np.nan_to_num(clamped) * factor[..., None]), -127, 127)
    rows["codes"] = (128 + codes).astype(np.uint8)
    rows["scale"][np.isnan(x).any(axis=-1)] = np.nan
    return rows


def from_q8(rows: Stored) -> F32:
    """The elements [..., D] of records, exact in f32."""
    factor = rows["scale"].astype(np.float32) / np.float32(64)
    return (rows["codes"].astype(np.float32) - np.float32(128)) * factor[..., None]


def _empty(blocks: int, spec: Attention, kv_type: KvType) -> Stored:
    shape = blocks, KV_BLOCK, spec.n_kv_heads
    if kv_type == "q8":
        return np.zeros(shape, _record(spec.head_dim))
    return np.zeros((*shape, spec.head_dim), {"f32": np.float32, "f16": np.float16}[kv_type])


def _record(dim: int) -> np.dtype[np.void]:
    return np.dtype([("codes", np.uint8, (dim,)), ("scale", np.float16)])
