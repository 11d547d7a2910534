"""Channels of an answer's tokens: choice of the parser, marks as tokens, stop strings."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.small import CHATML, CONTROL, USER_DEFINED, byte_level
from tests.text.test_detokenizer import pushed, pushed_ids
from worker.text.detokenizer import IncrementalDetokenizer
from worker.text.parsers import answer_parser
from worker.text.parsers.hermes import HermesParser
from worker.text.parsers.interface import Place
from worker.text.parsers.think import ThinkParser
from worker.text.tokenizer import load_tokenizer

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}]
HERMES = CHATML + "{# <think> <tool_call> #}"
XML = CHATML + "{# <think> <function= #}"


def model(kind=None, template=CHATML, extra=()):
    marks = [(mark, kind) for mark in MARKS if kind is not None]
    return load_tokenizer(byte_level(extra=[*marks, *extra]) | {"tokenizer.chat_template": template})


TEXT, TOKEN, SILENT = model(template=HERMES), model(USER_DEFINED), model(CONTROL)
PLAIN = model()
CALL = '<tool_call>\n{"name": "f", "arguments": {"n": 5}}\n</tool_call>'


def runs(tokenizer, answer, prompt="<|im_start|>assistant\n", **options):
    """(channel, recipient and call if any, text) of each run of an answer's text in one place."""
    prompt_ids = tokenizer.encode(prompt, special=True)
    return joined(pushed(tokenizer, answer + "<|im_end|>", prompt_ids=prompt_ids, **options))


def joined(outputs):
    found: list[tuple[Place, str]] = []
    for text, place, _ in outputs:
        if text and found and found[-1][0] == place:
            found[-1] = (place, found[-1][1] + text)
        elif text:
            found.append((place, text))
    return [(*(value for value in place if value is not None), text) for place, text in found]


@pytest.mark.parametrize("tokenizer", [TEXT, TOKEN, SILENT], ids=["text", "token", "control token"])
def test_marks_are_found_as_text_and_as_tokens(tokenizer):
    answer = f"<think>\nhm\n</think>\n\nhell\n{CALL}\n{CALL}"
    calls = [("tool", "functions.f", n, '{"n": 5}') for n in (0, 1)]
    assert runs(tokenizer, answer, tools=TOOLS) == [("reasoning", "hm"), ("final", "hell"), *calls]


@pytest.mark.parametrize(
    ("prompt", "channel"),
    [
        ("<|im_start|>assistant\n", "final"),
        ("<|im_start|>assistant\n<think>\n", "reasoning"),
        ("<|im_start|>assistant\n<think>\nOkay, ", "reasoning"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "final"),
        ("<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", "final"),
        ("<|im_start|>assistant\n<think>\nx\n</think>\ny<|im_end|>\n<|im_start|>assistant\n<think>", "reasoning"),
        ("What is the mark <think> for?", "final"),
        ("A: <think>\n", "reasoning"),
        ("", "final"),
    ],
)
@pytest.mark.parametrize("tokenizer", [TEXT, TOKEN, SILENT], ids=["text", "token", "control token"])
def test_the_prompt_s_last_turn_decides_whether_the_answer_begins_with_reasoning(tokenizer, prompt, channel):
    assert runs(tokenizer, "he", prompt) == [(channel, "he")]


def test_parsers_are_chosen_by_template_vocabulary_and_tools():
    assert answer_parser(PLAIN, [], TOOLS) is None
    assert runs(TEXT, CALL) == [("final", CALL)]
    assert runs(TOKEN, CALL) == [("final", CALL)]
    assert runs(model(template=XML), CALL, tools=TOOLS) == [("final", CALL)]
    call = "<tool_call>\n<function=f>\n<parameter=n>\n5\n</parameter>\n</function>\n</tool_call>"
    assert runs(model(template=XML), call, tools=TOOLS) == [("tool", "functions.f", 0, '{"n": 5}')]
    assert runs(TEXT, call, tools=TOOLS) == [("final", call)]


def test_a_token_with_text_of_two_channels_leaves_the_later_text_to_the_next_token():
    tokenizer = model(template=HERMES, extra=[("hm</think>he", USER_DEFINED)])
    ids = tokenizer.encode("<think>hm</think>hell<|im_end|>", special=True)
    assert [out[:2] for out in pushed_ids(tokenizer, ids)[-3:]] == [
        ("hm", Place("reasoning")),
        ("hell", Place("final")),
        ("", Place("final")),
    ]


