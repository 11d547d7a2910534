"""HarmonyParser: channels, recipients and odd headers of gpt-oss's answers."""

import re
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.small import HARMONY_NAMES, byte_level
from tests.text.test_detokenizer import pushed, pushed_ids
from worker.text.parsers.harmony import HarmonyParser
from worker.text.parsers.interface import Place
from worker.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(byte_level(names=HARMONY_NAMES, extra=[("analysis", 1), ("final", 1)]))
PROMPT = TOKENIZER.encode("<|start|>user<|message|>x<|end|><|start|>assistant", special=True)


def runs(text: str, prompt_ids=PROMPT, tokenizer=TOKENIZER, **options) -> list[tuple[str, ...]]:
    """(channel, recipient and call if any, text) of each run of an answer's text in one place."""
    found: list[tuple[Place, str]] = []
    for piece, place, _ in pushed(tokenizer, text, prompt_ids=prompt_ids, **options):
        if piece and found and found[-1][0] == place:
            found[-1] = (place, found[-1][1] + piece)
        elif piece:
            found.append((place, piece))
    return [(*(value for value in place if value is not None), piece) for place, piece in found]


def test_headers_release_no_text_and_content_has_a_channel():
    text = "<|channel|>analysis<|message|>he<|end|><|start|>assistant<|channel|>final<|message|>hell<|return|>"
    assert runs(text) == [("reasoning", "he"), ("final", "hell")]


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f<|constrain|>json",
        "<|channel|>commentary to=functions.f json",
        "<|channel|>commentary to=functions.f",
        "<|channel|>analysis to=functions.f code",
        "<|channel|>final to=functions.f",
        " to=functions.f<|channel|>commentary <|constrain|>json",
        " to=functions.f<|channel|>commentary json",
        " to=functions.f<|channel|>analysis",
        " to=functions.f",
        "<|channel|>commentaryto=functions.f <|constrain|>json",
        "<|channel|>––commentary to=functions.f <|constrain|>json",
        "<|channel|>commentary? to=functions.f <|constrain|>response",
        "<|channel|>commentary<|channel|>commentary to=functions.f <|constrain|>json",
        "<|channel|>commentary to=functions.f<|channel|>commentary <|constrain|>json",
        "assistant<|channel|>commentary to=functions.f",
        "<|start|>assistantassistant to=functions.f<|channel|>commentary",
    ],
)
def test_the_recipient_is_read_from_either_place(header):
    assert runs(header + '<|message|>{"a": 1}<|call|>') == [("tool", "functions.f", 0, '{"a": 1}')]


def test_calls_are_counted_and_recipients_are_published_as_the_model_wrote_them():
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>analysis to=browser.search code<|message|>{"q": 1}<|call|>'
        "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{}<|call|>"
    )
    calls = [("tool", "browser.search", 0, '{"q": 1}'), ("tool", "functions.f", 1, "{}")]
    assert runs(text) == [("reasoning", "hm"), ("final", "I look."), *calls]


def test_a_call_without_arguments_is_visible():
    outputs = pushed(TOKENIZER, "<|channel|>commentary to=functions.f<|message|><|call|>", prompt_ids=PROMPT)
    assert ("", Place("tool", "functions.f", 0), None) in outputs


@pytest.mark.parametrize(
    "header", ["<|start|>user", "<|channel|>elsewhere", "<|channel|>??", "<|channel|>final to=user"]
)
def test_content_of_an_unknown_channel_is_final(header):
    assert runs(header + "<|message|>he") == [("final", "he")]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Hello, world.<|return|>", "Hello, world."),
        (" Hello<|end|>", " Hello"),
        ("Hello", "Hello"),
        ("assistant<|return|>", "assistant"),
        ("to<|return|>", "to"),
        ("<|channel|>Sorry<|return|>", "Sorry"),
        ("<|channel|>Sorry, I can't.<|return|>", "Sorry, I can't."),
        ("<|channel|>Sorry<|constrain|>json<|end|>", "Sorry"),
        ("<|channel|>Sorry<|channel|>No<|end|>", "SorryNo"),
        ("<|channel|>final Hello you<|return|>", "Hello you"),
        ("<|channel|>finalHello<|return|>", "Hello"),
        ("<|channel|>finally, no<|return|>", "finally, no"),
        ("<|channel|>analysis The user", "The user"),
        ("<|channel|>commentary to=functions.f<|end|>", ""),
        ("<|channel|>日本語<|return|>", "日本語"),
        (f"<|channel|>{'x' * 40}<|return|>", "x" * 40),
        (f"<|channel|>commentary to={'x' * 300}<|return|>", f"to={'x' * 300}"),
        ("<|start|>assistant Hello", "Hello"),
        ("<|start|>Hello<|end|>", "Hello"),
        ("<|start|><|start|>assistant<|channel|>", ""),
    ],
)
def test_text_without_a_message_token_is_published_as_final(answer, text):
    assert runs(answer) == ([("final", text)] if text else [])


def test_an_over_long_header_is_text_and_its_channel_still_counts():
    assert runs("<|channel|>analysis We should greet.<|message|>hm<|end|>") == [
        ("final", "We should greet."),
        ("reasoning", "hm"),
    ]
    assert runs("Hello<|channel|>final<|message|>you") == [("final", "Helloyou")]


def test_text_that_cannot_be_a_header_is_published_at_once():
    outputs = pushed(TOKENIZER, "Well, he", prompt_ids=PROMPT)
    assert [text for text, _, _ in outputs] == ["W", "e", "ll", ",", " ", "he"]


