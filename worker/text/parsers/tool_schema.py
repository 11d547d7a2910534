"""Types of a tool's parameters by its JSON schema, and texts as JSON values of these types."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

STRING = frozenset(["string"])
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
            if _type_of(parsed) & types:
                return value if read is _from_json else json.dumps(parsed, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return json_string(text)


def json_string(text: str) -> str:
    """Return a text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Any, root: Any, references: int = 8) -> frozenset[str]:
    """The JSON types of a schema; `root` has the schemas that it may refer to."""
    if not isinstance(schema, Mapping):
        return frozenset()
    named = schema.get("type")
    found = {_ALIASES.get(name, name) for name in ([named] if isinstance(named, str) else named or ())}
    for choices in (schema.get(key) for key in ("anyOf", "oneOf", "allOf")):
        for choice in choices if isinstance(choices, Sequence) else ():
            found |= _types(choice, root, references)
    if not found and references and isinstance(reference := schema.get("$ref"), str):
        found |= _types(_referenced(root, reference), root, references - 1)
    if schema.get("nullable") is True and found:
        found.add("null")
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not found and isinstance(values, Sequence):
        found.update(*map(_type_of, values))
    return frozenset(found)


def _referenced(root: Any, reference: str) -> Any:
    """The schema at a JSON pointer such as `#/$defs/Item`, or None."""
    found = root
    for part in reference.removeprefix("#").split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _type_of(value: Any) -> frozenset[str]:
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
