"""Open, check and map a GGUF file, single or split: metadata, tensors, and views of their bytes.

An opened file is well-formed: every tensor lies inside it. Whether an architecture has these
tensors is checked by `worker/adapters/`, and their bytes are interpreted by `worker/quants.py`.
Next: `gguf_header.py`, which reads the header.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from worker.errors import ModelLoadFailed
from worker.gguf_header import MAX_TENSORS, Header, TensorInfo, read_header
from worker.quants import Bytes

__all__ = ["GgufFile", "TensorInfo", "shard_paths"]

T = TypeVar("T")
D = TypeVar("D")

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")
_SAMPLES, _SAMPLE_BYTES = 32, 4096  # each may be a disk access


def shard_paths(path: Path) -> list[Path]:
    """All shards of the split model of `path` (`NAME-00002-of-00003.gguf`), or `path`."""
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    stem, no, count = match["stem"], int(match["no"]), int(match["count"])
    if not 1 <= no <= count < MAX_TENSORS:
        expected = f"a shard number from 00001 up to the count, which is below {MAX_TENSORS}"
        raise ModelLoadFailed("the name is not that of a shard", str(path), expected)
    return [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


@dataclass(frozen=True, slots=True)
class _Shard:
    """One mapped file and its header."""

    path: Path
    bytes: mmap.mmap
    header: Header


class GgufFile:
    """An opened model file. Metadata of the first shard, tensors of all.

    Metadata values are int, float, bool and str; arrays of numbers or bools are NumPy arrays of the
    file's type, arrays of strings are list[str], nested arrays are lists. Bytes that are not UTF-8
    are lone surrogates in a string. Close it, or use `with`.
    """

    def __init__(self, path: Path, shards: list[_Shard]) -> None:
        self.path = path
        self.version: int = shards[0].header.version
        self.metadata: dict[str, Any] = shards[0].header.metadata
        self.tensors: dict[str, TensorInfo] = {t.name: t for shard in shards for t in shard.header.tensors}
        self.architecture: str = self.get("general.architecture", str, "")
        """Empty in files that are not models."""
        self._shards = shards

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Open and check the file, or all shards of a split model. Raises ModelLoadFailed."""
        paths = shard_paths(path)
        shards: list[_Shard] = []
        with contextlib.ExitStack() as mapped:
            for index, shard_path in enumerate(paths):
                buffer = mapped.enter_context(_map(shard_path))
                shards.append(_Shard(shard_path, buffer, read_header(buffer, shard_path, index)))
                _check_split(shards[-1], index, len(paths))
            _check_together(shards)
            file = cls(path, shards)
            mapped.pop_all()
        return file

    def require(self, key: str, kind: type[T]) -> T:
        """The metadata value `key`. Raises ModelLoadFailed: missing, no `kind` or not finite."""
        if key not in self.metadata:
            raise ModelLoadFailed(f"metadata key {key!r} is missing", str(self.path), f"type {kind.__name__}")
        value = self.metadata[key]
        if type(value) is not kind:
            what = f"metadata key {key!r} is of type {type(value).__name__}"
            raise ModelLoadFailed(what, str(self.path), f"type {kind.__name__}")
        if isinstance(value, str) and not value.isascii() and not is_unicode(value):
            raise ModelLoadFailed(f"metadata key {key!r} is not UTF-8", str(self.path), "valid UTF-8")
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelLoadFailed(f"metadata key {key!r} is {value}", str(self.path), "a finite number")
        return value

    def get(self, key: str, kind: type[T], default: D) -> T | D:
        """Like `require`, but `default` if the key is missing."""
        return self.require(key, kind) if key in self.metadata else default

    @property
    def name(self) -> str:
        """`general.name`, or the file's name without its extension if there is no usable one."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name.strip() and is_unicode(name) else self.path.stem

    def data(self, tensor: TensorInfo) -> Bytes:
        """The tensor's blocks [rows, row_bytes] u8, read-only; rows are all dims but the last."""
        (whole,) = self.pieces(tensor)
        return whole

    def pieces(self, tensor: TensorInfo) -> Iterator[Bytes]:
        """The tensor's blocks as `data`, in pieces if it is a part: one for each item."""
        count = tensor.shape[0] if tensor.stride else 1
        for i in range(count):
            at, nbytes = tensor.offset + i * tensor.stride, tensor.nbytes // count
            flat = np.frombuffer(self._shards[tensor.shard].bytes, np.uint8, nbytes, at)
            yield flat.reshape(-1, tensor.kind.row_bytes(tensor.shape[-1]))

    @property
    def tensor_bytes(self) -> int:
        """Stored bytes of all tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def by_type(self) -> dict[str, tuple[int, int]]:
        """Type name → (tensors, bytes), the type with the most bytes first."""
        found: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors.values():
            count, nbytes = found.get(tensor.kind.name, (0, 0))
            found[tensor.kind.name] = (count + 1, nbytes + tensor.nbytes)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of a sample of the model; the same on every machine.

        Covers each shard's size, its whole header (metadata, names, shapes, types, offsets) and
        4 KiB from the middle of up to 32 tensors, spread evenly over the shard; not the file's name
        or times. Bytes outside of the samples are not covered: it identifies a model and does not
        authenticate it.
        """
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(len(shard.bytes).to_bytes(8, "little"))
            digest.update(memoryview(shard.bytes)[: shard.header.size])
            for start, stop in _samples(shard.header.tensors):
                digest.update(shard.bytes[start:stop])
        return digest.hexdigest()

    def close(self) -> None:
        """Unmap the file. A shard with live views is unmapped with the last of them."""
        for shard in self._shards:
            with contextlib.suppress(BufferError):
                shard.bytes.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


