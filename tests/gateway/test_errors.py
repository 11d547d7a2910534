"""Errors: status, shape and headers, before the stream begins and after; what clients retry."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from tests.gateway.gateways import fake_worker, gateway, wait_for_jobs
from tests.jobs.echo import complete, take_next, tokens
from tests.jobs.harness import wait_until
from tests.service.models import SharedModel, failing_model
from tests.service.serving import LONG_LEASE, serving, wait_until_queue_is_empty
from worker.errors import VramOom
from worker.gateway.errors import api_error
from worker.jobs.events import ErrorEvent

HELLO = [{"role": "user", "content": "hello there"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "gpt-9"}, 404, "model_not_found", "model"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"tempo": 1}, 400, "unknown_parameter", "tempo"),
        ({"user": "x" * 300}, 400, "invalid_value", "user"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "context_length_exceeded", "messages"),
        ({"max_tokens": 10**6}, 400, "context_length_exceeded", "max_tokens"),
        ({"logit_bias": {"99999": 1}}, 400, "invalid_value", "logit_bias[99999]"),
        ({"response_format": {"type": "poem"}}, 400, None, "response_format"),
        ({"max_tokens": 10**30}, 400, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 10**6}, 400, "context_length_exceeded", "max_completion_tokens"),
        ({"max_completion_tokens": 10**30}, 400, "invalid_value", "max_completion_tokens"),
        ({"top_k": 10**30}, 400, "invalid_value", "top_k"),
        ({"deadline_ms": 10**400}, 400, "invalid_value", "deadline_ms"),
        ({"seed": 2**64}, 400, "invalid_value", "seed"),
        ({"seed": -(2**63) - 1}, 400, "invalid_value", "seed"),
        ({"chat_template_kwargs": {"a": 10**30}}, 400, "invalid_value", "chat_template_kwargs.a"),
        ({"structured_outputs": {"json": {"maximum": 10**30}}}, 400, "invalid_value", "structured_outputs.json"),
        ({"structured_outputs": {"json": 7}}, 400, "invalid_value", "structured_outputs.json"),
        ({"structured_outputs": {"regex": 7}}, 400, "invalid_value", "structured_outputs.regex"),
        ({"structured_outputs": {"json_object": False}}, 400, None, "structured_outputs.json_object"),
    ],
)
async def test_a_wrong_request_has_status_and_field_streamed_or_not(gate, stream, fields, status, code, param):
    body = {"model": "echo", "messages": HELLO, "max_tokens": 5, "stream": stream, **fields}
    response = await gate.http().post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param or error["param"].startswith(f"{param}.")
    assert param in error["message"]
    assert code is None or error["code"] == code
    await wait_until_queue_is_empty(gate.client)


def test_an_internal_error_is_not_retried():
    error = api_error(RuntimeError("a defect"))
    assert (error.status, error.code, error.headers) == (500, "internal_error", {"x-should-retry": "false"})


async def test_openai_s_client_raises_its_own_exceptions(gate):
    client = gate.openai()
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="echo", messages=HELLO, extra_body={"guided_json": {}})
    assert wrong.value.param == "guided_json"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/tokenize", 501),
        ("POST", "/v1/chat/completions", 400),
    ],
)
async def test_a_path_that_is_not_served_has_an_error_body_too(gate, method, path, status):
    response = await gate.http().request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert response.headers["x-request-id"]


@pytest.mark.parametrize(
    ("origin", "content_type", "status"),
    [
        ("https://elsewhere.example", "text/plain", 403),
        ("https://elsewhere.example", "multipart/form-data; boundary=x", 403),
        ("https://elsewhere.example", None, 403),
        ("null", "text/plain", 403),
        ("https://elsewhere.example", "application/json; charset=utf-8", 200),
        ("http://gateway.example", "text/plain", 200),
        (None, "text/plain", 200),
    ],
)
async def test_a_page_of_another_origin_starts_no_job_without_consent(gate, origin, content_type, status):
    given = {"Host": "gateway.example", "Origin": origin, "Content-Type": content_type}
    headers = {name: value for name, value in given.items() if value is not None}
    body = json.dumps({"model": "echo", "messages": HELLO, "max_tokens": 2})
    response = await gate.http().post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status
    assert gate.metric("gateway_jobs_total") == (status == 200)
    if status == 403:
        assert response.json()["error"]["code"] == "cross_origin"
        assert "application/json" in response.json()["error"]["message"]


async def test_a_path_with_a_slash_at_its_end_is_not_redirected(gate):
    response = await gate.http().post("/v1/chat/completions/", json={"messages": HELLO})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


async def test_a_client_that_leaves_before_its_request_is_complete_is_logged_as_such(gate):
    _, writer = await asyncio.open_connection("127.0.0.1", gate.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()

    async def reached():
        return gate.metric("gateway_open_requests") == 1

    await wait_until(reached)
    writer.close()
    await writer.wait_closed()

    async def logged():
        return [line["status"] for line in gate.logged("request")] == [499]

    await wait_until(logged)
    assert gate.logged("request_failed") == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_above_the_limit_has_status_413(harness, echo, chunked):
    async with gateway(harness, max_body_bytes=2000) as running:

        async def parts():
            for _ in range(30):
                yield b" " * 100

        content = parts() if chunked else b" " * 3000
        response = await running.http().post("/v1/chat/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


async def test_a_full_queue_has_status_429_and_the_client_s_retry_leaves_one_job(harness):
    async with gateway(harness, bound=1) as running:
        transport = await fake_worker(harness, running)
        await running.client.submit(prompt="fills the queue", job_id="first")
        response = await running.http().post("/v1/chat/completions", json={"model": "echo", "messages": HELLO})
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"

        client = running.openai(max_retries=3)
        asking = asyncio.create_task(client.chat.completions.create(model="echo", messages=HELLO))

        async def refused_again():
            return running.metric('gateway_requests_total{route="/v1/chat/completions",status="429"}') >= 2

        await wait_until(refused_again)
        await complete(transport, await take_next(transport), 2)

        await wait_for_jobs(running, 1)
        await complete(transport, await take_next(transport), 2)
        assert (await asking).choices[0].message.content == "w0 w1 "
        assert running.metric("gateway_jobs_total") == 1
        assert await running.client.queue_length() == 0


async def test_a_passed_deadline_has_status_504_and_is_not_retried(harness):
    model = SharedModel.echo()
    async with serving(harness, model.fresh(), lease=LONG_LEASE), gateway(harness) as running:
        await running.wait_for_model("echo")
        body = {"model": "echo", "messages": HELLO, "deadline_ms": 1, "ignore_eos": True, "max_tokens": 4000}
        response = await running.http().post("/v1/chat/completions", json=body)
        assert response.status_code == 504
        assert response.json()["error"]["type"] == "timeout_error"
        assert response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.InternalServerError):
            await running.openai(max_retries=2).chat.completions.create(
                model="echo", messages=HELLO, extra_body={"deadline_ms": 1, "ignore_eos": True}, max_tokens=4000
            )
        assert running.metric("gateway_jobs_total") == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_job_that_waits_beyond_its_deadline_has_status_504_and_is_cancelled(harness, stream):
    async with gateway(harness) as running:
        await fake_worker(harness, running)
        body = {"model": "echo", "messages": HELLO, "deadline_ms": 50, "stream": stream}
        response = await running.http().post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "inference_timeout")

        async def cancelled():
            (entry,) = await running.client.queue()
            return (await running.client.state(entry.job_id)).get("error") == "CANCELLED"

        await wait_until(cancelled)


async def test_the_gateway_s_deadline_is_that_of_jobs_without_one(harness):
    async with serving(harness, SharedModel.echo().fresh(), lease=LONG_LEASE), gateway(harness, deadline_s=0.001) as it:
        await it.wait_for_model("echo")
        body = {"model": "echo", "messages": HELLO, "ignore_eos": True, "max_tokens": 4000}
        assert (await it.http().post("/v1/chat/completions", json=body)).status_code == 504


async def test_a_job_that_fails_before_its_first_token_has_status_500(harness):
    async with serving(harness, failing_model(VramOom("no memory"), 0), lease=LONG_LEASE), gateway(harness) as running:
        await running.wait_for_model("echo")
        response = await running.http().post("/v1/chat/completions", json={"model": "echo", "messages": HELLO})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "vram_oom"


async def test_an_error_after_the_stream_began_is_an_event_that_clients_raise(harness):
    async with gateway(harness) as running:
        transport = await fake_worker(harness, running)
        stream_task = asyncio.create_task(
            running.openai().chat.completions.create(model="echo", messages=HELLO, stream=True)
        )

        await wait_for_jobs(running, 1)
        lease = await take_next(transport)
        await transport.append(lease, tokens(0, 2))
        stream = await stream_task
        assert (await anext(stream)).choices[0].delta.role == "assistant"
        await transport.finish(lease, ErrorEvent.of(VramOom("no memory")))
        with pytest.raises(openai.APIError, match="no memory"):
            async for _ in stream:
                pass


async def test_a_job_that_another_client_cancels_has_status_409_without_a_retry(harness):
    async with gateway(harness) as running:
        await fake_worker(harness, running)
        asking = asyncio.create_task(
            running.http().post("/v1/chat/completions", json={"model": "echo", "messages": HELLO})
        )

        await wait_for_jobs(running, 1)
        (entry,) = await running.client.queue()
        await running.client.cancel(entry.job_id)
        response = await asking
        assert (response.status_code, response.headers["x-should-retry"]) == (409, "false")
        assert response.json()["error"]["code"] == "cancelled"
