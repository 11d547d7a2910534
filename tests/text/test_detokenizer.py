"""IncrementalDetokenizer: UTF-8 decoding, stop strings and harmony channels together."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.small import HARMONY_NAMES, byte_level, tokenizer_of
from worker.text.detokenizer import HarmonyParser, IncrementalDetokenizer
from worker.text.tokenizer import load_tokenizer

HARMONY = load_tokenizer(byte_level(names=HARMONY_NAMES, extra=[("analysis", 1), ("final", 1)]))
PLAIN = load_tokenizer(byte_level())


def pushed(tokenizer, text: str, **options) -> list[tuple[str, str | None, str | None]]:
    """The output of each token of a raw text; the last push flushes."""
    return pushed_ids(tokenizer, tokenizer.encode(text, special=True), **options)


def pushed_ids(tokenizer, ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [tuple(detokenizer.push(token_id, last=at == len(ids) - 1)) for at, token_id in enumerate(ids)]


def channels_of(outputs) -> list[tuple[str | None, str]]:
    """(channel, text) of each run of outputs on one channel, without empty runs."""
    runs: list[tuple[str | None, str]] = []
    for text, channel, _ in outputs:
        if text and runs and runs[-1][0] == channel:
            runs[-1] = (channel, runs[-1][1] + text)
        elif text:
            runs.append((channel, text))
    return runs


@settings(deadline=None)
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
    assert pushed_ids(qwen2, ids, stop=["\n\n"]) == [("Yes", None, None), (".", None, "\n\n")]
    assert pushed_ids(qwen2, ids, stop=[".\n\n\n", "s\n"]) == [("Ye", None, None), ("s.\n\n", None, None)]


def test_the_last_token_releases_withheld_text_even_if_it_is_an_end_token():
    outputs = pushed(PLAIN, "hell!<|im_end|>", stop=["l!?"])
    assert [text for text, _, _ in outputs] == ["hell"[:3], "", "l!"]


def test_the_last_token_s_text_is_cut_before_a_stop_string():
    assert pushed(PLAIN, "a.b", stop=["."])[1:] == [("", None, "."), ("", None, ".")]


def test_tokens_before_min_tokens_are_neither_matched_nor_withheld():
    outputs = pushed(PLAIN, "ababab", stop=["ab"], min_tokens=3)
    assert [text for text, _, _ in outputs[:4]] == ["a", "b", "a", "b"]
    assert outputs[5] == ("", None, "ab")


def test_harmony_headers_release_no_text_and_content_has_a_channel():
    text = "<|channel|>analysis<|message|>he<|end|><|start|>assistant<|channel|>final<|message|>hell<|return|>"
    prompt = HARMONY.encode("<|start|>user<|message|>x<|end|><|start|>assistant", special=True)
    outputs = pushed(HARMONY, text, prompt_ids=prompt)
    assert channels_of(outputs) == [("analysis", "he"), ("final", "hell")]


def test_text_after_a_channel_s_name_in_the_header_is_ignored():
    text = "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    assert channels_of(pushed(HARMONY, text)) == [("commentary", "{}")]


@pytest.mark.parametrize("header", ["<|start|>user<|message|>", "<|channel|>elsewhere<|message|>"])
def test_content_of_an_unknown_channel_has_none(header):
    assert channels_of(pushed(HARMONY, header + "he")) == [(None, "he")]


def test_an_answer_to_a_raw_prompt_without_harmony_has_no_channel():
    assert channels_of(pushed(HARMONY, "hell", prompt_ids=HARMONY.encode("he"))) == [(None, "hell")]


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        ("<|start|>assistant", []),
        ("<|start|>assistant<|channel|>final<|message|>", [("final", "he")]),
        ("<|start|>assistant<|channel|>fin", []),
        ("<|start|>user<|message|>x<|end|>", [(None, "he")]),
        ("<|channel|>analysis<|message|>", [("analysis", "he")]),
    ],
)
def test_the_prompt_determines_the_harmony_state_in_which_the_answer_begins(prompt, runs):
    assert channels_of(pushed(HARMONY, "he", prompt_ids=HARMONY.encode(prompt, special=True))) == runs


def test_a_channel_name_may_begin_in_the_prompt_and_end_in_the_answer():
    prompt = HARMONY.encode("<|start|>assistant<|channel|>fin", special=True)
    assert channels_of(pushed(HARMONY, "al<|message|>he", prompt_ids=prompt)) == [("final", "he")]


def test_text_withheld_at_a_message_s_end_is_released_on_its_channel():
    text = "<|channel|>analysis<|message|>he\n<|end|><|start|>assistant<|channel|>final<|message|>\nll"
    outputs = pushed(HARMONY, text, stop=["\n\n"])
    assert channels_of(outputs) == [("analysis", "he\n"), ("final", "\nll")]
    assert outputs[-1][2] is None


def test_a_stop_string_in_a_header_does_not_match():
    text = "<|channel|>final<|message|>he<|end|>"
    assert channels_of(pushed(HARMONY, text, stop=["final"])) == [("final", "he")]


def test_gpt_oss_s_vocabulary_has_harmony_channels(gpt_oss, qwen2):
    assert HarmonyParser.supported_by(gpt_oss.vocab)
    assert not HarmonyParser.supported_by(qwen2.vocab)
    outputs = pushed(gpt_oss, "<|channel|>analysis<|message|>We.<|end|><|start|>assistant<|channel|>final<|message|>Hi")
    assert channels_of(outputs) == [("analysis", "We."), ("final", "Hi")]


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
    tokenizer = SimpleNamespace(token_bytes=chunks.__getitem__, vocab=SimpleNamespace(special={}))
    return [text for text, _, _ in pushed_ids(tokenizer, range(len(chunks)))]


@given(CHUNKS)
def test_the_joined_text_is_the_replace_decoding_of_all_bytes(chunks):
    assert "".join(decoded(chunks)) == b"".join(chunks).decode("utf-8", "replace")


def test_a_code_point_is_released_with_its_last_byte():
    assert decoded([b"a\xf0\x9f", b"\x99", b"\x82b"]) == ["a", "", "🙂b"]


def test_the_last_push_flushes_an_unfinished_sequence():
    assert decoded([b"\xe2", b"\x82"]) == ["", "\ufffd"]
