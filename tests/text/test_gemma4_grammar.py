"""Gemma 4's notation of arguments enforced from schemas, and the schemas that it can't have enforced."""

import json

import jsonschema
import pytest

from tests.text.test_answer_grammar import FAMILIES, answers, before_calls, prompt_of
from worker.errors import InvalidRequest
from worker.text.answer_grammar import answer_grammar

NESTED = {
    "type": "object",
    "properties": {
        "b": {"type": "object", "properties": {"x": {"type": "boolean"}, "W": {"type": "null"}}, "required": ["x"]},
        "a": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1, "maxItems": 3},
        "c": {"enum": ["one", "", 2, None, True]},
        "d": {"const": 'a "b"'},
        "e": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}},
        "f": {"type": "array", "maxItems": 0},
        "g": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "minimum": 5, "maximum": 7}]},
        "h": {"type": ["string", "null"], "minLength": 1, "maxLength": 3},
    },
    "required": ["a", "c", "d", "e", "f"],
    "additionalProperties": False,
    "$defs": {"item": {"type": "object", "properties": {"next": {"$ref": "#/$defs/item"}}, "title": "Item"}},
}


@pytest.mark.parametrize("name", ["gemma4", "gemma4, control tokens", "gemma4, marks as text"])
def test_nested_parameters_have_gemma_4_s_notation(name):
    tokenizer = FAMILIES[name]
    tools = [{"type": "function", "function": {"name": "f", "parameters": NESTED}}]
    found = answers(tokenizer, prompt_of(tokenizer), None, "required", before_calls(tokenizer), tools)
    calls = [text for answer in found for (channel, _, _), text in answer.items() if channel == "tool"]
    assert len(calls) > 20
    for text in calls:
        jsonschema.validate(json.loads(text), NESTED)
        assert list(json.loads(text)) == sorted(json.loads(text))
    assert {len(json.loads(text)) for text in calls} >= {5, 6, 7}
    assert {json.loads(text)["c"] for text in calls} >= {"one", "", 2, None}


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "^x"}}}, "properties.a.pattern"),
        ({"properties": {"a": {"type": "string", "enum": ['<|"|>']}}}, "properties.a.enum"),
        ({"properties": {"a": {"enum": [[1]]}}}, "properties.a.enum"),
        ({"properties": {"a": {"type": "integer", "const": "5"}}}, "properties.a.const"),
        ({"properties": {"a": {"type": "array", "minItems": 3, "maxItems": 2}}}, "properties.a.minItems"),
        ({"properties": {"a": {"oneOf": [{"type": "string"}]}}}, "properties.a.oneOf"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}}, "properties.a.$ref"),
        ({"properties": {"a": False}}, "properties.a"),
        ({"properties": {"a:b": {}}}, "properties"),
        ({"required": ["a"]}, "required"),
    ],
)
def test_what_gemma_4_s_notation_cannot_have_enforced_is_refused(schema, place):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}]
    tokenizer = FAMILIES["gemma4"]
    with pytest.raises(InvalidRequest) as caught:
        answer_grammar(tokenizer, prompt_of(tokenizer), None, tools, "required")
    assert caught.value.details["errors"][0]["field"] == f"tools.0.function.parameters.{place}"
