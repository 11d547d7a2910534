"""A model file to the report of `worker inspect`: header, metadata, tokenizer, adapter, memory plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np

from tests.gguf.raw_file import raw_file
from tests.text.small import byte_level, sentencepiece
from worker.cli import models
from worker.config import Settings
from worker.cpu.backend import CpuBackend
from worker.errors import ModelLoadFailed
from worker.gguf_file import GgufFile, _Shard
from worker.gguf_header import read_header
from worker.quants import QUANT_TYPES

PATH = Path("fuzzed.gguf")
ZEROS = bytes(1 << 16)
"""Follow a file that ends before its tensors, so that a mutated header need not be shorter."""


def seeds() -> Iterator[bytes]:
    yield b"\0" + bytes(raw_file().data)
    yield b"\0" + bytes(raw_file(2).data)
    with TemporaryDirectory() as folder:
        for number, (arch, metadata) in enumerate(
            [
                ("llama", sentencepiece()),
                ("qwen2", byte_level()),
                ("novel", byte_level() | {"novel.rope.scaling.type": [1, 2], "novel.rope.dimension_sections": [1, 1]}),
            ]
        ):
            path = Path(folder) / f"{number}.gguf"
            _write(path, arch, metadata)
            whole = path.read_bytes()
            with GgufFile.open(path) as file:
                size = file._shards[0].header.size
            yield b"\1" + whole[:size]


def _write(path: Path, arch: str, metadata: dict) -> None:
    """A model of one layer of 32 columns in Q4_0."""
    writer, width = gguf.GGUFWriter(path, arch), 32
    rows = len(metadata["tokenizer.ggml.tokens"])
    sizes = {"context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": width}
    for key, value in {**sizes, "attention.head_count": 1, "attention.head_count_kv": 1}.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}.get(type(value), writer.add_array)
        add(key, value)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v"):
        _add_q4(writer, f"blk.0.{name}.weight", width)
        if arch == "qwen2":
            writer.add_tensor(f"blk.0.{name}.bias", np.ones(width, np.float32))
    for name in ("attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        _add_q4(writer, f"blk.0.{name}.weight", width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    _add_q4(writer, "token_embd.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_q4(writer: gguf.GGUFWriter, name: str, rows: int) -> None:
    writer.add_tensor(name, np.zeros((rows, 18), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_0)


BACKEND, SETTINGS = CpuBackend(), Settings()


def run(data: bytes) -> None:
    replaced = models.open_backend, models.load_settings  # both take longer than a file
    models.open_backend, models.load_settings = lambda engine: BACKEND, lambda: SETTINGS
    try:
        _open(data)
    finally:
        models.open_backend, models.load_settings = replaced


def _open(data: bytes) -> None:
    content = data[1:] + (ZEROS if data[:1] and data[0] % 2 else b"")
    try:
        file = GgufFile(PATH, [_Shard(PATH, content, read_header(content, PATH))])
        report = models._report(file, [4096])
    except ModelLoadFailed as error:
        error.message.encode()
        return
    assert isinstance(report["can_run"], bool)
    for tensor in file.tensors.values():
        if tensor.kind in QUANT_TYPES:
            assert file.data(tensor).nbytes == tensor.nbytes
