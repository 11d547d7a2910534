"""`/v1/messages` with the anthropic package, over a gateway, a worker and a server."""

from __future__ import annotations

import json

import anthropic
import httpx
import pytest

from tests.gateway.gateways import gateway
from tests.gateway.stack import keys_of, last_turn, scripted_worker, stack
from tests.jobs.harness import wait_until

TOOL = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
USER = [{"role": "user", "content": "hello"}]


def script(prompt: str) -> str:
    role, text = last_turn(prompt)
    if role == "tool":
        return f"It is {text}."
    if "<tools>" in prompt:
        return f"<think>I need the weather.</think>Let me see. {CALL}"
    if prompt.endswith("</think>\n\n"):
        return "at once"
    if text == "think":
        return "<think>hm</think>done"
    return f"you said {text}"


def request(text: str = "hello", **fields):
    return {"model": "scripted", "max_tokens": 200, "messages": [{"role": "user", "content": text}], **fields}


async def test_a_message_has_the_answer_and_its_usage(harness):
    async with stack(harness, script) as (gate, prompts), gate.anthropic() as client:
        message = await client.messages.create(**request(system="Be brief."))
        prompt = prompts[-1]

    assert [block.text for block in message.content] == ["you said hello"]
    assert message._request_id
    assert (message.role, message.stop_reason, message.model) == ("assistant", "end_turn", "scripted")
    assert message.usage.output_tokens == len("you said hello") + 1
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")


async def test_a_stream_accumulates_to_a_message(harness):
    async with stack(harness, script) as (gate, _), gate.anthropic() as client:
        opening = client.messages.stream(**request("think"))
        async with opening as stream:
            text = "".join([piece async for piece in stream.text_stream])
            message = await stream.get_final_message()

    assert text == "done"
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "hm"
    assert message.stop_reason == "end_turn"


async def test_a_tool_loop_passes_the_blocks_back(harness):
    async with stack(harness, script) as (gate, prompts), gate.anthropic() as client:
        messages = [{"role": "user", "content": "weather in Ulm?"}]
        first = await client.messages.create(**request(tools=[TOOL]) | {"messages": messages})
        call = first.content[-1]
        messages.append(
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in first.content]}
        )
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        messages.append({"role": "user", "content": [result]})
        second = await client.messages.create(**request(tools=[TOOL]) | {"messages": messages})
        prompt = prompts[-1]

    assert [block.type for block in first.content] == ["thinking", "text", "tool_use"]
    assert (first.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Ulm"})
    assert second.content[-1].text == "It is sunny."
    assert "<think>\nI need the weather.\n</think>\n\nLet me see. \n<tool_call>" in prompt


async def test_a_streamed_tool_call_has_the_input_of_the_unstreamed_one(harness):
    async with stack(harness, script) as (gate, _), gate.anthropic() as client:
        opening = client.messages.stream(**request(tools=[TOOL]))
        async with opening as stream:
            events = [event async for event in stream]
            message = await stream.get_final_message()

    pieces = [
        event.delta.partial_json for event in events if getattr(getattr(event, "delta", None), "partial_json", None)
    ]
    assert json.loads("".join(pieces)) == message.content[-1].input == {"city": "Ulm"}
    assert len(pieces) > 1


async def test_disabled_thinking_reaches_the_template(harness):
    async with stack(harness, script) as (gate, _), gate.anthropic() as client:
        message = await client.messages.create(**request("think", thinking={"type": "disabled"}))

    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == "at once"


async def test_a_stop_sequence_ends_the_answer_and_is_named(harness):
    async with stack(harness, script) as (gate, _), gate.anthropic() as client:
        message = await client.messages.create(**request(stop_sequences=["said"]))

    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "said")
    assert message.content[0].text == "you "


async def test_an_answer_at_its_limit_reports_max_tokens(harness):
    async with stack(harness, script) as (gate, _), gate.anthropic() as client:
        message = await client.messages.create(**request(max_tokens=3))

    assert message.stop_reason == "max_tokens"
    assert message.content[0].text == "you"


