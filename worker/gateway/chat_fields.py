"""Messages, tools and tool choices of a chat request, as the fields of a job.

A job has OpenAI's form without what no template renders; `worker/jobs/chat.py` checks the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from worker.gateway.errors import invalid

_MESSAGE_FIELDS = ("role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id")
_MESSAGE_IGNORED = frozenset({"annotations", "audio", "function_call", "refusal", "reasoning", "reasoning_details"})
"""Fields of the answers of OpenAI and vLLM, which clients send back."""
_PART_FIELDS = {"text": ("type", "text"), "refusal": ("type", "refusal")}
_PART_IGNORED = frozenset({"annotations", "cache_control", "id", "index", "prompt_cache_breakpoint"})
"""Fields of parts of answers and of caches, which change no prompt."""
_UNSUPPORTED = ("audio", "function_call")
"""Fields that must be null: the template would leave out what they hold."""


def job_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages in the form of a job. Raises status 400."""
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, path: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise invalid(f"{path}: a map", path, "invalid_value")
    _refuse_others(message, _MESSAGE_FIELDS, path, _MESSAGE_IGNORED)
    for name in _UNSUPPORTED:
        if message.get(name) is not None:
            raise invalid(f"{path}.{name}: not supported", f"{path}.{name}", "unsupported_value")
    if message.get("role") != "assistant":
        for name, value in message.items():
            if name in _MESSAGE_IGNORED and value is not None:
                raise invalid(f"{path}.{name}: only of an assistant", f"{path}.{name}", "invalid_value")
    result = {name: message[name] for name in _MESSAGE_FIELDS if message.get(name) is not None}
    if "content" in result:
        result["content"] = _content(result["content"], f"{path}.content")
    if message.get("role") == "assistant":
        _complete_assistant(result, message, path)
    return result


def _complete_assistant(result: dict[str, Any], message: Mapping[str, Any], path: str) -> None:
    """An assistant's turn may have no text, a refusal instead, or reasoning under vLLM's name."""
    if isinstance(reasoning := message.get("reasoning"), str):
        result.setdefault("reasoning_content", reasoning)
    calls = result.pop("tool_calls", None)
    if calls:
        result["tool_calls"] = _tool_calls(calls, f"{path}.tool_calls")
    else:
        result.setdefault("content", message.get("refusal") or "")


def _content(content: Any, path: str) -> Any:
    """Text, or text parts; a refusal is text of the assistant."""
    if not isinstance(content, list):
        return content
    parts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "refusal"):
            message = f"{path}[{index}]: only parts of type text are supported"
            raise invalid(message, f"{path}[{index}].type", "unsupported_value")
        _refuse_others(part, _PART_FIELDS[kind], f"{path}[{index}]", _PART_IGNORED)
        parts.append({"type": "text", "text": part.get(kind)})
    return parts


def _refuse_others(
    given: Mapping[str, Any], names: Sequence[str], path: str, ignored: frozenset[str] = frozenset()
) -> None:
    """Raise status 400 for a field that is neither named nor ignored."""
    if unknown := next((str(name) for name in given if name not in names and name not in ignored), None):
        raise invalid(f"{path}.{unknown}: unknown field", f"{path}.{unknown}", "unknown_parameter")


def _tool_calls(calls: Any, path: str) -> list[Any]:
    """The calls without the index that streamed ones have."""
    if not isinstance(calls, list):
        raise invalid(f"{path}: a list", path, "invalid_value")
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping) or call.get("type", "function") != "function":
            raise invalid(f"{path}[{index}]: only calls of functions", f"{path}[{index}].type", "unsupported_value")
    return [{name: value for name, value in call.items() if name != "index"} for call in calls]


def tool_fields(tools: Sequence[Any] | None, choice: Any) -> dict[str, Any]:
    """The job fields `tools` and `tool_choice`. Raises status 400 for what is no function."""
    for index, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        path = f"tools[{index}]"
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise invalid(f"{path}: only tools of type function are supported", f"{path}.type", "unsupported_value")
        if not isinstance(function.get("name"), str):
            raise invalid(f"{path}.function.name: required", f"{path}.function.name", "missing_required_parameter")
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools or (), choice)
    if not tools:
        return {} if choice in ("auto", "none") else {"tool_choice": choice}
    return {"tools": list(tools), "tool_choice": choice}


def _allowed(tools: Sequence[Any], choice: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The tools that an `allowed_tools` choice names, and its mode."""
    allowed = choice.get("allowed_tools")
    listed = allowed.get("tools") if isinstance(allowed, Mapping) else None
    if not isinstance(allowed, Mapping) or not isinstance(listed, list) or not listed:
        raise invalid("tool_choice.allowed_tools.tools: a list of tools", "tool_choice.allowed_tools.tools")
    _refuse_others(choice, ("type", "allowed_tools"), "tool_choice")
    _refuse_others(allowed, ("mode", "tools"), "tool_choice.allowed_tools")
    functions = [each.get("function") if isinstance(each, Mapping) else None for each in listed]
    names = [each.get("name") if isinstance(each, Mapping) else None for each in functions]
    known = {tool["function"]["name"]: tool for tool in tools}
    if missing := [name for name in names if not isinstance(name, str) or name not in known]:
        message = f"tool_choice.allowed_tools: there is no tool {str(missing[0])[:100]}"
        raise invalid(message, "tool_choice.allowed_tools.tools")
    return [known[name] for name in names], allowed.get("mode", "auto")
