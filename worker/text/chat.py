"""The input and the output of chat templates."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from worker.text.traced_text import TracedText


@dataclass(frozen=True, slots=True)
class Chat:
    """The part of a request that a chat template renders."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    tool_choice: Any = None
    kwargs: Mapping[str, Any] | None = None
    """Further variables, `chat_template_kwargs`; they replace special tokens."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A rendered chat."""

    text: TracedText
    requested: Collection[str]
    """The texts of the request; none if the origin of every character of `text` is known."""
