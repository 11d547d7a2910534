"""Free reasoning, content of a format, tool calls of the tools' schemas: in the notation of each model family."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.text.masks import allowed, draw
from tests.text.small import CHATML, CONTROL, HARMONY_NAMES, USER_DEFINED, byte_level, sentencepiece, tokenizer_of
from worker.errors import InvalidRequest
from worker.text.answer_grammar import ContentFormat, answer_grammar
from worker.text.detokenizer import IncrementalDetokenizer
from worker.text.parsers import answer_parser, tool_format
from worker.text.parsers.tool_schema import STRING, parameter_types
from worker.text.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parent.parent / "data" / "templates"
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
GEMMA4_MARKS = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>')
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["celsius", "kelvin"]},
        "at": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}, "maxItems": 2}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "d", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"functions.weather": WEATHER, "functions.now": {"type": "object", "maxProperties": 0}}
NAMED = {"type": "function", "function": {"name": "weather"}}
JSON = ContentFormat("json_schema", {"enum": [{"a": 1}, {"a": 22}, "<tool_call>"]})
CONTENTS = ({"a": 1}, {"a": 22}, "<tool_call>")


def marked(kind: Any, names: tuple[str, ...] = MARKS, template: str = CHATML) -> Tokenizer:
    return tokenizer_of(byte_level(extra=[(name, kind) for name in names]), **{"tokenizer.chat_template": template})


FAMILIES = {
    "hermes": marked(USER_DEFINED, MARKS[2:]),
    "hermes, control tokens": marked(CONTROL, MARKS[2:]),
    "hermes, marks as text": marked(USER_DEFINED, (), CHATML + "{# <tool_call> #}"),
    "hermes, thinking": marked(USER_DEFINED),
    "hermes, thinking, control tokens": marked(CONTROL),
    "hermes, thinking, marks as text": marked(USER_DEFINED, (), CHATML + "{# <think> <tool_call> #}"),
    "hermes, SentencePiece": tokenizer_of(
        sentencepiece(names=("<|user|>", "<tool_call>", "</tool_call>")), **{"tokenizer.chat_template": CHATML}
    ),
    "qwen_xml": marked(USER_DEFINED, MARKS[2:], CHATML + "{# <function= #}"),
    "qwen_xml, thinking": marked(USER_DEFINED, MARKS, CHATML + "{# <function= #}"),
    "gemma4": marked(USER_DEFINED, GEMMA4_MARKS),
    "gemma4, control tokens": marked(CONTROL, GEMMA4_MARKS),
    "gemma4, marks as text": marked(USER_DEFINED, (), CHATML + "{# <|tool_call>call: #}"),
    "harmony": tokenizer_of(byte_level(names=HARMONY_NAMES)),
}


@pytest.fixture(params=FAMILIES)
def tokenizer(request) -> Tokenizer:
    return FAMILIES[request.param]


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text as one token for each mark and for each byte."""
    return [
        token_id
        for part in tokenizer._special.split(text)
        for token_id in ([part] if isinstance(part, int) else tokenizer._bpe.encode(part))
    ]


def prompt_of(tokenizer: Tokenizer, *, opened: bool = False) -> list[int]:
    harmony = "<|start|>" in tokenizer.vocab.special
    text = "<|start|>assistant" if harmony else "<|im_start|>assistant\n" + ("<think>\n" if opened else "")
    return ids_of(tokenizer, text)


def published(tokenizer: Tokenizer, prompt: list[int], ids: list[int], *, structured: bool) -> dict[Any, str]:
    """The text of each place of a whole answer, in order."""
    parser = answer_parser(tokenizer, prompt, TOOLS, structured=structured)
    text = IncrementalDetokenizer(tokenizer, parser=parser)
    end, found = min(tokenizer.vocab.end_ids), {}
    for token_id in [*ids, end]:
        piece = text.push(token_id, last=token_id == end)
        found[piece.place] = found.get(piece.place, "") + piece.text
    return {(place.channel, place.recipient, place.call): text for place, text in found.items() if text}


def grammar_of(tokenizer: Tokenizer, prompt: list[int], content: Any = None, choice: Any = None, tools: Any = TOOLS):
    grammar = answer_grammar(tokenizer, prompt, content, tools, choice)
    assert grammar is not None
    return grammar


