"""Chat completions with OpenAI's client: answers, streams, and what both have in common."""

from __future__ import annotations

import json

import pytest

from tests.gateway.gateways import chunks_of, events_of, gateway
from tests.gateway.recorded_events import end, pages, started, texts
from tests.gateway.scripted import last_user, scripted_model, tokenizer_of
from tests.service.serving import LONG_LEASE, serving
from worker.gateway.answer import ChoiceReader
from worker.gateway.chat_chunks import ChatChunks
from worker.gateway.context import Call
from worker.gateway.jobs import JobGroup
from worker.gateway.keys import Caller
from worker.gateway.sse import DONE

HELLO = [{"role": "user", "content": "hello there"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "Time", "parameters": {"type": "object"}}},
]
ANSWERS = {
    "think": "<think>\nlet me see\n</think>\n\nBlue 🌦 sky.",
    "weather": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln 🌦"}}\n</tool_call>',
    "both": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "emoji": "a😀b",
    "stop": "one, two, three",
    "lines": "a\u2028b\u2029c\x85d\r\ne\x0b\x1cf",
}


@pytest.fixture
async def scripted(harness):
    """A gateway whose worker answers with the text of ANSWERS that the last message names."""
    model = scripted_model(lambda prompt: ANSWERS.get(last_user(prompt), "what?"))
    async with serving(harness, model, lease=LONG_LEASE), gateway(harness) as running:
        await running.wait_for_model("scripted")
        yield running


async def test_an_answer_is_a_chat_completion_whose_usage_equals_the_job_s_end(gate):
    answer = await gate.openai().chat.completions.create(model="echo", messages=HELLO, max_tokens=12)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "user\nhello ",
        "length",
    )
    end = [item.event async for item in gate.client.events(answer.id, idle_s=5)][-1]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (end.prompt_tokens, end.tokens_out)
    assert answer.usage.total_tokens == end.prompt_tokens + end.tokens_out


