"""Text completions with OpenAI's client."""

from __future__ import annotations

import pytest

from tests.gateway.gateways import chunks_of, gateway
from tests.gateway.scripted import scripted_model
from tests.service.serving import LONG_LEASE, serving


@pytest.fixture
async def scripted(harness):
    """A gateway whose worker answers every prompt with a smiling one."""
    model = scripted_model(lambda prompt: f"{prompt} 😀")
    async with serving(harness, model, lease=LONG_LEASE), gateway(harness) as running:
        await running.wait_for_model("scripted")
        yield running


async def test_a_completion_is_the_text_that_follows_the_prompt(gate):
    answer = await gate.openai().completions.create(model="echo", prompt="abc", max_tokens=6)
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == (
        "text_completion",
        "abcabc",
        "length",
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)


async def test_a_completion_has_16_tokens_at_most_by_default(gate):
    answer = await gate.openai().completions.create(model="echo", prompt="abc")
    assert answer.usage.completion_tokens == 16


async def test_prompts_and_their_choices_are_indexed_prompt_by_prompt(gate):
    answer = await gate.openai().completions.create(model="echo", prompt=["ab", "xyz"], n=2, max_tokens=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "ab"), (1, "ab"), (2, "xy"), (3, "xy")]
    assert answer.usage.prompt_tokens == 2 + 3
    assert answer.usage.completion_tokens == 8


async def test_token_ids_are_a_prompt(gate):
    with_text = await gate.openai().completions.create(model="echo", prompt="ab", max_tokens=2)
    ids = [item.event.id async for item in gate.client.events(with_text.id, idle_s=5) if item.kind == "token"]
    answer = await gate.openai().completions.create(model="echo", prompt=ids, max_tokens=2)
    assert answer.choices[0].text == "ab"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_puts_the_prompt_before_the_answer(gate, stream):
    body = {"model": "echo", "prompt": ["ab", "xyz"], "max_tokens": 2, "echo": True, "stream": stream}
    response = await gate.http().post("/v1/completions", json=body)
    texts = {0: "", 1: ""}
    for answer in chunks_of(response.text) if stream else [response.json()]:
        for choice in answer["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "abab", 1: "xyzxy"}


async def test_a_stream_joins_to_the_answer_and_ends_with_the_usage(gate):
    stream = await gate.openai().completions.create(
        model="echo", prompt="abc", max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ("abc" * 7)[:20]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 20)


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_offsets_into_the_text_and_one_entry_for_each_token(scripted, stream):
    request = {"model": "scripted", "prompt": "hi", "logprobs": 2, "max_tokens": 50}
    if stream:
        chunks = [chunk async for chunk in await scripted.openai().completions.create(**request, stream=True)]
        found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
        tokens = [token for each in found for token in each.tokens]
        offsets = [offset for each in found for offset in each.text_offset]
        top = [item for each in found for item in each.top_logprobs]
    else:
        logprobs = (await scripted.openai().completions.create(**request)).choices[0].logprobs
        tokens, offsets, top = logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs
    assert tokens == ["h", "i", " ", "\\xf0", "\\x9f", "\\x98", "\\x80"]
    assert offsets == [0, 1, 2, 3, 3, 3, 3]
    assert [len(each) for each in top] == [2] * 7
    assert all(token in each for token, each in zip(tokens, top, strict=True))