def answers(tokenizer: Tokenizer, prompt: list[int], content: Any, choice: Any, start: str = "", tools: Any = TOOLS):
    """Published answers of random logits that finished. Those that go on are forced to begin with `start`."""
    grammar = grammar_of(tokenizer, prompt, content, choice, tools)
    vocab = tokenizer.vocab
    favour = [i for i in range(vocab.size) if tokenizer.token_bytes(i)[:1] in (b'"', b"}", b"<", b"\n")]
    marks = [mark.encode() for mark in ("\n</parameter>", "</function>", "</tool_call>", '<|"|>', "<tool_call|>")]
    favour += [
        i for name, i in vocab.special.items() if name.startswith(("</", "<|end|>", "<|m", '<|"', "<tool_call|"))
    ]
    begin = ids_of(tokenizer, start)
    mask = grammar.start()
    for token_id in begin:
        mask.accept(token_id)

    class Continued:
        def start(self):
            mask = grammar.start()
            for token_id in begin:
                mask.accept(token_id)
            return mask

    found = []
    for seed in range(40):
        ids, ended = draw(Continued(), tokenizer, seed, 500, favour, marks)
        if ended:
            found.append(published(tokenizer, prompt, begin + ids, structured=content is not None))
    return found


def assert_calls_are_valid(answer: dict[Any, str], names: set[str]) -> int:
    calls = 0
    for (channel, recipient, index), arguments in answer.items():
        if channel == "tool":
            assert recipient in names
            assert index == calls
            jsonschema.validate(json.loads(arguments), SCHEMAS[recipient])
            calls += 1
    return calls


def is_gemma4(tokenizer: Tokenizer) -> bool:
    return tool_format(tokenizer) == "gemma4"


def opening(tokenizer: Tokenizer) -> str:
    """The mark of a call."""
    return "<|tool_call>" if is_gemma4(tokenizer) else "<tool_call>"


def before_calls(tokenizer: Tokenizer) -> str:
    """What an answer begins with, so that random tokens do not go on reasoning for ever."""
    if is_gemma4(tokenizer):
        return "<|channel>thought\nhm <tool_cal <b><channel|>"
    thinks = "<think>" in tokenizer.vocab.special or "<think>" in tokenizer.template_source
    return "<think>hm <tool_cal <b></think>\n\n" if thinks else ""


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls_have_valid_arguments_and_nothing_else(tokenizer, choice):
    names = set(SCHEMAS) if choice == "required" else {"functions.weather"}
    start = before_calls(tokenizer)
    if "<|start|>" in tokenizer.vocab.special:
        start = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions."
    found = answers(tokenizer, prompt_of(tokenizer), None, choice, start)
    assert len(found) > 15
    called = set()
    for answer in found:
        assert assert_calls_are_valid(answer, names) >= 1
        assert not [text for (channel, _, _), text in answer.items() if channel == "final" and text.strip()]
        called |= {recipient for channel, recipient, _ in answer if channel == "tool"}
    assert called == names


def test_with_tool_choice_auto_a_call_is_constrained_once_it_begins(tokenizer):
    harmony = "<|start|>" in tokenizer.vocab.special
    start = (
        "<|channel|>commentary to=functions."
        if harmony
        else before_calls(tokenizer) + "I look it up." + opening(tokenizer)
    )
    for choice in (None, "auto"):
        found = answers(tokenizer, prompt_of(tokenizer), None, choice, start)
        assert len(found) > 20
        assert all(assert_calls_are_valid(answer, set(SCHEMAS)) >= 1 for answer in found)


def test_with_tool_choice_auto_text_is_free(tokenizer):
    harmony = "<|start|>" in tokenizer.vocab.special
    mask = grammar_of(tokenizer, prompt_of(tokenizer)).start()
    for token_id in ids_of(tokenizer, "<|channel|>final<|message|>" if harmony else "any {text"):
        mask.accept(token_id)
    vocab, found = tokenizer.vocab, allowed(mask, tokenizer.vocab.size)
    texts = {i for i in range(vocab.size) if tokenizer.token_bytes(i) and tokenizer.token_bytes(i)[0] < 0x80}
    assert texts | vocab.end_ids <= found


