"""The chat fields of a job: messages with parts and tool calls, tools, template variables."""

from typing import Any

import msgpack
import pytest

from worker.errors import InvalidRequest
from worker.jobs.protocol import Job

USER = {"role": "user", "content": "hi"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
FUNCTION_F = {"type": "function", "function": {"name": "f"}}


def chat(**fields: Any) -> Job:
    return Job.parse({"job_id": "a", "messages": [USER], **fields})


def errors(*messages: Any, **fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        chat(**({"messages": list(messages)} if messages else {}), **fields)
    return {each["field"]: each["constraint"] for each in caught.value.details["errors"]}


def test_every_part_of_a_chat_with_tools_is_accepted() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "5", "tool_call_id": "c", "name": "f"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None]}}}]},
    ]
    job = chat(messages=messages, tools=TOOLS, tool_choice=FUNCTION_F, chat_template_kwargs={"enable_thinking": False})
    assert job.messages is not None
    assert job.messages[4].tool_calls is not None
    assert job.messages[4].tool_calls[0].function.arguments == {"x": [1, None]}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": 5}, {"messages.0.content": "text or a list of text parts"}),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, {"messages.0.content.0.text": "text"}),
        ({"role": "user", "content": [{"type": "image", "text": ""}]}, {"messages.0.content.0.type": "'text'"}),
        ({"role": "user", "content": ["x"]}, {"messages.0.content.0": "a map"}),
        ({"role": "tool"}, {"messages.0.content": "required, except in an assistant message with tool_calls"}),
        (USER | {"tool_calls": [CALL]}, {"messages.0.tool_calls": "only in messages of the role assistant"}),
        (USER | {"tool_call_id": "c"}, {"messages.0.tool_call_id": "only in messages of the role tool"}),
        (USER | {"reasoning_content": ""}, {"messages.0.reasoning_content": "only in messages of the role assistant"}),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]},
            {"messages.0.tool_calls.0.function.arguments": "JSON text or a map of arguments"},
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            {"messages.0.tool_calls.0.function.arguments": "required"},
        ),
    ],
)
def test_a_wrong_message_is_described_in_a_sentence(message: dict[str, Any], expected: dict[str, str]) -> None:
    assert errors(message) == expected


def test_values_that_json_lacks_are_refused() -> None:
    for value in (b"x", float("nan"), {5: 6}, "\ud800", [{"a": b""}]):
        assert list(errors(chat_template_kwargs={"x": value})) == ["chat_template_kwargs"]
        assert list(errors(tools=[{"x": value}])) == ["tools.0"]


def test_a_tool_choice_needs_tools_and_names_one_of_them() -> None:
    assert errors(tool_choice="required") == {"tool_choice": "auto or none: the job has no tools"}
    assert errors(tool_choice="f") == {"tool_choice": "'auto', 'none' or 'required'"}
    assert errors(tool_choice=5) == {"tool_choice": "auto, none, required or a map that names a function"}
    other = {"type": "function", "function": {"name": "other"}}
    assert errors(tools=TOOLS, tool_choice=other) == {"tool_choice.function.name": "the name of one of the tools"}
    for choice in ("auto", "none"):
        assert chat(tool_choice=choice).tool_choice == choice


def test_chat_fields_need_messages() -> None:
    fields = {"tools": TOOLS, "chat_template_kwargs": {"x": 1}, "tool_choice": "auto"}
    with pytest.raises(InvalidRequest) as caught:
        Job.parse({"job_id": "a", "prompt": "x", **fields})
    assert {each["field"] for each in caught.value.details["errors"]} == set(fields)


def test_an_error_shows_no_text_of_tools_and_variables() -> None:
    secret = "my secret"
    for fields in (
        {"tools": [secret]},
        {"tools": [{"x": secret, "y": b""}]},
        {"chat_template_kwargs": secret},
        {"chat_template_kwargs": {"x": [secret, b""]}},
    ):
        with pytest.raises(InvalidRequest) as caught:
            chat(**fields)
        assert secret.encode() not in msgpack.packb([caught.value.message, caught.value.details])
