"""Chat templates: Jinja2 from the GGUF file, rendered as transformers' `apply_chat_template` does.

The caller provides the clock, limits of time and memory, and tokenizes the rendered text: a worker
renders in a child process, see template_process.py. Read next: chat_messages.py (the forms of
messages), traced_template.py (rendering).
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from worker.errors import InvalidRequest, ModelLoadFailed
from worker.text.chat import Chat, RenderedChat
from worker.text.chat_messages import Content, adapt, required_contents, traced_messages
from worker.text.template_traits import Traits, find_traits
from worker.text.traced_template import RaisedByTemplate, TracedTemplate
from worker.text.traced_text import TRUSTED, UNKNOWN, UNTRUSTED, TracedText, trace_all, untrace, untrusted_texts

RESERVED_KWARGS = frozenset(
    (
        *("messages", "conversation", "tools", "tool_choice", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "strftime_now", "raise_exception"),
    )
)
"""Variables and arguments of `apply_chat_template` that `chat_template_kwargs` can't replace."""

MAX_CHARACTERS = 1 << 24
"""Of a rendered chat: twice the largest payload. A longer one is in no model's context."""
_MAX_SWITCHES = 4
"""Contents that may have an effect without being in the prompt; each costs two renders."""


class ChatTemplate:
    """A compiled template. `variables` are the special tokens by role: bos_token, eos_token, …

    `special` are the names of all special tokens. A chat with tools is rendered with the template
    `tool_use` if the file has one.
    """

    def __init__(
        self, source: str, variables: Mapping[str, str], special: Collection[str] = (), tool_use: str = ""
    ) -> None:
        self._source, self._tool_use_source = source, tool_use
        self._special, self._token_variables = frozenset(special), variables
        self._tokens = trace_all(variables, TRUSTED)
        try:
            self._template = TracedTemplate(source)
        except MemoryError:
            raise
        except Exception as error:  # a template can raise any exception when it is compiled
            what = f"the chat template does not compile ({_sentence(error)})"
            raise ModelLoadFailed(what, "tokenizer.chat_template", "a Jinja2 template") from error

    def prepare(self) -> None:
        """Find out what the template accepts, which else the first chat does."""
        _ = self._traits

    def render(self, chat: Chat, now: datetime) -> RenderedChat:
        """Return the text with the generation prompt; the template's clock is `now` in UTC.

        Raises InvalidRequest if the template rejects the messages (`raise_exception`) or fails, if
        it drops a message, or if it has no place for a part of the chat.
        """
        if chat.tools and self._tool_use_source:
            return self._tool_use.render(chat, now)
        self._check(chat)
        variables = self._chat_variables(chat, now)
        try:
            text = self._template.render(untrace(variables))
        except MemoryError:
            raise
        except Exception as error:  # or rendered
            verb = "rejects them" if isinstance(error, RaisedByTemplate) else "fails on them"
            constraint = f"the model's chat template {verb}: {_sentence(error)}"
            roles = [message.get("role") for message in chat.messages[:16]]
            raise InvalidRequest.of(("messages", constraint, roles)) from error
        if len(text) > MAX_CHARACTERS:
            rule = f"at most {MAX_CHARACTERS} characters when the model's chat template has rendered them"
            raise InvalidRequest.of(("messages", rule, len(text)))
        traced = self._template.trace(variables, text)
        missing = (content for content in required_contents(chat.messages) if not _arrives(content, traced))
        for count, content in enumerate(missing):
            if count == _MAX_SWITCHES or not self._changes(text, chat, content, now):
                rule = "must be in the prompt, but the model's chat template drops this text"
                raise InvalidRequest.of((content.field, rule, f"string of {len(content.text)}"))
        return RenderedChat(traced, untrusted_texts(variables) if UNKNOWN in traced._origin else ())

    def _changes(self, text: str, chat: Chat, content: Content, now: datetime) -> bool:
        """Whether a content that is not in the rendered text has an effect, such as a switch.

        The text then differs from those without the content, and with a neutral word instead.
        """
        for other in ("", "wq"):
            variables = self._chat_variables(replace(chat, messages=content.replaced(chat.messages, other)), now)
            try:
                if self._template.render(untrace(variables)) == text:
                    return False
            except MemoryError:
                raise
            except Exception:  # a template can raise any exception
                continue
        return True

    def _chat_variables(self, chat: Chat, now: datetime) -> dict[str, Any]:
        messages = adapt(traced_messages(chat.messages), self._traits)
        variables = self._variables(messages, chat.tools, now) | self._kwargs(chat.kwargs or {})
        if chat.tool_choice is not None:
            variables["tool_choice"] = trace_all(chat.tool_choice, UNTRUSTED)
        return variables

    @cached_property
    def _tool_use(self) -> "ChatTemplate":
        try:
            return ChatTemplate(self._tool_use_source, self._token_variables, self._special)
        except ModelLoadFailed as error:
            constraint = f"none: the model's template for tools is not usable: {error.message}"
            raise InvalidRequest.of(("tools", constraint, None)) from error

    @cached_property
    def _traits(self) -> Traits:
        def render(messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
            return self._template.render(untrace(self._variables(messages, tools, datetime(2025, 1, 1, tzinfo=UTC))))

        return find_traits(self._source, render)

    def _variables(self, messages: list[Any], tools: list[Any] | None, now: datetime) -> dict[str, Any]:
        return {
            **self._tokens,
            "messages": messages,
            "tools": trace_all(tools, UNTRUSTED),
            "documents": None,
            "add_generation_prompt": True,
            "strftime_now": now.astimezone(UTC).strftime,
        }

    def _kwargs(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The caller's variables. A special token's name is that token in one of its variables."""
        variables = {}
        for key, value in kwargs.items():
            is_token = key.endswith("_token") and isinstance(value, str) and value in self._special
            variables[key] = trace_all(value, TRUSTED if is_token else UNTRUSTED)
        return variables

    def _check(self, chat: Chat) -> None:
        """Refuse what the template can't take into account."""
        errors: list[tuple[str, str, Any]] = [
            (f"chat_template_kwargs.{key}", "not a variable that a job can set", None)
            for key in chat.kwargs or {}
            if key in RESERVED_KWARGS
        ]
        if "tool" not in self._source:
            rule = "none: the model's chat template has no tools"
            if chat.tools and chat.tool_choice != "none":
                errors.append(("tools", rule, f"list of {len(chat.tools)}"))
            indexes = (index for index, message in enumerate(chat.messages) if message.get("tool_calls"))
            errors += [(f"messages.{index}.tool_calls", rule, None) for index in indexes]
        if errors:
            raise InvalidRequest.of(*errors[:16])


def _arrives(content: Content, text: TracedText) -> bool:
    plain = content.text.strip()
    return content.field in text._sources or any(
        _of_unknown_origin(form, text) for form in (plain, json.dumps(plain, ensure_ascii=False)[1:-1])
    )


def _of_unknown_origin(part: str, text: TracedText) -> bool:
    """Whether a part of the text is this one, and its origin is not recorded."""
    at = text.find(part)
    while at >= 0 and text._origin.count(UNKNOWN, at, at + len(part)) < len(part):
        at = text.find(part, at + 1)
    return at >= 0


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"