def test_content_follows_its_format_after_free_reasoning(tokenizer):
    start = before_calls(tokenizer)
    if "<|start|>" in tokenizer.vocab.special:
        start = "<|channel|>analysis<|message|>hm {<|end|><|start|>assistant<|channel|>final"
    found = answers(tokenizer, prompt_of(tokenizer), JSON, "none", start)
    assert len(found) == 40
    for answer in found:
        finals = [text for (channel, _, _), text in answer.items() if channel == "final"]
        assert len(finals) == 1
        assert json.loads(finals[0]) in CONTENTS
        reasoning = [text for (channel, _, _), text in answer.items() if channel == "reasoning"]
        assert reasoning == ([] if not start else ["hm {"] if "analysis" in start else ["hm <tool_cal <b>"])


def test_content_or_calls_with_both_a_format_and_tools(tokenizer):
    harmony = "<|start|>" in tokenizer.vocab.special
    contents = calls = 0
    starts = ("<|channel|>final<|message|>", " to=functions.") if harmony else ("", opening(tokenizer))
    for start in starts:
        for answer in answers(
            tokenizer, prompt_of(tokenizer), JSON, None, start if harmony else before_calls(tokenizer) + start
        ):
            found = assert_calls_are_valid(answer, set(SCHEMAS))
            finals = [text for (channel, _, _), text in answer.items() if channel == "final" and text.strip()]
            assert bool(found) != bool(finals), answer
            assert all(json.loads(text) in CONTENTS for text in finals)
            contents, calls = contents + bool(finals), calls + bool(found)
    assert contents > 10
    assert calls > 10


@pytest.mark.parametrize("name", [name for name in FAMILIES if "thinking" in name])
def test_reasoning_that_the_prompt_opened_is_free_until_its_end(name):
    tokenizer = FAMILIES[name]
    prompt = prompt_of(tokenizer, opened=True)
    grammar = grammar_of(tokenizer, prompt, JSON, "none")
    vocab = tokenizer.vocab
    mask = grammar.start()
    texts = {i for i in range(vocab.size) if tokenizer.token_bytes(i) and tokenizer.token_bytes(i)[0] < 0x80}
    for token_id in ids_of(tokenizer, "so {"):
        assert texts <= allowed(mask, vocab.size)
        assert not allowed(mask, vocab.size) & vocab.end_ids
        mask.accept(token_id)
    for token_id in ids_of(tokenizer, '</think>\n\n{"a":22'):
        mask.accept(token_id)
    braces = ids_of(tokenizer, "} \n")
    assert allowed(mask, vocab.size) == set(braces)
    mask.accept(braces[0])
    assert allowed(mask, vocab.size) == vocab.end_ids


