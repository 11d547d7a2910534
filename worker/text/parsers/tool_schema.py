"""Types of a tool's parameters by its JSON schema, and texts as JSON values of these types."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

STRING = frozenset(["string"])
_MAX_DEPTH = 50
"""Levels of schemas in schemas that are looked at, as many as a grammar takes."""
_ALIASES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "dict": "object", "list": "array"}


def parameter_types(tools: Sequence[Mapping[str, Any]], name: str) -> dict[str, frozenset[str]]:
    """Return the types of each parameter of the function `name`; those without a type are strings.

    `tools` has OpenAI's form. What is not of that form is ignored: tools are not validated.
    """
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            schema = function.get("parameters")
            properties = schema.get("properties") if isinstance(schema, Mapping) else None
            if isinstance(properties, Mapping):
                return {str(name): _types(value, schema) or STRING for name, value in properties.items()}
    return {}


def json_value(text: str, types: frozenset[str]) -> str:
    """Return a parameter's text as JSON: as null or of one of the types, else as a string.

    JSON is kept as it is written; Python literals are converted.
    """
    value = text.strip()
    if types != STRING and value.lower() in ("null", "none"):
        return "null"
    if "boolean" in types and value.lower() in ("true", "false"):
        return value.lower()
    for read in (_from_json, ast.literal_eval):
        try:
            parsed = read(value)
            if type_of(parsed) & types:
                return value if read is _from_json else json.dumps(parsed, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return json_string(text)


def json_string(text: str) -> str:
    """Return a text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Any, root: Any, known: dict[str, frozenset[str]] | None = None, depth: int = 0) -> frozenset[str]:
    """The JSON types of a schema; `root` has the schemas that it may refer to.

    `known` has the types of the references that were followed: a schema of a few references to
    itself would else take exponential time.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return frozenset()
    known = {} if known is None else known
    named = schema.get("type")
    names = [named] if isinstance(named, str) else named if isinstance(named, list | tuple) else ()
    found = {_ALIASES.get(name, name) for name in names if isinstance(name, str)}
    for choices in (schema.get(key) for key in ("anyOf", "oneOf", "allOf")):
        for choice in choices if isinstance(choices, list | tuple) else ():
            found |= _types(choice, root, known, depth + 1)
    if not found and isinstance(reference := schema.get("$ref"), str):
        if reference not in known:
            known[reference] = frozenset()
            known[reference] = _types(referenced(root, reference), root, known, depth + 1)
        found |= known[reference]
    if schema.get("nullable") is True and found:
        found.add("null")
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not found and isinstance(values, Sequence):
        found.update(*map(type_of, values))
    return frozenset(found)


def referenced(root: Any, reference: str) -> Any:
    """The schema at a JSON pointer such as `#/$defs/Item`, or None."""
    found = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def type_of(value: Any) -> frozenset[str]:
    """The JSON types of a Python value; an integral number has two."""
    if value is None or isinstance(value, bool | str):
        return frozenset(["null" if value is None else "boolean" if isinstance(value, bool) else "string"])
    if isinstance(value, int | float):
        is_integral = isinstance(value, int) or value.is_integer()
        return frozenset(["number", "integer"] if is_integral else ["number"])
    if isinstance(value, dict):
        return frozenset(["object"])
    return frozenset(["array"] if isinstance(value, list | tuple) else [])


def _from_json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse)


def _refuse(name: str) -> Any:
    raise ValueError(name)
