"""A small well-formed GGUF file, packed by hand, that knows where each of its fields lies.

Independent of the reader and of gguf's writer: bad files are made from it by changing a field that has a name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

ALIGNMENT = 32
STRING, ARRAY = 8, 9
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

METADATA: list[tuple[str, int, Any]] = [
    ("general.architecture", STRING, "llama"),
    ("general.alignment", 4, ALIGNMENT),
    ("a.u8", 0, 200),
    ("a.i8", 1, -100),
    ("a.u16", 2, 60_000),
    ("a.i16", 3, -30_000),
    ("a.i32", 5, -2_000_000_000),
    ("a.f32", 6, 0.1),
    ("a.true", 7, True),
    ("a.u64", 10, 2**63 + 1),
    ("a.i64", 11, -(2**62)),
    ("a.f64", 12, 0.1),
    ("a.text", STRING, "Grüße, 世界 🌍"),
    ("b.tokens", ARRAY, (STRING, ["<s>", "", "é", "hello"])),
    ("b.scores", ARRAY, (6, [0.5, -1.5, 3.25])),
    ("b.types", ARRAY, (5, [1, 3, -1])),
    ("b.bools", ARRAY, (7, [True, False, True])),
    ("b.nested", ARRAY, (ARRAY, [(STRING, ["x", "yz"]), (2, [1, 2, 3])])),
]
# name, dims as in the file (innermost first), ggml type, bytes
TENSORS = [
    ("norm.weight", (8,), 0, 32),
    ("matrix.weight", (64, 3), 2, 3 * 36),
    ("experts.weight", (32, 2, 3), 8, 6 * 34),
    ("flat.weight", (4, 1, 1, 2), 1, 16),
]


@dataclass
class RawFile:
    """The bytes so far, and for each field its name, place and struct code."""

    data: bytearray = field(default_factory=bytearray)
    fields: dict[str, tuple[int, str]] = field(default_factory=dict)

    def put(self, name: str, code: str, value: Any) -> None:
        assert name not in self.fields, name
        self.fields[name] = (len(self.data), code)
        self.data += struct.pack("<" + code, value)

    def text(self, name: str, value: str) -> None:
        encoded = value.encode(errors="surrogateescape")
        self.put(f"{name}: length", "Q", len(encoded))
        self.fields[f"{name}: bytes"] = (len(self.data), f"{len(encoded)}s")
        self.data += encoded

    def value(self, name: str, kind: int, value: Any) -> None:
        if kind == STRING:
            self.text(name, value)
        elif kind != ARRAY:
            self.put(name, CODES[kind], value)
        else:
            element, values = value
            self.put(f"{name}: element type", "I", element)
            self.put(f"{name}: count", "Q", len(values))
            for index, item in enumerate(values):
                self.value(f"{name}[{index}]", element, item)

    def changed(self, **values: Any) -> bytes:
        """A copy with the fields of these names set to new values, packed in their own width."""
        copy = bytearray(self.data)
        for name, value in values.items():
            offset, code = self.fields[name]
            struct.pack_into("<" + code, copy, offset, value)
        return bytes(copy)

    def set(self, name: str, value: Any) -> bytes:
        return self.changed(**{name: value})


def raw_file(version: int = 3, metadata: list[tuple[str, int, Any]] = METADATA) -> RawFile:
    raw = RawFile(bytearray(b"GGUF"))
    raw.put("version", "I", version)
    raw.put("tensor count", "Q", len(TENSORS))
    raw.put("metadata count", "Q", len(metadata))
    for key, kind, value in metadata:
        raw.text(f"{key} key", key)
        raw.put(f"{key}: type", "I", kind)
        raw.value(key, kind, value)
    offset = 0
    for name, dims, kind, nbytes in TENSORS:
        raw.text(f"{name} name", name)
        raw.put(f"{name}: dims", "I", len(dims))
        for index, dim in enumerate(dims):
            raw.put(f"{name}: dim {index}", "Q", dim)
        raw.put(f"{name}: type", "I", kind)
        raw.put(f"{name}: offset", "Q", offset)
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    pad(raw.data)
    for index, (_, _, _, nbytes) in enumerate(TENSORS):
        raw.data += bytes((index * 50 + i) % 256 for i in range(nbytes))
        pad(raw.data)
    return raw


def pad(data: bytearray) -> None:
    data += bytes(-len(data) % ALIGNMENT)
