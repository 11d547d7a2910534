"""`Last-Event-ID`: a stream goes on where it broke, at any gateway."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from tests.gateway.gateways import events_of, gateway
from tests.gateway.scripted import last_user, scripted_model
from tests.gateway.test_answer import joined
from tests.gateway.test_chat import ANSWERS, TOOLS
from tests.jobs.harness import wait_until
from tests.service.serving import LONG_LEASE, serving

OPTIONS = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
async def two(harness):
    """Two gateways beside one worker that answers with ANSWERS."""
    model = scripted_model(lambda prompt: ANSWERS.get(last_user(prompt), "what?"), step_s=0.002)
    async with serving(harness, model, lease=LONG_LEASE), gateway(harness) as one, gateway(harness) as other:
        for each in (one, other):
            await each.wait_for_model("scripted")
        yield one, other


async def stream(running, body, last_id=None, path="/v1/chat/completions"):
    headers = {"Last-Event-ID": last_id} if last_id else {}
    response = await running.http().post(path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return events_of(response.text)


def body_of(content, **fields):
    messages = [{"role": "user", "content": content}]
    return {"model": "scripted", "messages": messages, "tools": TOOLS, "logprobs": True, **OPTIONS, **fields}


@pytest.mark.parametrize("content", ["think", "both", "emoji"])
async def test_the_rest_follows_any_event_exactly(two, content):
    one, other = two
    body = body_of(content)
    whole = await stream(one, body)
    for cut in range(len(whole) - 1):
        rest = await stream(other, body, whole[cut]["id"])
        assert messages_of([*whole[: cut + 1], *rest]) == messages_of(whole)
    assert [event["data"] for event in rest] == ["[DONE]"]
    assert other.metric("gateway_jobs_total") == 0


async def test_a_stream_of_several_choices_resumes_each_of_them(two):
    one, other = two
    body = body_of("both", n=3)
    whole = await stream(one, body)
    assert len(messages_of(whole)[0]) == 3
    for cut in range(0, len(whole) - 1, 3):
        rest = await stream(other, body, whole[cut]["id"])
        assert messages_of([*whole[: cut + 1], *rest]) == messages_of(whole)


def messages_of(events):
    """The joined deltas and log-probabilities of each choice, finish reasons and usage."""
    deltas, logprobs, ends, usage = defaultdict(list), defaultdict(list), {}, None
    assert events[-1] == {"data": "[DONE]"}
    for event in events[:-1]:
        chunk = json.loads(event["data"])
        assert usage is None, "a chunk after the usage"
        usage = chunk["usage"]
        for choice in chunk["choices"]:
            assert choice["index"] not in ends, "a chunk after the finish reason"
            deltas[choice["index"]].append(choice["delta"])
            logprobs[choice["index"]] += (choice["logprobs"] or {"content": []})["content"]
            ends |= {choice["index"]: choice["finish_reason"]} if choice["finish_reason"] else {}
    return {index: joined(each) for index, each in deltas.items()}, logprobs, ends, usage


async def test_a_completion_resumes_with_the_right_offsets(two):
    one, other = two
    body = {"model": "scripted", "prompt": "emoji", "logprobs": 1, **OPTIONS}
    whole = await stream(one, body, path="/v1/completions")
    for cut in range(len(whole) - 1):
        rest = await stream(other, body, whole[cut]["id"], path="/v1/completions")
        assert offsets_of([*whole[: cut + 1], *rest]) == [0, 1, 1, 1, 1, 2]


def offsets_of(events):
    chunks = [json.loads(event["data"]) for event in events[:-1]]
    found = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    return [offset for each in found for offset in each["text_offset"]]


async def test_an_event_s_id_has_the_redis_entry_s(two):
    one, _ = two
    whole = await stream(one, body_of("emoji"))
    job_id = json.loads(whole[0]["data"])["id"]
    entries = {item.entry_id for item in [item async for item in one.client.events(job_id, idle_s=5)]}
    ids = [event["id"].split(":") for event in whole[:-1]]
    assert {group for group, _, _ in ids} == {job_id}
    assert {entry for _, entry, _ in ids} <= entries


@pytest.mark.parametrize(
    ("last_id", "status"),
    [
        ("5-1", 400),
        ("chatcmpl-x:1-1:1", 400),
        (f"cmpl-{'a' * 32}:1-1:1", 400),
        (f"chatcmpl-{'a' * 32}:1-1:1.1", 400),
        (f"chatcmpl-{'a' * 32}:1-1:1", 400),
    ],
)
async def test_a_last_event_id_of_no_stream_is_refused(two, last_id, status):
    one, _ = two
    response = await one.http().post("/v1/chat/completions", json=body_of("emoji"), headers={"Last-Event-ID": last_id})
    assert response.status_code == status
    assert response.json()["error"]["param"] == "Last-Event-ID"


async def test_a_stream_that_has_expired_is_not_found(two):
    one, _ = two
    last_id = (await stream(one, body_of("emoji")))[0]["id"]

    async def settled() -> bool:
        return await one.client.queue_length() == 0

    await wait_until(settled, 10)
    await one.client.forget(last_id.partition(":")[0], 0)
    response = await one.http().post("/v1/chat/completions", json=body_of("emoji"), headers={"Last-Event-ID": last_id})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "stream_not_found")


@pytest.mark.parametrize("fields", [{"logprobs": False}, {"seed": 5}, {"user": "somebody"}, {"n": 2}])
async def test_a_stream_is_resumed_by_the_same_request_only(two, fields):
    one, other = two
    last_id = (await stream(one, body_of("emoji")))[0]["id"]
    body = body_of("emoji", **fields)
    response = await other.http().post("/v1/chat/completions", json=body, headers={"Last-Event-ID": last_id})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "stream_mismatch")


async def test_a_last_event_id_of_another_request_than_the_key_s_is_refused(two):
    one, _ = two
    whole = await stream(one, body_of("emoji"))
    headers = {"Last-Event-ID": whole[0]["id"], "Idempotency-Key": "other"}
    response = await one.http().post("/v1/chat/completions", json=body_of("emoji"), headers=headers)
    assert response.status_code == 400


async def test_a_stream_that_a_stopping_gateway_breaks_off_goes_on_at_another_one(harness):
    model = scripted_model(lambda prompt: "x" * 200, step_s=0.01)
    async with serving(harness, model, lease=LONG_LEASE), gateway(harness) as other:
        await other.wait_for_model("scripted")
        body, received = body_of("x", logprobs=False), ""
        async with gateway(harness, grace_s=0.1) as stopping:
            await stopping.wait_for_model("scripted")
            async with stopping.http().stream("POST", "/v1/chat/completions", json=body) as response:
                async for text in response.aiter_text():
                    received += text
                    if not stopping.context.draining:
                        stopping.server.drain()
        *begun, last = events_of(received)
        assert json.loads(last["data"])["error"]["code"] == "draining"
        assert 2 < len(begun) < 150
        rest = await stream(other, body, begun[-1]["id"])
        messages, _, ends, _ = messages_of([*begun, *rest])
        assert (messages[0]["content"], ends) == ("x" * 200, {0: "stop"})
