"""Chat templates: Jinja2 from the GGUF file, rendered as transformers' `apply_chat_template` does.

The caller provides the clock. tokenizer.py escapes the content of the messages before rendering and
tokenizes the rendered text.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from worker.errors import InvalidRequest, ModelLoadFailed


class ChatTemplate:
    """A compiled template. `variables` are the special tokens by role: bos_token, eos_token, …"""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._variables = {**variables, "tools": None, "documents": None, "add_generation_prompt": True}
        extensions = [_Generation, loopcontrols]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a template can raise any exception when it is compiled
            what = f"the chat template does not compile ({_sentence(error)})"
            raise ModelLoadFailed(what, "tokenizer.chat_template", "a Jinja2 template") from error

    def render(self, messages: list[dict[str, str]], now: datetime) -> str:
        """Return the text with the generation prompt; the template's clock is `now` in UTC.

        Raises InvalidRequest if the template rejects the messages (`raise_exception`) or fails.
        """
        try:
            clock = now.astimezone(UTC).strftime
            return self._template.render(messages=messages, strftime_now=clock, **self._variables)
        except Exception as error:  # or rendered
            verb = "rejects them" if isinstance(error, _RaisedByTemplate) else "fails on them"
            constraint = f"the model's chat template {verb}: {_sentence(error)}"
            roles = [message.get("role") for message in messages[:16]]
            raise InvalidRequest.of(("messages", constraint, roles)) from error


class _RaisedByTemplate(TemplateError):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}`, which marks the model's turns for training: render its body."""

    tags = {"generation"}  # noqa: RUF012  (a plain set in jinja2's Extension)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise _RaisedByTemplate(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"