@pytest.mark.parametrize(
    ("template", "kwargs", "answer"),
    [
        ("qwen3", {}, "<think>\nhm\n</think>\n\n"),
        ("qwen3", {"enable_thinking": False}, ""),
        ("qwen3.5", {}, "hm\n</think>\n\n"),
        ("qwen3.5", {"enable_thinking": False}, ""),
        ("deepseek-r1", {}, "hm\n</think>\n\n"),
        ("smollm3", {}, "<think>\nhm\n</think>\n"),
        ("gemma-4", {"enable_thinking": True}, "<|channel>thought\nhm\n<channel|>"),
        ("gemma-4", {"enable_thinking": True}, ""),
        ("gemma-4", {}, ""),
        ("hermes-json", {}, ""),
        ("chatml", {}, ""),
    ],
)
def test_with_real_templates_content_begins_where_reasoning_ends(template, kwargs, answer):
    source = (TEMPLATES / f"{template}.jinja").read_text()
    marks = GEMMA4_MARKS if template == "gemma-4" else MARKS
    names = [*marks, "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    tokenizer = marked(USER_DEFINED, tuple(names), source)
    messages = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.encode_chat(messages, now=datetime(2026, 1, 1, tzinfo=UTC), kwargs=kwargs)
    mask = grammar_of(tokenizer, prompt, JSON, None, None).start()
    for token_id in ids_of(tokenizer, answer + '{"a":2'):
        mask.accept(token_id)
    assert allowed(mask, tokenizer.vocab.size) == set(ids_of(tokenizer, "2"))


def test_an_answer_may_also_begin_with_its_content():
    tokenizer = FAMILIES["hermes, thinking"]
    found = answers(tokenizer, prompt_of(tokenizer), JSON, "none", '{"a":')
    assert {"".join(answer["final", None, None].split()) for answer in found} == {'{"a":1}', '{"a":22}'}


@pytest.mark.parametrize(
    ("prompt", "so_far"),
    [
        ("plain text", ""),
        ("<|start|>assistant<|channel|>final<|message|>", ""),
        (
            "<|start|>assistant<|channel|>analysis<|message|>hm",
            "ok<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        ("<|start|>user<|message|>hi<|end|><|start|>assistant", "<|channel|>final<|message|>"),
        ("<|start|>user<|message|>hi<|end|><|start|>assistant", "<|channel|>final <|constrain|>json<|message|>"),
    ],
)
def test_an_answer_continues_a_harmony_prompt_where_it_ends(prompt, so_far):
    tokenizer = FAMILIES["harmony"]
    mask = grammar_of(tokenizer, ids_of(tokenizer, prompt), JSON, "none").start()
    for token_id in ids_of(tokenizer, so_far + '{"a":2'):
        mask.accept(token_id)
    assert allowed(mask, tokenizer.vocab.size) == set(ids_of(tokenizer, "2"))


@pytest.mark.parametrize(
    "prompt", ["<|start|>assistant<|channel|>fi", "<|start|>user", "<|start|>assistant to=functions.now<|message|>"]
)
def test_a_harmony_prompt_that_ends_elsewhere_is_refused(prompt):
    tokenizer = FAMILIES["harmony"]
    with pytest.raises(InvalidRequest, match="a prompt that ends after"):
        grammar_of(tokenizer, ids_of(tokenizer, prompt), JSON, "none")


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize(
    "template", ["llama-3", "mistral-nemo", "mistral-small", "command-r7b", "granite-3.3", "gemma-2", "phi-3.5"]
)
def test_a_forced_call_is_refused_where_no_parser_knows_the_notation(template, choice):
    tokenizer = marked(CONTROL, (), (TEMPLATES / f"{template}.jinja").read_text())
    with pytest.raises(InvalidRequest, match="tool_choice: auto or none: this worker has no grammar"):
        answer_grammar(tokenizer, [], None, TOOLS, choice)
    assert answer_grammar(tokenizer, [], None, TOOLS, "auto") is None
    assert answer_grammar(tokenizer, [], JSON, TOOLS, "auto") is not None


def test_with_tool_choice_auto_an_odd_prompt_or_too_many_tools_leave_the_answer_free():
    tokenizer = FAMILIES["harmony"]
    prompt = ids_of(tokenizer, "<|start|>assistant<|channel|>fi")
    assert answer_grammar(tokenizer, prompt, None, TOOLS, None) is None
    large = [{"type": "function", "function": {"name": f"f{n}", "description": "d"}} for n in range(9000)]
    tokenizer = FAMILIES["hermes"]
    assert answer_grammar(tokenizer, prompt_of(tokenizer), None, large, None) is None
    with pytest.raises(InvalidRequest, match="bytes as a grammar"):
        answer_grammar(tokenizer, prompt_of(tokenizer), None, large, "required")


def test_a_mark_that_another_notation_shares_is_not_taken_for_hermes():
    tokenizer = marked(USER_DEFINED, MARKS[2:], CHATML + "{# <tool_call>{name}<arg_key>{key}</arg_key> #}")
    assert answer_grammar(tokenizer, prompt_of(tokenizer), None, TOOLS, None) is None
    with pytest.raises(InvalidRequest, match="no grammar for the tool calls"):
        answer_grammar(tokenizer, prompt_of(tokenizer), None, TOOLS, "required")


def test_what_needs_no_grammar_has_none(tokenizer):
    for content, tools, choice in ((None, None, None), (None, TOOLS, "none"), (None, [5, {"type": "x"}], None)):
        assert answer_grammar(tokenizer, prompt_of(tokenizer), content, tools, choice) is None
    assert answer_grammar(tokenizer, prompt_of(tokenizer), None, TOOLS, None, ignore_eos=True) is None
    with pytest.raises(InvalidRequest, match="ignore_eos"):
        answer_grammar(tokenizer, prompt_of(tokenizer), None, TOOLS, "required", ignore_eos=True)


def odd_tool(**function: Any) -> list[Any]:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "not": {"const": "x"}}}}
    return [{"type": "function", "function": {"name": "weather", "parameters": parameters, **function}}]


