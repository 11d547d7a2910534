"""Rules of tool calls in the notations of Hermes and Qwen3-Coder, from the tools of a job.

    <tool_call>\\n{"name": "NAME", "arguments": {…}}\\n</tool_call>                        hermes
    <tool_call>\\n<function=NAME>\\n<parameter=P>\\nVALUE\\n</parameter>\\n…</function>\\n</tool_call>

In the second a value of the type string is plain text, others are JSON. Each call ends with its
mark, and further calls may follow. The rule `call` begins after `<tool_call>`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from worker.errors import InvalidRequest
from worker.text import lark
from worker.text.json_schema import Error, prepare, schema_source
from worker.text.parsers.tool_schema import STRING, parameter_types
from worker.text.vocabulary import Vocabulary

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
ANNOTATIONS = ("title", "description", "default", "examples", "$comment")
_TEXT_KEYWORDS = ("type", "enum", "const", "minLength", "maxLength", *ANNOTATIONS)
"""Keywords of a string that a value without quotes can have enforced, and annotations."""
_OBJECT_KEYWORDS = (
    *("type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema"),
    *ANNOTATIONS,
)
"""Keywords of the parameters that the notation with a tag for each of them can have enforced."""

_VALUE_END = r"\n<\/parameter>"
_TAG = r"(?s:.*)<\s{0,3}\/?\s{0,3}(?:function|tool_call|parameter)(?s:.*)"
"""What a value without quotes can't contain, since the parser may take it for the value's end."""


class Marks:
    """The marks of the notations as terms: a token's id if the mark is a control token, or text."""

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab

    def is_control(self, mark: str) -> bool:
        """Whether the mark is a control token, which has no text."""
        return self._vocab.control_id(mark) is not None

    def term(self, mark: str) -> str:
        """The mark as a term."""
        return f"<[{self._vocab.special[mark]}]>" if self.is_control(mark) else lark.literal(mark)

    def until(self, rule: str, mark: str, never: str = "") -> list[str]:
        """Rules of any text up to the mark, and the mark; none begins with the pattern `never`."""
        terminal = rule.upper()
        if self.is_control(mark):
            return [f"{rule}: {terminal} {self.term(mark)}", f"{terminal}: {lark.ANY_TEXT}{lark.unless(never)}"]
        text = f"/(?s:.*){lark.escaped(mark)}/"
        return [f"{rule}[lazy]: {terminal}", f"{terminal}: {text}{lark.unless(never)}"]

    def after_space(self, rule: str, mark: str) -> list[str]:
        """Rules of the mark after optional white space."""
        if self.is_control(mark):
            return [rf"{rule}: /[ \n\t]{{0,4}}/ {self.term(mark)}"]
        return [rf"{rule}: /[ \n\t]{{0,4}}{lark.escaped(mark)}/"]


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    field: str
    """The field of the job that holds its parameters."""
    parameters: Mapping[str, Any]
    strict: bool

    @cached_property
    def _prepared(self) -> tuple[dict[str, Any], list[Error]]:
        return prepare({**self.parameters, "type": "object"}, self.field)

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of the arguments. Raises InvalidRequest for what can't be enforced."""
        schema, errors = self._prepared
        if errors:
            raise InvalidRequest.of(*errors)
        return schema


def requested_tools(tools: Sequence[Any] | None, tool_choice: Any) -> list[Tool]:
    """The functions that a job's `tool_choice` allows.

    Tools that have not OpenAI's form are left out. Raises InvalidRequest if a call is required and
    no function is left.
    """
    if tool_choice == "none":
        return []
    name = tool_choice["function"]["name"] if isinstance(tool_choice, Mapping) else None
    found = [tool for tool in map(_tool, range(len(tools or ())), tools or ()) if tool and name in (None, tool.name)]
    if not found and tool_choice not in (None, "auto"):
        raise InvalidRequest.of(("tools", "functions with a name, in OpenAI's form", None))
    return list({tool.name: tool for tool in reversed(found)}.values())[::-1]


def _tool(index: int, tool: Any) -> Tool | None:
    inside = isinstance(tool, Mapping) and "function" in tool
    function = tool["function"] if inside else tool
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not re.fullmatch(r"[^\s<>]{1,256}", name):
        return None
    parameters = function.get("parameters")
    given = parameters if isinstance(parameters, Mapping) and parameters else _NO_PARAMETERS
    field = f"tools.{index}.{'function.' if inside else ''}parameters"
    return Tool(name, field, given, function.get("strict") is True)


def call_rules(tools: Sequence[Tool], marks: Marks, *, is_xml: bool, loose: bool) -> list[str]:
    """The rules `call`, `opened_call` and `calls`.

    Raises InvalidRequest for what can't be enforced, unless `loose`.
    """
    rules = [
        r"calls: opened_call (/\n{0,2}/ opened_call)*",
        f"opened_call: {marks.term('<tool_call>')} call",
        f"call: {lark.alternatives([f'call_{n}' for n in range(len(tools))])} /\\n?/ {marks.term('</tool_call>')}",
    ]
    for n, tool in enumerate(tools):
        rules += _xml_call(n, tool, loose=loose) if is_xml else _hermes_call(n, tool, loose=loose)
    return rules


def _hermes_call(n: int, tool: Tool, *, loose: bool) -> Iterator[str]:
    name = lark.escaped(json.dumps(tool.name, ensure_ascii=False))
    yield rf'call_{n}: /\n?\{{ ?"name": ?{name}, ?"arguments": ?/ arguments_{n} "}}"'
    yield f"arguments_{n}: {schema_source(ANY_OBJECT if loose else tool.schema)}"


