"""What a chat template accepts, found by rendering short chats with it.

A form of a message is accepted if the template does not fail and the message's words arrive.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]
Render = Callable[[list[Message], list[Any] | None], str]
"""Messages and tools to text. It may raise any exception."""

Form = Literal["text", "parts", "both"]
_KEY, _VALUE, _CALL_ID = "wqkey", "wqvalue", "abcdefghi"
_FILLERS = ("wquser", "wqresult", "")
"""Contents beside the one that is tried."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "wqtool",
        "description": "wq",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": "wq"}}},
    },
}


@dataclass(frozen=True, slots=True)
class Traits:
    """What a template accepts."""

    system: bool
    developer: bool
    """It knows the role; else developer messages are system messages."""
    content: Mapping[str, Form]
    """By role: content as text, as parts, or both unchanged."""
    arguments: Literal["text", "map", "both"]
    """A tool call's arguments as JSON text, as a map, or both unchanged."""
    null_content: bool
    """None is accepted as the content of a message with tool calls; else the empty text."""
    thinking: bool
    """It reads a message's reasoning from the field `thinking`."""


def find_traits(source: str, render: Render) -> Traits:
    """Find a template's traits by trial."""
    trial = _Trial(render)
    return Traits(
        system=trial.system(),
        developer=re.search(r"""['"]developer['"]""", source) is not None,
        content={role: trial.content(role) for role in ("system", "developer", "user", "assistant", "tool")},
        arguments=trial.arguments(),
        null_content=trial.null_content(),
        thinking="<|channel|>" in source and "thinking" in source,
    )


class _Trial:
    def __init__(self, render: Render) -> None:
        self._render = render

    def system(self) -> bool:
        """Whether a system message arrives, or nothing is known since other messages fail too."""
        texts = [self._attempt(_chat("system", content)) for content in ("wqword", _parts("wqword"))]
        return any("wqword" in text for text in texts if text) or self._attempt(_chat("user", "wquser")) is None

    def content(self, role: str) -> Form:
        """The form of content in messages of a role; text if nothing is known."""
        text = self._attempt(_chat(role, "wqword"))
        parts = self._attempt(_chat(role, _parts("wqword")))
        if parts is None or "wqword" not in parts:
            return "text"
        if text is None or "wqword" not in text:
            return "parts"
        # A list that is printed or converted to JSON shows the names of its keys.
        printed = len(re.findall(r"""['"]text['"]""", parts)) > len(re.findall(r"""['"]text['"]""", text))
        return "text" if printed else "both"

    def arguments(self) -> Literal["text", "map", "both"]:
        """The form of a tool call's arguments."""
        arguments = {_KEY: _VALUE}
        as_map, as_text = self._call(arguments) or "", self._call(json.dumps(arguments)) or ""
        # A map that is printed has Python's quotes, a text that is converted to JSON escaped ones.
        takes_map = _VALUE in as_map and f"'{_KEY}': '{_VALUE}'" not in as_map
        takes_text = _VALUE in as_text and f'\\"{_KEY}' not in as_text
        # A template with a notation of its own for maps inserts a text, which is JSON, unchanged.
        takes_text &= not takes_map or (f'"{_KEY}"' in as_map) == (f'"{_KEY}"' in as_text)
        return "both" if takes_map == takes_text else "map" if takes_map else "text"

    def null_content(self) -> bool:
        """Whether None as content neither fails nor is printed."""
        texts = [self._call({_KEY: _VALUE}, c) or self._call(json.dumps({_KEY: _VALUE}), c) for c in (None, "")]
        null, empty = texts
        return empty is None or (null is not None and null.count("None") == empty.count("None"))

    def _call(self, arguments: Any, content: str | None = "") -> str | None:
        chat = _chat("tool", "wqresult", arguments, content)
        return self._attempt(chat) or self._attempt(chat[:2])

    def _attempt(self, messages: list[Message]) -> str | None:
        """Render a chat; if that fails, without tools or with them, a system message, or parts."""
        tools = [_TOOL] if any(message["role"] == "tool" for message in messages) else None
        prefixed = [_message("system", "wq"), *messages]
        in_parts = [{**m, "content": _parts(m["content"])} if m["content"] in _FILLERS else m for m in messages]
        variants = ((messages, tools), (messages, None if tools else [_TOOL]), (prefixed, tools), (in_parts, tools))
        for chat, given in variants:
            try:
                return self._render(chat, given)
            except MemoryError:
                raise
            except Exception:  # a template can raise any exception
                continue
        return None


def _message(role: str, content: Any, **fields: Any) -> Message:
    return {"role": role, "content": content, **fields}


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _chat(role: str, content: Any, arguments: Any = None, call_content: str | None = "") -> list[Message]:
    """A short chat with one message of the role, with this content."""
    user = _message("user", "wquser")
    if role in ("system", "developer"):
        return [_message("system", content), user]
    if role == "user":
        return [_message("user", content)]
    if role == "assistant":
        return [user, _message("assistant", content), user]
    function = {"name": "wqtool", "arguments": {_KEY: _VALUE} if arguments is None else arguments}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    result = _message("tool", content, tool_call_id=_CALL_ID, name="wqtool")
    return [user, _message("assistant", call_content, tool_calls=[call]), result]
