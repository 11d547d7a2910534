"""Copies of a model file with other metadata and tensors, as unusual converters write them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType as Value


def changed_copy(
    source: Path,
    target: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
) -> Path:
    """Write a copy of `source` and return its path.

    `metadata` replaces or adds values (None drops a key; bytes become a string that need not be
    UTF-8), `tensors` replaces or adds F32 tensors, `drop` names the tensors to leave out.
    """
    reader = gguf.GGUFReader(source)
    changes = dict(metadata or {})
    architecture = changes.pop("general.architecture", reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in changes:
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[-1] if kind is Value.ARRAY else None)
    for key, value in changes.items():
        if value is not None:
            writer.add_key_value(key, value, *_types(value))
    added = dict(tensors or {})
    for tensor in reader.tensors:
        if tensor.name not in drop and tensor.name not in added:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, values in added.items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _types(value: Any) -> tuple[Value, Value | None]:
    """The GGUF type of a value, and that of its elements."""
    if isinstance(value, list):
        return Value.ARRAY, _types(value[0])[0]
    kinds = {bool: Value.BOOL, int: Value.UINT32, float: Value.FLOAT32, str: Value.STRING, bytes: Value.STRING}
    return kinds[type(value)], None
