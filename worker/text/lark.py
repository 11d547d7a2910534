"""Pieces of grammars in llguidance's Lark dialect, and what a job's own grammar may contain.

A job's grammar constrains text: it can't name special tokens, nor set options whose effect is on
sampling or on tokens that are taken back. Schemas in it are checked as those of a job.
"""

import json
import re
from collections.abc import Iterator

from worker.text.json_schema import Error, prepare, schema_source

OPTIONS = '%llguidance {"no_forcing": true}'
"""A mask has all tokens that the text allows, not only those that the tokenizer would choose."""
ANY_TEXT = "/(?s:.*)/"

_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|\#[^\n]*)
    | (?P<string>"(?:\\.|[^"\\\n])*")
    | (?P<regex>/(?:\\.|[^/\\\n])+/)
    | (?P<special><[^<>\s]+>)
    | (?P<reference>@[\w-]+)
    | (?P<negation>~(?!\s*\d))
    | (?P<option>\b(?:temperature|stop|stop_capture|max_tokens)\s*=)
    | (?P<directive>%(?:json|llguidance)\b)\s*""",
    re.VERBOSE,
)


def literal(text: str) -> str:
    """Return a text as a string of the grammar."""
    return json.dumps(text, ensure_ascii=False)


def regex(pattern: str) -> str:
    """Return a regular expression as a term: digits of `\\d` are ASCII."""
    from llguidance import regex_to_lark  # noqa: PLC0415  # only jobs with a grammar need it

    return f"/{regex_to_lark(pattern, 'd')}/"


def escaped(text: str) -> str:
    """Return a text as a part of a regular expression between slashes."""
    # Only operators: \< and \> are boundaries of words.
    return re.sub(r"[][\\.+*?(){}|^$/#&~-]", lambda found: "\\" + found[0], text).replace("\n", "\\n")


def unless(never: str) -> str:
    """Return what excludes texts that begin with a pattern from a terminal."""
    return f" & ~/{never}(?s:.*)/" if never else ""


def checked(grammar: str, place: str) -> tuple[str, list[Error]]:
    """Return a job's grammar as it is to be compiled, and what in it is not supported."""
    parts: list[str] = []
    errors: list[Error] = []
    at = 0
    while found := _TOKEN.search(grammar, at):
        parts.append(grammar[at : found.start()])
        at = found.end()
        text, kind = found[0], found.lastgroup
        if kind == "special":
            errors.append((place, "without special tokens: a grammar constrains text", text[:60]))
        elif kind == "reference":
            errors.append((place, "without references to other grammars", text[:60]))
        elif kind == "negation":
            errors.append((place, "without the operator ~, which allows bytes that are no text", None))
        elif kind == "option":
            errors.append((place, "without the options temperature, stop and max_tokens", text.rstrip("= ")))
        elif kind == "directive":
            text, at = _directive(grammar, text.strip(), at, place, errors)
        parts.append(text)
    parts.append(grammar[at:])
    return "".join(parts), errors


def _directive(grammar: str, name: str, at: int, place: str, errors: list[Error]) -> tuple[str, int]:
    """Read the JSON after `%json` or `%llguidance`; return what replaces both, and its end."""
    try:
        value, end = json.JSONDecoder().raw_decode(grammar, at)
    except (ValueError, RecursionError):
        errors.append((place, f"JSON after {name}", grammar[at : at + 60]))
        return "", at
    if name == "%llguidance":
        if value != {}:
            errors.append((place, "without options in %llguidance", None))
        return "", end
    schema, found = prepare(value, f"{place}.%json")
    errors += found
    return schema_source(schema), end


def alternatives(terms: Iterator[str] | list[str]) -> str:
    """Return a group of alternatives."""
    return "(" + " | ".join(terms) + ")"
