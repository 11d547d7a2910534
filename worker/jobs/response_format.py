"""The field `response_format` of a job: the form of an answer's text, in OpenAI's notation.

    {"type": "text"}                                         free
    {"type": "json_object"}                                  any JSON object
    {"type": "json_schema", "json_schema": {"schema": {…}}}  JSON that is valid for a schema
    {"type": "regex", "regex": "[0-9]+"}                     a text that matches wholly
    {"type": "choice", "choice": ["yes", "no"]}              one of the texts
    {"type": "grammar", "grammar": "start: …"}               a text of a grammar, in Lark's notation

What a worker supports of schemas and grammars is checked when it prepares the job.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from worker.jobs.fields import JsonMap, ShortText, Strict, Text

MAX_CHOICES = 10_000

_Source = Annotated[Text, Field(min_length=1, max_length=1 << 18)]


class TextFormat(Strict):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON Schema. Only `schema` has an effect: the schema is always enforced."""

    name: ShortText | None = None
    description: Text | None = None
    schema_: Annotated[JsonMap, Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    """JSON that is valid for a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexFormat(Strict):
    """A text that a regular expression matches wholly, in the syntax of Rust's crate `regex`."""

    type: Literal["regex"]
    regex: _Source


class ChoiceFormat(Strict):
    """One of several texts."""

    type: Literal["choice"]
    choice: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=MAX_CHOICES)
    ]


class GrammarFormat(Strict):
    """A text of a grammar in the Lark dialect of llguidance."""

    type: Literal["grammar"]
    grammar: _Source


_TYPES = ("text", "json_object", "json_schema", "regex", "choice", "grammar")
FORMAT_TAGS = frozenset(f"<{name}>" for name in _TYPES)
"""Tags of the alternatives, which are no part of a field's name."""


def _tag(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return f"<{kind}>" if isinstance(kind, str) and kind in _TYPES else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")]
    | Annotated[RegexFormat, Tag("<regex>")]
    | Annotated[ChoiceFormat, Tag("<choice>")]
    | Annotated[GrammarFormat, Tag("<grammar>")],
    Discriminator(
        _tag, custom_error_type="kind", custom_error_message=f"a map whose type is one of {', '.join(_TYPES)}"
    ),
]


def format_conflicts(fields: Mapping[Any, Any], implied_version: int) -> list[tuple[str, str, Any]]:
    """Field, constraint and value where `response_format` contradicts other fields."""
    errors: list[tuple[str, str, Any]] = []
    given = fields.get("response_format")
    if _tag(given) is None:  # not given, or another error
        return errors
    v = fields.get("v")
    if type(v) is int and 0 < v < implied_version:
        errors.append(("response_format", f"only with v {implied_version}", None))
    if fields.get("ignore_eos") is True and _tag(given) != "<text>":
        errors.append(("ignore_eos", "false with response_format: a grammar ends with an end token", True))
    return errors
