"""Files by gguf's own writer, with a value of every metadata type and tensors of three kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

INTEGERS = {
    GGUFValueType.UINT8: [0, 255],
    GGUFValueType.INT8: [-128, 127],
    GGUFValueType.UINT16: [0, 2**16 - 1],
    GGUFValueType.INT16: [-(2**15), 2**15 - 1],
    GGUFValueType.UINT32: [0, 2**32 - 1],
    GGUFValueType.INT32: [-(2**31), 2**31 - 1],
    GGUFValueType.UINT64: [0, 2**64 - 1],
    GGUFValueType.INT64: [-(2**63), 2**63 - 1],
}
FLOATS = {GGUFValueType.FLOAT32: [0.1, -1e38], GGUFValueType.FLOAT64: [0.1, 1e300]}
OTHERS = {GGUFValueType.BOOL: [True, False], GGUFValueType.STRING: ["", "Grüße, 世界 🌍"]}


def write(path: Path, tensors: dict[str, np.ndarray[Any, Any]], **writer_options: Any) -> None:
    writer = GGUFWriter(path, "llama", **writer_options)
    for kind, values in (INTEGERS | FLOATS | OTHERS).items():
        for index, value in enumerate(values):
            writer.add_key_value(f"scalar.{kind.name}.{index}", value, kind)
        writer.add_key_value(f"array.{kind.name}", values, GGUFValueType.ARRAY, sub_type=kind)
    for name, blocks in tensors.items():
        if blocks.dtype == np.uint8:
            writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def some_tensors(count: int = 7) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for i in range(count):
        tensors[f"blk.{i}.norm.weight"] = rng.standard_normal(5 + i).astype(np.float32)
        tensors[f"blk.{i}.half.weight"] = rng.standard_normal((3, 5 + i)).astype(np.float16)
        tensors[f"blk.{i}.exps.weight"] = rng.integers(0, 256, (2, 3, 34 * (i + 1)), dtype=np.uint8)
    return tensors
