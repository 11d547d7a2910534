"""Structured output through the gateway: OpenAI's `parse`, vLLM's forms, refused schemas, tools."""

from __future__ import annotations

import json
import re

import openai
import pytest
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "Name a city."}]


class City(BaseModel):
    name: str = Field(max_length=12)
    million: int = Field(ge=0, le=40)


async def test_parse_returns_the_pydantic_model(smollm2_gate):
    answer = await smollm2_gate.openai().chat.completions.parse(
        model="SmolLM2", messages=QUESTION, response_format=City, max_tokens=120, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, City)


async def test_a_stream_of_structured_output_parses_too(smollm2_gate):
    async with smollm2_gate.openai().chat.completions.stream(
        model="SmolLM2", messages=QUESTION, response_format=City, max_tokens=120, temperature=0
    ) as stream:
        answer = await stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "regex", "regex": "[0-9]{4}"}}, "[0-9]{4}"),
        ({"structured_outputs": {"regex": "[a-c]{3}"}}, "[a-c]{3}"),
        ({"structured_outputs": {"choice": ["Paris", "Rome"]}}, "Paris|Rome"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_every_form_of_a_request_constrains_the_text(smollm2_gate, path, fields, pattern):
    prompt = {"messages": QUESTION} if "chat" in path else {"prompt": "A city:"}
    body = {"model": "SmolLM2", "max_tokens": 20, "temperature": 0.8, "seed": 3, **prompt, **fields}
    choice = (await smollm2_gate.http().post(path, json=body)).json()["choices"][0]
    text = choice["message"]["content"] if "chat" in path else choice["text"]
    assert re.fullmatch(pattern, text)


async def test_json_mode_answers_with_an_object(smollm2_gate):
    answer = await smollm2_gate.openai().chat.completions.create(
        model="SmolLM2", messages=QUESTION, response_format={"type": "json_object"}, max_tokens=200, temperature=0
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "null"}}}}, "not"),
        ({"type": "regex", "regex": "("}, "response_format"),
        ({"type": "poem"}, "response_format"),
    ],
)
async def test_what_cannot_be_constrained_has_status_400_that_names_it(smollm2_gate, given, named):
    with pytest.raises(openai.BadRequestError) as refused:
        await smollm2_gate.openai().chat.completions.create(model="SmolLM2", messages=QUESTION, response_format=given)
    assert named in refused.value.message
    assert (refused.value.param or "").startswith("response_format")
