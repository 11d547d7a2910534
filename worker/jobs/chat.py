"""The fields of a job that a chat template renders: messages, tools, variables.

The models check each field; `chat_conflicts` compares a job's fields with each other.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, LiteralString, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from worker.jobs.fields import LIST_TAG, MAP_TAG, TEXT_TAG, JsonMap, ShortText, Strict, Text, one_of

CHAT_FIELDS = ("chat_template_kwargs", "tools", "tool_choice")
"""Fields of a job that need `messages`."""


class TextPart(Strict):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


class FunctionCall(Strict):
    """The function that a tool call names, and its arguments: JSON text, or the map itself."""

    name: ShortText
    arguments: Annotated[
        Annotated[Text, TEXT_TAG] | Annotated[JsonMap, MAP_TAG], one_of("JSON text or a map of arguments")
    ]


class ToolCall(Strict):
    """A tool call of an earlier assistant turn, as in OpenAI's chat completions."""

    id: ShortText | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


Content = Annotated[
    Annotated[Text, TEXT_TAG] | Annotated[list[TextPart], LIST_TAG], one_of("text or a list of text parts")
]


class Message(Strict):
    """One turn of a chat. Control tokens in its texts are treated as plain text.

    Fields that are None are not passed to the chat template, except `content`.
    """

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: Content | None = None
    name: ShortText | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=1024)] | None = None
    tool_call_id: ShortText | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise _contradiction("content", "required, except in an assistant message with tool_calls")
        for field, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) is not None and self.role != role:
                raise _contradiction(field, f"only in messages of the role {role}")
        return self


def _contradiction(field: str, rule: LiteralString) -> PydanticCustomError:
    return PydanticCustomError("contradiction", rule, {"path": [field]})


Messages = Annotated[list[Message], Field(min_length=1, max_length=8192)]


class NamedFunction(Strict):
    """The name in a `tool_choice` that names a function."""

    name: ShortText


class ToolChoice(Strict):
    """A `tool_choice` that names the function to call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoiceField = Annotated[
    Annotated[Literal["auto", "none", "required"], TEXT_TAG] | Annotated[ToolChoice, MAP_TAG],
    one_of("auto, none, required or a map that names a function"),
]
Tools = Annotated[list[JsonMap], Field(min_length=1, max_length=1024)]


def chat_conflicts(fields: Mapping[Any, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield field, constraint and value of a job's chat fields that contradict other fields."""
    if fields.get("messages") is None:
        yield from ((name, "only with messages", None) for name in CHAT_FIELDS if fields.get(name) is not None)
    choice, tools = fields.get("tool_choice"), fields.get("tools")
    if choice == "required" and not tools:
        yield "tool_choice", "auto or none: the job has no tools", choice
    if not isinstance(choice, Mapping) or not isinstance(choice.get("function"), Mapping):
        return
    given = tools if isinstance(tools, list | tuple) else ()
    functions = [tool.get("function", tool) for tool in given if isinstance(tool, Mapping)]
    name = choice["function"].get("name")
    if isinstance(name, str) and name not in [each.get("name") for each in functions if isinstance(each, Mapping)]:
        yield "tool_choice.function.name", "the name of one of the tools", f"string of {len(name)}"
