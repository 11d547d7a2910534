"""Gemma 4's channels and tool calls: as its template writes them, odd ones, and in any split."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text.small import CONTROL, NORMAL, USER_DEFINED, byte_level, tokenizer_of
from tests.text.test_channels import TOOLS, joined
from tests.text.test_detokenizer import pushed
from tests.text.test_parsers import call, runs, split
from tests.text.test_template_families import FAMILIES, TEMPLATES, apply_chat_template
from worker.text.parsers.gemma4 import Gemma4Parser

OPTIONS: dict[str, dict[str, bool]] = {
    "text": {"opened": False, "calls": False},
    "calls": {"opened": False, "calls": True},
    "opened": {"opened": True, "calls": True},
    "structured": {"opened": False, "calls": True, "structured": True},
    "structured, opened": {"opened": True, "calls": False, "structured": True},
}
TEMPLATE = (TEMPLATES / "gemma-4.jinja").read_text()


def parsed(name: str, *parts: str) -> list[tuple]:
    return runs(Gemma4Parser(**OPTIONS[name]), *parts)


@pytest.mark.parametrize(
    ("answer", "reasoning", "final"),
    [
        ("<|channel>thought\nhm\n<channel|>hello", "hm", "hello"),
        ("<|channel>thought\n\na\n\nb\n\n<channel|>\n\nhello\n", "a\n\nb", "hello\n"),
        ("<|channel>thought\n<channel|>hello", "", "hello"),
        ("<|channel>thought<channel|>hello", "", "hello"),
        ("hello", "", "hello"),
        ("hello <|chan <b>", "", "hello <|chan <b>"),
        ("thought\nhello", "", "thought\nhello"),
        # The marks are removed wherever they are, as the template does; odd names of channels are text of theirs.
        ("hello\n<|channel>thought\n<channel|>", "", "hello"),
        ("hello<channel|>", "", "hello"),
        ("<channel|>hello", "", "hello"),
        ("<|channel><|channel>thought\nhm<channel|>hello", "hm", "hello"),
        ("<|channel>thoughts\n<channel|>hello", "thoughts", "hello"),
        ("<|channel>final\nhm<channel|>hello", "final\nhm", "hello"),
        ("<|channel>thought\na<|channel>b <chan<channel|>c", "a<|channel>b <chan", "c"),
        ("<|channel>thought\nnever closed\n", "never closed\n", ""),
        ("<|channel>thought\ncut <chan", "cut <chan", ""),
        ("<|channel>thought", "", ""),
        ("<|channel>", "", ""),
        ("<|chan", "", "<|chan"),
    ],
)
def test_text_in_channels_is_reasoning(answer, reasoning, final):
    expected = [("reasoning", reasoning)] * bool(reasoning) + [("final", final)] * bool(final)
    assert parsed("text", answer) == expected
    assert parsed("calls", answer) == expected


def test_there_may_be_several_channels():
    text = "<|channel>thought\na\n<channel|>b\n<|channel>thought\nc\n<channel|>d"
    assert parsed("calls", text) == [("reasoning", "a"), ("final", "b"), ("reasoning", "c"), ("final", "d")]


@pytest.mark.parametrize(
    ("answer", "reasoning", "final"),
    [
        ("hm\n<channel|>hello", "hm", "hello"),
        ("<|channel>thought\nhm<channel|>hello", "hm", "hello"),
        ("thought\nhm<channel|>hello", "hm", "hello"),
        ("<channel|>hello", "", "hello"),
        ("hello", "hello", ""),
    ],
)
def test_an_answer_to_a_prompt_that_opens_a_channel_begins_with_reasoning(answer, reasoning, final):
    expected = [("reasoning", reasoning)] * bool(reasoning) + [("final", final)] * bool(final)
    assert parsed("opened", answer) == expected


NESTED = 'he said "hi"\n{}[],: \\ \' <|" |> <tool_call|> é'


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ('s:<|"|>a<|"|>', {"s": "a"}),
        ('s:<|"|><|"|>', {"s": ""}),
        (f's:<|"|>{NESTED}<|"|>,n:5', {"s": NESTED, "n": 5}),
        ('n:-5,x:1.50,e:1e-05,b:true,c:false,z:null,big:12345678901234567890',
         {"n": -5, "x": 1.5, "e": 1e-05, "b": True, "c": False, "z": None, "big": 12345678901234567890}),
        ('o:{a:{b:<|"|>}]<|"|>},c:{}},l:[1,[],[<|"|>,<|"|>,{k:<|"|>]<|"|>}]]',
         {"o": {"a": {"b": "}]"}, "c": {}}, "l": [1, [], [",", {"k": "]"}]]}),
        # With white space, in quotes of either kind, in Python's words, and without quotes.
        (' n : 5 , l : [ 1 , 2 ] , s : <|"|> a <|"|> ', {"n": 5, "l": [1, 2], "s": " a "}),
        ('<|"|>a b<|"|>:1,"c d":2,e-f g:3', {"a b": 1, "c d": 2, "e-f g": 3}),
        ('s:"a, \\"}",l:["]",2]', {"s": 'a, "}', "l": ["]", 2]}),
        ("a:None,b:True,c:False", {"a": None, "b": True, "c": False}),
        ("a:Paris,b:2 days,c:NaN,d:01", {"a": "Paris", "b": "2 days", "c": "NaN", "d": "01"}),
        # Something is missing, or there is too much.
        ("a:,b:", {"a": None, "b": None}),
        (",a:1,,b:2,", {"a": 1, "b": 2}),
        ("l:[,1,,2,]", {"l": [1, 2]}),
        ("l:[1,2", {"l": [1, 2]}),
        ("o:{l:[{a:1", {"o": {"l": [{"a": 1}]}}),
        ("a:1}", {"a": 1}),
        ("a:1}]}", {"a": 1}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["<|tool_call>call:f{%s}<tool_call|>", "<|tool_call> call: f {%s}\n<tool_call|>\n"])
def test_arguments_are_published_as_json(arguments, expected, form):
    ((*place, text),) = parsed("calls", form % arguments)
    assert place == ["tool", "functions.f", 0]
    assert json.loads(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "I look.\n<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:g.h-2{}<tool_call|>\nDone.",
            [("final", "I look."), call('{"a": 1}'), call("{}", 1, "g.h-2"), ("final", "Done.")],
        ),
        (
            "<|channel>thought\nhm <|tool_call> hm\n<channel|><|tool_call>call:f{}<tool_call|>",
            [("reasoning", "hm <|tool_call> hm"), call("{}")],
        ),
        ("<|channel>thought\nhm\n<|tool_call>call:f{}<tool_call|>", [("reasoning", "hm"), call("{}")]),
        ("<|tool_call>call:f{a:1<tool_call|>x", [call('{"a": 1}'), ("final", "x")]),
        ("<|tool_call>call:f{}", [call("{}")]),
        ("<|tool_call>call:f{}<tool_", [call("{}")]),
        ("<|tool_call>call:f{} and more", [call("{}"), ("final", " and more")]),
        ("<|tool_call>call:f{}<|tool_call>call:g{}", [call("{}"), call("{}", 1, "g")]),
        ('<|tool_call>call:f{a:<|"|>b', [call('{"a": "b')]),
        ('<|tool_call>call:f{a:<|"|>b<|"', [call('{"a": "b<|\\"')]),
        ("<|tool_call>call:f{a:[1,tr", [call('{"a": [1, "tr"')]),
        ("<|tool_call>call:f{a:1,b", [call('{"a": 1'), ("final", "b")]),
        ("<|tool_call>call:f{a:", [call('{"a": ')]),
        ("<|tool_call>call:f{", [call("{")]),
        ("<|tool_call>call:f{hello}<tool_call|>", [call("{"), ("final", "hello"), call("}")]),
        ("<|tool_call>call:f{a:b, c}<tool_call|>", [call('{"a": "b"'), ("final", "c"), call("}")]),
        ("<|tool_call>call:f{]a:1}<tool_call|>", [call("{"), ("final", "]"), call('"a": 1}')]),
        ("<|tool_call>call:f{a\n:1}<tool_call|>", [call("{"), ("final", "a:1"), call("}")]),
        ("<|tool_call>call:f{:1}<tool_call|>", [call("{"), ("final", ":1"), call("}")]),
    ],
)
def test_calls_are_published_with_what_they_have(answer, expected):
    assert parsed("calls", answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "a < b <|tool <|tool_call",
        "<|tool_call>",
        "<|tool_call>hello",
        "<|tool_call>call",
        "<|tool_call>call:",
        "<|tool_call>call:f",
        "<|tool_call>call:f g{}",
        "<|tool_call>call:{}<tool_call|>",
        f"<|tool_call>call:{'f' * 300}{{}}",
        '<|tool_call>{"name": "f"}<tool_call|>',
        "call:f{}",
        "text\n\n",
    ],
)
def test_text_that_is_no_call_is_final(answer):
    assert parsed("calls", answer) == [("final", answer)]


def test_calls_are_text_in_answers_to_jobs_without_tools():
    answer = "<|tool_call>call:f{}<tool_call|>"
    assert parsed("text", answer) == [("final", answer)]


def test_a_string_is_published_as_it_comes():
    parser = Gemma4Parser(opened=False, calls=True)
    parser.push(0, '<|tool_call>call:f{s:<|"|>a')
    assert [text for _, text in parser.push(0, "b\nc<|")] == ["b\\nc"]


def test_content_with_a_format_has_marks_only_before_it():
    content = '{"a": "<|channel>thought\\n<channel|><|tool_call>call:f{}<tool_call|>"}'
    assert parsed("structured", content) == [("final", content)]
    assert parsed("structured", f"\n<|channel>thought\nhm<channel|>\n{content}") == [
        ("reasoning", "hm"), ("final", content),
    ]  # fmt: skip
    assert parsed("structured", "<|tool_call>call:f{}<tool_call|><|tool_call>call:f{}<tool_call|>") == [
        call("{}"), call("{}", 1),
    ]  # fmt: skip
    assert parsed("structured, opened", f"hm<channel|>{content}") == [("reasoning", "hm"), ("final", content)]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('ab"\\{}[],:<|> \né', max_size=9).filter(lambda text: '<|"|>' not in f"{text}<"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]\w{0,3}", fullmatch=True), inner),
    max_leaves=9,
)  # fmt: skip


@given(st.dictionaries(st.from_regex(r"[a-z_][\w -]{0,5}\w", fullmatch=True), VALUES, max_size=4), st.text("a\nb"))
def test_a_call_that_the_template_writes_has_its_arguments(arguments: dict[str, Any], thought: str):
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    turn = {"role": "assistant", "content": None, "reasoning_content": f"x{thought}x", "tool_calls": calls}
    chat = [{"role": "user", "content": "hi"}, turn]
    text = apply_chat_template(TEMPLATE, chat, None, {"bos_token": "<bos>"}, {})
    answer = text.rpartition("<|turn>model\n")[2].removesuffix("<|tool_response>")
    reasoning, (*place, published) = parsed("calls", answer)
    assert reasoning == ("reasoning", f"x{thought}x")
    assert place == ["tool", "functions.f", 0]
    assert json.loads(published) == arguments


MARKS = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
FRAGMENTS = (
    *MARKS, *("thought", "thought\n", "call:", "call:f{", "a:", "a:1", ",", "{", "}", "[", "]", '"', "\\", " ", "\n"),
    *("<", "<|", "|>", "<tool_", ":", "1", "é🙂", "<|tool_call>call:f{", '<|tool_call>call:f{s:<|"|>'),
)  # fmt: skip
ANSWERS = st.lists(st.sampled_from(FRAGMENTS) | st.text("a<", max_size=3), max_size=14).map("".join)


@pytest.mark.parametrize("name", OPTIONS)
@given(answer=ANSWERS, cuts=st.lists(st.integers(0, 500), max_size=9))
def test_the_result_does_not_depend_on_how_the_text_is_split(name, answer, cuts):
    whole = parsed(name, answer)
    assert parsed(name, *split(answer, cuts)) == whole
    assert parsed(name, *answer) == whole


@pytest.mark.parametrize("name", OPTIONS)
@given(parts=st.lists(st.integers(100, 999).map("w{}".format) | st.sampled_from(FRAGMENTS), max_size=14))
def test_no_text_is_lost(name, parts):
    published = "".join(run[-1] if run[0] != "tool" else f"{run[1]} {run[-1]}" for run in parsed(name, "".join(parts)))
    for part in parts:
        assert not part.startswith("w") or part in published, part


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("start", ["", "<|channel>", "<|tool_call>", "<|tool_call>call:f{", "<|tool_call>call:f{a:"])
@pytest.mark.parametrize("unit", [" ", "!", '"', "\\", "<", "{", "[", ",", "a:", '<|"|>', "<|tool_call> "])
def test_a_long_run_of_one_unit_takes_little_time(name, start, unit):
    parts = [unit * 64] * 100
    begun = time.process_time()
    assert "".join(run[-1] for run in parsed(name, start, *parts, "é"))
    assert time.process_time() - begun < 2


def tokenizer(kind):
    family = FAMILIES["gemma-4"]
    names = [name for name in family.names.split() if name not in MARKS]
    marks = [(mark, kind) for mark in MARKS if kind is not NORMAL]
    metadata = byte_level(names=names, extra=marks, bos_token_id=259, eos_token_id=261)
    return tokenizer_of(metadata, **{"tokenizer.chat_template": TEMPLATE})


TOKENIZERS = {"text": tokenizer(NORMAL), "token": tokenizer(USER_DEFINED), "control token": tokenizer(CONTROL)}


@pytest.mark.parametrize("model", TOKENIZERS.values(), ids=TOKENIZERS)
def test_marks_are_found_as_text_and_as_tokens(model):
    answer = '<|channel>thought\nhm\n<channel|>hell<|tool_call>call:f{n:5,s:<|"|>he<|"|>}<tool_call|>'
    prompt = model.encode("<|turn>model\n", special=True)
    expected = [("reasoning", "hm"), ("final", "hell"), ("tool", "functions.f", 0, '{"n": 5, "s": "he"}')]
    assert joined(pushed(model, answer + "<|tool_response>", prompt_ids=prompt, tools=TOOLS)) == expected


@pytest.mark.parametrize("model", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "channel"),
    [
        ("<|turn>model\n", "final"),
        ("<|turn>model\n<|channel>thought\n<channel|>", "final"),
        ("<|turn>model\n<|channel>thought\n", "reasoning"),
        ("<|turn>model\n<|channel>thought\nso", "reasoning"),
        ("<|turn>user\nwhat is <|channel>?<turn|>\n<|turn>model\n", "final"),
        ("<|tool_call>call:f{}<tool_call|><|tool_response>response:f{value:<|channel>}<tool_response|>", "final"),
    ],
)
def test_the_prompt_s_last_turn_decides_whether_the_answer_begins_with_reasoning(model, prompt, channel):
    found = joined(pushed(model, "he<turn|>", prompt_ids=model.encode(prompt, special=True), tools=TOOLS))
    assert found == [(channel, "he")]