def test_the_last_token_publishes_all_that_is_left():
    tokenizer = model(template=HERMES, extra=[("hm</think>he", USER_DEFINED)])
    ids = tokenizer.encode("<think>hm</think>he", special=True)
    assert pushed_ids(tokenizer, ids)[-1] == ("hmhe", Place("final"), None)
    assert pushed(tokenizer, "<think>he</th")[-1] == ("</th", Place("reasoning"), None)


STOPS = [
    # A stop string is matched in the text of one channel, as it is published.
    ("<think>ab</think>ba", ["bb"], [("reasoning", "ab"), ("final", "ba")]),
    ("<think>a\n</think>\n\nb\n\nc", ["\n\n"], [("reasoning", "a"), ("final", "b")]),
    ("<think>a\n\nb</think>c", ["\n\n"], [("reasoning", "a")]),
    ("<think>a\n\nb</think>c", ["d", "</think>c"], [("reasoning", "a\n\nb")]),
    ("<think>a</think>b", ["</think>"], [("reasoning", "a")]),
    ("a<tool_call>b", ["<tool_call>"], [("final", "a")]),
    ("a" + CALL, ["5"], [("final", "a"), ("tool", "functions.f", 0, '{"n": ')]),
    ("a" + CALL, ['"name"'], [("final", "a"), ("tool", "functions.f", 0, '{"n": 5}')]),
]


@pytest.mark.parametrize(("answer", "stop", "expected"), STOPS)
def test_a_stop_string_matches_in_one_channel_or_with_a_mark(answer, stop, expected):
    assert runs(TEXT, answer, stop=stop, tools=TOOLS) == expected


@pytest.mark.parametrize("tokenizer", [TOKEN, SILENT], ids=["token", "control token"])
def test_a_mark_that_is_a_stop_token_has_no_text(tokenizer):
    silent = frozenset([tokenizer.vocab.special["<tool_call>"], tokenizer.vocab.special["</think>"]])
    assert joined(pushed(tokenizer, "<think>a</think>", silent_ids=silent)) == [("reasoning", "a")]
    assert joined(pushed(tokenizer, "a<tool_call>", silent_ids=silent, tools=TOOLS)) == [("final", "a")]


def test_text_withheld_for_a_stop_string_is_published_on_its_channel():
    outputs = pushed(TEXT, "<think>ab</think>c<|im_end|>", stop=["bc", "cd"])
    assert joined(outputs) == [("reasoning", "ab"), ("final", "c")]


def test_the_first_min_tokens_are_not_matched():
    assert runs(TEXT, "<think>abab", stop=["ab"], min_tokens=9) == [("reasoning", "ab")]


PARTS = st.lists(st.sampled_from([*MARKS, "\n", "he", '{"name": "f", "arguments": {', "}", "é", "🙂", '"'])).map(
    "".join
)


@given(PARTS, st.lists(st.integers(1, 9), min_size=1), st.sampled_from([(), ("he",), ("\n\n",), ("</think>", "}h")]))
def test_the_text_of_each_channel_does_not_depend_on_the_tokens(answer, sizes, stop):
    """Bytes of code points are split too. End tokens follow, so that each token has one channel."""
    data, chunks, n = answer.encode(), [], 0
    while data:
        size = sizes[n % len(sizes)]
        chunks.append(data[:size])
        data, n = data[size:], n + 1
    assert channels(chunks, stop) == channels([answer.encode()], stop)


def channels(chunks: list[bytes], stop) -> list[tuple]:
    """The stop string and the text before it, or None and the runs of text, of tokens of these bytes."""
    tokens = SimpleNamespace(vocab=PLAIN.vocab, token_bytes=[*chunks, *[b""] * 40].__getitem__)
    parser = ThinkParser(opened=False, content=HermesParser())
    detokenizer, outputs = IncrementalDetokenizer(tokens, stop=stop, parser=parser), []
    for at in range(len(chunks) + 40):
        outputs.append(tuple(detokenizer.push(at, last=at == len(chunks) + 39)))
        if outputs[-1][2] is not None:
            return outputs[-1][2], "".join(text for text, _, _ in outputs)
    return None, joined(outputs)
