"""Every block format against gguf's own tables and de-quantization, and two of them by hand."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from worker import quants as ours
from worker.quants import QUANT_TYPES, QuantType, dequantize, quant_type

EACH_TYPE = pytest.mark.parametrize("kind", QUANT_TYPES, ids=lambda kind: kind.name)


def random_blocks(kind: QuantType, rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(kind.ggml_id).integers(0, 256, (rows, kind.row_bytes(cols)), dtype=np.uint8)


def test_the_types_are_those_that_the_worker_must_read() -> None:
    required = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S"
    required += " IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4"
    assert [kind.name for kind in QUANT_TYPES] == required.split()


@EACH_TYPE
def test_names_numbers_and_sizes_are_ggml_s(kind: QuantType) -> None:
    assert quant_type(kind.ggml_id) is kind
    assert GGMLQuantizationType(kind.ggml_id).name == kind.name
    assert GGML_QUANT_SIZES[GGMLQuantizationType(kind.ggml_id)] == (kind.block_size, kind.block_bytes)


def test_any_other_type_has_its_name_and_size_and_is_not_supported() -> None:
    assert quant_type(9) == QuantType("Q8_1", 9, 32, 40)
    assert quant_type(4_000) == QuantType("type 4000", 4_000, 1, 0)
    for ggml_id in set(range(64)) - {kind.ggml_id for kind in QUANT_TYPES}:
        assert quant_type(ggml_id) not in QUANT_TYPES


@EACH_TYPE
def test_random_blocks_are_dequantized_bit_for_bit_as_gguf_does(kind: QuantType) -> None:
    """Random bytes make infinities, NaNs and denormals too. Rows × cols go past one step and end inside one."""
    data = random_blocks(kind, 5, 256 * 450)
    assert data.shape[1] // kind.block_bytes * kind.block_size * 5 > ours._STEP
    with np.errstate(all="ignore"):
        expected = quants.dequantize(data, GGMLQuantizationType(kind.ggml_id))
    found = dequantize(data, kind)
    assert found.dtype == np.float32
    assert found.shape == (5, 256 * 450)
    assert found.flags.owndata or found.base.flags.owndata
    same = found.view(np.uint32) == np.ascontiguousarray(expected).view(np.uint32)
    assert (same | (np.isnan(found) & np.isnan(expected))).all()


@EACH_TYPE
def test_rows_are_dequantized_alike_alone_and_together(kind: QuantType) -> None:
    data = random_blocks(kind, 3, 512)
    alone = np.concatenate([dequantize(data[i : i + 1], kind) for i in range(3)])
    assert alone.tobytes() == dequantize(data, kind).tobytes()
    assert dequantize(data[:0], kind).shape == (0, 512)


def test_dequantizing_a_large_matrix_needs_little_more_than_its_result() -> None:
    data = random_blocks(ours.Q4_K, 1024, 4096)
    tracemalloc.start()
    try:
        result = dequantize(data, ours.Q4_K)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - result.nbytes < 8 << 20


def test_mxfp4_by_hand() -> None:
    """17 bytes: the exponent first, then 16 bytes whose low nibbles are elements 0–15 and whose high ones 16–31."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    low, high = list(range(16)), [(5 * i + 3) % 16 for i in range(16)]
    block = bytes([127 + 3, *(h << 4 | e for e, h in zip(low, high, strict=True))])
    expected = [8 * values[code] for code in low + high]
    assert dequantize(np.frombuffer(block, np.uint8)[None], ours.MXFP4).tolist() == [expected]


def test_the_exponents_of_mxfp4_reach_from_denormals_to_a_huge_number_that_is_no_nan() -> None:
    blocks = np.full((256, 17), 0x22, np.uint8)  # every element is 1
    blocks[:, 0] = np.arange(256)
    ones = dequantize(blocks, ours.MXFP4)[:, 0].astype(np.float64)
    assert ones[1:255].tolist() == [2.0 ** (exponent - 127) for exponent in range(1, 255)]
    assert ones[0] == 2.0**-127
    assert np.isfinite(ones[:255]).all()
    assert not np.isnan(ones[255])


def test_q4_0_by_hand() -> None:
    """18 bytes: an f16 scale d, then nibbles as in MXFP4; an element is d · (nibble - 8)."""
    low, high = list(range(16)), list(range(15, -1, -1))
    block = np.float16(0.25).tobytes() + bytes(h << 4 | e for e, h in zip(low, high, strict=True))
    expected = [0.25 * (nibble - 8) for nibble in low + high]
    assert dequantize(np.frombuffer(block, np.uint8)[None], ours.Q4_0).tolist() == [expected]


def test_a_row_is_whole_blocks() -> None:
    assert ours.Q6_K.row_bytes(512) == 420
    with pytest.raises(ValueError, match="896 elements does not consist of Q4_K blocks of 256"):
        ours.Q4_K.row_bytes(896)


def test_opening_files_does_not_import_gguf() -> None:
    """It would cost a start 60 ms and more; only de-quantization needs it."""
    script = "import sys, worker.gguf_file; assert 'gguf' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("kind", ours.CODEBOOK_TYPES, ids=lambda kind: kind.name)
def test_a_codebook_has_the_magnitudes_of_gguf_s(kind: QuantType) -> None:
    definition = getattr(quants, kind.name)
    rows = ours.codebook(kind)
    assert rows.shape == definition.grid_shape
    assert (np.array(definition.grid_map)[rows] == definition.grid.reshape(rows.shape)).all()