def _xml_call(n: int, tool: Tool, *, loose: bool) -> Iterator[str]:
    head = rf"/\n?<function={lark.escaped(tool.name)}>\n?/"
    if loose:
        yield f"call_{n}: {head} rest_{n}"
        yield rf"rest_{n}[lazy]: /(?s:.*)<\/function>/"
        return
    parameters = list(_xml_parameters(n, tool))
    items = " ".join(f"parameter_{n}_{i}{'' if needed else '?'}" for i, (needed, _) in enumerate(parameters))
    yield f'call_{n}: {head} {items} "</function>"'
    for _, rules in parameters:
        yield from rules


def _xml_parameters(n: int, tool: Tool) -> Iterator[tuple[bool, list[str]]]:
    """Yield whether each parameter is required, and its rules."""
    schema = tool.schema
    wrong = [key for key in schema if key not in _OBJECT_KEYWORDS]
    if wrong:
        rule = "not supported: parameters in tags of their own can't have this keyword enforced"
        raise InvalidRequest.of(*((f"{tool.field}.{key}", rule, None) for key in wrong))
    check_forms(schema, tool.field, ("properties", "required"))
    properties, required = schema.get("properties", {}), schema.get("required", ())
    types = parameter_types([{"name": tool.name, "parameters": schema}], tool.name)
    definitions = {key: schema[key] for key in ("$defs", "definitions", "$schema") if key in schema}
    for name in required:
        if name not in properties:
            raise InvalidRequest.of((f"{tool.field}.required", "names of properties", str(name)[:60]))
    for i, (name, inner) in enumerate(properties.items()):
        if not re.fullmatch(r"[^\s<>](?:[^\n<>]{0,200}[^\s<>])?", name):
            raise InvalidRequest.of((f"{tool.field}.properties", "names without < and >", name[:60]))
        rule = f"parameter_{n}_{i}"
        opening = rf"/<parameter={lark.escaped(name)}>\n/"
        value = list(_xml_value(f"value_{n}_{i}", tool, name, inner, types[name], definitions))
        yield name in required, [rf"{rule}: {opening} value_{n}_{i} /\n?/", *value]


def check_forms(schema: Mapping[str, Any], field: str, keywords: Sequence[str]) -> None:
    """Raise InvalidRequest for a keyword whose value has not the form that JSON Schema requires."""
    for key in keywords:
        value = schema.get(key)
        if key not in schema:
            continue
        if key == "properties":
            is_valid, rule = isinstance(value, Mapping), "a map of schemas"
        elif key == "required":
            is_valid = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
            rule = "a list of names"
        elif key in ("enum", "anyOf"):
            is_valid, rule = isinstance(value, list | tuple) and len(value) > 0, "a list that is not empty"
        else:
            is_valid, rule = type(value) is int and value >= 0, "an integer, 0 or more"
        if not is_valid:
            raise InvalidRequest.of((f"{field}.{key}", rule, None))


def _xml_value(
    rule: str, tool: Tool, name: str, schema: Any, types: frozenset[str], definitions: Mapping[str, Any]
) -> Iterator[str]:
    """The rules of a value and the end of its tag."""
    if types != STRING and not _is_text_or_null(schema, types):
        inner = {**definitions, **schema} if isinstance(schema, Mapping) else {"allOf": [schema]}
        yield f"{rule}: {rule}_json /{_VALUE_END}/"
        yield f"{rule}_json: {schema_source(inner)}"
        return
    given = schema if isinstance(schema, Mapping) and types == STRING else {}
    field = f"{tool.field}.properties.{name}"
    check_forms(given, field, ("enum", "minLength", "maxLength"))
    wrong = [key for key in given if key not in _TEXT_KEYWORDS]
    if wrong or schema is False:
        constraint = "not supported in a parameter whose value has no quotes"
        raise InvalidRequest.of(*((f"{field}.{key}", constraint, None) for key in wrong or ("false",)))
    values = [given["const"]] if "const" in given else given.get("enum")
    if values is None:
        least, most = given.get("minLength", 0), given.get("maxLength", "")
        count = f"{{{least},{most}}}" if least or most != "" else "*"
        yield f"{rule}[lazy]: {rule.upper()}"
        yield f"{rule.upper()}: (/(?s:.){count}/ & ~/{_TAG}/) /{_VALUE_END}/"
        return
    texts = [value for value in values if isinstance(value, str) and value and not re.search(_TAG, value)]
    if len(texts) < len(values):
        raise InvalidRequest.of((f"{field}.enum", "texts without tags of a tool call", None))
    yield f"{rule}: {rule.upper()} /{_VALUE_END}/"
    yield f"{rule.upper()}: {' | '.join(map(lark.literal, texts))}"


def _is_text_or_null(schema: Any, types: frozenset[str]) -> bool:
    """Whether every text without quotes is a valid value: the parser makes `null` of that word."""
    if types != STRING | {"null"} or not isinstance(schema, Mapping):
        return False
    lists = [schema.get(key) for key in ("anyOf", "oneOf")]
    choices = [choice for choices in lists if isinstance(choices, list | tuple) for choice in choices]
    allowed = {*ANNOTATIONS, "type", *(("anyOf", "oneOf") if choices else ())}
    return all(set(each) <= allowed for each in (schema, *choices) if isinstance(each, Mapping))
