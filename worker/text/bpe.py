"""Byte-pair encoding of ordinary text: of bytes, of characters, or SentencePiece's, by a library.

The encoders have `encode` (text to ids) and `decode_token` (a NORMAL token to its bytes). A model
needs one of them, so each imports its library when it is built. The callers handle special tokens
and the space prefix (tokenizer.py). Read next: pre_tokenizers.py, which splits text into words.
"""

import re
import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import compress, repeat
from typing import TYPE_CHECKING, Protocol

from worker.errors import InvalidRequest, ModelLoadFailed, NativePanic, panics_as_errors
from worker.text.pre_tokenizers import pre_tokenizer
from worker.text.vocabulary import BYTE, BYTE_NAMES, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

CACHED_WORDS = 10_000
"""Words whose ids `tokenizers` keeps. It does not free them with the tokenizer (0.23)."""

_SPACE = "▁"
_LINES = re.compile(r"\n+|[^\n]+")
_UNREACHABLE = "\uffff"  # first character of rows that no text encodes to

# Field numbers and values of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_TYPE_NORMAL, _TYPE_UNKNOWN, _TYPE_CONTROL, _TYPE_BYTE = 1, 2, 3, 6
_MODEL_TYPE, _BPE, _BYTE_FALLBACK, _NORMALIZER_NAME = 3, 2, 35, 1
_ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3, 4


class Encoder(Protocol):
    """Ordinary text to ids, and tokens to bytes."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens, or raise InvalidRequest."""

    def decode_token(self, token: str) -> bytes:
        """Return the bytes of a NORMAL token."""


class ByteBpe:
    """Byte-level BPE (GPT-2, Radford et al. 2019) with `tokenizers`, for the kind `gpt2`.

    One printable character stands for each byte, so that a token is a string.
    """

    def __init__(self, vocab: Vocabulary, merges: list[str]) -> None:
        from tokenizers import Regex, pre_tokenizers  # noqa: PLC0415  # slow to import

        ids = vocab.ordinary()
        # A byte without a token separates its neighbours and is dropped after that: it needs an id.
        alphabet = byte_alphabet()
        self._missing = {char: vocab.size + n for n, char in enumerate(alphabet) if char not in ids}
        ids |= self._missing
        self._size = vocab.size
        words = pre_tokenizer(vocab.pre)
        self._bpe = _bpe(ids, merges, ignore_merges=words.ignore_merges)
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        self._bytes = {char: bytes([byte]) for byte, char in enumerate(alphabet)}

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text; bytes that the vocabulary lacks are dropped.

        Raises InvalidRequest for a text that the library gives up on, such as a word of 10 MB.
        """
        ids = _encode(self._bpe, text)
        return [token_id for token_id in ids if token_id < self._size] if self._missing else ids

    def decode_token(self, token: str) -> bytes:
        """Return the bytes of a NORMAL token; a character outside the byte alphabet is UTF-8."""
        return b"".join(self._bytes.get(char) or char.encode() for char in token)


class CharacterBpe:
    """BPE of characters with byte fallback, with `tokenizers`, for the kind `gemma4`.

    As in llama.cpp, lines and the runs of newlines between them are encoded apart, and a run that
    is a token is encoded as that token, without merges.
    """

    def __init__(self, vocab: Vocabulary, merges: list[str]) -> None:
        self._ids = vocab.ordinary()
        self._size = vocab.size
        missing = {name: vocab.size + n for n, name in enumerate(BYTE_NAMES) if name not in self._ids}
        self._bpe = _bpe(self._ids | missing, merges, byte_fallback=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text; bytes that the vocabulary lacks are dropped.

        Raises InvalidRequest for a text that the library gives up on, such as a line of 10 MB.
        """
        ids: list[int] = []
        for part in _LINES.findall(text.replace(" ", _SPACE)):
            if part[0] == "\n" and part in self._ids:
                ids.append(self._ids[part])
            else:
                ids += (token_id for token_id in _encode(self._bpe, part) if token_id < self._size)
        return ids

    def decode_token(self, token: str) -> bytes:
        """Return the bytes of a NORMAL token."""
        return token.replace(_SPACE, " ").encode()


