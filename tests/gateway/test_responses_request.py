"""Requests of the Responses API as fields of a job."""

from __future__ import annotations

import pytest

from worker.gateway.errors import ApiError
from worker.gateway.responses_request import ResponsesRequest
from worker.jobs.protocol import Job

TOOL = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}


def fields_of(**body):
    request = ResponsesRequest.parse({"model": "m", "input": "hi", **body})
    return request.job_fields(request.messages())


def error_of(**body):
    with pytest.raises(ApiError) as raised:
        ResponsesRequest.parse({"model": "m", "input": "hi", **body})
    assert raised.value.status == 400
    return raised.value


def test_a_text_is_a_message_of_the_user_after_the_instructions():
    fields = fields_of(instructions="Be brief.")

    assert fields["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


def test_the_items_of_one_turn_are_one_assistant_message():
    items = [
        {"role": "user", "content": "weather?"},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
    ]

    user, assistant, first, second = fields_of(input=items)["messages"]

    assert user == {"role": "user", "content": "weather?"}
    assert assistant["reasoning_content"] == "hm"
    assert assistant["content"] == [{"type": "text", "text": "Let me see."}]
    assert [call["id"] for call in assistant["tool_calls"]] == ["c1", "c2"]
    assert first == {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    assert second["content"] == [{"type": "text", "text": "sun"}]


def test_two_answers_in_a_row_are_two_messages():
    items = [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]

    assert [message["content"] for message in fields_of(input=items)["messages"]] == ["a", "b", "c"]


def test_reasoning_after_a_call_begins_a_new_message():
    items = [
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"role": "user", "content": "c"},
    ]

    first, second, _ = fields_of(input=items)["messages"]

    assert "tool_calls" in first
    assert second == {"role": "assistant", "reasoning_content": "hm", "content": ""}


def test_tools_have_the_form_of_chat_completions():
    fields = fields_of(tools=[TOOL], tool_choice={"type": "function", "name": "f"})

    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    assert fields["tools"] == [{"type": "function", "function": function}]
    assert fields["tool_choice"] == {"type": "function", "function": {"name": "f"}}


def test_only_the_allowed_tools_reach_the_job():
    tools = [TOOL, TOOL | {"name": "g"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}

    fields = fields_of(tools=tools, tool_choice=choice)

    assert [tool["function"]["name"] for tool in fields["tools"]] == ["g"]
    assert fields["tool_choice"] == "required"
    assert (
        ResponsesRequest.parse({"input": "x", "tools": tools, "tool_choice": choice}).echo("m")["tool_choice"] == choice
    )


def test_sampling_fields_are_those_of_the_job():
    fields = fields_of(temperature=0, top_p=0.5, max_output_tokens=7, seed=3, stop="x", top_k=2, top_logprobs=2)

    job = Job.parse({"job_id": "j", **fields})
    assert (job.temperature, job.top_p, job.max_tokens, job.seed) == (0, 0.5, 7, 3)
    assert (job.stop, job.top_k, job.logprobs) == (["x"], 2, 2)


def test_log_probabilities_can_be_requested_by_include():
    assert fields_of(include=["message.output_text.logprobs"])["logprobs"] == 0
    assert "logprobs" not in fields_of()


@pytest.mark.parametrize(
    ("effort", "kwargs"),
    [
        ("low", {"reasoning_effort": "low"}),
        ("none", {"reasoning_effort": "none", "enable_thinking": False}),
    ],
)
def test_an_effort_is_a_variable_of_the_chat_template(effort, kwargs):
    assert fields_of(reasoning={"effort": effort})["chat_template_kwargs"] == kwargs


def test_template_variables_of_the_request_take_priority_over_the_effort():
    fields = fields_of(reasoning={"effort": "low"}, chat_template_kwargs={"reasoning_effort": "high", "x": 1})

    assert fields["chat_template_kwargs"] == {"reasoning_effort": "high", "x": 1}


def test_a_schema_is_a_response_format():
    schema = {"type": "object", "properties": {}}

    fields = fields_of(text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}})

    assert fields["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema, "strict": True},
    }
    assert "response_format" not in fields_of(text={"format": {"type": "text"}})


def test_the_forms_of_vllm_are_response_formats():
    assert fields_of(structured_outputs={"regex": "[0-9]+"})["response_format"] == {"type": "regex", "regex": "[0-9]+"}


def test_fields_of_the_schema_without_effect_are_ignored():
    fields = fields_of(
        service_tier="auto", prompt_cache_key="k", safety_identifier="u", stream_options={}, max_tool_calls=3
    )

    assert set(fields) == {"messages"}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"guided_json": {}}, "guided_json"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "name": "f"}}, "tool_choice"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
            },
            "tool_choice.tools",
        ),
        ({"background": True, "store": False}, "store"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": None}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text"}}, "structured_outputs": {"regex": "x"}}, "structured_outputs"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
    ],
)
def test_what_is_unknown_or_not_supported_is_refused_by_name(body, named):
    error = error_of(**body)

    assert error.param == named
    assert named in error.message


def test_the_items_of_a_response_can_be_passed_back():
    items = [
        {"role": "user", "content": "hi"},
        {
            "id": "msg_1",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "phase": None,
            "content": [{"type": "output_text", "text": "a", "annotations": [], "logprobs": []}],
        },
        {"id": "fc_1", "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"},
        {"id": "o", "type": "function_call_output", "call_id": "c", "output": "1", "status": "completed"},
    ]

    roles = [message["role"] for message in fields_of(input=items)["messages"]]
    assert roles == ["user", "assistant", "tool"]
