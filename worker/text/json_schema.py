"""JSON Schemas as far as a grammar can enforce them: what is refused, by keyword and place.

llguidance refuses most keywords that it does not implement itself. `prepare` names the place too,
and refuses what llguidance accepts and does not enforce exactly:

| keyword | reason |
| --- | --- |
| `patternProperties` | overlapping patterns and properties are not distinguished reliably |
| `minProperties` | additional keys may repeat, and count once when the text is parsed |
| `const`, `enum` | of strings with most control characters, since these would be dropped |
| `const`, `enum`, `minimum`, `multipleOf` … | of numbers beyond ±2**53, which would be rounded |
| `prefixItems` | beside `additionalItems` or a list of `items`, since it would be ignored |
| `$schema` | of other dialects than drafts 4 to 2020-12, whose keywords differ |
| `x-guidance` | options of llguidance, one of which ignores unsupported keywords |

A limit beyond ±2**53 that allows all numbers up to it becomes ±2**53, which is read exactly.

Without `$schema` the dialect is Draft 2020-12. Properties are generated in the order of the schema.
Unknown keywords are annotations, as in JSON Schema. Read next: grammar.py.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any] | bool
Error = tuple[str, str, Any]
"""Field, constraint and value, as in `InvalidRequest.of`."""

MAX_DEPTH = 50
"""Levels of schemas in schemas; llguidance reads JSON up to 128 levels deep."""
_MAX_PROPERTIES = 2000
"""Of one object. The time to compile grows with the square: 0.3 s here."""
_MAX_ERRORS = 8

_UNSUPPORTED = frozenset(
    (
        *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "propertyNames"),
        *("contains", "minContains", "maxContains", "uniqueItems", "unevaluatedProperties", "unevaluatedItems"),
        *("patternProperties", "$dynamicRef", "$recursiveRef", "x-guidance"),
    )
)
_NEUTRAL = {"uniqueItems": False, "unevaluatedProperties": True, "unevaluatedItems": True}
"""Values of unsupported keywords that allow everything."""
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_NO_STRINGS = frozenset(("array", "boolean", "integer", "null", "number", "object"))

_DROPPED = re.compile(r"(?<!\\)(?:\\\\)*\\u00|\x7f")
"""In constants as JSON: characters that llguidance leaves out without escapes by code point."""

MAX_EXACT = 2**53
"""llguidance reads numbers as f64, which holds all integers up to here."""
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_DIALECT = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/(2019-09|2020-12))/schema#?")

_IN_MAP = ("properties", "$defs", "definitions")
_IN_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_DIRECT = ("items", "additionalItems", "additionalProperties")

_OPTIONS = {
    # At most one space, or line breaks and an indentation: an answer can't be white space forever.
    "whitespace_pattern": r"[ ]|\n{1,2}[ \t]{0,40}",
    # Each string has one spelling, so that a key can't occur twice in two spellings.
    "json_allowed_escapes": 'nrbtf\\"',
    "lenient": False,
    "coerce_one_of": False,
}


def prepare(schema: Any, place: str) -> tuple[dict[str, Any], list[Error]]:
    """Return the schema as llguidance is to compile it, and what in it is not supported."""
    errors: list[Error] = []
    prepared = _prepared(schema, place, 0, errors)
    root = prepared if isinstance(prepared, dict) else {"allOf": [prepared]}
    return root, errors[:_MAX_ERRORS]


def schema_source(prepared: Mapping[str, Any]) -> str:
    """Return a prepared schema as a term of a Lark grammar."""
    return "%json " + json.dumps({**prepared, "x-guidance": _OPTIONS}, ensure_ascii=False)


def locate(prepared: Mapping[str, Any], place: str, error_of: Callable[[dict[str, Any]], str]) -> tuple[str, str]:
    """Find the innermost schema that doesn't compile; return its place and the error.

    `error_of` compiles a schema and returns its error or "". The given schema must have one.
    """
    definitions = {key: prepared[key] for key in ("$schema", "$defs", "definitions") if key in prepared}
    found, error, current = place, error_of(dict(prepared)), prepared
    while True:
        for part, inner in _subschemas(current):
            if not isinstance(inner, Mapping):  # false alone is no mistake
                continue
            inner_error = error_of({**definitions, **inner})
            if inner_error and ("Unsatisfiable" in inner_error) <= ("Unsatisfiable" in error):
                found, error, current = f"{found}.{part}", inner_error, inner
                break
        else:
            break
    return found, error


def _prepared(schema: Any, place: str, depth: int, errors: list[Error]) -> Any:
    if isinstance(schema, bool) or len(errors) >= _MAX_ERRORS:
        return schema
    if not isinstance(schema, Mapping):
        errors.append((place, "a schema: a map, true or false", _shortened(schema)))
        return schema
    if depth > MAX_DEPTH:
        errors.append((place, f"schemas nested at most {MAX_DEPTH} levels deep", None))
        return schema
    errors += _unsupported(schema, place)
    prepared: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NEUTRAL and value is _NEUTRAL[key]:
            continue
        if key in _IN_MAP and isinstance(value, Mapping):
            prepared[key] = {
                name: _prepared(inner, f"{place}.{key}.{_shortened(name)}", depth + 1, errors)
                for name, inner in value.items()
            }
        elif (key in _IN_LIST or key == "items") and isinstance(value, list | tuple):
            prepared[key] = [_prepared(v, f"{place}.{key}.{n}", depth + 1, errors) for n, v in enumerate(value)]
        elif key in _DIRECT:
            prepared[key] = _prepared(value, f"{place}.{key}", depth + 1, errors)
        elif key in _LOWER and _is_number(value):
            prepared[key] = max(value, -MAX_EXACT)
        elif key in _UPPER and _is_number(value):
            prepared[key] = min(value, MAX_EXACT)
        else:
            prepared[key] = value
    return prepared


def _unsupported(schema: Mapping[str, Any], place: str) -> Iterator[Error]:
    for key, value in schema.items():
        if key in _UNSUPPORTED and not (key in _NEUTRAL and value is _NEUTRAL[key]):
            yield f"{place}.{key}", "not supported: a grammar can't enforce this keyword", None
        if key in ("const", "enum") and _DROPPED.search(json.dumps(value, ensure_ascii=False)):
            yield f"{place}.{key}", "strings without control characters, besides line ends and tabs", None
        if _beyond_exact(key, value):
            yield f"{place}.{key}", "numbers from -2**53 to 2**53, which are read exactly", None
    if "prefixItems" in schema:
        for key in ("additionalItems", "items"):
            if key in schema and (key != "items" or isinstance(schema[key], list | tuple)):
                yield f"{place}.{key}", "not supported beside prefixItems", None
    dialect = schema.get("$schema")
    if dialect is not None and not (isinstance(dialect, str) and _DIALECT.fullmatch(dialect)):
        yield f"{place}.$schema", "a draft of JSON Schema from 4 to 2020-12", _shortened(dialect)
    form, kind = schema.get("format"), schema.get("type")
    types = kind if isinstance(kind, list | tuple) else [kind if isinstance(kind, str) else "string"]
    kinds = frozenset(each for each in types if isinstance(each, str))
    if form is not None and form not in _FORMATS and not kinds <= _NO_STRINGS:
        yield f"{place}.format", f"one of {', '.join(_FORMATS)}", _shortened(form)
    reference = schema.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#")):
        yield f"{place}.$ref", "a reference within the schema, such as #/$defs/NAME", _shortened(reference)
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, Mapping) and len(properties) > _MAX_PROPERTIES:
        yield f"{place}.properties", f"at most {_MAX_PROPERTIES} properties", len(properties)
    names = len(set(map(str, required))) if isinstance(required, list | tuple) else 0
    at_least = schema.get("minProperties")
    if isinstance(at_least, int | float) and at_least > names + 1:
        yield f"{place}.minProperties", f"at most {names + 1}: the required properties and one more", at_least


def _beyond_exact(key: str, value: Any) -> bool:
    """Whether the keyword has a number that would be rounded and can't be replaced."""
    if key in ("const", "enum"):
        return any(abs(number) > MAX_EXACT for number in _numbers(value))
    if not _is_number(value):
        return False
    above, below = value > MAX_EXACT, value < -MAX_EXACT
    return (key in _LOWER and above) or (key in _UPPER and below) or (key == "multipleOf" and above)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers in a JSON value."""
    if _is_number(value):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(each)


def _subschemas(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the place and the schema of each schema directly in this one."""
    if not isinstance(schema, Mapping):
        return
    for key, value in schema.items():
        if key in _IN_MAP and isinstance(value, Mapping):
            yield from ((f"{key}.{_shortened(name)}", inner) for name, inner in value.items())
        elif (key in _IN_LIST or key == "items") and isinstance(value, list | tuple):
            yield from ((f"{key}.{n}", inner) for n, inner in enumerate(value))
        elif key in _DIRECT:
            yield key, value


def _shortened(value: Any) -> Any:
    """A value or a name as an error reports it."""
    if isinstance(value, str):
        return value if len(value) <= 60 else value[:60] + "…"
    return value if value is None or isinstance(value, bool | int | float) else type(value).__name__
