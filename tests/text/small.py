"""Metadata of small vocabularies: every byte, a few merges or pieces, some control tokens."""

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
