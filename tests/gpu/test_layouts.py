"""Upload and dequantization of every type: sizes to the byte, values to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from tests.gpu.guarded import GuardedPool
from tests.gpu.weights import random_bytes, upload
from worker.errors import ModelLoadFailed
from worker.gguf_file import TensorInfo
from worker.gpu.layouts import is_vector, plane_bytes, weight_bytes
from worker.gpu.memory import ALIGNMENT, Purpose
from worker.quants import (
    BF16,
    F16,
    F32,
    IQ1_M,
    IQ1_S,
    IQ2_S,
    IQ2_XS,
    IQ2_XXS,
    IQ3_S,
    IQ3_XXS,
    MXFP4,
    QUANT_TYPES,
    TQ1_0,
)

CODES = {
    **dict.fromkeys((IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S), 96 + 8 + 2),
    **dict.fromkeys((IQ3_XXS, IQ3_S), 128 + 8 + 2),
    TQ1_0: 66,
}
"""Bytes of 256 elements of the types that are not stored as in the file: codes, scales, a scale of scales."""
EACH_TYPE = pytest.mark.parametrize("kind", QUANT_TYPES, ids=lambda kind: kind.name)


def info(kind, shape, name="w.weight"):
    return TensorInfo(name=name, shape=shape, kind=kind, offset=0, nbytes=0, shard=0)


@EACH_TYPE
def test_planes_have_exactly_the_bytes_of_the_file_or_of_the_codes_that_replace_it(kind):
    bytes_of_256 = CODES.get(kind, kind.row_bytes(256))
    for cols in (256, 512, 2816):
        assert sum(plane_bytes(kind, cols)) == cols // 256 * bytes_of_256
    if kind.block_size <= 32:
        assert sum(plane_bytes(kind, 896 + 32)) == kind.row_bytes(896 + 32)


@EACH_TYPE
def test_a_matrix_needs_at_most_two_percent_more_than_its_planes(kind):
    assert weight_bytes(info(kind, (151, 2816))) <= 1.02 * 151 * 11 * CODES.get(kind, kind.row_bytes(256))


def test_rows_that_are_not_whole_units_are_rejected_with_the_tensor_s_name():
    with pytest.raises(ModelLoadFailed, match=r"'w.weight': rows of 100 elements; expected a multiple of 32"):
        weight_bytes(info(F32, (4, 100)))


def test_biases_of_experts_are_vectors_and_routers_are_matrices():
    assert is_vector(info(F32, (8, 64), "ffn_down_exps.bias"))
    assert is_vector(info(F16, (64,), "output_norm.weight"))
    assert not is_vector(info(F32, (8, 64), "ffn_gate_inp.weight"))


def device_values(kernels, memory, kind, shape, blocks):
    from worker.gpu.layouts import dequantize

    pool = GuardedPool()
    out = dequantize(kernels, pool, upload(kernels, memory, kind, shape, blocks))
    pool.check()
    return out.get()


def comparable(kind, blocks):
    """Blocks without the two smallest scales of MXFP4, which -ftz=true flushes to zero."""
    if kind is MXFP4:
        blocks = blocks.copy()
        first = blocks.reshape(-1, kind.block_bytes)[:, 0]
        first[first < 2] = 2
    return blocks


@EACH_TYPE
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (7, 256), (33, 1280), (5, 2816)])
def test_device_dequantization_of_random_bytes_is_bit_exact(kernels, memory, kind, rows, cols):
    """NaN equals NaN."""
    blocks = comparable(kind, random_bytes(kind, rows, cols))
    with np.errstate(all="ignore"):
        expected = np.ascontiguousarray(quants.dequantize(blocks, GGMLQuantizationType(kind.ggml_id)))
    found = device_values(kernels, memory, kind, (rows, cols), blocks)
    same = found.view(np.uint32) == expected.view(np.uint32)
    assert (same | (np.isnan(found) & np.isnan(expected))).all()


@EACH_TYPE
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_embedded_rows_of_random_bytes_are_scaled_with_one_rounding(kernels, memory, kind, scale):
    """Rows without a token are zeros; NaN equals NaN."""
    from cupy import asarray

    from worker.gpu.layouts import embed

    blocks = comparable(kind, random_bytes(kind, 7, 256))
    tokens, slots = np.array([6, 0, 3], np.int32), np.array([2, -1, 0, 1], np.int32)
    with np.errstate(all="ignore"):
        values = np.ascontiguousarray(quants.dequantize(blocks, GGMLQuantizationType(kind.ggml_id)))
        expected = values[tokens[slots]] * np.float32(scale)
    expected[slots < 0] = 0
    pool, table = GuardedPool(), upload(kernels, memory, kind, (7, 256), blocks)
    found = embed(kernels, pool, table, asarray(tokens), asarray(slots), scale).get()
    pool.check()
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.abs(expected) < np.finfo(np.float32).tiny)
    assert (same | (np.isnan(found) & np.isnan(expected))).all()


@pytest.mark.parametrize("kind", [kind for kind in QUANT_TYPES if kind.block_size <= 32], ids=lambda kind: kind.name)
def test_rows_that_are_odd_multiples_of_32_are_bit_exact(kernels, memory, kind):
    blocks = comparable(kind, random_bytes(kind, 3, 96))
    with np.errstate(all="ignore"):
        expected = np.ascontiguousarray(quants.dequantize(blocks, GGMLQuantizationType(kind.ggml_id)))
    found = device_values(kernels, memory, kind, (3, 96), blocks)
    same = found.view(np.uint32) == expected.view(np.uint32)
    assert (same | (np.isnan(found) & np.isnan(expected))).all()


@EACH_TYPE
def test_a_tensor_of_many_chunks_arrives_whole_and_its_bytes_are_reported(kernels, memory, monkeypatch, kind):
    from worker.gpu.layouts import dequantize

    blocks = comparable(kind, random_bytes(kind, 61, 768))
    in_one = dequantize(kernels, GuardedPool(), upload(kernels, memory, kind, (61, 768), blocks)).get()
    monkeypatch.setattr("worker.gpu.upload.CHUNK", 12 * ALIGNMENT)
    reported = []
    in_many = dequantize(
        kernels, GuardedPool(), upload(kernels, memory, kind, (61, 768), blocks, on_bytes=reported.append)
    )
    assert in_many.get().tobytes() == in_one.tobytes()
    assert len(reported) > 2
    assert sum(reported) == blocks.nbytes
    assert memory.used[Purpose.WORKSPACE] == 0


def test_vectors_of_every_float_type_arrive_as_f32(kernels, memory):
    values = np.array([[1.5, -2.0, 0.25, 65504.0]], np.float32)
    stored = {F32: values, F16: values.astype(np.float16), BF16: (values.view(np.uint32) >> 16).astype(np.uint16)}
    for kind, raw in stored.items():
        found = upload(kernels, memory, kind, (4,), raw.view(np.uint8), "norm.weight").data.get()
        expected = values[0] if kind is not BF16 else (values.view(np.uint32) >> 16 << 16).view(np.float32)[0]
        assert found.tobytes() == expected.tobytes()


@EACH_TYPE
def test_slices_of_rows_and_of_experts_hold_their_own_values(kernels, memory, kind):
    from worker.gpu.layouts import dequantize

    blocks = comparable(kind, random_bytes(kind, 24, 256))
    whole = upload(kernels, memory, kind, (24, 256), blocks)
    part = dequantize(kernels, GuardedPool(), whole.rows(5, 12)).get()
    assert part.tobytes() == dequantize(kernels, GuardedPool(), whole).get()[5:12].tobytes()
    experts = upload(kernels, memory, kind, (4, 6, 256), blocks)
    part = dequantize(kernels, GuardedPool(), experts.rows(1, 3)).get()
    assert part.reshape(12, 256).tobytes() == dequantize(kernels, GuardedPool(), whole).get()[6:18].tobytes()


@EACH_TYPE
def test_embedding_gathers_the_rows_of_the_tokens(kernels, memory, kind):
    from worker.gpu.layouts import dequantize, embed

    table = upload(kernels, memory, kind, (19, 512), comparable(kind, random_bytes(kind, 19, 512)))
    pool = GuardedPool()
    tokens = np.array([18, 0, 0, 7, 3], np.int32)
    x = embed(kernels, pool, table, pool.put(tokens)).get()
    pool.check()
    assert x.tobytes() == dequantize(kernels, pool, table).get()[tokens].tobytes()