def test_a_second_message_token_changes_nothing():
    assert runs("<|channel|>analysis<|message|>he<|message|>ll") == [("reasoning", "hell")]


def test_a_message_without_a_start_token_is_parsed():
    text = "<|channel|>analysis<|message|>he<|end|>assistant<|channel|>final<|message|>ll<|return|>"
    assert runs(text) == [("reasoning", "he"), ("final", "ll")]
    assert runs("<|channel|>analysis<|message|>he<|channel|>final<|message|>ll") == runs(text)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("he", [("final", "he")]),
        ("<|start|>assistant<|channel|>final<|message|>", [("final", "he")]),
        ("<|start|>assistant<|channel|>fin", [("final", "he")]),
        ("<|start|>user<|message|>x<|end|>", [("final", "he")]),
        ("<|channel|>analysis<|message|>", [("reasoning", "he")]),
        ("<|start|>assistant to=functions.f<|message|>{", [("tool", "functions.f", 0, "he")]),
    ],
)
def test_the_prompt_determines_the_state_in_which_the_answer_begins(prompt, expected):
    assert runs("he", TOKENIZER.encode(prompt, special=True)) == expected


def test_a_header_may_begin_in_the_prompt_and_end_in_the_answer():
    prompt = TOKENIZER.encode("<|start|>assistant<|channel|>ana", special=True)
    assert runs("lysis<|message|>he", prompt) == [("reasoning", "he")]
    assert runs("lysis he", prompt) == [("final", "he")]


def test_text_withheld_at_a_message_s_end_is_released_on_its_channel():
    text = "<|channel|>analysis<|message|>he\n<|end|><|start|>assistant<|channel|>final<|message|>\nll"
    assert runs(text, stop=["\n\n"]) == [("reasoning", "he\n"), ("final", "\nll")]


def test_a_stop_string_in_a_header_does_not_match():
    assert runs("<|channel|>final<|message|>he<|end|>", stop=["final"]) == [("final", "he")]


def test_an_unfinished_code_point_ends_with_its_message():
    ids = TOKENIZER.encode("<|channel|>analysis<|message|>é", special=True)[:-1]
    ids += TOKENIZER.encode("<|end|><|start|>assistant<|channel|>final<|message|>he", special=True)
    outputs = pushed_ids(TOKENIZER, ids, PROMPT)
    assert [(place.channel, text) for text, place, _ in outputs if text] == [("reasoning", "\ufffd"), ("final", "he")]


def test_gpt_oss_s_vocabulary_has_harmony_channels(gpt_oss, qwen2):
    assert HarmonyParser.supported_by(gpt_oss.vocab)
    assert not HarmonyParser.supported_by(qwen2.vocab)
    text = "<|channel|>analysis<|message|>We.<|end|><|start|>assistant<|channel|>final<|message|>Hi"
    prompt = gpt_oss.encode("<|start|>assistant", special=True)
    assert runs(text, prompt, gpt_oss) == [("reasoning", "We."), ("final", "Hi")]


FRAGMENTS = (*HARMONY_NAMES, "analysis", "commentary", "final", "assistant", " to=functions.f", " json", "?", " ")
WORDS = st.integers(0, 99).map(" word{}".format)
ANSWERS = st.lists(st.sampled_from(FRAGMENTS) | WORDS, max_size=12)


@given(ANSWERS, st.booleans())
def test_only_words_in_the_place_of_a_channel_or_type_are_markup(answer, chat):
    text = "".join(answer)
    published = "".join(run[-1] for run in runs(text, PROMPT if chat else ()))
    kept = re.sub(r"(<\|channel\|>|<\|constrain\|>)[\s?]*(\w+)", r"\1", text)
    missing = [word for word in re.findall(r" (word\d+)", kept) if word not in published]
    assert not missing


@given(ANSWERS, st.lists(st.integers(0, 99), max_size=9), st.booleans())
def test_the_result_does_not_depend_on_how_the_text_is_split(answer, cuts, chat):
    whole = parsed(answer, chat, lambda text: [text])
    assert parsed(answer, chat, list) == whole
    assert parsed(answer, chat, lambda text: split(text, cuts)) == whole


def parsed(answer, chat, split_text):
    """Runs of text of an answer whose texts are split by `split_text`."""
    parser = HarmonyParser(TOKENIZER.vocab, TOKENIZER.token_bytes, PROMPT if chat else ())
    pieces = []
    for part in re.findall(r"<\|\w+\|>|(?:(?!<\|\w+\|>).)+", "".join(answer), re.DOTALL):
        ids = TOKENIZER.vocab.special
        parts = [(ids[part], "")] if part in ids else [(-1, text) for text in split_text(part)]
        for token_id, text in parts:
            pieces += parser.push(token_id, text)
    return joined([*pieces, *parser.flush()])


def split(text, cuts):
    at = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(at)]


def joined(pieces):
    found: list[tuple[Place, str]] = []
    for place, text in pieces:
        if found and found[-1][0] == place:
            found[-1] = (place, found[-1][1] + text)
        else:
            found.append((place, text))
    return found


@pytest.mark.parametrize("unit", ["!", " ", "to=", "?", "json ", "assistant"])
@pytest.mark.parametrize("start", ["<|channel|>", "<|start|>", " to=functions.f<|constrain|>", ""])
def test_a_header_of_one_repeated_unit_takes_little_time(unit, start):
    begun = time.process_time()
    runs(start + unit * 400 + "x<|message|>he")
    assert time.process_time() - begun < 2
