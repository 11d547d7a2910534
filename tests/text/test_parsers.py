"""The parsers of text markup: `<think>`, Hermes's JSON calls and Qwen3-Coder's XML calls."""

import json
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.text.parsers.hermes import HermesParser
from worker.text.parsers.interface import Parser, Place
from worker.text.parsers.qwen_xml import QwenXmlParser
from worker.text.parsers.think import ThinkParser

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "s": {"type": "string"},
                    "n": {"type": "integer"},
                    "x": {"type": "number"},
                    "b": {"type": "boolean"},
                    "o": {"type": "object"},
                    "l": {"type": "array"},
                    "u": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "t": {"type": ["string", "integer"]},
                },
            },
        },
    }
]
PARSERS = {
    "think": lambda: ThinkParser(opened=False, content=None),
    "opened": lambda: ThinkParser(opened=True, content=None),
    "hermes": HermesParser,
    "xml": lambda: QwenXmlParser(TOOLS),
    "think and hermes": lambda: ThinkParser(opened=False, content=HermesParser()),
    "think and xml": lambda: ThinkParser(opened=True, content=QwenXmlParser(TOOLS), ended_by_call=True),
}


def parsed(name: str, *parts: str) -> list[tuple]:
    return runs(PARSERS[name](), *parts)


def runs(parser: Parser, *parts: str) -> list[tuple]:
    """(channel, recipient and call if any, text) of each run of text in one place."""
    found: list[tuple[Place, str]] = []
    for pieces in [*(parser.push(0, part) for part in parts), parser.flush()]:
        for place, text in pieces:
            assert text
            if found and found[-1][0] == place:
                found[-1] = (place, found[-1][1] + text)
            else:
                found.append((place, text))
    return [(*(value for value in place if value is not None), text) for place, text in found]


@pytest.mark.parametrize(
    ("answer", "reasoning", "final"),
    [
        ("<think>\nhm\n</think>\n\nhello", "hm", "hello"),
        ("\n<think>hm</think>hello", "hm", "hello"),
        ("<think>\n\n</think>\n\nhello", "", "hello"),
        ("<think>a\n\nb\n</think>\n  hello\n", "a\n\nb", "  hello\n"),
        ("<think>a<b </thin </think>c", "a<b </thin ", "c"),
        ("<think>never closed\n", "never closed\n", ""),
        ("<think>cut </th", "cut </th", ""),
        ("<think>", "", ""),
        ("<thi", "", "<thi"),
        (" \n", "", " \n"),
        ("hello <think>x</think>", "", "hello <think>x</think>"),
        ("<think>a</think>b</think>c<think>d", "a", "b</think>c<think>d"),
        ("<think><think>a</think>b", "a", "b"),
    ],
)
def test_reasoning_is_what_think_marks_enclose_at_the_start(answer, reasoning, final):
    expected = [("reasoning", reasoning)] * bool(reasoning) + [("final", final)] * bool(final)
    assert parsed("think", answer) == expected


@pytest.mark.parametrize(
    ("answer", "reasoning", "final"),
    [
        ("hm\n</think>\n\nhello", "hm", "hello"),
        ("\n\n</think>\n\nhello", "", "hello"),
        ("<think>\nhm</think>hello", "hm", "hello"),
        ("hello", "hello", ""),
        ("<thin", "<thin", ""),
    ],
)
def test_an_answer_to_a_prompt_that_opens_the_mark_begins_with_reasoning(answer, reasoning, final):
    expected = [("reasoning", reasoning)] * bool(reasoning) + [("final", final)] * bool(final)
    assert parsed("opened", answer) == expected


def call(arguments: str, index: int = 0, name: str = "f") -> tuple:
    return ("tool", f"functions.{name}", index, arguments)


