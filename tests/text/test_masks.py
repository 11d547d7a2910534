"""Masks equal brute force over every token, and answers drawn from them are of their format."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from tests.text.masks import (
    ByteStates,
    accepts,
    allowed,
    by_brute_force,
    byte_ids,
    byte_level_vocabulary,
    compiled,
    draw,
    prefixes,
    sentencepiece_vocabulary,
    text_of,
)
from tests.text.random_schemas import check, hoisted, random_schema
from worker.text.grammar_vocabulary import token_bytes
from worker.text.tokenizer import Tokenizer

SCHEMAS = 500
"""Random schemas answered on each of two vocabularies; `python -m tests.text.random_schemas` takes more."""

VOCABULARIES = {"byte-level": byte_level_vocabulary, "SentencePiece": sentencepiece_vocabulary}


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer(request) -> Tokenizer:
    """A vocabulary whose file suppresses the token `ll`."""
    build = VOCABULARIES[request.param]
    return build(suppress_tokens=[build().vocab.ids["ll"]])


def assert_masks_follow(grammar, tokenizer, following, steps=40, seeds=range(8)):
    """Walk through random answers and compare each mask with `following` of the bytes so far."""
    rows = tokenizer.vocab.size
    for seed in seeds:
        rng, mask, so_far = np.random.default_rng(seed), grammar.start(), b""
        for _ in range(steps):
            found = allowed(mask, rows)
            assert found == following(so_far), so_far
            drawn = int(rng.choice(sorted(found)))
            if drawn in tokenizer.vocab.end_ids:
                break
            mask.accept(drawn)
            so_far += tokenizer.token_bytes(drawn)


CHOICES = ["true", "null", "nullable", "hello", "hell", '{"é日', " 12", "12", "-1.5", "\n\n", "a" * 60, "</div>"]


def test_masks_of_a_choice_equal_brute_force(tokenizer):
    known, whole = set(prefixes(CHOICES)), {choice.encode() for choice in CHOICES}
    following = by_brute_force(lambda a, b: a + b in known, whole.__contains__, tokenizer)
    assert_masks_follow(compiled(tokenizer, "choice", CHOICES), tokenizer, following, seeds=range(40))


def test_masks_of_a_regular_expression_equal_brute_force(tokenizer):
    texts = [f"{sign}{a}{unit}" for sign in ("", "-") for a in range(130) for unit in ("he", "ll", "é", "日\n")]
    assert all(re.fullmatch(r"-?(1[0-2]\d|[1-9]?\d)(he|ll|é|日\n)", text) for text in texts)
    known, whole = set(prefixes(texts)), {text.encode() for text in texts}
    following = by_brute_force(lambda a, b: a + b in known, whole.__contains__, tokenizer)
    grammar = compiled(tokenizer, "regex", r"-?(1[0-2]\d|[1-9]?\d)(he|ll|é|日\n)")
    assert_masks_follow(grammar, tokenizer, following, seeds=range(40))


def test_masks_of_json_equal_brute_force_by_bytes(tokenizer):
    """A token is allowed if its bytes are, one after the other."""
    for seed in range(50):
        grammar = compiled(tokenizer, "json_schema", hoisted(random_schema(random.Random(seed))))

        states = ByteStates(grammar, tokenizer)

        def is_whole(data: bytes, states=states) -> bool:
            ends = allowed(states.after(data), tokenizer.vocab.size) & tokenizer.vocab.end_ids
            assert ends in (set(), set(tokenizer.vocab.end_ids)), "all end tokens or none"
            return bool(ends)

        following = by_brute_force(states.may_follow, is_whole, tokenizer)
        assert_masks_follow(grammar, tokenizer, following, steps=25, seeds=range(2))


def test_padding_control_and_suppressed_tokens_are_never_allowed(tokenizer):
    vocab = tokenizer.vocab
    never = vocab.padding_ids | vocab.suppressed_ids | (set(vocab.special.values()) - vocab.end_ids)
    never -= {vocab.special[name] for name in vocab.user_defined}
    assert vocab.ids["ll"] in never
    for kind, value in (("regex", "(?s:.*)"), ("json_schema", {}), ("grammar", "start: /[^a]+/")):
        mask = compiled(tokenizer, kind, value).start()
        for byte in b'"x<|':
            assert not allowed(mask, vocab.size) & never
            if byte_ids(tokenizer)[byte] not in allowed(mask, vocab.size):
                break
            mask.accept(byte_ids(tokenizer)[byte])


def test_words_beyond_the_vocabulary_are_zero(tokenizer):
    """The embedding may have more rows than the vocabulary has tokens."""
    assert tokenizer.vocab.size % 32
    words = np.full(-(-tokenizer.vocab.size // 32) + 5, 0xFFFFFFFF, np.uint32)
    compiled(tokenizer, "regex", "(?s:.*)").start().fill(words)
    ids = np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0]
    assert ids.size
    assert ids.max() < tokenizer.vocab.size
    assert not words[-5:].any()


def test_the_library_gets_the_bytes_of_the_answer_without_a_space_prefix(tokenizer):
    texts = token_bytes(tokenizer)
    vocab = tokenizer.vocab
    for token_id, text in enumerate(texts):
        if text.startswith(b"\xff"):
            assert token_id in vocab.end_ids or vocab.tokens[token_id] in vocab.special
        elif text:
            assert text == tokenizer.token_bytes(token_id)
        else:
            never = vocab.padding_ids | vocab.suppressed_ids
            assert token_id in never or tokenizer.token_bytes(token_id)[:1] in (b"", b"\xff")
    assert tokenizer.word_encoder("he") == [vocab.ids["he"]]
    assert tokenizer.encode("he") == [vocab.ids["he" if vocab.kind == "gpt2" else "▁he"]]


@pytest.mark.parametrize("seed", [0])
def test_every_finished_answer_to_a_random_schema_is_valid(tokenizer, seed):
    refused, finished, unfinished = check(tokenizer, SCHEMAS, seed)
    assert refused + finished + unfinished == SCHEMAS
    assert finished > 0.95 * SCHEMAS, (refused, unfinished)


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", r"(ab|cd)+x\d{2}/[^a-z\n]{1,5}", r"(ab|cd)+x\d{2}/[^a-z\n]{1,5}"),
        ("choice", CHOICES, "|".join(map(re.escape, CHOICES))),
        ("grammar", 'start: item ("," item)*\nitem: /[a-z]{1,3}/ | "(" start ")"', r"[a-z,()]+"),
        ("grammar", 'start: "x" %json {"enum": [1, "b"]}\n%llguidance {}', r'x(1|"b")'),
    ],
)
def test_answers_follow_regular_expressions_choices_and_lark(tokenizer, kind, value, pattern):
    grammar = compiled(tokenizer, kind, value)
    ended = [text_of(tokenizer, ids) for ids, end in (draw(grammar, tokenizer, n, 200) for n in range(40)) if end]
    assert len(ended) > 30
    for text in ended:
        assert re.fullmatch(pattern, text), text
        assert accepts(grammar, tokenizer, text)


def test_white_space_in_json_is_bounded(tokenizer):
    grammar = compiled(tokenizer, "json_schema", {"type": "array", "items": {"type": "integer"}})
    assert accepts(grammar, tokenizer, "[1, 2,\n\n\t 3\n]")
    for text in ("[1,  2]", "[1,\n\n\n2]", "[1,\r2]", " [1]", "[1] ", "[\n" + " " * 41 + "1]"):
        assert not accepts(grammar, tokenizer, text), text
