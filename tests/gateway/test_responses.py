"""`/v1/responses` with the openai package, over a gateway, a worker and a server."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from tests.gateway.gateways import fake_worker, gateway
from tests.gateway.stack import last_turn, scripted_worker, stack
from tests.jobs.harness import wait_until
from worker.jobs.documents import response_key

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'


def script(prompt: str) -> str:
    """Think, call the weather tool if there are tools, and report what it returned."""
    role, text = last_turn(prompt)
    if role == "tool":
        return f"It is {text}."
    if "<tools>" in prompt:
        return f"<think>I need the weather.</think>{CALL}"
    if text == "think":
        return "<think>hm</think>done"
    if text == "emoji":
        return "\U0001f600!"
    if text == "silent":
        return ""
    return f"you said {text}"


def texts(events, kind):
    return "".join(event.delta for event in events if event.type == kind)


async def test_a_response_has_the_answer_and_its_usage(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        response = await client.responses.create(model="scripted", input="hello", instructions="Be brief.")

    assert response.output_text == "you said hello"
    assert response.status == "completed"
    assert response.instructions == "Be brief."
    assert response.usage.output_tokens == len("you said hello") + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


async def test_a_stream_gives_the_events_of_the_package_and_its_accumulated_response(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        stream = client.responses.stream(model="scripted", input="think")
        async with stream as opened:
            events = [event async for event in opened]
            response = await opened.get_final_response()

    assert events[0].type == "response.created"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert texts(events, "response.reasoning_text.delta") == "hm"
    assert texts(events, "response.output_text.delta") == response.output_text == "done"
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert events[-1].type == "response.completed"


async def test_a_tool_loop_passes_the_items_back(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        history = [{"role": "user", "content": "weather in Ulm?"}]
        first = await client.responses.create(model="scripted", input=history, tools=[TOOL])
        reasoning, call = first.output
        history += [item.model_dump() for item in first.output]
        history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
        second = await client.responses.create(model="scripted", input=history, tools=[TOOL])

    assert reasoning.content[0].text == "I need the weather."
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Ulm"})
    assert second.output_text == "It is sunny."


async def test_a_streamed_tool_call_equals_the_unstreamed_one(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        whole = await client.responses.create(model="scripted", input="weather?", tools=[TOOL])
        async with client.responses.stream(model="scripted", input="weather?", tools=[TOOL]) as stream:
            events = [event async for event in stream]

    arguments = texts(events, "response.function_call_arguments.delta")
    assert arguments == whole.output[-1].arguments
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [arguments]


async def test_an_earlier_response_is_continued_from_what_is_stored(harness):
    async with stack(harness, script) as (gate, prompts), gate.openai() as client:
        first = await client.responses.create(model="scripted", input="one", instructions="Old.")
        second = await client.responses.create(model="scripted", input="two", previous_response_id=first.id)
        third = await client.responses.create(model="scripted", input="three", previous_response_id=second.id)
        prompt = prompts[-1]

    assert third.output_text == "you said three"
    turns = ["one", "you said one", "two", "you said two", "three"]
    assert [prompt.index(turn) for turn in turns] == sorted(prompt.index(turn) for turn in turns)
    assert "Old." not in prompt, "instructions are not carried over"


async def test_a_tool_call_is_continued_by_its_output_alone(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        first = await client.responses.create(model="scripted", input="weather?", tools=[TOOL])
        output = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "rainy"}
        second = await client.responses.create(
            model="scripted", input=[output], tools=[TOOL], previous_response_id=first.id
        )

    assert second.output_text == "It is rainy."


async def test_an_unknown_earlier_response_is_refused_by_name(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.responses.create(model="scripted", input="x", previous_response_id="resp_" + "0" * 32)

    assert raised.value.param == "previous_response_id"
    assert raised.value.code == "previous_response_not_found"


async def test_a_response_that_is_not_stored_cannot_be_retrieved(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        response = await client.responses.create(model="scripted", input="x", store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)


async def test_a_response_is_retrieved_as_it_was_returned(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        response = await client.responses.create(model="scripted", input="think", metadata={"a": "b"})
        retrieved = await client.responses.retrieve(response.id)

    assert retrieved == response
    assert retrieved.metadata == {"a": "b"}


async def test_a_background_response_runs_without_its_client(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        created = await client.responses.create(model="scripted", input="hello", background=True)

        async def completed() -> bool:
            return (await client.responses.retrieve(created.id)).status == "completed"

        await wait_until(completed)
        response = await client.responses.retrieve(created.id)

    assert created.status == "queued"
    assert response.output_text == "you said hello"
    assert response.background


async def test_a_background_stream_is_continued_after_any_number_at_another_gateway(harness):
    async with scripted_worker(harness, script, step_s=0.01):
        async with gateway(harness) as gate, gate.openai() as client:
            await gate.wait_for_model("scripted")
            stream = await client.responses.create(model="scripted", input="hello", background=True, stream=True)
            received = []
            async for event in stream:
                received.append(event)
                if event.type == "response.output_text.delta" and len(received) > 8:
                    break
            await stream.close()
        response_id, last = received[0].response.id, received[-1].sequence_number
        async with gateway(harness) as other, other.openai() as client:
            rest = [
                event async for event in await client.responses.retrieve(response_id, stream=True, starting_after=last)
            ]
            whole = [event async for event in await client.responses.retrieve(response_id, stream=True)]
            after_the_end = await client.responses.retrieve(response_id, stream=True, starting_after=10_000)
            assert [event async for event in after_the_end] == []

    assert [event.sequence_number for event in rest] == list(range(last + 1, last + 1 + len(rest)))
    assert [*received, *rest] == whole
    assert rest[-1].response.output_text == "you said hello"


async def test_the_stream_of_a_stored_response_accumulates_from_any_number(harness):
    async with stack(harness, script, step_s=0.01) as (gate, _), gate.openai() as client:
        created = await client.responses.create(model="scripted", input="think", background=True)
        stream = client.responses.stream(response_id=created.id, starting_after=6)
        async with stream as opened:
            events = [event async for event in opened]
            response = await opened.get_final_response()

    assert events[0].sequence_number == 7
    assert response.output_text == "done"


async def test_a_cancelled_background_response_stops_its_job(harness):
    async with stack(harness, script, step_s=0.05) as (gate, _), gate.openai() as client:
        stream = await client.responses.create(model="scripted", input="x" * 500, background=True, stream=True)
        events = []
        async for event in stream:
            events.append(event)
            if event.type == "response.output_text.delta":
                cancelled = await client.responses.cancel(events[0].response.id)
                break
        rest = [event async for event in stream]

        async def idle() -> bool:
            return not await gate.client.queue()

        await wait_until(idle)

    assert cancelled.status == "cancelled"
    assert rest[-1].type == "response.failed"
    assert rest[-1].response.status == "cancelled"


async def test_a_background_response_that_waits_is_cancelled_at_once(harness):
    async with gateway(harness) as gate, gate.openai() as client:
        busy = await fake_worker(harness, gate, "scripted")
        created = await client.responses.create(model="scripted", input="x", background=True)
        waiting = await client.responses.retrieve(created.id)
        cancelled = await client.responses.cancel(created.id)
        again = await client.responses.cancel(created.id)
        await busy.close()

    assert (created.status, waiting.status) == ("queued", "queued")
    assert (cancelled.status, again.status) == ("cancelled", "cancelled")


async def test_only_background_responses_can_be_cancelled(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        response = await client.responses.create(model="scripted", input="x")
        with pytest.raises(openai.BadRequestError):
            await client.responses.cancel(response.id)


async def test_a_deleted_response_is_gone(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        response = await client.responses.create(model="scripted", input="x")
        await client.responses.delete(response.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
    ttl = (await harness.keys())[f"inf:{{job:{response.id}}}:events"]
    assert ttl <= 60_000


async def test_a_response_that_is_deleted_while_it_runs_is_cancelled(harness):
    async with stack(harness, script, step_s=0.05) as (gate, _), gate.openai() as client:
        stream = await client.responses.create(model="scripted", input="x" * 500, background=True, stream=True)
        events = aiter(stream)
        created = await anext(events)
        while (await anext(events)).type != "response.output_text.delta":
            pass
        await client.responses.delete(created.response.id)
        rest = [event async for event in events]

    assert rest[-1].response.status == "cancelled"


async def test_a_stored_request_expires_with_its_events(harness):
    async with stack(harness, script, response_retention_s=100.0) as (gate, _), gate.openai() as client:
        response = await client.responses.create(model="scripted", input="x")

        async def shortened() -> bool:
            return (await harness.keys())[response_key(response.id)] <= 100_000

        await wait_until(shortened)


async def test_a_disconnect_cancels_a_foreground_response(harness):
    async with (
        stack(harness, script, step_s=0.05, response_retention_s=100.0) as (gate, _),
        gate.openai() as client,
    ):
        stream = await client.responses.create(model="scripted", input="x" * 500, stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()

        async def cancelled() -> bool:
            return bool(gate.logged("cancelled"))

        await wait_until(cancelled)
        ttls = [ttl for key, ttl in (await harness.keys()).items() if key.endswith(":response")]
        assert len(ttls) == 1
        assert ttls[0] <= 100_000


async def test_a_disconnect_does_not_cancel_a_background_response(harness):
    async with stack(harness, script, step_s=0.01) as (gate, _), gate.openai() as client:
        stream = await client.responses.create(model="scripted", input="hello", background=True, stream=True)
        created = await anext(aiter(stream))
        await stream.close()

        async def completed() -> bool:
            return (await client.responses.retrieve(created.response.id)).status == "completed"

        await wait_until(completed)
        assert not gate.logged("cancelled")


async def test_an_answer_at_its_limit_is_incomplete(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        response = await client.responses.create(model="scripted", input="hello", max_output_tokens=3)

    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "you"


async def test_log_probabilities_come_with_text_and_stream(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        response = await client.responses.create(model="scripted", input="emoji", **wanted)
        async with client.responses.stream(model="scripted", input="emoji", **wanted) as stream:
            events = [event async for event in stream]

    logprobs = response.output[0].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in logprobs).decode() == "\U0001f600!"
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)
    assert any(event.logprobs for event in events if event.type == "response.output_text.delta")


async def test_an_empty_answer_is_an_empty_message(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        response = await client.responses.create(model="scripted", input="silent")

    assert response.output_text == ""
    assert [item.type for item in response.output] == ["message"]


async def test_an_input_that_is_too_long_is_named(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.responses.create(model="scripted", input="x" * 9000)

    assert (raised.value.param, raised.value.code) == ("input", "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"temperature": 9}, "temperature"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(harness, fields, param):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.responses.create(model="scripted", input="x", **fields)

    assert raised.value.param == param


async def test_a_streamed_request_that_a_worker_refuses_has_the_status_of_its_error(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.responses.create(model="scripted", input="x", max_output_tokens=10**6, stream=True)
        background = await client.responses.create(
            model="scripted", input="x", max_output_tokens=10**6, background=True
        )

        async def failed() -> bool:
            return (await client.responses.retrieve(background.id)).status == "failed"

        await wait_until(failed)
        response = await client.responses.retrieve(background.id)

    assert raised.value.param == "max_output_tokens"
    assert "400 - max_output_tokens: at most " in raised.value.message
    assert response.error.code == "invalid_prompt"


async def test_an_unknown_model_is_not_found(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="other", input="x")


async def test_responses_of_other_tenants_are_not_found(harness):
    async with stack(harness, script, tenants=("one", "two")) as (gate, _):
        one, two = gate.openai(api_key="key-of-one"), gate.openai(api_key="key-of-two")
        async with one, two:
            response = await one.responses.create(model="scripted", input="x")
            await one.responses.retrieve(response.id)
            with pytest.raises(openai.NotFoundError):
                await two.responses.retrieve(response.id)
            with pytest.raises(openai.BadRequestError):
                await two.responses.create(model="scripted", input="y", previous_response_id=response.id)


async def test_a_repeated_request_with_a_key_attaches_to_one_job(harness):
    headers = {"Idempotency-Key": "k1"}
    async with stack(harness, script) as (gate, prompts), gate.openai() as client:
        first = await client.responses.create(model="scripted", input="x", extra_headers=headers)
        second = await client.responses.create(model="scripted", input="x", extra_headers=headers)
        assert len(prompts) == 1

    assert first == second


async def test_a_broken_stream_is_resumed_after_the_last_event_id(harness):
    async with stack(harness, script, step_s=0.01) as (gate, _), httpx.AsyncClient(timeout=20) as client:
        body = {"model": "scripted", "input": "hello", "stream": True}
        headers = {"Idempotency-Key": "k1"}
        whole = await read_events(client, gate, body, headers)
        half = len(whole) // 2
        rest = await read_events(client, gate, body, headers | {"Last-Event-ID": whole[half - 1][0]})

    assert [data for _, data in whole[half:]] == [data for _, data in rest]


async def read_events(client, gate, body, headers):
    """Ids and data of the events of one streamed request."""
    events, event_id = [], ""
    async with client.stream("POST", f"{gate.url}/v1/responses", json=body, headers=headers) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                event_id = line[4:]
            elif line.startswith("data: "):
                events.append((event_id, json.loads(line[6:])))
    return events


async def test_the_agents_package_runs_a_tool_loop(harness):
    from agents import (
        Agent,
        ModelSettings,
        OpenAIResponsesModel,
        RunConfig,
        Runner,
        function_tool,
        set_tracing_disabled,
    )

    set_tracing_disabled(True)
    calls: list[str] = []

    @function_tool
    def weather(city: str) -> str:
        """The weather of a city."""
        calls.append(city)
        return "windy"

    async with stack(harness, script) as (gate, _), gate.openai() as client:
        model = OpenAIResponsesModel("scripted", client)
        agent = Agent(
            "a", instructions="Be brief.", model=model, tools=[weather], model_settings=ModelSettings(temperature=0)
        )
        result = await Runner.run(agent, "weather in Ulm?", run_config=RunConfig(tracing_disabled=True))
        streamed = Runner.run_streamed(agent, "weather in Ulm?", run_config=RunConfig(tracing_disabled=True))
        kinds = {event.type async for event in streamed.stream_events()}

    assert calls == ["Ulm", "Ulm"]
    assert result.final_output == streamed.final_output == "It is windy."
    assert "raw_response_event" in kinds


async def test_the_synchronous_client_streams_from_a_thread(harness):
    def run(url: str) -> str:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        with client, client.responses.stream(model="scripted", input="hello") as stream:
            return stream.get_final_response().output_text

    async with stack(harness, script) as (gate, _):
        assert await asyncio.to_thread(run, gate.url) == "you said hello"
