"""Answers of SmolLM2 beside those of llama.cpp's HTTP server: the same keys in the same places."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.gateway.gateways import chunks_of

EXTENSIONS = frozenset({"timings", "choices[].logprobs.content[].id", "choices[].logprobs.content[].top_logprobs[].id"})
"""Keys of llama.cpp's that OpenAI's API does not have."""
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"messages": QUESTION, "max_tokens": 4, "temperature": 0}


def keys_of(value: Any, path: str = "") -> set[str]:
    """The paths of all keys; items of a list share one."""
    if isinstance(value, dict):
        here = {f"{path}{name}": item for name, item in value.items()}
        return set(here).union(*(keys_of(item, f"{name}.") for name, item in here.items()))
    if isinstance(value, list):
        return set().union(*(keys_of(item, f"{path.removesuffix('.')}[].") for item in value))
    return set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"prompt": "Paris is", "max_tokens": 4, "temperature": 0}),
    ],
)
async def test_an_answer_has_the_keys_of_llama_cpp_s(smollm2_gate, llama, path, body):
    theirs = await asyncio.to_thread(llama._post, path, body)
    ours = (await smollm2_gate.http().post(path, json=body)).json()
    missing = keys_of(theirs) - keys_of(ours)
    assert {key for key in missing if not key.startswith("timings.")} <= EXTENSIONS


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Paris is", "max_tokens": 4})]
)
async def test_a_stream_s_chunks_have_the_keys_of_llama_cpp_s(smollm2_gate, llama, path, body):
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    theirs = keys_of(chunks_of(await asyncio.to_thread(llama.post_text, path, body)))
    ours = keys_of(chunks_of((await smollm2_gate.http().post(path, json=body)).text))
    assert {key for key in theirs - ours if not key.startswith("[].timings")} == set()


async def test_an_error_has_the_keys_of_openai_s_also_where_llama_cpp_has_fewer(smollm2_gate, llama):
    with pytest.raises(RuntimeError) as refused:
        await asyncio.to_thread(llama._post, "/v1/chat/completions", {"messages": "x"})
    theirs = str(refused.value)
    ours = (await smollm2_gate.http().post("/v1/chat/completions", json={"messages": "x"})).json()
    assert "invalid_request_error" in theirs
    assert ours["error"]["type"] == "invalid_request_error"


async def test_smollm2_answers_openai_s_client_streamed_and_not(smollm2_gate):
    client = smollm2_gate.openai()
    request = {"model": "SmolLM2", "messages": QUESTION, "max_tokens": 12, "temperature": 0}
    answer = await client.chat.completions.create(**request)
    assert "Paris" in answer.choices[0].message.content
    stream = await client.chat.completions.create(**request, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == answer.choices[0].message.content
    logprobs = await client.chat.completions.create(**request, logprobs=True, top_logprobs=3)
    content = logprobs.choices[0].logprobs.content
    assert b"".join(bytes(item.bytes) for item in content).decode() == text
    assert all(item.top_logprobs[0].token == item.token for item in content)


def test_paths_of_keys_are_found_in_maps_and_lists():
    assert keys_of(json.loads('{"a": [{"b": 1}, {"c": {"d": 2}}]}')) == {"a", "a[].b", "a[].c", "a[].c.d"}
