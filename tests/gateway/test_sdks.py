"""Other clients of OpenAI's API: openai-agents, langchain-openai, pydantic-ai, each with a tool."""

from __future__ import annotations

import json

import pytest

from tests.gateway.gateways import gateway
from tests.gateway.scripted import scripted_model
from tests.service.serving import LONG_LEASE, serving

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ANSWER = "It is sunny in Köln."
QUESTION = "How is the weather in Köln?"


def script(prompt):
    """Call the tool, then answer."""
    return ANSWER if "<tool_response>" in prompt else CALL


@pytest.fixture
async def gate(harness):
    async with serving(harness, scripted_model(script), lease=LONG_LEASE), gateway(harness) as running:
        await running.wait_for_model("scripted")
        yield running


def weather(city: str) -> str:
    assert city == "Köln"
    return json.dumps({"city": city, "sky": "sunny"})


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_agents_runs_a_tool_loop(gate, stream):
    from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled

    set_tracing_disabled(True)

    @function_tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return weather(city)

    model = OpenAIChatCompletionsModel("scripted", gate.openai())
    agent = Agent(name="a", instructions="Be brief.", model=model, tools=[get_weather])
    if stream:
        running = Runner.run_streamed(agent, QUESTION)
        async for _ in running.stream_events():
            pass
        assert running.final_output == ANSWER
    else:
        assert (await Runner.run(agent, QUESTION)).final_output == ANSWER


def chat_openai(gate, **options):
    from langchain_openai import ChatOpenAI

    options |= {"base_url": f"{gate.url}/v1", "api_key": "none", "http_async_client": gate.http()}
    return ChatOpenAI(model="scripted", max_retries=0, **options)


async def test_langchain_calls_a_tool_and_sends_its_result(gate):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return weather(city)

    chat = chat_openai(gate).bind_tools([get_weather])
    called = await chat.ainvoke([HumanMessage(QUESTION)])
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Köln"})
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    answer = await chat.ainvoke([HumanMessage(QUESTION), called, result])
    assert answer.content == ANSWER
    assert answer.usage_metadata["output_tokens"] == len(ANSWER.encode()) + 1


async def test_langchain_s_stream_adds_up_to_the_same_tool_call_and_usage(gate):
    from langchain_core.messages import HumanMessage

    parts = [part async for part in chat_openai(gate, stream_usage=True).bind_tools(TOOLS).astream([HumanMessage("x")])]
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    (call,) = whole.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Köln"})
    assert whole.usage_metadata["output_tokens"] > 0


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.mark.parametrize("stream", [False, True])
async def test_pydantic_ai_runs_a_tool_loop(gate, stream):
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("scripted", provider=OpenAIProvider(openai_client=gate.openai()))
    agent = Agent(model)

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Weather of a city."""
        return weather(city)

    if stream:
        async with agent.run_stream(QUESTION) as running:
            assert await running.get_output() == ANSWER
    else:
        result = await agent.run(QUESTION)
        assert result.output == ANSWER
        assert result.usage.output_tokens > 0