ARGUMENTS = '{"a": {"b": ["}</tool_call>", "\\"{"]}, "é": 1.5}'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f'<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>', [call(ARGUMENTS)]),
        (f'<tool_call>{{"name":"f","parameters":{ARGUMENTS}}}</tool_call>', [call(ARGUMENTS)]),
        (f'<tool_call>\n{{"arguments": {ARGUMENTS}, "name": "f"}}\n</tool_call>', [call(ARGUMENTS)]),
        ('<tool_call>{"id": [1], "name": "f", "arguments": {}, "x": "}"}</tool_call>', [call("{}")]),
        ('<tool_call>{"name": "f"}</tool_call>', [call("{}")]),
        ('<tool_call>{"name": "\\u0066", "arguments": "{}"}</tool_call>', [call('"{}"')]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', [call("null")]),
        (
            'I look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\nDone.\n',
            [("final", "I look."), call('{"a": 1}'), call("{}", 1, "g"), ("final", "Done.\n")],
        ),
        ('<tool_call>{"name": "f"}\n{"name": "g"}</tool_call>', [call("{}"), call("{}", 1, "g")]),
        # Parts are missing, or there are too many.
        ('<tool_call>{"name": "f", "arguments": {}}', [call("{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}\nDone', [call("{}"), ("final", "Done")]),
        ('<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "f"}', [call("{}"), call("{}", 1)]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>x', [call('{"a": 1}'), ("final", "x")]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1\n</tool_call>x', [call('{"a": 1\n'), ("final", "x")]),
        ('<tool_call>{"name": "f", "arguments": {}}}</tool_call>x', [call("{}"), ("final", "x")]),
        ('<tool_call>{"name": "f", "arguments": {"a": "b', [call('{"a": "b')]),
        ('<tool_call>{"name": "f", "arguments": {"a": <b', [call('{"a": <b')]),
        ('<tool_call>{"name": "f", "arguments": {}}</tool_', [call("{}")]),
        ('<tool_call>{"name": "f", "arguments": {} and more', [call("{}"), ("final", " and more")]),
    ],
)  # fmt: skip
def test_calls_of_hermes_are_published_with_their_arguments(answer, expected):
    assert parsed("hermes", answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "a < b <tool <tool_call",
        "<tool_call>",
        "<tool_call>\nhello</tool_call>\n",
        "<tool_call>{'name': 'f'}</tool_call>",
        '<tool_call>{"name": f}</tool_call>',
        '<tool_call>{"name": ""}</tool_call>',
        r'<tool_call>{"name": "\ud800"}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": }</tool_call>',
        '<tool_call>{"name": "f"',
        '<tool_call>{"name": "f", "argu',
        '<tool_call>{"name": "f", "arguments":',
        '<tool_call>{"arguments": {"a": 1}, "na',
        '<tool_call>["name"]</tool_call>',
        '<tool_call>{"name": "f", "args": {"a": 1}}</tool_call>',
        "text\n\n",
    ],
)
def test_text_that_is_no_call_is_final(answer):
    assert parsed("hermes", answer) == [("final", answer)]


def test_a_call_after_a_broken_one_is_parsed():
    text = '<tool_call>{"name" }<tool_call>{"name": "f"}</tool_call>'
    assert parsed("hermes", text) == [("final", '<tool_call>{"name" }'), call("{}")]


def xml(*parameters: tuple[str, str], name: str = "f") -> str:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("parameter", "value", "expected"),
    [
        ("s", 'he said "hi"\n\\n\té', '"he said \\"hi\\"\\n\\\\n\\té"'),
        ("s", "5", '"5"'),
        ("s", "null", '"null"'),
        ("s", "", '""'),
        ("s", "\n\n", '"\\n\\n"'),
        ("s", "a</parameter>b</function>c<parameter d", '"a</parameter>b</function>c<parameter d"'),
        ("unknown", "5", '"5"'),
        ("n", "5", "5"),
        ("n", " -5 ", "-5"),
        ("n", "5.0", "5.0"),
        ("n", "5.5", '"5.5"'),
        ("n", "five", '"five"'),
        ("n", "true", '"true"'),
        ("n", "None", "null"),
        ("x", "1.50", "1.50"),
        ("x", "12345678901234567890", "12345678901234567890"),
        ("x", "NaN", '"NaN"'),
        ("b", "True", "true"),
        ("b", "false", "false"),
        ("b", "yes", '"yes"'),
        ("o", '{"a": [1, "}"]}', '{"a": [1, "}"]}'),
        ("o", "{'a': True}", '{"a": true}'),
        ("o", "{a", '"{a"'),
        ("l", "[1, 2]", "[1, 2]"),
        ("l", "('a', None)", '["a", null]'),
        ("l", "[{1}]", '"[{1}]"'),
        ("l", r"['\ud800']", r'["\ud800"]'),
        ("u", "null", "null"),
        ("u", "text", '"text"'),
        ("t", "7", "7"),
        ("t", "7 days", '"7 days"'),
    ],
)
def test_values_of_xml_calls_are_json_of_the_tool_s_types(parameter, value, expected):
    assert parsed("xml", xml((parameter, value))) == [call(f'{{"{parameter}": {expected}}}')]


