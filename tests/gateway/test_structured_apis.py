"""Structured output of the Responses and the Messages API, parsed by their packages."""

from __future__ import annotations

import openai
import pytest
from pydantic import BaseModel

from tests.gateway.test_llama_server import QUESTION


class City(BaseModel):
    name: str
    capital: bool


async def test_the_openai_package_parses_a_response(smollm2_gate):
    client = smollm2_gate.openai()
    request = {"model": "SmolLM2", "input": QUESTION, "max_output_tokens": 80, "temperature": 0}
    response = await client.responses.parse(**request, text_format=City)
    opening = client.responses.stream(**request, text_format=City)
    async with opening as stream:
        streamed = await stream.get_final_response()

    assert isinstance(response.output_parsed, City)
    assert streamed.output_parsed == response.output_parsed


async def test_the_anthropic_package_parses_a_message(smollm2_gate):
    message = await smollm2_gate.anthropic().messages.parse(
        model="SmolLM2", max_tokens=120, messages=QUESTION, output_format=City
    )

    assert isinstance(message.parsed_output, City)


async def test_a_schema_that_cannot_be_enforced_is_refused_by_its_keyword(smollm2_gate):
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object", "not": {}}}
    with pytest.raises(openai.BadRequestError) as raised:
        await smollm2_gate.openai().responses.create(model="SmolLM2", input="x", text={"format": form})

    assert raised.value.param == "text.format.schema.not"
