"""Rules of an answer in Gemma 4's notation, from the tools of a job (see `parsers/gemma4.py`).

    <|channel>…<channel|>                                                     reasoning
    <|tool_call>call:NAME{key:<|"|>text<|"|>,n:5,list:[true]}<tool_call|>     calls

Arguments have no white space, and keys are in the order of their names, as in the model's chat
template. Of a schema's keywords those in `_KEYWORDS` can be enforced in this notation.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from worker.errors import InvalidRequest
from worker.text import lark
from worker.text.json_schema import MAX_DEPTH, schema_source
from worker.text.parsers.gemma4 import CALL, CALL_END, CLOSE, OPEN, QUOTE, opens_channel
from worker.text.parsers.tool_schema import referenced, type_of
from worker.text.tokenizer import Tokenizer
from worker.text.tool_grammar import ANNOTATIONS, Marks, Tool, check_forms

_SCALARS = ("integer", "number", "boolean", "null")
_KEYWORDS: Mapping[str, Sequence[str]] = {
    "string": ("minLength", "maxLength"),
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "minItems", "maxItems"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "boolean": (),
    "null": (),
}
_WITH_FORMS = ("minLength", "maxLength", "minItems", "maxItems", "properties", "required")
_EVERYWHERE = (*ANNOTATIONS, "$defs", "definitions", "$schema")
_KEY = re.compile(r'[^\s:,{}\[\]<"](?:[^:,{}\[\]<"\n]{0,254}[^\s:,{}\[\]<"])?')


def gemma4_rules(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    has_content: bool,
    tools: Sequence[Tool],
    marks: Marks,
    forced: bool,
    *,
    loose: bool,
) -> list[str]:
    """The rules of the answer, with the start rule. `loose`: arguments are any objects.

    Raises InvalidRequest for a schema that this notation can't have enforced, unless `loose`.
    """
    opened = opens_channel(tokenizer, prompt_ids)
    # The parser takes a call for the end of reasoning.
    rules = marks.until("reasoning", CLOSE, rf"(?s:.*){lark.escaped(CALL)}call:")
    rules += [r"thought: reasoning /\n{0,4}/", *marks.after_space("channel", OPEN)]
    if tools:
        rules += _call_rules(tools, marks, loose=loose)
    if has_content:
        rules.append("body: content | calls" if tools else "body: content")
    elif forced:
        rules.append("body: calls")
    else:
        never = "" if marks.is_control(OPEN) else rf"[ \n\t]{{0,4}}{lark.escaped(OPEN)}"
        rules += ["body: (lead call)* text", *marks.until("lead", CALL, never)]
        rules += ["text: TEXT", f"TEXT: {lark.ANY_TEXT}{lark.unless(never)}"]
    return [f"start: {'' if opened else 'body | channel '}thought body", *rules]


def _call_rules(tools: Sequence[Tool], marks: Marks, *, loose: bool) -> Iterator[str]:
    yield "calls: opened_call+"
    yield f"opened_call: {marks.term(CALL)} call"
    yield f"call: {lark.alternatives([f'call_{n}' for n in range(len(tools))])} {marks.term(CALL_END)}"
    arguments = _Arguments(marks)
    for n, tool in enumerate(tools):
        rule = "any_object" if loose else arguments.rule_of(tool)
        yield f"call_{n}: {lark.literal(f'call:{tool.name}')} {rule}"
    yield from arguments.rules


class _Arguments:
    """Rules of values in the notation, one for each schema."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._quote = marks.term(QUOTE)
        self._root: Mapping[str, Any] = {}
        self._depth = 0
        self._count = 0
        self._references: dict[str, str] = {}
        self.rules = [
            "any_value: any_string | any_object | any_list | any_scalar",
            *self._string("any_string", "*"),
            'any_object: "{" (any_pair ("," any_pair)*)? "}"',
            'any_pair: ANY_KEY ":" any_value',
            "ANY_KEY: /[A-Za-z_][A-Za-z0-9_-]{0,63}/",
            'any_list: "[" (any_value ("," any_value)*)? "]"',
            f"any_scalar: {schema_source({'type': ['number', 'boolean', 'null']})}",
        ]

    def rule_of(self, tool: Tool) -> str:
        """The name of the rule of a tool's arguments. Raises InvalidRequest for its schema."""
        self._root, self._references = tool.schema, {}
        return self._value(tool.schema, tool.field)

    def _string(self, rule: str, count: str) -> Iterator[str]:
        """Rules of a text of `count` code points between quotes."""
        inner = rf"(/(?s:.){count}/ & ~/(?s:.*){lark.escaped(QUOTE)}(?s:.*)/)"
        if self._marks.is_control(QUOTE):
            yield f"{rule}: {self._quote} {rule.upper()} {self._quote}"
            yield f"{rule.upper()}: {inner}"
        else:
            yield f"{rule}: {self._quote} {rule}_end"
            yield f"{rule}_end[lazy]: {rule.upper()}"
            yield f"{rule.upper()}: {inner} /{lark.escaped(QUOTE)}/"

    def _new(self, terms: Sequence[str], name: str = "") -> str:
        """Add a rule of alternatives and return its name."""
        name = name or self._name()
        self.rules.append(f"{name}: {' | '.join(terms)}")
        return name

    def _name(self) -> str:
        self._count += 1
        return f"value_{self._count}"

    def _value(self, schema: Any, field: str, name: str = "") -> str:
        """Add the rule of a schema's values and return its name."""
        if schema is True or (isinstance(schema, Mapping) and not set(schema) - set(_EVERYWHERE)):
            return self._new(["any_value"], name)
        if not isinstance(schema, Mapping) or self._depth > MAX_DEPTH:
            raise InvalidRequest.of((field, "not supported: no value is valid, or the schema is too deep", None))
        self._depth += 1
        if "$ref" in schema:
            self._check_keywords(schema, field, ("$ref",))
            terms = [self._reference(schema["$ref"], field)]
        elif "anyOf" in schema:
            self._check_keywords(schema, field, ("anyOf", "type"))
            check_forms(schema, field, ("anyOf",))
            shared = {"type": schema["type"]} if "type" in schema else {}
            choices = [{**shared, **each} if isinstance(each, Mapping) else each for each in schema["anyOf"]]
            terms = [self._value(each, f"{field}.anyOf.{n}") for n, each in enumerate(choices)]
        elif "const" in schema or "enum" in schema:
            terms = self._constants(schema, field)
        else:
            terms = self._typed(schema, field)
        self._depth -= 1
        return self._new(terms, name)

    def _check_keywords(self, schema: Mapping[str, Any], field: str, keywords: Sequence[str]) -> None:
        rule = "not supported: the notation of this model's calls can't have this keyword enforced"
        wrong = [(f"{field}.{key}", rule, None) for key in schema if key not in (*keywords, *_EVERYWHERE)]
        if wrong:
            raise InvalidRequest.of(*wrong)

    def _reference(self, reference: Any, field: str) -> str:
        if not isinstance(reference, str):
            raise InvalidRequest.of((f"{field}.$ref", "a reference within the schema, such as #/$defs/NAME", None))
        if reference not in self._references:
            self._references[reference] = name = self._name()
            self._value(referenced(self._root, reference), f"{field}.$ref", name)
        return self._references[reference]

    def _constants(self, schema: Mapping[str, Any], field: str) -> list[str]:
        """The constants of a schema as alternatives: texts in quotes, others as in JSON."""
        self._check_keywords(schema, field, ("const", "enum", "type"))
        check_forms(schema, field, ("enum",))
        types = _types(schema, field)
        values = [schema["const"]] if "const" in schema else schema["enum"]
        allowed = [value for value in values if not types or type_of(value) & types]
        if not allowed or any(QUOTE in repr(value) or isinstance(value, Mapping | list | tuple) for value in allowed):
            key = "const" if "const" in schema else "enum"
            raise InvalidRequest.of((f"{field}.{key}", f"values of the type, no lists or maps, without {QUOTE}", None))
        texts = [lark.literal(value if isinstance(value, str) else json.dumps(value)) for value in allowed]
        quoted = [isinstance(value, str) for value in allowed]
        return [f"{self._quote} {t} {self._quote}" if q else t for t, q in zip(texts, quoted, strict=True)]

    def _typed(self, schema: Mapping[str, Any], field: str) -> list[str]:
        types = _types(schema, field) or frozenset(_KEYWORDS)
        keywords = [key for each in types for key in _KEYWORDS[each]]
        self._check_keywords(schema, field, ("type", *keywords))
        check_forms(schema, field, [key for key in keywords if key in _WITH_FORMS])
        terms = []
        if scalars := [each for each in _SCALARS if each in types]:
            limits = {key: schema[key] for key in _KEYWORDS["number"] if key in schema}
            terms.append(self._new([schema_source({"type": scalars, **limits})]))
        if "string" in types:
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            rule = self._name()
            self.rules += self._string(rule, f"{{{least},{most}}}" if least or most != "" else "*")
            terms.append(rule)
        if "array" in types:
            terms.append(self._list(schema, field))
        if "object" in types:
            terms.append(self._object(schema, field))
        return terms

    def _list(self, schema: Mapping[str, Any], field: str) -> str:
        item = self._value(schema.get("items", True), f"{field}.items")
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0 < least or (most is not None and most < least):
            raise InvalidRequest.of((f"{field}.minItems", "at most maxItems", least))
        further = f'("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}'
        items = "" if most == 0 else f"{item} {further}" if least else f"({item} {further})?"
        return self._new([f'"[" {items} "]"'])

    def _object(self, schema: Mapping[str, Any], field: str) -> str:
        """An object without other keys than `properties`, if there are any."""
        properties, required = schema.get("properties", {}), schema.get("required", ())
        for name in (*properties, *required):
            if not _KEY.fullmatch(name) or name not in properties:
                rule = "names of properties, without the brackets and quotes of the notation"
                part = "properties" if name in properties else "required"
                raise InvalidRequest.of((f"{field}.{part}", rule, name[:60]))
        if not properties and (further := schema.get("additionalProperties", True)) is not False:
            value = self._value(further, f"{field}.additionalProperties")
            return self._new([f'"{{" (ANY_KEY ":" {value} ("," ANY_KEY ":" {value})*)? "}}"'])
        first, later = "", ""
        for name in sorted(properties, key=str.lower, reverse=True):
            member = f"{lark.literal(f'{name}:')} {self._value(properties[name], f'{field}.properties.{name}')}"
            if name in required:
                first, later = self._new([f"{member} {later}"]), self._new([f'"," {member} {later}'])
            else:
                first = self._new([f"{member} {later}", *([first] if first else ['""'])])
                later = self._new([f'("," {member})? {later}'])
        return self._new([f'"{{" {first} "}}"'])


def _types(schema: Mapping[str, Any], field: str) -> frozenset[str]:
    """The types that a schema names; none if it names none."""
    named = schema.get("type", ())
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name in _KEYWORDS for name in names):
        raise InvalidRequest.of((f"{field}.type", "one or several types of JSON", None))
    return frozenset(names)
