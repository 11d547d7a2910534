"""Fields of requests: each is honoured, ignored because OpenAI has it, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from worker.gateway.chat import ChatRequest
from worker.gateway.completions import CompletionRequest
from worker.gateway.errors import ApiError
from worker.jobs.protocol import Job

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
OTHER = {"type": "function", "function": {"name": "later"}}


def allowed(function: Any) -> dict[str, Any]:
    tools = [{"type": "function", "function": function}]
    return {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": tools}}


def chat(**fields: Any) -> dict[str, Any]:
    """The job of a chat with these fields, which a worker would accept but for response_format."""
    (job,) = ChatRequest.parse(json.dumps({"messages": HELLO, **fields}).encode()).jobs("m")
    Job.parse({"job_id": "j"} | {name: value for name, value in job.items() if name != "response_format"})
    return job


def refused(request: type[ChatRequest] | type[CompletionRequest], **fields: Any) -> ApiError:
    base = {"messages": HELLO} if request is ChatRequest else {"prompt": "x"}
    with pytest.raises(ApiError) as caught:
        request.parse(json.dumps({**base, **fields}).encode()).jobs("m")
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("request_model", "params"),
    [
        (ChatRequest, chat_params.CompletionCreateParamsBase),
        (CompletionRequest, text_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_openai_s_schema_is_known(request_model, params):
    known = {*request_model.model_fields, *request_model.ignored, *request_model.neutral}
    assert set(params.__annotations__) - known == set()


@pytest.mark.parametrize(
    ("field", "value", "name", "expected"),
    [
        ("temperature", 0.5, "temperature", 0.5),
        ("temperature", 1, "temperature", 1.0),
        ("top_p", 0.9, "top_p", 0.9),
        ("top_k", 5, "top_k", 5),
        ("top_k", -1, "top_k", 0),
        ("min_p", 0.1, "min_p", 0.1),
        ("repetition_penalty", 1.1, "repetition_penalty", 1.1),
        ("frequency_penalty", -1, "frequency_penalty", -1.0),
        ("presence_penalty", 1, "presence_penalty", 1.0),
        ("seed", 7, "seed", 7),
        ("seed", -1, "seed", 2**64 - 1),
        ("seed", -(2**63), "seed", 2**63),
        ("seed", 2**64 - 1, "seed", 2**64 - 1),
        ("logit_bias", {"5": -100}, "logit_bias", {"5": -100.0}),
        ("min_tokens", 3, "min_tokens", 3),
        ("ignore_eos", True, "ignore_eos", True),
        ("stop", "x", "stop", ["x"]),
        ("stop", ["x", "y"], "stop", ["x", "y"]),
        ("stop_token_ids", [3], "stop_token_ids", [3]),
        ("priority", 2, "priority", 2),
        ("deadline_ms", 900, "deadline_ms", 900),
        ("max_tokens", 9, "max_tokens", 9),
        ("max_completion_tokens", 9, "max_tokens", 9),
        ("user", "u", "tenant", "u"),
        ("chat_template_kwargs", {"a": 1}, "chat_template_kwargs", {"a": 1}),
        ("reasoning_effort", "low", "chat_template_kwargs", {"reasoning_effort": "low"}),
        ("reasoning_effort", "none", "chat_template_kwargs", {"reasoning_effort": "none", "enable_thinking": False}),
        ("tools", [TOOL], "tools", [TOOL]),
        ("response_format", {"type": "json_object"}, "response_format", {"type": "json_object"}),
        ("structured_outputs", {"regex": "a+"}, "response_format", {"type": "regex", "regex": "a+"}),
        ("structured_outputs", {"json_object": True}, "response_format", {"type": "json_object"}),
    ],
)
def test_a_field_becomes_that_of_a_job(field, value, name, expected):
    assert chat(**{field: value})[name] == expected


def test_fields_that_are_absent_or_null_leave_the_job_s_defaults():
    absent = chat()
    assert absent == {"model": "m", "messages": HELLO}
    assert chat(**{name: None for name in (*ChatRequest.model_fields, *ChatRequest.neutral) if name != "messages"}) == (
        absent
    )


def test_max_completion_tokens_precedes_its_old_name():
    assert chat(max_tokens=5, max_completion_tokens=6)["max_tokens"] == 6


def test_given_template_variables_precede_those_of_the_reasoning_effort():
    job = chat(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})
    assert job["chat_template_kwargs"] == {"reasoning_effort": "none", "enable_thinking": True}


def test_logprobs_ask_for_alternatives_and_bytes():
    assert "logprobs" not in chat(logprobs=False)
    assert {name: chat(logprobs=True)[name] for name in ("logprobs", "token_bytes")} == {
        "logprobs": 0,
        "token_bytes": True,
    }
    assert chat(logprobs=True, top_logprobs=4)["logprobs"] == 4


def test_each_choice_is_a_job_with_the_next_seed():
    jobs = ChatRequest.parse(json.dumps({"messages": HELLO, "n": 3, "seed": 2**64 - 2}).encode()).jobs("m")
    assert [job["seed"] for job in jobs] == [2**64 - 2, 2**64 - 1, 0]
    assert ["seed" in job for job in ChatRequest.parse({"messages": HELLO, "n": 2}).jobs("m")] == [False, False]


@pytest.mark.parametrize(
    ("choice", "tools", "expected"),
    [
        ("auto", [TOOL], {"tools": [TOOL], "tool_choice": "auto"}),
        ("none", [TOOL], {"tools": [TOOL], "tool_choice": "none"}),
        ("required", [TOOL], {"tools": [TOOL], "tool_choice": "required"}),
        (
            {"type": "function", "function": {"name": "now"}},
            [TOOL],
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "now"}}},
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [OTHER]}},
            [TOOL, OTHER],
            {"tools": [OTHER], "tool_choice": "required"},
        ),
        ("auto", None, {}),
        ("none", [], {}),
    ],
)
def test_tool_choices_of_every_form_become_the_job_s(choice, tools, expected):
    job = chat(tool_choice=choice, tools=tools)
    assert {name: job[name] for name in ("tools", "tool_choice") if name in job} == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {}}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"cache_prompt": True}, "cache_prompt"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"verbose": True}}, "stream_options.verbose"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "zzz": 1}]}]},
            "messages[0].content[0].zzz",
        ),
        ({"messages": [{"role": "user", "content": "x", "refusal": "z"}]}, "messages[0].refusal"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": allowed({"name": "now"}) | {"zzz": 1}}, "tool_choice.zzz"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [TOOL], "tool_choice": allowed({"name": []})}, "tool_choice.allowed_tools.tools"),
        ({"tools": [TOOL], "tool_choice": allowed({"name": "f"})}, "tool_choice.allowed_tools.tools"),
        ({"tools": [TOOL], "tool_choice": allowed("now")}, "tool_choice.allowed_tools.tools"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(fields, param):
    error = refused(ChatRequest, **fields)
    assert error.param == param
    assert next(iter(fields)).split("[")[0] in error.message or param in error.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"messages": NaN}', b"\xff"])
def test_a_body_that_is_no_json_object_is_refused(body):
    with pytest.raises(ApiError) as caught:
        ChatRequest.parse(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_an_answer_can_be_sent_back_as_a_message():
    message = {
        **{"role": "assistant", "content": None, "refusal": None, "annotations": [], "audio": None},
        **{"function_call": None, "reasoning": "hm", "reasoning_content": "hm"},
        "tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
    }
    sent = chat(messages=[*HELLO, message, {"role": "tool", "tool_call_id": "c", "content": "noon"}])["messages"]
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    assert sent[1] == {"role": "assistant", "reasoning_content": "hm", "tool_calls": [call]}
    bare = chat(messages=[*HELLO, {"role": "assistant", "tool_calls": []}])["messages"]
    assert bare[1] == {"role": "assistant", "content": ""}
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    said = chat(messages=[*HELLO, {"role": "assistant", "content": parts}])["messages"]
    assert said[1]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    ("prompt", "n", "expected"),
    [
        ("a", 1, [{"prompt": "a"}]),
        ("a", 2, [{"prompt": "a"}] * 2),
        (["a", "b"], 2, [{"prompt": "a"}] * 2 + [{"prompt": "b"}] * 2),
        ([1, 2], 1, [{"prompt_tokens": [1, 2]}]),
        ([[1, 2], [3]], 1, [{"prompt_tokens": [1, 2]}, {"prompt_tokens": [3]}]),
    ],
)
def test_prompts_of_every_form_become_jobs(prompt, n, expected):
    jobs = CompletionRequest.parse({"prompt": prompt, "n": n}).jobs("m")
    assert jobs == [each | {"model": "m", "max_tokens": 16} for each in expected]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ["a", 1]},
        {"prompt": [True]},
        {"prompt": ["x"] * 129},
        {"suffix": "end"},
        {"best_of": 3},
        {"echo": True, "logprobs": 1},
    ],
)
def test_a_completion_that_cannot_be_served_is_refused(fields):
    refused(CompletionRequest, **fields)


def test_an_echo_needs_a_prompt_of_text():
    with pytest.raises(ApiError, match="echo: only with prompts of text"):
        CompletionRequest.parse({"prompt": [1], "echo": True}).echoes()
