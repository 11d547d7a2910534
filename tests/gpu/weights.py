"""Random weights of every type, uploaded by the loader, and their reference values."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
from gguf import GGMLQuantizationType

from tests.tiny_weights import RandomWeights
from worker.gguf_file import TensorInfo
from worker.gpu.memory import Pool, Purpose, aligned
from worker.gpu.upload import Upload
from worker.ops import Linear
from worker.quants import dequantize


def blocks_of(kind, shape, name="w", std=0.05):
    """Blocks [rows, row_bytes] u8 with roughly normal values."""
    blocks = RandomWeights(7, name).matrix(GGMLQuantizationType(kind.ggml_id), shape, std)
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(math.prod(shape[:-1]), kind.row_bytes(shape[-1]))


def random_bytes(kind, rows, cols, seed=0):
    """Blocks [rows, row_bytes] u8 of random bits, including infinities, NaNs and denormals."""
    size = (rows, kind.row_bytes(cols))
    return np.random.default_rng([seed, kind.ggml_id]).integers(0, 256, size, dtype=np.uint8)


def upload(kernels, memory, kind, shape, blocks, name="w.weight", on_bytes=lambda _: None):
    """The tensor on the device, uploaded by the loader."""
    info = TensorInfo(name=name, shape=shape, kind=kind, offset=0, nbytes=blocks.nbytes, shard=0)
    pool = Pool(memory, 4 * aligned(blocks.nbytes) + 4 * math.prod(shape), Purpose.WEIGHTS)
    file = SimpleNamespace(data=lambda _: blocks, pieces=lambda _: [blocks])
    uploading = Upload(file, kernels, memory, pool, on_bytes)
    tensor = uploading(info)
    uploading.close()
    return tensor


class Projection:
    """A Linear on the device; f64 `weight` [..., rows, cols] and `bias` [..., rows] or None."""

    def __init__(self, kernels, memory, kind, shape, name="w", bias=False):
        blocks = blocks_of(kind, shape, name)
        self.weight = dequantize(blocks, kind).reshape(shape).astype(np.float64)
        self.bias = None
        device_bias = None
        if bias:
            from worker.quants import F32

            values = np.random.default_rng(5).normal(size=shape[:-1]).astype(np.float32)
            self.bias = values.astype(np.float64)
            raw = values.view(np.uint8).reshape(-1, 4 * shape[-2])
            device_bias = upload(kernels, memory, F32, shape[:-1], raw, f"{name}.bias")
        self.linear = Linear(upload(kernels, memory, kind, shape, blocks), device_bias)

    def exact(self, x, expert=None):
        """W·x + b in f64 for x [T, cols], or for one x [cols] and one expert."""
        w, b = (self.weight, self.bias) if expert is None else (self.weight[expert], self.bias)
        y = x.astype(np.float64) @ w.T
        if b is None:
            return y
        return y + (b if expert is None else b[expert])


def error(found, exact):
    """‖found - exact‖ / ‖exact‖; infinite if any value is NaN or infinite."""
    found = np.asarray(found, np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact)) if np.isfinite(found).all() else math.inf
