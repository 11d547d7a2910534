"""A well-formed file opens with the values that were written, as gguf's own reader and writer have them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from tests.gguf.against_gguf import assert_same
from tests.gguf.raw_file import ARRAY, METADATA, STRING, TENSORS, raw_file
from tests.gguf.written_file import FLOATS, INTEGERS, some_tensors, write
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile

ARRAY_TYPES = {
    GGUFValueType.UINT8: np.uint8,
    GGUFValueType.INT8: np.int8,
    GGUFValueType.UINT16: np.uint16,
    GGUFValueType.INT16: np.int16,
    GGUFValueType.UINT32: np.uint32,
    GGUFValueType.INT32: np.int32,
    GGUFValueType.UINT64: np.uint64,
    GGUFValueType.INT64: np.int64,
    GGUFValueType.FLOAT32: np.float32,
    GGUFValueType.FLOAT64: np.float64,
    GGUFValueType.BOOL: np.bool_,
}


def test_every_metadata_type_and_every_tensor_reads_as_gguf_reads_it(written: Path) -> None:
    with GgufFile.open(written) as file:
        assert (file.version, file.architecture) == (3, "llama")
        assert_same(file, written)


def test_scalars_have_the_python_types_of_their_gguf_types(written: Path) -> None:
    with GgufFile.open(written) as file:
        for kinds, python_type in ((INTEGERS, int), (FLOATS, float)):
            assert {type(file.metadata[f"scalar.{kind.name}.1"]) for kind in kinds} == {python_type}
        assert file.metadata["scalar.UINT64.1"] == 2**64 - 1
        assert file.metadata["scalar.BOOL.0"] is True
        assert file.metadata["scalar.STRING.1"] == "Grüße, 世界 🌍"


def test_arrays_of_numbers_are_numpy_arrays_of_the_type_in_the_file(written: Path) -> None:
    with GgufFile.open(written) as file:
        for kind, dtype in ARRAY_TYPES.items():
            assert file.require(f"array.{kind.name}", np.ndarray).dtype == dtype
        assert file.require("array.STRING", list) == ["", "Grüße, 世界 🌍"]


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3_read_alike(tmp_path: Path, version: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_file(version).data)
    with GgufFile.open(path) as file:
        assert file.version == version
        assert_same(file, path)
        assert list(file.metadata) == [key for key, _, _ in METADATA]
        assert [array.tolist() if hasattr(array, "tolist") else array for array in file.metadata["b.nested"]] == [
            ["x", "yz"],
            [1, 2, 3],
        ]


def test_a_shape_is_the_reverse_of_the_dims_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_file().data)
    with GgufFile.open(path) as file:
        for name, dims, kind, nbytes in TENSORS:
            tensor = file.tensors[name]
            assert (tensor.shape, tensor.kind.ggml_id, tensor.nbytes) == (dims[::-1], kind, nbytes)
        experts = file.data(file.tensors["experts.weight"])  # 3 experts of 2 rows of one Q8_0 block
        assert experts.shape == (6, 34)
        assert experts[0, :3].tolist() == [100, 101, 102]
        assert file.data(file.tensors["norm.weight"]).shape == (1, 32)


def test_tensor_bytes_are_read_only_and_outlive_the_file(written: Path) -> None:
    file = GgufFile.open(written)
    blocks = file.data(file.tensors["blk.0.norm.weight"])
    file.close()
    with pytest.raises(ValueError, match="read-only"):
        blocks[0, 0] = 1
    assert blocks.view(np.float32)[0].tolist() == some_tensors()["blk.0.norm.weight"].tolist()


def test_an_alignment_of_the_file_s_own_moves_the_data(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(4096)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile.open(path) as file:
        assert [tensor.offset for tensor in file.tensors.values()] == [4096, 8192]
        assert_same(file, path)


def test_a_file_of_a_vocabulary_alone_opens_with_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    write(path, {})
    with GgufFile.open(path) as file:
        assert (file.tensors, file.tensor_bytes, file.by_type()) == ({}, 0, {})


def test_types_are_counted_with_their_bytes(written: Path) -> None:
    with GgufFile.open(written) as file:
        halves = sum(2 * 3 * (5 + i) for i in range(7))
        floats = sum(4 * (5 + i) for i in range(7))
        blocks = sum(6 * 34 * (i + 1) for i in range(7))
        assert list(file.by_type().items()) == [("Q8_0", (7, blocks)), ("F16", (7, halves)), ("F32", (7, floats))]
        assert file.tensor_bytes == halves + floats + blocks


def test_a_vocabulary_of_200_000_tokens_and_as_many_merges_opens_in_well_under_a_second(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    words = [f"token{i}" for i in range(200_000)]
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(words)
    writer.add_token_merges(words)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    began = time.perf_counter()
    with GgufFile.open(path) as file:
        took = time.perf_counter() - began
        assert file.metadata["tokenizer.ggml.tokens"] == file.metadata["tokenizer.ggml.merges"] == words
    assert took < 0.9  # 0.15 s on a quiet laptop; gguf's own reader takes 6 s


# --- required values ------------------------------------------------------------------------------------------------


ODD = st.sampled_from(["", "\0", "a\0", "\0" * 8, "é" * 40, "x" * 256, "y" * 65_536, "\1\0\0\0\0\0\0\0z"])


@given(st.lists(st.text(max_size=6) | ODD, max_size=12), st.integers(0, 4))
def test_many_strings_read_as_they_were_written_whatever_is_in_them(tmp_path_factory, strings, ordinary) -> None:
    every = ["token", "Ġof", "x" * 300] * 350 * ordinary + strings
    raw = raw_file(metadata=[*METADATA[:2], ("c.strings", ARRAY, (STRING, every)), ("c.after", STRING, "after")])
    path = tmp_path_factory.getbasetemp() / "strings.gguf"
    path.write_bytes(raw.data)
    with GgufFile.open(path) as file:
        assert file.metadata["c.strings"] == every
        assert file.metadata["c.after"] == "after"


def test_a_string_that_is_no_utf_8_is_an_error_only_where_it_is_needed(tmp_path: Path) -> None:
    metadata = [*METADATA[:2], ("c.strings", ARRAY, (STRING, ["abcd"] * 2000)), ("c.text", STRING, "é")]
    raw = raw_file(metadata=metadata)
    data = raw.changed(**{"c.strings[1500]: bytes": b"ab\xff\xff", "c.text: bytes": b"\xff\xfe"})
    (tmp_path / "m.gguf").write_bytes(data)
    with GgufFile.open(tmp_path / "m.gguf") as file:
        strings = file.metadata["c.strings"]
        assert strings[1500].encode(errors="surrogateescape") == b"ab\xff\xff"
        assert strings[:1500] + strings[1501:] == ["abcd"] * 1999
        with pytest.raises(ModelLoadFailed, match=r"'c.text' is not UTF-8"):
            file.require("c.text", str)


@pytest.mark.parametrize(
    ("name", "expected"),
    [((STRING, "tiny é"), "tiny é"), ((STRING, ""), "m"), ((STRING, "\udcff"), "m"), ((4, 7), "m"), (None, "m")],
)
def test_the_name_is_that_of_the_metadata_or_of_the_file(name, expected, tmp_path: Path) -> None:
    metadata = [*METADATA[:2], *([("general.name", *name)] if name else [])]
    raw = raw_file(metadata=metadata)
    (tmp_path / "m.gguf").write_bytes(raw.data)
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert file.name == expected


def test_a_tensor_of_an_unsupported_type_is_listed(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(raw_file().set("matrix.weight: type", 4_000))
    with GgufFile.open(tmp_path / "m.gguf") as file:
        assert file.by_type()["type 4000"][0] == 1
        assert len(file.fingerprint()) == 64


def test_a_missing_key_is_named(written: Path) -> None:
    missing = r"'llama.block_count' is missing; expected type int"
    with GgufFile.open(written) as file, pytest.raises(ModelLoadFailed, match=missing):
        file.require("llama.block_count", int)


def test_a_value_of_another_type_is_refused_and_a_bool_is_no_int(written: Path) -> None:
    with GgufFile.open(written) as file:
        with pytest.raises(ModelLoadFailed, match=r"'scalar.BOOL.0' is of type bool; expected type int"):
            file.require("scalar.BOOL.0", int)
        with pytest.raises(ModelLoadFailed, match=r"'array.INT32' is of type ndarray; expected type str"):
            file.get("array.INT32", str, None)


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_file().set("a.f32", float("nan")))
    with GgufFile.open(path) as file, pytest.raises(ModelLoadFailed, match=r"'a.f32' is nan; expected a finite number"):
        file.require("a.f32", float)


def test_a_default_stands_in_for_a_missing_key_only(written: Path) -> None:
    with GgufFile.open(written) as file:
        assert file.get("no.such.key", int, 7) == 7
        assert file.get("scalar.INT8.1", int, 7) == 127


# --- fingerprint ----------------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    with GgufFile.open(path) as file:
        return file.fingerprint()


def test_the_fingerprint_does_not_depend_on_the_file_s_name(written: Path) -> None:
    assert fingerprint(written) == fingerprint(Path(shutil.copy(written, written.with_name("other.gguf"))))


def test_metadata_and_weights_change_the_fingerprint(tmp_path: Path) -> None:
    raw = raw_file()
    variants = [bytes(raw.data), raw.set("a.u8", 7), raw.set("flat.weight name: bytes", b"flax.weight")]
    variants.append(bytes(raw.data[:-20]) + b"\7" + bytes(raw.data[-19:]))  # inside the last tensor
    seen = set()
    for data in variants:
        (tmp_path / "model.gguf").write_bytes(data)
        seen.add(fingerprint(tmp_path / "model.gguf"))
    assert len(seen) == len(variants)
