"""Special tokens: `split` finds them, `split_traced` in a rendered template."""

from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from worker.text.special_tokens import SpecialTokens
from worker.text.traced_text import TRUSTED, UNTRUSTED, concat, trace

NAMES = ("<|a|>", "<|a|><|b|>", "<|b|>", "<s>", "s>|", "aba", "a b", "<|", "ss")
IDS = {name: row for row, name in enumerate(NAMES)}
TEXTS = st.lists(st.sampled_from([*NAMES, *"<|>abs \n", "<|a", "|b|>", "word"]), max_size=6).map("".join)


def naive_split(text: str) -> list[str | int]:
    """The longest name at each position, else one more character of plain text."""
    parts, at = [""], 0
    while at < len(text):
        name = max((name for name in NAMES if text.startswith(name, at)), key=len, default=None)
        if name:
            parts += [IDS[name], ""]
        else:
            parts[-1] += text[at]
        at += len(name or "x")
    return [part for part in parts if part != ""]


@given(TEXTS)
def test_a_text_is_split_at_the_longest_name_at_each_position(text):
    assert list(SpecialTokens(IDS).split(text)) == naive_split(text)


def tokenizers_split(text: str, control: tuple[str, ...], user_defined: tuple[str, ...], *, found: bool) -> list:
    """The names and the text between them by `tokenizers`; with `found`, control tokens are."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.encode_special_tokens = not found
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in control])
    tokenizer.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in user_defined])
    encoding = tokenizer.encode(text)
    parts, start = [], 0
    for name, (at, end) in zip(encoding.tokens, encoding.offsets, strict=True):
        parts += [text[start:at], (name,)]
        start = end
    return [part for part in [*parts, text[start:]] if part != ""]


CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
USER_DEFINED = ("<tool_call>", "</tool_call>", "<think>", "</think>", "  ", "   ", "    ", "ab", "bcd", "abcde", "é")
PARTS = [*CONTROL, *USER_DEFINED, "<|im_", "end|>", "<tool", "a", "bc", "cd", " ", "\n", "<", "x"]


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), st.booleans())
def test_user_defined_names_are_found_in_any_text_as_by_tokenizers(text, control):
    names = (*CONTROL, *USER_DEFINED)
    tokens = SpecialTokens({name: row for row, name in enumerate(names)}, USER_DEFINED)
    parts = [part if isinstance(part, str) else (names[part],) for part in tokens.split(text, control=control)]
    assert parts == tokenizers_split(text, CONTROL, USER_DEFINED, found=control)


@pytest.mark.parametrize("text", ["<s>>", "x<s>", "a<s", "x<s>>y", "<<s>"])
def test_no_user_defined_name_that_overlaps_a_control_name_is_found_in_untrusted_text(text):
    tokens = SpecialTokens({"<s>": 0, ">>": 1, "x<s>": 2, "<s": 3, "<<": 4}, (">>", "x<s>", "<s", "<<"))
    assert list(tokens.split(text, control=False)) == (["a", 3] if text == "a<s" else [text])


def test_a_name_of_one_character_is_found_where_no_longer_one_begins():
    tokens = SpecialTokens({"a": 0, "ab": 1, "abcd": 2}, ("a", "ab", "abcd"))
    assert list(tokens.split("abcdabcaxba", control=False)) == [2, 1, "c", 0, "xb", 0]


def test_a_vocabulary_without_special_tokens_splits_nothing():
    assert list(SpecialTokens({}).split("<s>")) == ["<s>"]


@given(st.lists(st.tuples(TEXTS, st.sampled_from([TRUSTED, UNTRUSTED])), max_size=6))
def test_control_tokens_are_found_in_trusted_text_alone(parts):
    text = concat(trace(part, origin) for part, origin in parts)
    found = list(SpecialTokens(IDS).split_traced(text, list))
    at = 0
    for part in found:
        end = at + len(part if isinstance(part, str) else NAMES[part])
        assert isinstance(part, str) or set(text._origin[at:end]) == {TRUSTED}
        at = end
    assert "".join(part if isinstance(part, str) else NAMES[part] for part in found) == text
    assert not any(isinstance(a, str) and isinstance(b, str) for a, b in pairwise(found))


@given(TEXTS)
def test_trusted_text_is_split_as_any_text_is(text):
    assert list(SpecialTokens(IDS).split_traced(trace(text, TRUSTED), list)) == naive_split(text)


def test_a_token_of_unknown_origin_is_none_if_the_request_could_have_made_it():
    tokens = SpecialTokens({"<|a|>": 0})
    for requested in ("x <|a|> y", "<|A|>", "<-|-a-|->", "x <|a", "|> x", "a"):
        assert list(tokens.split_traced(trace("<|a|>"), lambda text=requested: [text])) == ["<|a|>"]
    assert list(tokens.split_traced(trace("<|a|>"), lambda: ["hello", " b "])) == [0]


def test_a_long_text_of_names_and_parts_of_names_is_processed_in_the_time_limit():
    tokens = SpecialTokens({f"<|reserved_{row}|>": row for row in range(1000)})
    assert len(list(tokens.split("<|reserved_" * 100_000))) == 1
    assert len(list(tokens.split_traced(trace("<|reserved_7|>" * 50_000, UNTRUSTED), list))) == 1