def test_parameters_that_cannot_be_enforced_are_refused_if_they_must_be(tokenizer):
    field = "tools.0.function.parameters.properties.city.not"
    for choice, strict in (("required", None), (NAMED, False), (None, True)):
        with pytest.raises(InvalidRequest, match=field):
            answer_grammar(tokenizer, prompt_of(tokenizer), None, odd_tool(strict=strict), choice)


def test_otherwise_such_a_tool_takes_any_arguments(tokenizer):
    harmony = "<|start|>" in tokenizer.vocab.special
    start = "<|channel|>commentary to=functions." if harmony else before_calls(tokenizer) + opening(tokenizer)
    found = answers(tokenizer, prompt_of(tokenizer), None, None, start, odd_tool())
    calls = [text for answer in found for (channel, _, _), text in answer.items() if channel == "tool"]
    assert len(calls) > 5
    if "<function=" not in tokenizer.template_source:
        assert all(isinstance(json.loads(text), dict) for text in calls)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "^x"}}}, "properties.a.pattern"),
        ({"properties": {"a": {"type": "string", "enum": ["</parameter>"]}}}, "properties.a.enum"),
        ({"properties": {"a<b": {}}}, "properties"),
        ({"anyOf": [{"required": ["a"]}]}, "anyOf"),
        ({"required": ["a"]}, "required"),
    ],
)
def test_what_parameters_in_tags_cannot_have_enforced_is_refused(schema, place):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}]
    tokenizer = FAMILIES["qwen_xml"]
    with pytest.raises(InvalidRequest) as caught:
        answer_grammar(tokenizer, prompt_of(tokenizer), None, tools, "required")
    assert caught.value.details["errors"][0]["field"] == f"tools.0.function.parameters.{place}"


def test_a_call_that_is_forced_needs_a_function(tokenizer):
    with pytest.raises(InvalidRequest, match="tools: functions with a name"):
        answer_grammar(
            tokenizer, prompt_of(tokenizer), None, [{"type": "function", "function": {"name": "a b"}}], "required"
        )


MALFORMED = [
    *({"properties": value} for value in (True, [], "a", 5)),
    *({"required": value} for value in (True, "a", [["a"]], [{}], 5)),
    *({"properties": {"a": {"type": value}}} for value in (5, [{}], [["string"]], {})),
    *({"properties": {"a": {key: 5}}} for key in ("anyOf", "oneOf", "allOf", "enum", "$ref")),
    *({"properties": {"a": {"type": "string", "enum": value}}} for value in (5, True, "ab", {})),
    *({"properties": {"a": {"type": "string", "minLength": value}}} for value in (-1, 1.5, "1}", True, None, [])),
    *({"properties": {"a": {"anyOf": value, "type": ["string", "null"]}}} for value in (5, True, [5])),
]


@pytest.mark.parametrize("schema", MALFORMED, ids=json.dumps)
@pytest.mark.parametrize("family", ["qwen_xml", "hermes", "gemma4"])
def test_parameters_that_are_no_schema_are_refused_or_any_object(family, schema):
    tokenizer = FAMILIES[family]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert answer_grammar(tokenizer, prompt_of(tokenizer), None, [tool], "auto") is not None
    answer_parser(tokenizer, prompt_of(tokenizer), [tool])
    choice = {"type": "function", "function": {"name": "f"}}
    with contextlib.suppress(InvalidRequest):
        assert answer_grammar(tokenizer, prompt_of(tokenizer), None, [tool], choice) is not None


def test_references_of_a_parameter_to_itself_take_no_exponential_time():
    loop = {"anyOf": [{"$ref": "#/$defs/x"}] * 20}
    schema = {
        "type": "object",
        "properties": {"a": loop},
        "$defs": {"x": {"anyOf": [*loop["anyOf"], {"type": "integer"}]}},
    }
    deep: dict[str, Any] = {"type": "boolean"}
    for _ in range(900):
        deep = {"anyOf": [deep]}
    tools = [{"function": {"name": "f", "parameters": {**schema, "properties": {"a": loop, "b": deep}}}}]
    assert parameter_types(tools, "f") == {"a": {"integer"}, "b": STRING}