async def test_a_stream_joins_to_the_unstreamed_answer(gate):
    client = gate.openai()
    whole = await client.chat.completions.create(model="echo", messages=HELLO, max_tokens=15)
    stream = await client.chat.completions.create(
        model="echo", messages=HELLO, max_tokens=15, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (whole.usage.prompt_tokens, 15)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_without_usage_no_chunk_has_it_and_the_last_event_is_done(gate):
    body = {"model": "echo", "messages": HELLO, "max_tokens": 5, "stream": True}
    response = await gate.http().post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert all("usage" not in chunk for chunk in chunks_of(response.text))
    assert all("id" in event for event in events_of(response.text)[:-1])


async def test_several_choices_are_jobs_of_their_own_and_the_usage_is_their_sum(scripted):
    request = {"model": "scripted", "messages": [{"role": "user", "content": "stop"}], "n": 3}
    answer = await scripted.openai().chat.completions.create(**request)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {ANSWERS["stop"]}
    assert answer.usage.completion_tokens == 3 * (len(ANSWERS["stop"]) + 1)
    async with scripted.openai().chat.completions.stream(**request) as stream:
        collected = await stream.get_final_completion()
    assert [choice.message.content for choice in collected.choices] == [ANSWERS["stop"]] * 3


def test_choices_of_a_stream_begin_in_order_whichever_job_starts_first():
    call = Call("r", Caller(), 0.0)
    group = JobGroup(None, call, "chatcmpl-", [{}, {}, {}])
    chunks = ChatChunks(group, [ChoiceReader(run.id) for run in group.runs], "m", include_usage=False)
    recorded = pages([started(), *texts(("final", "x")), end(1)])
    order = [(2, page) for page in recorded] + [(1, page) for page in recorded] + [(0, page) for page in recorded]
    sent = b"".join(chunks.of_page(index, page) for index, page in order) + chunks.usage() + DONE
    choices = [chunk["choices"][0] for chunk in chunks_of(sent)]
    begun = [choice["index"] for choice in choices if "role" in choice["delta"]]
    assert begun == [0, 1, 2]
    assert [choice["index"] for choice in choices[:3]] == [0, 1, 2]
    assert sorted(choice["index"] for choice in choices if choice["finish_reason"]) == [0, 1, 2]


async def test_reasoning_has_both_names_and_is_not_content(scripted):
    body = {"model": "scripted", "messages": [{"role": "user", "content": "think"}]}
    answer = (await scripted.http().post("/v1/chat/completions", json=body)).json()
    message = answer["choices"][0]["message"]
    assert message["content"].strip() == "Blue 🌦 sky."
    assert message["reasoning"].strip() == message["reasoning_content"].strip() == "let me see"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    streamed = await scripted.http().post("/v1/chat/completions", json=body | {"stream": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(streamed.text)]
    for name in ("content", "reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]


async def test_tool_calls_are_equal_streamed_and_not_and_have_ids_of_their_own(scripted):
    client = scripted.openai()
    request = {"model": "scripted", "messages": [{"role": "user", "content": "both"}], "tools": TOOLS}
    answer = await client.chat.completions.create(**request)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    calls = answer.choices[0].message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("get_weather", {"city": "Köln"}),
        ("now", {}),
    ]
    assert len({call.id for call in calls}) == 2
    async with client.chat.completions.stream(**request) as stream:
        streamed = (await stream.get_final_completion()).choices[0].message.tool_calls
    assert [call.function.arguments for call in streamed] == [call.function.arguments for call in calls]
    assert [call.function.name for call in streamed] == ["get_weather", "now"]


async def test_without_parallel_tool_calls_there_is_at_most_one(scripted):
    request = {"model": "scripted", "messages": [{"role": "user", "content": "both"}], "tools": TOOLS}
    answer = await scripted.openai().chat.completions.create(**request, parallel_tool_calls=False)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]


async def test_tools_that_must_not_be_called_leave_the_call_as_text(scripted):
    request = {"model": "scripted", "messages": [{"role": "user", "content": "weather"}], "tools": TOOLS}
    answer = await scripted.openai().chat.completions.create(**request, tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert "get_weather" in answer.choices[0].message.content


async def test_a_stop_string_ends_the_answer_as_stop_and_is_named_beside_it(scripted):
    request = {"model": "scripted", "messages": [{"role": "user", "content": "stop"}], "stop": ["two"]}
    answer = (await scripted.http().post("/v1/chat/completions", json=request)).json()
    choice = answer["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("one, ", "stop", "two")
    ended = (await scripted.http().post("/v1/chat/completions", json=request | {"stop": None})).json()
    assert (ended["choices"][0]["finish_reason"], ended["choices"][0]["stop_reason"]) == ("stop", None)


async def test_a_stop_token_of_the_request_ends_the_answer_and_is_named_beside_it(scripted):
    tokenizer = tokenizer_of("qwen3")
    token = next(id for id in range(256) if tokenizer.token_bytes(id) == b",")
    request = {"model": "scripted", "messages": [{"role": "user", "content": "stop"}], "stop_token_ids": [token]}
    choice = (await scripted.http().post("/v1/chat/completions", json=request)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("one", "stop", token)
    response = await scripted.http().post("/v1/chat/completions", json=request | {"stream": True})
    assert chunks_of(response.text)[-1]["choices"][0]["stop_reason"] == token


@pytest.mark.parametrize("stream", [False, True])
async def test_the_bytes_of_logprobs_join_to_the_text_s_utf8_also_of_a_split_emoji(scripted, stream):
    request = {"model": "scripted", "messages": [{"role": "user", "content": "emoji"}], "logprobs": True}
    client = scripted.openai()
    if stream:
        async with client.chat.completions.stream(**request, top_logprobs=2) as events:
            answer = await events.get_final_completion()
    else:
        answer = await client.chat.completions.create(**request, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(item.bytes) for item in content) == answer.choices[0].message.content.encode()
    assert [len(item.bytes) for item in content] == [1] * 6
    assert all(len(item.top_logprobs) == 2 and item.top_logprobs[0].bytes == item.bytes for item in content)


async def test_a_request_without_a_model_goes_to_the_only_one(gate):
    answer = (await gate.http().post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 3})).json()
    assert answer["model"] == "echo"


async def test_the_job_has_the_request_s_fields_and_ids(gate):
    headers = {"X-Request-Id": "request-7", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    body = {"model": "echo", "messages": HELLO, "max_tokens": 4, "seed": 11, "user": "ada"}
    response = await gate.http().post("/v1/chat/completions", json=body, headers=headers)
    assert response.headers["x-request-id"] == "request-7"
    items = [item async for item in gate.client.events(response.json()["id"], idle_s=5)]
    assert (items[0].event.seed, items[0].event.max_tokens) == (11, 4)
    assert {(item.envelope.correlation_id, item.envelope.traceparent) for item in items} == {
        ("request-7", headers["traceparent"])
    }


async def test_a_keep_alive_comment_is_sent_while_nothing_happens(harness):
    async with gateway(harness, keep_alive_s=0.05) as running:
        async with serving(harness, scripted_model(lambda prompt: "x"), lease=LONG_LEASE) as worker:
            await running.wait_for_model("scripted")
            await worker.stop()
        body = {"model": "scripted", "messages": HELLO, "stream": True}
        async with running.http().stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            assert [await anext(lines) for _ in range(3)] == [": keep-alive", "", ": keep-alive"]


async def test_line_separators_of_unicode_do_not_break_an_event(scripted):
    request = {"model": "scripted", "messages": [{"role": "user", "content": "lines"}], "stream": True}
    stream = await scripted.openai().chat.completions.create(**request)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWERS["lines"]
    response = await scripted.http().post("/v1/chat/completions", json=request)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(response.text)]  # splits at every kind of line end
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWERS["lines"]