def is_unicode(text: str) -> bool:
    """Whether a string of metadata was valid UTF-8 in the file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _map(path: Path) -> mmap.mmap:
    """Map a regular file for reading. Opening a pipe would block until it has a writer."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "this is a directory" if stat.S_ISDIR(mode) else "this is not a regular file"
            raise ModelLoadFailed(what, str(path), "a GGUF file")
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                raise ModelLoadFailed("the file is empty", str(path), "a whole, untruncated GGUF file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelLoadFailed(f"the file can't be opened: {reason}", str(path), "a readable GGUF file") from error


def _check_split(shard: _Shard, index: int, named: int) -> None:
    """Check a shard's split metadata against its file name: number `index` (from 0) of `named`."""
    no, count = _split_number(shard, "split.no", 0), _split_number(shard, "split.count", 1)
    merged = count == 0 and named == 1  # llama.cpp's gguf-split --merge leaves a count of 0 behind
    if not merged and (no, count) != (index, named):
        what = f"split.no and split.count are {no} and {count}, and the file name is that of shard {index} of {named}"
        raise ModelLoadFailed(what, str(shard.path), "the shards under their own names, NAME-0000i-of-0000N.gguf")


def _check_together(shards: list[_Shard]) -> None:
    """Check that no tensor occurs in two shards and that none is missing."""
    owner: dict[str, Path] = {}
    for shard in shards:
        for tensor in shard.header.tensors:
            if tensor.name in owner:
                what = f"tensor {tensor.name!r} is in {owner[tensor.name].name} too"
                raise ModelLoadFailed(what, str(shard.path), "each tensor in one shard")
            owner[tensor.name] = shard.path
    claimed = _split_number(shards[0], "split.tensors.count", len(owner))
    if len(shards) > 1 and claimed != len(owner):
        what = f"the shards hold {len(owner)} tensors together"
        raise ModelLoadFailed(what, str(shards[0].path), f"{claimed}, the value of split.tensors.count")
    if len(owner) >= MAX_TENSORS:
        what = f"the shards hold {len(owner):,} tensors"
        raise ModelLoadFailed(what, str(shards[0].path), f"fewer than {MAX_TENSORS:,}")


def _split_number(shard: _Shard, key: str, default: int) -> int:
    value = shard.header.metadata.get(key, default)
    if type(value) is not int:
        raise ModelLoadFailed(f"metadata key {key!r} is of type {type(value).__name__}", str(shard.path), "type int")
    return value


def _samples(tensors: tuple[TensorInfo, ...]) -> Iterator[tuple[int, int]]:
    """Byte ranges in the middle of evenly chosen tensors, in file order."""
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    chosen = min(_SAMPLES, len(ordered))
    for i in range(chosen):
        tensor = ordered[i * len(ordered) // chosen]
        start = tensor.offset + max(0, tensor.nbytes - _SAMPLE_BYTES) // 2
        yield start, min(start + _SAMPLE_BYTES, tensor.offset + tensor.nbytes)
