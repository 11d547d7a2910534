"""Masks of grammars in tests: as sets of ids, by brute force, and answers drawn from random logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tests.text.small import CONTROL, USER_DEFINED, byte_level, sentencepiece, tokenizer_of
from worker.errors import InvalidRequest
from worker.sampling import Grammar, TokenMask
from worker.text.answer_grammar import ContentFormat, answer_grammar
from worker.text.grammar import GrammarMask
from worker.text.tokenizer import Tokenizer

# Tokens over the borders of JSON's lexemes, and rows that no answer has: padding, unused, suppressed.
_JSON_TOKENS = ('{"', '":', '",', '"}', "},", "[[", "]}", "tr", "true", "null", "12", "-1", ".5", "e+", "\\n", "é日")
_ODD_ROWS = [("[PAD0]", USER_DEFINED), ("", 1), ("<|reserved|>", CONTROL), ("</div>", USER_DEFINED)]


def byte_level_vocabulary(**keys: Any) -> Tokenizer:
    """307 tokens: a number that is no multiple of 32."""
    rows = [(_printable(text), 1) for text in (*_JSON_TOKENS, " {", "\n\n", "  ", ' "', "hell\xff")]
    return tokenizer_of(byte_level(extra=[*rows, *_ODD_ROWS], **keys))


def sentencepiece_vocabulary(**keys: Any) -> Tokenizer:
    """SentencePiece with a space prefix, byte tokens, and characters that a byte token has, too."""
    letters = [*'abcdefghijklmnopqrstuvwxyz0123456789{}[]:,.-+_"\\/', "é", "日"]
    pieces = ("▁", *letters, "▁{", "▁▁", "he", "ll", "▁he", *(text for text in _JSON_TOKENS if " " not in text))
    return tokenizer_of(sentencepiece(pieces=pieces, add_space_prefix=True, **keys))


def _printable(text: str) -> str:
    """A text in the characters of a byte-level vocabulary; \\xff is the byte."""
    from worker.text.bpe import byte_alphabet

    alphabet = byte_alphabet()
    data = b"".join(b"\xff" if char == "\xff" else char.encode() for char in text)
    return "".join(alphabet[byte] for byte in data)


def compiled(tokenizer: Tokenizer, kind: Any, value: Any, **options: Any) -> Grammar:
    grammar = answer_grammar(tokenizer, [], ContentFormat(kind, value), None, None, **options)
    assert grammar is not None
    return grammar


def refusal(tokenizer: Tokenizer, kind: Any, value: Any) -> tuple[str, str]:
    """Field and constraint of the error for a format."""
    try:
        compiled(tokenizer, kind, value)
    except InvalidRequest as error:
        first = error.details["errors"][0]
        return first["field"], first["constraint"]
    raise AssertionError(f"{value} is accepted")


def allowed(mask: TokenMask, rows: int) -> set[int]:
    """The ids that a mask allows, of a vocabulary of `rows` rows; no bit is set above."""
    words = np.full(-(-rows // 32), 0xDEADBEEF, np.uint32)
    mask.fill(words)
    ids = np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0].tolist()
    return set(ids)


def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """Byte → id of a token that is this byte alone."""
    vocab = tokenizer.vocab
    never = vocab.padding_ids | vocab.suppressed_ids
    texts = {i: tokenizer.token_bytes(i) for i in range(vocab.size) if i not in never}
    return {text[0]: i for i, text in reversed(texts.items()) if len(text) == 1}


class ByteStates:
    """The masks of a grammar after bytes, one token each; each is computed from a shorter one's matcher."""

    def __init__(self, grammar: Any, tokenizer: Tokenizer) -> None:
        self._ids = byte_ids(tokenizer)
        self._known: dict[bytes, GrammarMask | None] = {b"": grammar.start()}

    def after(self, data: bytes) -> GrammarMask | None:
        """The mask after these bytes; None if the grammar does not allow them."""
        if data not in self._known:
            before = self.after(data[:-1])
            self._known[data] = before and self._next(before, data[-1])
        return self._known[data]

    def may_follow(self, so_far: bytes, text: bytes) -> bool:
        """Whether the bytes of a text may follow those so far."""
        ids = [self._ids.get(byte) for byte in text]
        mask = self.after(so_far)
        return mask is not None and None not in ids and mask._matcher.validate_tokens(ids) == len(ids)

    def _next(self, before: GrammarMask, byte: int) -> GrammarMask | None:
        mask = GrammarMask(before._matcher.deep_copy(), before._field, before._words)
        try:
            mask.accept(self._ids[byte])
        except (InvalidRequest, KeyError):
            return None
        return mask


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether an answer may be this text."""
    mask = ByteStates(grammar, tokenizer).after(text.encode())
    return mask is not None and bool(allowed(mask, tokenizer.vocab.size) & tokenizer.vocab.end_ids)


def by_brute_force(
    may_follow: Callable[[bytes, bytes], bool], is_whole: Callable[[bytes], bool], tokenizer: Tokenizer
) -> Callable[[bytes], set[int]]:
    """A function from the bytes so far to the ids that may follow, by trying every token.

    `may_follow(so_far, text)`: whether an answer may begin with both.
    """
    vocab = tokenizer.vocab
    never = vocab.padding_ids | vocab.suppressed_ids

    def following(so_far: bytes) -> set[int]:
        found = set(vocab.end_ids) if is_whole(so_far) else set()
        for token_id in range(vocab.size):
            text = tokenizer.token_bytes(token_id)
            if text and token_id not in never and may_follow(so_far, text):
                found.add(token_id)
        return found

    return following


def draw(
    grammar: Grammar,
    tokenizer: Tokenizer,
    seed: int,
    limit: int,
    favour: Sequence[int] = (),
    marks: Sequence[bytes] = (),
) -> tuple[list[int], bool]:
    """The ids of an answer by random logits without its end token, and whether it ended in `limit` tokens.

    `favour`: ids with a higher logit, such as those that close a string. A mark that has begun is
    likely to be completed, and the end tokens are more likely than others.
    """
    rng = np.random.default_rng(seed)
    rows, singles = tokenizer.vocab.size, byte_ids(tokenizer)
    bias = np.zeros(rows)
    bias[list(favour)] = 2.0
    bias[list(tokenizer.vocab.end_ids)] = 2.0
    words = np.zeros(-(-rows // 32), np.uint32)
    mask, ids, tail = grammar.start(), [], b""
    while len(ids) < limit:
        mask.fill(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:rows].astype(bool)
        logits = np.where(bits, rng.gumbel(size=rows) + bias, -np.inf)
        for mark in marks:
            begun = next((n for n in range(len(mark) - 1, 0, -1) if tail.endswith(mark[:n])), 0)
            if begun:
                logits[singles[mark[begun]]] += 8
        drawn = int(logits.argmax())
        if drawn in tokenizer.vocab.end_ids:
            return ids, True
        mask.accept(drawn)
        ids.append(drawn)
        tail = (tail + tokenizer.token_bytes(drawn))[-20:]
    return ids, False


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def closing(tokenizer: Tokenizer) -> list[int]:
    """Ids of tokens that close strings, lists and objects."""
    return [i for i in range(tokenizer.vocab.size) if tokenizer.token_bytes(i)[:1] in (b'"', b"]", b"}")]


def prefixes(texts: Sequence[str]) -> Iterator[bytes]:
    for text in texts:
        data = text.encode()
        yield from (data[:n] for n in range(len(data) + 1))
