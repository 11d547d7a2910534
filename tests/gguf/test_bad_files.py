"""What is not a whole, well-formed GGUF file is refused with what, where and expected, and with nothing else."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gguf.against_gguf import assert_same
from tests.gguf.raw_file import METADATA, raw_file
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile, is_unicode
from worker.quants import QUANT_TYPES

RAW = raw_file()
FIELDS = sorted(RAW.fields)
TENSOR_FIELDS = [name for name in FIELDS if ".weight" in name]
LENGTHS = [name for name in FIELDS if name.endswith(("length", "count", "dims", "offset")) or ": dim " in name]
TYPES = [name for name in FIELDS if name.endswith("type")]
BLOWUPS = [0, 1, 2, 5, 33, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]


def refused(data: bytes, path: Path) -> ModelLoadFailed:
    path.write_bytes(data)
    with pytest.raises(ModelLoadFailed) as caught:
        GgufFile.open(path)
    assert set(caught.value.details) == {"what", "where", "expected"}
    assert all(caught.value.details.values())
    assert str(path) in caught.value.details["where"]
    return caught.value


@pytest.fixture(scope="module")
def spot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "model.gguf"


# --- mutations ------------------------------------------------------------------------------------------------------


def set_field(raw: bytearray, name: str, value: int) -> None:
    offset, code = RAW.fields[name]
    size = struct.calcsize("<" + code)
    raw[offset : offset + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


def field_of(names: list[str]) -> st.SearchStrategy[str]:
    """A field; half of the time one of a tensor, which a fault before it would hide."""
    return st.sampled_from(names) | st.sampled_from([name for name in names if name in TENSOR_FIELDS])


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """The well-formed file with one to three faults; those that move bytes come last, after those that know fields."""
    data = bytearray(RAW.data)
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["length", "type", "any field", "byte"]))
        if kind == "length":
            set_field(data, draw(field_of(LENGTHS)), draw(st.sampled_from(BLOWUPS) | st.integers(0, 2**64 - 1)))
        elif kind == "type":
            set_field(data, draw(field_of(TYPES)), draw(st.integers(0, 45)))
        elif kind == "any field":
            set_field(data, draw(field_of(FIELDS)), draw(st.integers(0, 300) | st.integers(0, 2**64 - 1)))
        else:
            data[draw(st.sampled_from(range(len(data))))] ^= draw(st.integers(1, 255))
    place = draw(st.sampled_from(range(len(data))))
    kind = draw(st.sampled_from(["none", "none", "none", "none", "cut", "insert", "delete", "swap"]))
    if kind == "cut":
        del data[place:]
    elif kind == "insert":
        data[place:place] = draw(st.binary(min_size=1, max_size=20))
    elif kind == "delete":
        del data[place : place + draw(st.integers(1, 20))]
    elif kind == "swap":
        width = draw(st.sampled_from([1, 4, 8]))
        data[place : place + width] = data[place : place + width][::-1]
    return bytes(data)


def test_two_thousand_mutated_files_open_with_valid_values_or_are_refused(spot: Path) -> None:
    """Also in under a second each and with less than 4 MiB. What opens is what GGUFReader reads from it."""
    outcomes: Counter[str] = Counter()

    @settings(max_examples=2000, derandomize=True, database=None)
    @given(data=mutated())
    def check(data: bytes) -> None:
        outcomes[check_one(data, spot)] += 1

    check()
    assert set(outcomes) == {"opened", "refused"}
    assert outcomes["opened"] >= 100
    assert outcomes["refused"] >= 1000


def check_one(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    tracemalloc.start()
    began = time.perf_counter()
    try:
        file = GgufFile.open(path)
    except ModelLoadFailed as failure:
        complete = all(failure.details[part] for part in ("what", "where", "expected"))
        return "refused" if complete else "refused without saying why"
    else:
        with file:
            file.fingerprint()
            assert_valid(file, len(data))
            known_types = all(tensor.kind.block_bytes for tensor in file.tensors.values())
            if known_types and is_unicode("".join([*file.metadata, *file.tensors])):  # as gguf requires
                assert_same(file, path)
        return "opened"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.perf_counter() - began < 1
        assert peak < 4 << 20


def assert_valid(file: GgufFile, size: int) -> None:
    assert file.version in (2, 3)
    assert isinstance(file.architecture, str)
    end = 0
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.offset):
        assert end <= tensor.offset <= size - tensor.nbytes
        end = tensor.offset + tensor.nbytes
        if tensor.kind in QUANT_TYPES:
            assert file.data(tensor).size == tensor.nbytes
        assert all(dim > 0 for dim in tensor.shape)
    for value in file.metadata.values():
        assert isinstance(value, int | float | bool | str | list | np.ndarray)


# --- each check, by hand --------------------------------------------------------------------------------------------


def with_metadata(key: str, kind: int, value: Any) -> bytes:
    kept = [item for item in METADATA if item[0] != key]
    return bytes(raw_file(metadata=[*kept, (key, kind, value)]).data)


def nested(depth: int) -> tuple[int, Any]:
    return (9, [nested(depth - 1)]) if depth > 1 else (4, [7])


BAD: dict[str, tuple[bytes, str]] = {
    "another magic": (b"GGML" + bytes(RAW.data[4:]), r"begins with b'GGML'"),
    "version 1": (RAW.set("version", 1), "version 1 is obsolete"),
    "version 4": (RAW.set("version", 4), "version 4 is unknown"),
    "version 0": (RAW.set("version", 0), "version 0 is unknown"),
    "big-endian": (RAW.set("version", 3 << 24), "big-endian"),
    "too many tensors": (RAW.set("tensor count", 10_000), "10,000 tensors"),
    "more tensors than there are": (RAW.set("tensor count", 9_999), "tensor"),
    "a tensor count of 2^64 - 1": (RAW.set("tensor count", 2**64 - 1), "18,446,744,073,709,551,615 tensors"),
    "too many keys": (RAW.set("metadata count", 2**63), "metadata keys"),
    "an unknown value type": (RAW.set("a.u8: type", 13), "value type 13 is unknown.*a type from 0 to 12"),
    "an unknown element type": (RAW.set("b.types: element type", 77), "element type 77 is unknown"),
    "a string past the end": (RAW.set("a.text: length", 2**20), r"a string needs 1,048,576 bytes"),
    "a string of 2^64 - 1": (RAW.set("a.text: length", 2**64 - 1), "a string claims"),
    "a key past the end": (RAW.set("a.text key: length", 60_000), "a string needs 60,000 bytes"),
    "a key too long": (RAW.set("a.text key: length", 70_000), "a string claims 70,000 bytes; expected at most 65,535"),
    "an empty key": (with_metadata("", 0, 1), "the key is empty"),
    "a key twice": (RAW.set("a.u16 key: bytes", b"a.i16"), "'a.i16'.*the key occurs twice"),
    "a token past the end": (RAW.set("b.tokens[2]: length", 2**63), "'b.tokens'.*string 2 of 4 needs"),
    "more tokens than fit": (RAW.set("b.tokens: count", 100_000), "'b.tokens'"),
    "a token count of 2^64 - 1": (RAW.set("b.tokens: count", 2**64 - 1), "too many strings or arrays"),
    "more numbers than fit": (
        RAW.set("b.scores: count", 2**62 + 1),
        "'b.scores'.* 4,611,686,018,427,387,905 numbers",
    ),
    "more bools than fit": (RAW.set("b.bools: count", 2**40), "'b.bools'.*an array of 1,099,511,627,776 bools"),
    "a bool of 2": (RAW.data[: RAW.fields["a.true"][0]] + b"\2" + RAW.data[RAW.fields["a.true"][0] + 1 :], "bool .* 2"),
    "an array bool of 255": (
        RAW.data[: RAW.fields["b.bools[1]"][0]] + b"\xff" + RAW.data[RAW.fields["b.bools[1]"][0] + 1 :],
        "'b.bools'.*bool has the value 255; expected 0 or 1",
    ),
    "arrays five deep": (with_metadata("b.deep", 9, nested(5)), "nested more than 4 deep"),
    "too many nested arrays": (RAW.set("b.nested: count", 2**33), "too many strings or arrays"),
    "no architecture": (with_metadata("general.architecture", 4, 1), "'general.architecture' is of type int.*type str"),
    "an alignment of 0": (RAW.set("general.alignment", 0), "the alignment is 0; expected a power of two"),
    "an alignment of 48": (RAW.set("general.alignment", 48), "the alignment is 48"),
    "an alignment of 2^31": (RAW.set("general.alignment", 2**31), "the alignment is 2,147,483,648"),
    "an alignment that is a text": (with_metadata("general.alignment", 8, "32"), "alignment is a value of type 8"),
    "an alignment that is signed": (with_metadata("general.alignment", 5, 32), "type 5; expected type 4, uint32"),
    "no dimensions": (RAW.set("norm.weight: dims", 0), "'norm.weight'.*0 dimensions; expected 1 to 4"),
    "five dimensions": (RAW.set("norm.weight: dims", 5), "5 dimensions"),
    "a dimension of 0": (RAW.set("matrix.weight: dim 1", 0), r"'matrix.weight'.*dimensions \[64, 0\]"),
    "half a block": (RAW.set("matrix.weight: dim 0", 48), "48 elements of type Q4_0; expected a multiple of 32"),
    "elements that overflow 64 bits": (
        RAW.changed(**{f"flat.weight: dim {i}": 2**63 for i in range(4)}),
        "'flat.weight'.*would end at byte",
    ),
    "a product of dims that wraps to 0": (
        RAW.changed(**{"flat.weight: dim 0": 2**32, "flat.weight: dim 1": 2**32}),
        "'flat.weight'.*would end at byte",
    ),
    "an odd offset": (RAW.set("matrix.weight: offset", 33), "offset is 33; expected a multiple of the alignment 32"),
    "an offset past the end": (RAW.set("flat.weight: offset", 4096), "'flat.weight'.*would end at byte"),
    "an offset that wraps around": (RAW.set("flat.weight: offset", 2**64 - 32), "'flat.weight'.*would end at byte"),
    "tensors over each other": (RAW.set("flat.weight: offset", 64), "'(flat|matrix).weight'.*lies over that of tensor"),
    "two tensors at one place": (RAW.set("matrix.weight: offset", 0), "lies over that of tensor"),
    "an empty tensor name": (raw_file().set("norm.weight name: length", 0), "the name is empty"),
    "a tensor name too long": (RAW.set("norm.weight name: length", 65), "claims 65 bytes; expected at most 64"),
    "a tensor twice": (RAW.set("flat.weight name: bytes", b"norm.weight"), "'norm.weight'.*the name occurs twice"),
    "the last byte missing": (bytes(RAW.data[: -16 - 1]), "'flat.weight'.*would end at byte"),
    "only the magic": (b"GGUF", "a 32-bit number needs 4 bytes and 0 are left"),
    "an empty file": (b"", "the file is empty"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_refused_with_what_where_and_expected(data: bytes, message: str, tmp_path: Path) -> None:
    failure = refused(bytes(data), tmp_path / "bad.gguf")
    assert pytest.raises(ModelLoadFailed, match=f"(?s){message}").matches(failure)


def test_a_file_cut_anywhere_is_refused_or_lacks_only_padding(tmp_path: Path) -> None:
    spot = tmp_path / "cut.gguf"
    end_of_data = len(RAW.data) - 16  # the last tensor has 16 bytes in 32
    for size in range(end_of_data):
        refused(bytes(RAW.data[:size]), spot)
    spot.write_bytes(RAW.data[:end_of_data])
    GgufFile.open(spot).close()


def test_a_header_beyond_the_bound_is_refused_without_reading_it(tmp_path: Path) -> None:
    spot = tmp_path / "sparse.gguf"
    keys = RAW.fields["a.u8 key: length"][0]
    head = bytearray(RAW.data[:keys]) + struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 0, 200 << 20)
    spot.write_bytes(head)
    os.truncate(spot, 300 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ModelLoadFailed, match="a header of at most 64 MiB"):
            GgufFile.open(spot)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="No such file"):
        GgufFile.open(tmp_path / "nothing.gguf")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="this is a directory"):
        GgufFile.open(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelLoadFailed, match="not a regular file"):
        GgufFile.open(tmp_path / "pipe.gguf")


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(ModelLoadFailed, match="can't be opened"):
        GgufFile.open(Path("a\0b"))


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.gguf").write_bytes(RAW.data)

    def denied(path: Path, *_: Any) -> Iterator[None]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ModelLoadFailed, match="Permission denied"):
        GgufFile.open(tmp_path / "secret.gguf")


def test_the_file_that_all_faults_are_made_from_opens(tmp_path: Path) -> None:
    (tmp_path / "good.gguf").write_bytes(RAW.data)
    with GgufFile.open(tmp_path / "good.gguf") as file:
        assert_valid(file, len(RAW.data))
