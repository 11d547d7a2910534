"""Log-probabilities aligned with the text: split characters, withheld text, markup, stop strings."""

from __future__ import annotations

import math
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from tests.text.small import byte_level, tokenizer_of
from worker.gateway.logprobs import AlignedTokens, alternatives, chat_logprob, token_text
from worker.jobs.events import Token
from worker.text.detokenizer import IncrementalDetokenizer

TOKENIZER = tokenizer_of(byte_level())


def byte_tokens(data: bytes, stop: list[str], *, with_bytes: bool = True) -> list[Token]:
    """The tokens that a worker publishes for an answer of these bytes, up to a stop string."""
    ids = [next(id for id in range(256) if TOKENIZER.token_bytes(id) == bytes([byte])) for byte in data]
    detokenizer, tokens = IncrementalDetokenizer(TOKENIZER, stop=stop), []
    for i, id in enumerate(ids):
        released = detokenizer.push(id, last=i == len(ids) - 1)
        own = TOKENIZER.token_bytes(id) if with_bytes else None
        tokens.append(Token(i, id, released.text, -0.5, ((id, -0.5),), data=own, top_data=(own,) if own else None))
        if released.stop is not None:
            break
    return tokens


def aligned(tokens):
    """The entries, and those that were released with each token."""
    reader = AlignedTokens()
    released = [reader.push(token) for token in tokens]
    return [*chain.from_iterable(released), *reader.flush()], released


def test_the_bytes_of_a_split_emoji_are_those_of_its_tokens():
    tokens = byte_tokens("a😀b".encode(), [])
    entries, released = aligned(tokens)
    assert [entry.data for entry in entries] == [b"a", b"\xf0", b"\x9f", b"\x98", b"\x80", b"b"]
    assert [len(each) for each in released] == [1, 0, 0, 0, 4, 1]
    assert token_text(entries[1].data) == "\\xf0"
    assert [entry.offset for entry in entries] == [0, 1, 1, 1, 1, 2]


@given(text=st.text(max_size=12), stop=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_the_bytes_of_all_entries_are_the_text_s_utf8_however_it_ends(text, stop):
    tokens = byte_tokens(text.encode(), stop)
    entries, _ = aligned(tokens)
    assert b"".join(entry.data for entry in entries) == "".join(token.t for token in tokens).encode()


@given(data=st.binary(max_size=8))
def test_no_bytes_break_the_alignment_s_joined_text_at_valid_characters(data):
    tokens = byte_tokens(b"ok" + data, [])
    entries, _ = aligned(tokens)
    text = "".join(token.t for token in tokens).encode()
    assert text.startswith(b"".join(entry.data for entry in entries[:2]))
    assert sum(len(entry.data) for entry in entries) <= len(text)


def test_without_the_tokens_bytes_entries_have_those_of_the_released_text():
    tokens = byte_tokens("a😀b".encode(), [], with_bytes=False)
    entries, _ = aligned(tokens)
    assert [entry.data for entry in entries] == [b"a", "😀".encode(), b"b"]
    assert alternatives(entries[0].token) == [(f"token_id:{tokens[0].id}", None, -0.5)]


def test_markup_and_end_tokens_have_no_entry():
    tokens = [
        Token(0, 1, "", -0.5, data=b"<|channel|>"),
        Token(1, 2, "hi", -0.5, data=b"hi"),
        Token(2, 3, "", -0.5, data=b""),
    ]
    entries, _ = aligned(tokens)
    assert [entry.data for entry in entries] == [b"hi"]


def test_the_space_that_a_vocabulary_adds_to_the_first_word_is_not_part_of_its_entry():
    entries, _ = aligned([Token(0, 1, "hi", -0.5, data=b" hi"), Token(1, 2, " you", -0.5, data=b" you")])
    assert [entry.data for entry in entries] == [b"hi", b" you"]


def test_an_item_has_the_keys_of_openai_s():
    (entry,), _ = aligned([Token(0, 1, "hi", -0.5, ((1, -0.5), (2, -1.5)), data=b"hi", top_data=(b"hi", b"\xf0"))])
    assert chat_logprob(entry) == {
        "token": "hi",
        "logprob": -0.5,
        "bytes": [104, 105],
        "top_logprobs": [
            {"token": "hi", "logprob": -0.5, "bytes": [104, 105]},
            {"token": "\\xf0", "logprob": -1.5, "bytes": [0xF0]},
        ],
    }


def test_a_token_that_cannot_occur_has_openai_s_lowest_value():
    impossible = Token(0, 1, "x", -math.inf, ((2, -math.inf),), data=b"x", top_data=(b"y",))
    (entry,), _ = aligned([impossible])
    item = chat_logprob(entry)
    assert (item["logprob"], item["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)
