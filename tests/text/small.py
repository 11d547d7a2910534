"""Metadata of small vocabularies: every byte, a few merges or pieces, some control tokens."""

from pathlib import Path

import gguf
import numpy as np
from gguf import TokenType

from worker.text.bpe import byte_alphabet
from worker.text.tokenizer import Tokenizer, load_tokenizer

NORMAL, CONTROL, USER_DEFINED, BYTE = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HARMONY_NAMES = ("<|return|>", "<|call|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>")


def byte_level(*, names=CHATML_NAMES, kind=CONTROL, extra=(), **keys) -> dict:
    """Byte-level metadata: 256 bytes, `he` `ll` `hell`, names of one kind, extra (token, kind)."""
    merges = ["h e", "l l", "he ll"]
    rows = [(char, NORMAL) for char in byte_alphabet()] + [(merge.replace(" ", ""), NORMAL) for merge in merges]
    rows += [(name, kind) for name in names] + list(extra)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in rows],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in rows],
        "tokenizer.ggml.merges": merges,
        "tokenizer.chat_template": CHATML,
        **{key if "." in key else f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def sentencepiece(*, pieces=("▁", "h", "e", "l", "he", "ll", "▁he"), names=("<|user|>",), **keys) -> dict:
    """SentencePiece metadata: `<unk>` `<s>` `</s>`, bytes, pieces in merge order, names."""
    rows = [("<unk>", TokenType.UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    rows += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)] + [(piece, NORMAL) for piece in pieces]
    rows += [(name, CONTROL) for name in names]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [token for token, _ in rows],
        "tokenizer.ggml.token_type": [int(kind) for _, kind in rows],
        "tokenizer.ggml.scores": [-float(row) for row in range(len(rows))],
        **{key if "." in key else f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.piece(token_id) for token_id in ids]


def tokenizer_of(metadata: dict, **keys) -> Tokenizer:
    return load_tokenizer({**metadata, **keys})


def write_model(path: Path, metadata: dict) -> Path:
    """Write a llama model of one layer with this tokenizer, so that llama.cpp loads it."""
    writer, width = gguf.GGUFWriter(path, "llama"), 32
    sizes = {"context_length": 512, "embedding_length": width, "block_count": 1, "feed_forward_length": width}
    for key, value in {**sizes, "attention.head_count": 1, "attention.head_count_kv": 1}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}.get(type(value), writer.add_array)
        add(key, value)
    shapes = {"attn_norm": (width,), "ffn_norm": (width,)}
    shapes |= dict.fromkeys(
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (width, width)
    )
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()} | {"output_norm": (width,)}
    rng = np.random.default_rng(0)
    for name, shape in (shapes | {"token_embd": (len(metadata["tokenizer.ggml.tokens"]), width)}).items():
        weights = np.ones(shape) if "norm" in name else rng.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", weights.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
