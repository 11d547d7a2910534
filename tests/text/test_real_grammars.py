"""Grammars over the vocabularies of real models, of 32,064 to 201,088 tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.text.masks import allowed, compiled, draw, text_of
from worker.text.answer_grammar import ContentFormat, answer_grammar

TEXT = '{"name": "Ünï 日本 \\"x\\" \\n", "tags": ["a", "bb"], "n": -12.5e3, "deep": {"a": [{}, [], null, true]}}'


@pytest.fixture(scope="module", params=["qwen2", "phi3", "gpt_oss"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_the_model_s_own_tokens_of_a_json_text_are_allowed(tokenizer):
    """Also tokens over the borders of strings, and single bytes of characters."""
    size, grammar = tokenizer.vocab.size, compiled(tokenizer, "json_schema", {"type": "object"})
    for text in (TEXT, json.dumps(json.loads(TEXT), indent=2, ensure_ascii=False)):
        mask, ids = grammar.start(), tokenizer.word_encoder(text)
        assert any(len(tokenizer.token_bytes(i)) > 3 for i in ids)
        for token_id in ids:
            found = allowed(mask, size)
            assert token_id in found
            assert not found & (tokenizer.vocab.end_ids | tokenizer.vocab.padding_ids)
            mask.accept(token_id)
        assert allowed(mask, size) == tokenizer.vocab.end_ids


def test_masks_equal_those_of_each_token_s_bytes(tokenizer):
    """The mask in a string, where most tokens are allowed, and after a number."""
    vocab = tokenizer.vocab
    texts = [tokenizer.token_bytes(i) for i in range(vocab.size)]
    mask = compiled(tokenizer, "regex", "[a-z ]*[0-9]{1,3}").start()
    letters = {i for i, text in enumerate(texts) if text and set(text) <= set(b"abcdefghijklmnopqrstuvwxyz ")}
    digits = {i for i, text in enumerate(texts) if text.isdigit() and len(text) <= 3}
    both = {
        i
        for i, text in enumerate(texts)
        if (rest := text.lstrip(b"abcdefghijklmnopqrstuvwxyz ")) != text and rest.isdigit() and len(rest) <= 3
    }
    assert allowed(mask, vocab.size) == (letters | digits | both) - vocab.padding_ids - vocab.end_ids
    mask.accept(tokenizer.word_encoder("7")[-1])
    short = {i for i in digits if len(texts[i]) <= 2}
    assert allowed(mask, vocab.size) == (short - vocab.padding_ids) | vocab.end_ids


def test_random_answers_of_a_schema_are_valid(tokenizer):
    grammar = compiled(
        tokenizer,
        "json_schema",
        {"type": "object", "properties": {"a": {"maxLength": 20, "type": "string"}, "b": {"type": "integer"}}},
    )
    ended = [text_of(tokenizer, ids) for ids, end in (draw(grammar, tokenizer, seed, 60) for seed in range(5)) if end]
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_a_harmony_answer_of_gpt_oss_reasons_freely_and_answers_in_the_form(gpt_oss):
    start = gpt_oss.encode("<|start|>user<|message|>hi<|end|><|start|>assistant", special=True)
    grammar = answer_grammar(gpt_oss, start, ContentFormat("choice", ["yes", "no"]), None, None)
    mask = grammar.start()
    answer = "<|channel|>analysis<|message|>The user greets, é日…<|end|><|start|>assistant<|channel|>final<|message|>"
    for token_id in gpt_oss.encode(answer, special=True):
        mask.accept(token_id)
    found = {gpt_oss.token_bytes(i) for i in allowed(mask, gpt_oss.vocab.size)}
    assert found == {b"y", b"ye", b"yes", b"n", b"no"}


def test_the_rows_of_the_embedding_beyond_the_vocabulary_are_never_allowed(tokenizer):
    words = np.full(-(-tokenizer.vocab.size // 32) + 3, 0xFFFFFFFF, np.uint32)
    compiled(tokenizer, "regex", "(?s:.*)").start().fill(words)
    ids = np.nonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))[0]
    assert ids.max() < tokenizer.vocab.size
    assert ids.size > tokenizer.vocab.size // 2
