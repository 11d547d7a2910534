"""Responses and Messages of SmolLM2 beside those of llama.cpp's HTTP server."""

from __future__ import annotations

import asyncio
import json
from itertools import groupby

import pytest

from tests.gateway.gateways import events_of
from tests.gateway.test_llama_server import QUESTION, keys_of

MESSAGE = {"model": "SmolLM2", "messages": QUESTION, "max_tokens": 4, "temperature": 0}
RESPONSE = {"model": "SmolLM2", "input": "What is the capital of France?", "max_output_tokens": 4, "temperature": 0}
APIS = [("/v1/messages", MESSAGE), ("/v1/responses", RESPONSE)]


@pytest.mark.parametrize(("path", "body"), APIS)
async def test_an_answer_has_the_keys_of_llama_cpp_s(smollm2_gate, llama, path, body):
    theirs = await asyncio.to_thread(llama._post, path, body)
    ours = (await smollm2_gate.http().post(path, json=body)).json()

    assert keys_of(theirs) - keys_of(ours) == set()


@pytest.mark.parametrize(("path", "body"), APIS)
async def test_a_stream_has_the_events_of_llama_cpp_s_with_their_keys(smollm2_gate, llama, path, body):
    body = body | {"stream": True}
    theirs = events_of(await asyncio.to_thread(llama.post_text, path, body))
    ours = events_of((await smollm2_gate.http().post(path, json=body)).text)

    assert in_turn(ours) == [name for name in in_turn(theirs) if name]
    for name in in_turn(theirs):
        missing = keys_of_event(theirs, name) - keys_of_event(ours, name)
        assert {key for key in missing if not key.startswith("timings")} == set()


def in_turn(events):
    """The names of events, each run of one name once. An answer at its limit is incomplete here."""
    names = [event["event"].replace("response.incomplete", "response.completed") for event in events]
    return [name for name, _ in groupby(names)]


def keys_of_event(events, name):
    names = (name, name.replace("response.completed", "response.incomplete"))
    return set().union(*(keys_of(json.loads(event["data"])) for event in events if event["event"] in names))


async def test_a_prompt_has_as_many_tokens_as_llama_cpp_counts(smollm2_gate, llama):
    body = {"model": "SmolLM2", "messages": QUESTION, "system": "Be brief."}
    theirs = await asyncio.to_thread(llama._post, "/v1/messages/count_tokens", body)
    ours = (await smollm2_gate.http().post("/v1/messages/count_tokens", json=body)).json()

    assert ours == theirs


async def test_smollm2_answers_the_clients_of_both_apis_alike(smollm2_gate):
    message = await smollm2_gate.anthropic().messages.create(
        model="SmolLM2", max_tokens=12, messages=QUESTION, extra_body={"temperature": 0}
    )
    response = await smollm2_gate.openai().responses.create(
        model="SmolLM2", input=QUESTION, max_output_tokens=12, temperature=0
    )

    assert "Paris" in response.output_text
    assert message.content[0].text == response.output_text
