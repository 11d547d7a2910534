"""Requests of the Messages API as fields of a job."""

from __future__ import annotations

import pytest

from worker.gateway.errors import ApiError
from worker.gateway.messages_request import MessagesRequest
from worker.jobs.protocol import Job

TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
BASE = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}


def fields_of(**body):
    return MessagesRequest.parse({**BASE, **body}).job_fields()


def error_of(**body):
    with pytest.raises(ApiError) as raised:
        MessagesRequest.parse({**BASE, **body})
    assert raised.value.status == 400
    return raised.value


def test_the_system_prompt_is_the_first_message():
    assert fields_of(system="Be brief.")["messages"][0] == {"role": "system", "content": "Be brief."}
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert fields_of(system=blocks)["messages"][0]["content"] == [{"type": "text", "text": "Be brief."}]


def test_a_turn_with_reasoning_text_and_calls_is_one_message():
    turn = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
    ]
    result = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
        {"type": "text", "text": "And tomorrow?"},
    ]

    messages = fields_of(
        messages=[*BASE["messages"], {"role": "assistant", "content": turn}, {"role": "user", "content": result}]
    )["messages"]

    assert messages[1] == {
        "role": "assistant",
        "reasoning_content": "hm",
        "content": [{"type": "text", "text": "Let me see."}],
        "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    }
    assert messages[2] == {"role": "tool", "content": "rain", "tool_call_id": "t1"}
    assert messages[3] == {"role": "user", "content": [{"type": "text", "text": "And tomorrow?"}]}


def test_tools_have_the_form_of_chat_completions():
    fields = fields_of(tools=[TOOL], tool_choice={"type": "tool", "name": "f"})

    assert fields["tools"][0]["function"] == {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert fields["tool_choice"] == {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(("choice", "expected"), [("any", "required"), ("auto", "auto"), ("none", "none")])
def test_tool_choices_have_the_names_of_jobs(choice, expected):
    assert fields_of(tools=[TOOL], tool_choice={"type": choice})["tool_choice"] == expected


def test_sampling_fields_are_those_of_the_job():
    fields = fields_of(temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["x", "y"], seed=2)

    job = Job.parse({"job_id": "j", **fields})
    assert (job.max_tokens, job.temperature, job.top_k, job.stop, job.seed) == (5, 0.5, 3, ["x", "y"], 2)


def test_thinking_and_effort_are_variables_of_the_chat_template():
    on = fields_of(thinking={"type": "enabled", "budget_tokens": 1024}, output_config={"effort": "low"})

    assert on["chat_template_kwargs"] == {"enable_thinking": True, "reasoning_effort": "low"}
    assert fields_of(thinking={"type": "disabled"})["chat_template_kwargs"] == {"enable_thinking": False}
    assert "chat_template_kwargs" not in fields_of(thinking={"type": "adaptive"})


def test_a_schema_is_a_response_format():
    fields = fields_of(output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}})

    assert fields["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_fields_of_the_schema_without_effect_are_ignored():
    edits = {"edits": [{"type": "clear_thinking_20251015"}]}

    fields = fields_of(context_management=edits, service_tier="auto", metadata={"user_id": "u" * 300}, speed="fast")

    assert set(fields) == {"messages", "max_tokens"}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"frob": 1}, "frob"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"messages": [*BASE["messages"], {"role": "assistant", "content": "The"}]}, "messages[1]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_what_is_unknown_or_not_supported_is_refused_by_name(body, named):
    error = error_of(**body)

    assert error.param == named
    assert named in error.message
