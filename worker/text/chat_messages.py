"""Messages in the form that a chat template accepts, without loss of text.

`adapt` converts content, roles and tool calls; the template's traits are in template_traits.py.
Strings are `TracedText`: texts that are joined keep their sources.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worker.errors import InvalidRequest
from worker.text.template_traits import Traits
from worker.text.traced_text import TRUSTED, UNTRUSTED, TracedText, trace, trace_all

Message = dict[str, Any]
_ROLES = ("system", "developer", "user", "assistant", "tool")


def traced_messages(messages: list[Message]) -> list[Message]:
    """Copies of the messages with each string traced; the source of content is its field."""
    traced = []
    for index, message in enumerate(messages):
        copy = {key: trace_all(value, UNTRUSTED) for key, value in message.items()}
        role = message.get("role")
        if role in _ROLES:
            copy["role"] = trace_all(role, TRUSTED)
        copy["content"] = _traced_content(message.get("content"), f"messages.{index}.content")
        traced.append(copy)
    return traced


def _traced_content(content: Any, field: str) -> Any:
    if not isinstance(content, list):
        return trace_all(content, UNTRUSTED, frozenset((field,)))
    return [trace_all(part, UNTRUSTED, frozenset((f"{field}.{n}",))) for n, part in enumerate(content)]


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a message, or the text of one of its parts."""

    index: int
    part: int | None
    text: str

    @property
    def field(self) -> str:
        """The field of the job, and the source of the text."""
        return f"messages.{self.index}.content" + ("" if self.part is None else f".{self.part}")

    def replaced(self, messages: list[Message], text: str) -> list[Message]:
        """The messages with another text in this place."""
        message = messages[self.index]
        content: Any = text
        if self.part is not None:
            content = [*message["content"]]
            content[self.part] = {**content[self.part], "text": text}
        return [*messages[: self.index], {**message, "content": content}, *messages[self.index + 1 :]]


def required_contents(messages: list[Message]) -> Iterator[Content]:
    """Yield the contents that a template must not drop.

    It may drop earlier assistant turns, and thoughts.
    """
    for index, message in enumerate(messages):
        content, answer = message.get("content"), message.get("role") == "assistant"
        if answer and index < len(messages) - 1:
            continue
        if isinstance(content, list):
            contents = [Content(index, n, part["text"]) for n, part in enumerate(content)]
        else:
            contents = [Content(index, None, content or "")]
        for each in contents:
            if (each.text.rpartition("</think>")[2] if answer else each.text).strip():
                yield each


def adapt(messages: list[Message], traits: Traits) -> list[Message]:
    """Return traced messages as the template accepts them.

    Raises InvalidRequest if a tool call's arguments are not JSON, or a system text has no place.
    """
    adapted = [dict(message) for message in messages]
    for index, message in enumerate(adapted):
        if message["role"] == "developer" and not traits.developer:
            message["role"] = trace("system", TRUSTED)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [
                _adapt_call(call, traits, f"messages.{index}.tool_calls.{n}") for n, call in enumerate(calls)
            ]
        if message["content"] is None and not traits.null_content:
            message["content"] = TracedText("")
        if traits.thinking and "reasoning_content" in message:
            message.setdefault("thinking", message["reasoning_content"])
    if not traits.system:
        adapted = _merge_system(adapted)
    for message in adapted:
        message["content"] = _adapt_content(message["content"], traits.content.get(message["role"]))
    return adapted


def _adapt_content(content: Any, form: str | None) -> Any:
    if isinstance(content, list) and form == "text":
        return _text_of(content)
    if isinstance(content, str) and form == "parts":
        return [{"type": trace("text", TRUSTED), "text": content}]
    return content


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return trace("\n", TRUSTED).join([part["text"] for part in content])
    return trace("") if content is None else trace(content)


def _merge_system(messages: list[Message]) -> list[Message]:
    """Put the text of system messages at the beginning of the next user turn."""
    merged: list[Message] = []
    waiting: list[str] = []
    field = ""
    for index, message in enumerate(messages):
        if message["role"] == "system":
            waiting.append(_text_of(message["content"]))
            field = f"messages.{index}"
        elif message["role"] == "user" and waiting:
            content = trace("\n", TRUSTED).join([*waiting, _text_of(message["content"])])
            merged.append({**message, "content": content})
            waiting = []
        else:
            merged.append(message)
    if waiting:
        rule = "followed by a user message: the model's chat template has no system role"
        raise InvalidRequest.of((field, rule, None))
    return merged


def _adapt_call(call: Message, traits: Traits, field: str) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    if traits.arguments == "map" and isinstance(arguments, str):
        arguments = trace_all(_parsed(arguments, f"{field}.function.arguments"), UNTRUSTED)
    elif traits.arguments == "text" and isinstance(arguments, Mapping):
        arguments = trace_all(json.dumps(arguments, ensure_ascii=False), UNTRUSTED)
    return {**call, "function": {**function, "arguments": arguments}}


def _parsed(text: str, field: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        rule = "JSON text of an object, which the model's chat template needs"
        raise InvalidRequest.of((field, rule, f"string of {len(text)}"))
    return value