async def test_tokens_are_counted_as_a_message_counts_them(harness):
    async with stack(harness, script) as (gate, _), gate.anthropic() as client:
        count = await client.messages.count_tokens(model="scripted", messages=USER, system="Be brief.", tools=[TOOL])
        message = await client.messages.create(**request(system="Be brief.", tools=[TOOL]))

        async def idle() -> bool:
            return not await gate.client.queue()

        await wait_until(idle)

    usage = message.usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens > 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"extra_body": {"frob": 1}}, "frob"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"extra_body": {"temperature": 9}}, "temperature"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages[1]"),
        ({"stop_sequences": ["x" * 200]}, "stop_sequences[0]"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(harness, fields, named):
    async with stack(harness, script) as (gate, _), gate.anthropic() as client:
        with pytest.raises(anthropic.BadRequestError) as raised:
            await client.messages.create(**request() | fields)

    assert raised.value.body["type"] == "error"
    assert raised.value.body["error"]["type"] == "invalid_request_error"
    assert named in raised.value.body["error"]["message"]


async def test_a_refused_schema_is_named_as_in_the_request_when_tokens_are_counted(harness):
    async with stack(harness, script) as (gate, _):
        config = {"format": {"type": "json_schema", "schema": {"maximum": 10**30}}}
        body = {"model": "scripted", "messages": USER, "output_config": config}
        refused = await gate.http().post("/v1/messages/count_tokens", json=body)

    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("output_config.format.schema.maximum: ")


async def test_errors_have_the_types_of_the_api(harness):
    keys = keys_of("one", requests_per_minute=1)
    async with scripted_worker(harness, script), gateway(harness, keys=keys) as gate:
        await gate.wait_for_model("scripted")
        async with gate.anthropic(api_key="wrong-key") as client:
            with pytest.raises(anthropic.AuthenticationError) as raised:
                await client.messages.create(**request())
            assert raised.value.body["error"]["type"] == "authentication_error"
        async with gate.anthropic(api_key="key-of-one") as client:
            with pytest.raises(anthropic.NotFoundError) as raised:
                await client.messages.create(**request() | {"model": "other"})
            assert raised.value.body["error"]["type"] == "not_found_error"
            await client.messages.create(**request())
            with pytest.raises(anthropic.RateLimitError) as raised:
                await client.messages.create(**request())
            assert raised.value.response.headers["retry-after"]


async def test_a_streamed_request_that_a_worker_refuses_has_the_status_of_its_error(harness):
    async with stack(harness, script) as (gate, _), gate.anthropic() as client:
        with pytest.raises(anthropic.BadRequestError) as raised:
            await client.messages.create(**request(max_tokens=10**6), stream=True)

    assert "max_tokens" in raised.value.body["error"]["message"]


async def test_an_error_in_the_stream_is_an_error_event(harness):
    async with stack(harness, script, step_s=0.02) as (gate, _), gate.anthropic() as client:
        stream = await client.messages.create(**request("x" * 300, max_tokens=400), stream=True)
        events = aiter(stream)
        await gate.client.cancel((await anext(events)).message.id)
        with pytest.raises(anthropic.APIStatusError) as raised:
            await collect(events)

    assert "cancelled" in str(raised.value)


async def test_a_disconnect_cancels_the_job(harness):
    async with stack(harness, script, step_s=0.05) as (gate, _), gate.anthropic() as client:
        stream = await client.messages.create(**request("x" * 300, max_tokens=400), stream=True)
        await anext(aiter(stream))
        await stream.close()

        async def cancelled() -> bool:
            return bool(gate.logged("cancelled"))

        await wait_until(cancelled)


async def test_a_broken_stream_is_resumed_after_the_last_event_id(harness):
    headers = {"Idempotency-Key": "k1"}
    async with stack(harness, script, step_s=0.01) as (gate, _), httpx.AsyncClient(timeout=20) as client:
        whole = await read_events(client, gate, headers)
        half = len(whole) // 2
        rest = await read_events(client, gate, headers | {"Last-Event-ID": whole[half - 1][0]})

    assert rest == whole[half:]
    assert whole[0][1]["type"] == "message_start"


async def collect(events):
    return [event async for event in events]


async def read_events(client, gate, headers):
    """Ids and data of the events of one streamed request."""
    events, event_id = [], ""
    body = request(stream=True)
    async with client.stream("POST", f"{gate.url}/v1/messages", json=body, headers=headers) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                events.append((event_id, json.loads(line[6:])))
    return events
