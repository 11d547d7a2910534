"""SentencePiece BPE (Kudo and Richardson 2018): characters merged by their piece's score, bytes for the rest.

The merging is the `sentencepiece` library's own; its model is written here from the rows of the vocabulary, without
normalization, for llama.cpp has none. Knows nothing of special tokens and of the space before a text: tokenizer.py
does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from sentencepiece import SentencePieceProcessor

from worker.errors import InvalidRequest, ModelLoadFailed
from worker.text.vocabulary import BYTE, Vocabulary

_SPACE = "▁"
_OUT_OF_REACH = "\uffff"  # begins the names of rows that no text becomes

# Field numbers and values of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_TYPE_NORMAL, _TYPE_UNKNOWN, _TYPE_CONTROL, _TYPE_BYTE = 1, 2, 3, 6
_MODEL_TYPE, _BPE, _BYTE_FALLBACK, _NORMALIZER_NAME = 3, 2, 35, 1
_ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3, 4

_SCORE_FIELD = struct.Struct("<Bf")
_ONE_BYTE = [bytes([value]) for value in range(0x80)]  # what nearly every number of a vocabulary takes


class SentencePieceBpe:
    """Ordinary text to ids and back, for vocabularies of kind `llama`."""

    def __init__(self, vocab: Vocabulary, scores: list[float]) -> None:
        self._unknown = vocab.size
        try:
            self._model = SentencePieceProcessor(model_proto=b"".join(_model(vocab, scores)))
        except (RuntimeError, OverflowError) as error:
            what = f"sentencepiece can't use it ({str(error)[:120]})"
            raise ModelLoadFailed(what, "tokenizer.ggml.tokens", "a SentencePiece vocabulary") from error

    def encode(self, text: str) -> list[int]:
        """Return the ids of ordinary text. InvalidRequest if neither a piece nor a byte token spells a character."""
        ids: list[int] = self._model.encode(text, out_type=int)
        if self._unknown in ids:
            raise InvalidRequest.of(("prompt", "characters that the model's vocabulary can spell", text[:60]))
        return ids

    def spell(self, token: str) -> bytes:
        """Return the bytes that a NORMAL token stands for."""
        return token.replace(_SPACE, " ").encode()


def _model(vocab: Vocabulary, scores: list[float]) -> Iterator[bytes]:
    """Yield the fields of a ModelProto; the unknown piece, which the library must have, comes after the last row."""
    ordinary = vocab.ordinary()
    for row, (token, score) in enumerate(zip(vocab.tokens, scores, strict=True)):
        if token not in ordinary or ordinary[token] != row:
            yield _piece(f"{_OUT_OF_REACH}{row}", 0.0, _TYPE_CONTROL)
        else:
            yield _piece(token, score, _TYPE_BYTE if vocab.types[row] == BYTE else _TYPE_NORMAL)
    yield _piece(f"{_OUT_OF_REACH}unknown", 0.0, _TYPE_UNKNOWN)
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
