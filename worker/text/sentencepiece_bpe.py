"""SentencePiece BPE (Kudo and Richardson 2018): merges by score, with byte fallback.

The `sentencepiece` library encodes; this module serializes its ModelProto from the vocabulary,
without normalization, as in llama.cpp. Special tokens and the space prefix are handled in
tokenizer.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from sentencepiece import SentencePieceProcessor

from worker.errors import InvalidRequest, ModelLoadFailed
from worker.text.vocabulary import BYTE, Vocabulary

_SPACE = "▁"
_UNREACHABLE = "\uffff"  # first character of rows that no text encodes to

# Field numbers and values of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_TYPE_NORMAL, _TYPE_UNKNOWN, _TYPE_CONTROL, _TYPE_BYTE = 1, 2, 3, 6
_MODEL_TYPE, _BPE, _BYTE_FALLBACK, _NORMALIZER_NAME = 3, 2, 35, 1
_ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3, 4

_SCORE_FIELD = struct.Struct("<Bf")
_ONE_BYTE = [bytes([value]) for value in range(0x80)]  # most varints of a vocabulary are one byte


class SentencePieceBpe:
    """Encoder of ordinary text for vocabularies of kind `llama`."""

    def __init__(self, vocab: Vocabulary, scores: list[float]) -> None:
        self._unknown = vocab.size
        try:
            self._model = SentencePieceProcessor(model_proto=b"".join(_model(vocab, scores)))
        except (RuntimeError, OverflowError) as error:
            what = f"sentencepiece can't use it ({str(error)[:120]})"
            raise ModelLoadFailed(what, "tokenizer.ggml.tokens", "a SentencePiece vocabulary") from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text.

        Raises InvalidRequest for a character without a piece or byte token.
        """
        ids: list[int] = self._model.encode(text, out_type=int)
        if self._unknown in ids:
            raise InvalidRequest.of(("prompt", "characters that the model's vocabulary can encode", text[:60]))
        return ids

    def decode_token(self, token: str) -> bytes:
        """Return the bytes of a NORMAL token."""
        return token.replace(_SPACE, " ").encode()


def _model(vocab: Vocabulary, scores: list[float]) -> Iterator[bytes]:
    """Yield the fields of a ModelProto.

    The unknown piece, which the library requires, follows the last row.
    """
    ordinary = vocab.ordinary()
    for row, (token, score) in enumerate(zip(vocab.tokens, scores, strict=True)):
        if token not in ordinary or ordinary[token] != row:
            yield _piece(f"{_UNREACHABLE}{row}", 0.0, _TYPE_CONTROL)
        else:
            yield _piece(token, score, _TYPE_BYTE if vocab.types[row] == BYTE else _TYPE_NORMAL)
    yield _piece(f"{_UNREACHABLE}unknown", 0.0, _TYPE_UNKNOWN)
    byte_fallback = vocab.types.count(BYTE) == 256
    yield _field(_TRAINER, _number(_MODEL_TYPE, _BPE) + _number(_BYTE_FALLBACK, byte_fallback))
    plain = _field(_NORMALIZER_NAME, b"identity")
    yield _field(_NORMALIZER, plain + _number(_ADD_DUMMY_PREFIX, 0) + _number(_REMOVE_EXTRA_WHITESPACES, 0))


def _piece(token: str, score: float, kind: int) -> bytes:
    score_field = _SCORE_FIELD.pack(_SCORE << 3 | 5, score)
    return _field(_PIECES, _field(_PIECE, token.encode()) + score_field + _number(_TYPE, kind))


def _field(number: int, content: bytes) -> bytes:
    """Return a length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _ONE_BYTE[value]
    low = b""
    while value > 0x7F:
        low += bytes([value & 0x7F | 0x80])
        value >>= 7
    return low + bytes([value])