def _bpe(ids: dict[str, int], merges: list[str], **flags: bool) -> "Library":
    """Return the library's BPE without a pre-tokenizer. Raises ModelLoadFailed for wrong merges."""
    from tokenizers import Tokenizer, models  # noqa: PLC0415  # slow to import

    # A truncated vocabulary keeps the merges of the full one: drop those whose result it lacks.
    inside = map(ids.__contains__, map(str.replace, merges, repeat(" "), repeat(""), repeat(1)))
    split = map(str.partition, compress(merges, inside), repeat(" "))
    pairs = [(left, right) for left, _, right in split]
    try:
        with panics_as_errors():
            return Tokenizer(models.BPE(vocab=ids, merges=pairs, cache_capacity=CACHED_WORDS, **flags))
    except Exception as error:  # `tokenizers` raises bare Exceptions
        what = f"the merges don't fit the vocabulary ({str(error)[:120]})"
        raise ModelLoadFailed(what, "tokenizer.ggml.merges", "pairs of tokens, a space between") from error


def _encode(bpe: "Library", text: str) -> list[int]:
    """Return the library's ids. Raises InvalidRequest for a text that it gives up on."""
    try:
        # A batch, unlike `encode`, releases the GIL: long prompts do not block the event loop.
        with panics_as_errors():
            ids: list[int] = bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids
    except NativePanic as error:
        what = f"text without words of millions of characters, which the tokenizer can't find ({str(error)[:80]})"
        raise InvalidRequest.of(("prompt", what, text[:60])) from error


def byte_alphabet() -> list[str]:
    """Return GPT-2's 256 characters, one per byte: Latin-1 if printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class SentencePieceBpe:
    """SentencePiece BPE (Kudo and Richardson 2018) with `sentencepiece`, for the kind `llama`.

    Pairs are merged by score, with byte fallback. As in llama.cpp, text is not normalized.
    """

    def __init__(self, vocab: Vocabulary, scores: list[float]) -> None:
        from sentencepiece import SentencePieceProcessor  # noqa: PLC0415  # slow to import

        self._size = vocab.size
        try:
            self._model = SentencePieceProcessor(model_proto=b"".join(_model(vocab, scores)))
        except (RuntimeError, OverflowError) as error:
            what = f"sentencepiece can't use it ({str(error)[:120]})"
            raise ModelLoadFailed(what, "tokenizer.ggml.tokens", "a SentencePiece vocabulary") from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text. Raises InvalidRequest if a character has no token."""
        ids: list[int] = self._model.encode(text, out_type=int)
        if max(ids, default=0) >= self._size:
            raise InvalidRequest.of(("prompt", "characters that the model's vocabulary can encode", text[:60]))
        return ids

    def decode_token(self, token: str) -> bytes:
        """Return the bytes of a NORMAL token."""
        return token.replace(_SPACE, " ").encode()


def _model(vocab: Vocabulary, scores: list[float]) -> Iterator[bytes]:
    """Yield the fields of a ModelProto; pieces that the library requires follow the last row."""
    ordinary = vocab.ordinary()
    for row, (token, score) in enumerate(zip(vocab.tokens, scores, strict=True)):
        if token not in ordinary or ordinary[token] != row:
            yield _piece(f"{_UNREACHABLE}{row}", 0.0, _TYPE_CONTROL)
        else:
            yield _piece(token, score, _TYPE_BYTE if vocab.types[row] == BYTE else _TYPE_NORMAL)
    yield _piece(f"{_UNREACHABLE}unknown", 0.0, _TYPE_UNKNOWN)
    for name in BYTE_NAMES:  # the library requires all of them
        if vocab.ids.get(name) is None or vocab.types[vocab.ids[name]] != BYTE:
            yield _piece(name, 0.0, _TYPE_BYTE)
    yield _field(_TRAINER, _number(_MODEL_TYPE, _BPE) + _number(_BYTE_FALLBACK, 1))
    identity = _field(_NORMALIZER_NAME, b"identity")
    yield _field(_NORMALIZER, identity + _number(_ADD_DUMMY_PREFIX, 0) + _number(_REMOVE_EXTRA_WHITESPACES, 0))


def _piece(token: str, score: float, kind: int) -> bytes:
    score_field = struct.pack("<Bf", _SCORE << 3 | 5, float(score))  # an int may be too large for one
    return _field(_PIECES, _field(_PIECE, token.encode()) + score_field + _number(_TYPE, kind))


def _field(number: int, content: bytes) -> bytes:
    """Return a length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


@lru_cache(256)  # called several times for each row; most values are one byte
def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
