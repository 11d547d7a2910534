"""Parse the header of one GGUF file: metadata, and the position of each tensor.

Every length is checked against the remaining bytes before anything of that length is read or
allocated, so malformed content can only raise ModelLoadFailed. Split files, tensor data and the
meaning of metadata are not handled here, nor whether a tensor's type is supported: both matter only
where an adapter needs them. Format: ggml's `docs/gguf.md`. Next: `gguf_file.py`.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from worker.errors import ModelLoadFailed
from worker.quants import QuantType, quant_type

MAX_TENSORS = 10_000
# Far above any real model; together they bound the parsing of any header to one second.
_MAX_HEADER_BYTES = 64 << 20
_MAX_METADATA = 10_000
_MAX_OBJECTS = 1_200_000  # strings and nested arrays; the largest vocabulary with merges has 850,000
_MAX_DEPTH = 4
_MAX_ALIGNMENT = 1 << 20
_MAX_KEY_BYTES, _MAX_TENSOR_NAME_BYTES = 65_535, 64
_MIN_BULK, _MEAN_BYTES = 1000, 32  # for `_strings_in_bulk`: fewest strings; bytes of each with its length
_ARRAY_COST = 8  # reading a nested array takes the time of this many strings

_NOT_UTF8 = "surrogateescape"  # a string that is not UTF-8 is an error only where it is needed
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
_SCALARS = {
    type_id: struct.Struct(f"<{code}")
    for type_id, code in {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}.items()
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: `shape` is row-major, GGUF's dims reversed; `offset` is from the shard's start."""

    name: str
    shape: tuple[int, ...]
    kind: QuantType
    offset: int
    nbytes: int
    shard: int = 0
    stride: int = 0
    """Bytes from one item of the first axis to the next in a part of a tensor; 0: no part."""
    is_table: bool = False
    """The adapter gathers rows by token ids, and no product reads the tensor."""

    def part(self, start: int, stop: int) -> TensorInfo:
        """Rows [start, stop) of each item of a tensor [E, rows, cols], as a tensor of its own."""
        items, rows, cols = self.shape
        row = self.kind.row_bytes(cols)
        return replace(
            self,
            name=f"{self.name}[:, {start}:{stop}]",
            shape=(items, stop - start, cols),
            offset=self.offset + start * row,
            nbytes=items * (stop - start) * row,
            stride=rows * row,
        )


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header of `size` bytes: all tensors are in the file, aligned, without overlap."""

    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    size: int


def read_header(buffer: mmap | bytes, path: Path, shard: int = 0) -> Header:
    """Read and check the header of the file `path` with bytes `buffer`. Raises ModelLoadFailed."""
    reader = _Reader(buffer, path)
    version = _read_version(reader)
    tensor_count, metadata_count = reader.u64(), reader.u64()
    if tensor_count >= MAX_TENSORS:
        reader.fail(f"the file claims {tensor_count:,} tensors", f"fewer than {MAX_TENSORS:,}")
    if metadata_count > _MAX_METADATA:
        reader.fail(f"the file claims {metadata_count:,} metadata keys", f"at most {_MAX_METADATA:,}")
    metadata = _read_metadata(reader, metadata_count)
    entries = _read_entries(reader, tensor_count)
    return Header(version, metadata, _place(reader, entries, metadata, shard), reader.pos)


class _Reader:
    """Reads values from a header in order. `context` names the current item in error messages."""

    def __init__(self, buffer: mmap | bytes, path: Path) -> None:
        self.buffer = buffer
        self.pos = 0
        self.context = "header"
        self.path = path
        self._end = min(len(buffer), _MAX_HEADER_BYTES)
        self._objects_left = _MAX_OBJECTS

    def fail(self, what: str, expected: str) -> NoReturn:
        raise ModelLoadFailed(what, f"{self.path}, {self.context}, byte {self.pos:,}", expected)

    def take(self, size: int, what: str) -> int:
        """Advance by `size` bytes; returns their start."""
        start = self.pos
        if size > self._end - start:
            self._fail_end(size, what)
        self.pos = start + size
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.buffer, self.take(4, "a 32-bit number"))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.buffer, self.take(8, "a 64-bit number"))[0])

    def string(self, limit: int = _MAX_HEADER_BYTES) -> str:
        size = self.u64()
        if size > limit:
            self.fail(f"a string claims {size:,} bytes", f"at most {limit:,}")
        start = self.take(size, "a string")
        return self.buffer[start : self.pos].decode(errors=_NOT_UTF8)

    def value(self, type_id: int) -> Any:
        """A metadata value: int, float, bool, str, or an array as `_array` returns it."""
        if (scalar := _SCALARS.get(type_id)) is not None:
            return scalar.unpack_from(self.buffer, self.take(scalar.size, "a number"))[0]
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self._array(1)
        if type_id != _BOOL:
            self.fail(f"value type {type_id} is unknown", "a type from 0 to 12")
        byte = self.buffer[self.take(1, "a bool")]
        if byte > 1:
            self.fail(f"a bool has the value {byte}", "0 or 1")
        return byte == 1

    def _array(self, depth: int) -> Any:
        """A NumPy array of numbers or bools that owns its memory, or a list of str or of arrays."""
        type_id, count = self.u32(), self.u64()
        if (scalar := _SCALARS.get(type_id)) is not None:
            start = self.take(count * scalar.size, f"an array of {count:,} numbers")
            return np.frombuffer(self.buffer, np.dtype(scalar.format), count, start).copy()
        if type_id == _BOOL:
            start = self.take(count, f"an array of {count:,} bools")
            flags = np.frombuffer(self.buffer, np.uint8, count, start).copy()  # a view would keep the mapping open
            if count and flags.max() > 1:
                self.fail(f"a bool has the value {flags.max()}", "0 or 1")
            return flags == 1
        if type_id == _STRING:
            return self._strings(count)
        if type_id != _ARRAY:
            self.fail(f"array element type {type_id} is unknown", "a type from 0 to 12")
        if depth == _MAX_DEPTH:
            self.fail(f"arrays are nested more than {_MAX_DEPTH} deep", f"at most {_MAX_DEPTH}")
        self._spend(count * _ARRAY_COST)
        return [self._array(depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """`count` strings; `string` is inlined, since a vocabulary has hundreds of thousands."""
        self._spend(count)
        if count >= _MIN_BULK and (whole := _strings_in_bulk(self.buffer, self.pos, self._end, count)) is not None:
            strings, self.pos = whole
            return strings
        buffer, end, pos = self.buffer, self._end, self.pos
        length_at: Callable[..., tuple[int]] = _U64.unpack_from
        strings = []
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + length_at(buffer, pos)[0]
                if pos > end:
                    self.pos = start
                    self._fail_end(pos - start, f"string {len(strings):,} of {count:,}")
                strings.append(buffer[start:pos].decode(errors=_NOT_UTF8))
        except struct.error:
            self.pos = pos
            self._fail_end(8, f"the length of string {len(strings):,} of {count:,}")
        self.pos = pos
        return strings

    def _spend(self, objects: int) -> None:
        self._objects_left -= objects
        if self._objects_left < 0:
            self.fail("the arrays hold too many strings or arrays", f"at most {_MAX_OBJECTS:,} in one header")

    def _fail_end(self, size: int, what: str) -> NoReturn:
        left = max(0, self._end - self.pos)
        if self._end == len(self.buffer):
            self.fail(f"{what} needs {size:,} bytes and {left:,} are left", "a whole, untruncated GGUF file")
        what = f"{what} needs {size:,} bytes and {left:,} of the header's bound are left"
        self.fail(what, f"a header of at most {_MAX_HEADER_BYTES >> 20} MiB")


def _strings_in_bulk(buffer: mmap | bytes, start: int, end: int, count: int) -> tuple[list[str], int] | None:
    """`count` strings from `start` on and their end, in half the time of a loop, or None.

    A length below 65,536 ends in six zero bytes, and text rarely contains zeros, so a string is
    assumed after each such run. The assumption holds if each length leads to the next string, and
    the text can be split at the zeroed lengths if it has no other zero. None if either fails.
    """
    data = np.frombuffer(buffer, np.uint8, min(end - start, count * _MEAN_BYTES), start)
    zero = data == 0
    pairs = zero[1:] & zero[:-1]
    sixes = pairs[4:] & pairs[2:-2] & pairs[:-4]  # six zeros from here on
    begins = np.flatnonzero(sixes[:-1] & ~zero[6:])[:count] + 6
    if len(begins) < count or begins[0] != 8:
        return None
    ends = begins + data[begins - 8] + (data[begins - 7].astype(np.int64) << 8)
    text = data[: ends[-1]].copy()
    text[begins - 8] = text[begins - 7] = 0
    chained = len(text) == ends[-1] and np.array_equal(ends[:-1] + 8, begins[1:])
    if not chained or np.count_nonzero(text) != len(text) - 8 * count:
        return None
    with suppress(UnicodeDecodeError):
        return text.tobytes().decode().split("\0" * 8)[1:], start + len(text)
    return None


def _read_version(reader: _Reader) -> int:
    magic = reader.buffer[reader.take(4, "the magic number") : reader.pos]
    if magic != b"GGUF":
        reader.fail(f"the file begins with {magic!r}", "a GGUF file, which begins with b'GGUF'")
    version = reader.u32()
    if version & 0xFFFF == 0 and version:  # a small number in the other byte order
        reader.fail("the file is big-endian", "a little-endian GGUF file; convert it with gguf's gguf-convert-endian")
    if version == 1:
        reader.fail("GGUF version 1 is obsolete", "version 2 or 3; convert the model again with a current tool")
    if version not in (2, 3):
        reader.fail(f"GGUF version {version:,} is unknown", "version 2 or 3")
    return version


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        reader.context = f"metadata key {index + 1} of {count}"
        key = reader.string(_MAX_KEY_BYTES)
        reader.context = f"metadata key {key[:80]!r}"
        if not key or key in metadata:
            reader.fail("the key occurs twice" if key else "the key is empty", "one name for each key")
        type_id = reader.u32()
        if key == "general.alignment" and type_id != _UINT32:
            reader.fail(f"the alignment is a value of type {type_id}", f"type {_UINT32}, uint32")
        metadata[key] = reader.value(type_id)
    return metadata


def _read_entries(reader: _Reader, count: int) -> list[TensorInfo]:
    entries: list[TensorInfo] = []
    names: set[str] = set()
    for index in range(count):
        reader.context = f"tensor {index + 1} of {count}"
        name = reader.string(_MAX_TENSOR_NAME_BYTES)
        reader.context = f"tensor {name!r}"
        if not name or name in names:
            reader.fail("the name occurs twice" if name else "the name is empty", "one name for each tensor")
        names.add(name)
        entries.append(_read_entry(reader, name))
    return entries


def _read_entry(reader: _Reader, name: str) -> TensorInfo:
    """A tensor with its offset from the start of the data section, as in the header."""
    n_dims = reader.u32()
    if not 1 <= n_dims <= 4:
        reader.fail(f"the tensor has {n_dims:,} dimensions", "1 to 4")
    dims = tuple(reader.u64() for _ in range(n_dims))
    if 0 in dims:
        reader.fail(f"the tensor has dimensions {list(dims)}", "dimensions above 0")
    kind = quant_type(reader.u32())
    if dims[0] % kind.block_size:
        reader.fail(f"a row has {dims[0]:,} elements of type {kind.name}", f"a multiple of {kind.block_size}")
    return TensorInfo(name, dims[::-1], kind, reader.u64(), math.prod(dims[1:]) * kind.row_bytes(dims[0]))


def _place(reader: _Reader, entries: list[TensorInfo], metadata: dict[str, Any], shard: int) -> tuple[TensorInfo, ...]:
    """Convert offsets to file positions and check them. Python integers do not overflow."""
    reader.context = "metadata key 'general.alignment'"
    alignment: int = metadata.get("general.alignment", 32)
    if not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        reader.fail(f"the alignment is {alignment:,}", f"a power of two from 1 to {_MAX_ALIGNMENT:,}")
    data_start = -(-reader.pos // alignment) * alignment
    tensors = []
    for entry in entries:
        reader.context, offset = f"tensor {entry.name!r}", data_start + entry.offset
        if entry.offset % alignment:
            reader.fail(f"the data's offset is {entry.offset:,}", f"a multiple of the alignment {alignment}")
        if offset + entry.nbytes > len(reader.buffer):
            what = f"the data would end at byte {offset + entry.nbytes:,} and the file ends at {len(reader.buffer):,}"
            reader.fail(what, "a whole, untruncated GGUF file")
        tensors.append(replace(entry, offset=offset, shard=shard))
    _check_apart(reader, tensors)
    return tuple(tensors)


def _check_apart(reader: _Reader, tensors: list[TensorInfo]) -> None:
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            reader.context = f"tensor {after.name!r}"
            reader.fail(f"the data lies over that of tensor {before.name!r}", "tensors that lie apart")
