"""IncrementalDetokenizer: UTF-8 decoding, stop strings and channels together."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from tests.text.small import HARMONY_NAMES, byte_level, tokenizer_of
from worker.text.detokenizer import IncrementalDetokenizer
from worker.text.parsers import answer_parser
from worker.text.parsers.interface import Place
from worker.text.tokenizer import load_tokenizer

HARMONY = load_tokenizer(byte_level(names=HARMONY_NAMES, extra=[("analysis", 1), ("final", 1)]))
PLAIN = load_tokenizer(byte_level())
FINAL = Place("final")


def pushed(tokenizer, text: str, **options) -> list[tuple[str, Place, str | None]]:
    """The output of each token of a raw text; the last push flushes."""
    return pushed_ids(tokenizer, tokenizer.encode(text, special=True), **options)


def pushed_ids(tokenizer, ids, prompt_ids=(), tools=None, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, parser=answer_parser(tokenizer, prompt_ids, tools), **options)
    return [tuple(detokenizer.push(token_id, last=at == len(ids) - 1)) for at, token_id in enumerate(ids)]


@given(ids=st.lists(st.integers(0, 151935), max_size=40))
def test_joined_text_of_any_ids_is_the_replace_decoding_of_their_bytes(qwen2, ids):
    joined = "".join(text for text, _, _ in pushed_ids(qwen2, ids))
    assert joined == b"".join(map(qwen2.token_bytes, ids)).decode("utf-8", "replace")


@given(st.lists(st.integers(0, 266), max_size=60), st.lists(st.text("he<|\n", min_size=1, max_size=3), max_size=2))
def test_withholding_and_channels_lose_no_text(ids, stops):
    whole = pushed_ids(HARMONY, ids)
    stopped = pushed_ids(HARMONY, ids, stop=stops)
    joined, cut = "".join(text for text, _, _ in whole), "".join(text for text, _, _ in stopped)
    matched = stopped[-1][2] if stopped else None
    assert joined.startswith(cut + (matched or ""))
    assert matched is not None or joined == cut


def test_control_tokens_release_no_text():
    assert [text for text, _, _ in pushed(PLAIN, "h<|im_end|>e")] == ["h", "", "e"]


def test_a_stop_string_is_found_inside_a_longer_token(qwen2):
    ids = qwen2.encode("Yes.\n\n")
    assert [qwen2.piece(token_id) for token_id in ids] == ["Yes", ".\n\n"]
    assert pushed_ids(qwen2, ids, stop=["\n\n"]) == [("Yes", FINAL, None), (".", FINAL, "\n\n")]
    assert pushed_ids(qwen2, ids, stop=[".\n\n\n", "s\n"]) == [("Ye", FINAL, None), ("s.\n\n", FINAL, None)]


def test_the_last_token_releases_withheld_text_even_if_it_is_an_end_token():
    outputs = pushed(PLAIN, "hell!<|im_end|>", stop=["l!?"])
    assert [text for text, _, _ in outputs] == ["hell"[:3], "", "l!"]


def test_the_last_token_s_text_is_cut_before_a_stop_string():
    assert pushed(PLAIN, "a.b", stop=["."])[1:] == [("", FINAL, "."), ("", FINAL, ".")]


def test_tokens_before_min_tokens_are_neither_matched_nor_withheld():
    outputs = pushed(PLAIN, "ababab", stop=["ab"], min_tokens=3)
    assert [text for text, _, _ in outputs[:4]] == ["a", "b", "a", "b"]
    assert outputs[5] == ("", FINAL, "ab")


def test_a_second_detokenizer_releases_the_same_text_for_the_same_ids():
    ids = HARMONY.encode("<|channel|>analysis<|message|>he\n", special=True)
    options = {"stop": ["\n\n"], "min_tokens": 1}
    assert pushed_ids(HARMONY, ids, **options) == pushed_ids(HARMONY, ids, **options)
    first = tokenizer_of(byte_level(names=HARMONY_NAMES, extra=[("analysis", 1), ("final", 1)]))
    assert pushed_ids(first, ids, **options) == pushed_ids(HARMONY, ids, **options)


# Parts of code points, overlong and surrogate forms, and bytes that never occur in UTF-8.
CHUNKS = st.lists(
    st.binary(max_size=4)
    | st.text(max_size=3).map(str.encode)
    | st.sampled_from([b"\xf0\x9f", b"\x99\x82", b"\xe2\x82", b"\xac", b"\xc3", b"\xc0\x80", b"\xed\xa0", b"\xff"]),
    max_size=12,
)


def decoded(chunks: list[bytes]) -> list[str]:
    """The text of each token, where token i stands for `chunks[i]`."""
    detokenizer = IncrementalDetokenizer(SimpleNamespace(token_bytes=chunks.__getitem__))
    return [detokenizer.push(at, last=at == len(chunks) - 1).text for at in range(len(chunks))]


@given(CHUNKS)
def test_the_joined_text_is_the_replace_decoding_of_all_bytes(chunks):
    assert "".join(decoded(chunks)) == b"".join(chunks).decode("utf-8", "replace")


def test_a_code_point_is_released_with_its_last_byte():
    assert decoded([b"a\xf0\x9f", b"\x99", b"\x82b"]) == ["a", "", "🙂b"]


def test_the_last_push_flushes_an_unfinished_sequence():
    assert decoded([b"\xe2", b"\x82"]) == ["", "\ufffd"]