HEAD = "<tool_call>\n<function=f>\n"
S, N = "<parameter=s>\na\n</parameter>\n", "<parameter=n>\n5\n</parameter>\n"
END = "</function>\n</tool_call>"
BOTH = call('{"s": "a", "n": 5}')
TWO = [call("{}"), call("{}", 1, "g")]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (HEAD + END, [call("{}")]),
        (HEAD + S + N + END, [BOTH]),
        (f"I look.\n\n{xml()}\n{xml(name='g')}\nDone.", [("final", "I look."), *TWO, ("final", "Done.")]),
        ("<function=f><parameter=s>a</parameter><parameter=n>5</parameter></function>!", [BOTH, ("final", "!")]),
        ("<tool_call>\n<function=f>\n</function>\n<function=g>\n</function>\n</tool_call>", TWO),
        ("<tool_call><function=f></function>\n<tool_call><function=g></function>", TWO),
        (HEAD + "<parameter=s>a<parameter=n>5" + END, [BOTH]),
        (HEAD + S + N + "</tool_call>.", [BOTH, ("final", ".")]),
        (HEAD + S + N, [BOTH]),
        (HEAD + S + N + "</func", [BOTH]),
        (HEAD + S + "<parameter=n>5\n</tool_call>", [BOTH]),
        (HEAD + "< parameter = s >\na\n</ parameter >\n" + N + "</ function ></tool_call >", [BOTH]),
        ("<tool_call>\n< function = f >\n" + S + N + END, [BOTH]),
        ("<tool_call><function=f\n<parameter=s\na\n</parameter>" + N + "</function</tool_call>", [BOTH]),
        (HEAD.strip() + "and " + S, [("final", "and"), call('{"s": "a"}')]),
        (HEAD + '{"s": "a</function>"}\n' + END + ".", [call('{"s": "a</function>"}'), ("final", ".")]),
        (HEAD + '{"s": ["a"</function>.', [call('{"s": ["a"'), ("final", ".")]),
        (HEAD + '{"s": "a\\', [call('{"s": "a\\')]),
        (HEAD + S + "and " + N + END, [call('{"s": "a\\n</parameter>\\nand ", "n": 5}')]),
        (HEAD + "<", [call("{"), ("final", "<")]),
        (HEAD + "<parameter=s>ab</para", [call('{"s": "ab</para')]),
        (HEAD + "<parameter=n>5", [call('{"n": 5')]),
        (HEAD + S + "<parameter=n", [call('{"s": "a"'), ("final", "<parameter=n")]),
    ],
)
def test_xml_calls_are_published_as_json_objects(answer, expected):
    assert parsed("xml", answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "<tool_call>\nhello\n</tool_call>",
        "<tool_call><function=",
        "<function=f",
        "<function=f g>",
        f"<function={'f' * 300}>",
        "a <function b",
        '<tool_call>{"name": "f"}</tool_call>',
    ],
)
def test_text_that_is_no_xml_call_is_final(answer):
    assert parsed("xml", answer) == [("final", answer)]


def test_a_string_is_published_as_it_comes():
    parser = QwenXmlParser(TOOLS)
    parser.push(0, "<tool_call><function=f><parameter=s>\na")
    assert [text for _, text in parser.push(0, "b\nc")] == ["b\\nc"]


def test_reasoning_comes_before_calls():
    text = '<think>\nI call <tool_call>{"name": "f"}.\n</think>\n\nok\n<tool_call>{"name": "f"}</tool_call>'
    reasoning = ("reasoning", 'I call <tool_call>{"name": "f"}.')
    assert parsed("think and hermes", text) == [reasoning, ("final", "ok"), call("{}")]


def test_an_xml_call_ends_reasoning():
    assert parsed("think and xml", "hm <tool_call> hm\n" + xml()) == [("reasoning", "hm <tool_call> hm"), call("{}")]


FRAGMENTS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=s>", "\n"),
    *("<parameter=n>", "</parameter>", "<function=", "<parameter=", '{"name": "f"', ', "arguments": ', '{"a": "b"}'),
    *(
        "{",
        "}",
        '"',
        "\\",
        "<",
        ">",
        ":",
        ",",
        " ",
        "</",
        "< ",
        "é🙂",
        "5",
        '{"name": "f", "arguments": {',
        "</function",
    ),
)
ANSWERS = st.lists(st.sampled_from(FRAGMENTS) | st.text("a<", max_size=3), max_size=14).map("".join)


def split(text: str, cuts: list[int]) -> list[str]:
    at = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(at)]


@pytest.mark.parametrize("name", PARSERS)
@given(answer=ANSWERS, cuts=st.lists(st.integers(0, 500), max_size=9))
def test_the_result_does_not_depend_on_how_the_text_is_split(name, answer, cuts):
    whole = parsed(name, answer)
    assert parsed(name, *split(answer, cuts)) == whole
    assert parsed(name, *answer) == whole


WORDS = st.lists(st.integers(100, 999).map("w{}".format) | st.sampled_from(FRAGMENTS), max_size=14)


@pytest.mark.parametrize("name", PARSERS)
@given(parts=WORDS)
def test_no_text_is_lost(name, parts):
    published = "".join(run[-1] if run[0] != "tool" else f"{run[1]} {run[-1]}" for run in parsed(name, "".join(parts)))
    for part in parts:
        assert not part.startswith("w") or part in published, part


@given(st.text('ab\n"\\<>/é', max_size=20), st.integers(), st.booleans())
def test_the_arguments_of_an_xml_call_are_what_its_values_say(text, number, flag):
    ((_, _, _, arguments),) = parsed("xml", xml(("s", text), ("n", str(number)), ("b", str(flag))))
    assert json.loads(arguments) == {"s": text, "n": number, "b": flag}


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize(
    "start", ["", "<tool_call>", "<tool_call>{", '<tool_call>{"name": "f", ', "<function=f>", "<think>"]
)
@pytest.mark.parametrize("unit", [" ", "!", '"', "\\", "<", "{", ",", "</", "<tool_call> "])
def test_a_long_run_of_one_unit_takes_little_time(name, start, unit):
    parts = [unit * 64] * 100
    begun = time.process_time()
    assert "".join(run[-1] for run in parsed(name, start, *parts, "é"))
    assert time.process_time() - begun < 2
