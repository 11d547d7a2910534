"""The comparison of an opened file with gguf's own reader, an independent and slow implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, ReaderField

from worker.gguf_file import GgufFile


def plain(value: Any) -> list[Any]:
    """A metadata value that is no array of arrays, as the list of its scalars."""
    if isinstance(value, list | np.ndarray):
        return list(value.tolist() if isinstance(value, np.ndarray) else value)
    return [value]


def contents(field: ReaderField) -> list[Any]:
    parts = [field.parts[index] for index in field.data]
    if field.types[-1] == GGUFValueType.STRING:
        return [bytes(part).decode(errors="surrogateescape") for part in parts]
    return [part.tolist()[0] for part in parts]


def assert_same(file: GgufFile, path: Path) -> None:
    """All metadata and all tensors of one unsplit file are what GGUFReader reads; NaN equals NaN.

    Arrays of arrays are left out: GGUFReader flattens them and takes the first element's type for all.
    """
    reader = GGUFReader(path)
    theirs = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(theirs) == list(file.metadata)
    for key, field in theirs.items():
        value = file.metadata[key]
        if not isinstance(value, list) or all(isinstance(item, str) for item in value):
            assert repr(plain(value)) == repr(contents(field)), key
    assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
    for tensor in reader.tensors:
        mine = file.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.kind.ggml_id, mine.nbytes) == (tensor.tensor_type, tensor.n_bytes)
        assert mine.offset == tensor.data_offset
        assert file.data(mine).tobytes() == np.ascontiguousarray(tensor.data).tobytes()
