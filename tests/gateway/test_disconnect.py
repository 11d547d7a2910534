"""A client that disconnects: its job is cancelled at once, streamed or not, wherever it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

import httpx
import openai
import pytest

from tests.gateway.gateways import fake_worker, gateway, wait_for_jobs
from tests.jobs.echo import complete, take_next
from tests.jobs.harness import LossyStreams, wait_until
from tests.service.models import ScriptedRunner, SharedModel, StepBarrier
from tests.service.serving import LONG_LEASE, serving, wait_until_queue_is_empty
from worker.jobs.client import Client

BODY = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "ignore_eos": True, "max_tokens": 3000}
CANCEL_S = 0.1


async def disconnect(asking):
    """Break a request off; returns the time."""
    asking.cancel()
    at = time.monotonic()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    return at


async def ask(running, headers=None, *, stream=False, received=None):
    """Send a request and read its body; set `received` at the first chunk of text."""
    body = BODY | {"stream": stream}
    async with (
        httpx.AsyncClient(base_url=running.url, timeout=30, headers=headers) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            if received is not None and '"content":"u' in line:
                received.set()


async def cancelled_at(client, job_id):
    """Wait until the job is flagged or has ended as cancelled; returns the time."""

    async def cancelled():
        state = await client.state(job_id)
        return "cancel" in state or state.get("error") == "CANCELLED"

    await wait_until(cancelled, 10)
    return time.monotonic()


async def job_of(client):
    (entry,) = await client.queue()
    return entry.job_id


@pytest.mark.parametrize("stream", [False, True])
async def test_a_waiting_job_is_cancelled_within_100_ms(harness, stream):
    async with gateway(harness) as running:
        await fake_worker(harness, running)
        asking = asyncio.create_task(ask(running, stream=stream))
        await wait_for_jobs(running, 1)
        job_id = await job_of(running.client)
        began = await disconnect(asking)
        assert await cancelled_at(running.client, job_id) - began < CANCEL_S

        async def counted_and_logged():
            return running.metric("gateway_cancelled_total") == 1 and bool(running.logged("request"))

        await wait_until(counted_and_logged)
        assert [line["status"] for line in running.logged("request")] == [499]
        assert running.logged("request")[0]["job_id"] == job_id


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b" " * 200_000


async def pipelined(running, *waiting, stream=True):
    """Send a request for an answer and others behind it on one connection."""
    body = json.dumps(BODY | {"stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    await wait_for_jobs(running, 1)
    writer.write(b"".join(waiting))
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_is_seen_while_another_request_of_the_connection_waits(harness, stream):
    async with gateway(harness) as running:
        await fake_worker(harness, running)
        _, writer = await pipelined(running, HEALTH, stream=stream)
        job_id = await job_of(running.client)
        writer.close()
        await writer.wait_closed()
        await cancelled_at(running.client, job_id)


@pytest.mark.parametrize("waiting", [(HEALTH, HEALTH), (LARGE,)])
async def test_a_connection_on_which_much_waits_is_closed(harness, waiting):
    async with gateway(harness) as running:
        await fake_worker(harness, running)
        _, writer = await pipelined(running, *waiting)
        await cancelled_at(running.client, await job_of(running.client))
        writer.close()


async def test_a_request_that_waits_behind_another_is_answered_after_it(harness):
    async with gateway(harness) as running:
        transport = await fake_worker(harness, running)
        reader, writer = await pipelined(running, HEALTH, stream=False)
        await complete(transport, await take_next(transport), 2)
        received = await asyncio.wait_for(reader.readuntil(b'"open_requests"'), 10)
        assert received.index(b'"chat.completion"') < received.index(b'"status":"ok"')
        writer.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_job_in_prefill_is_cancelled_within_100_ms_and_the_worker_becomes_free(harness, stream):
    barrier, model = StepBarrier(0), SharedModel.echo()
    slow = model.fresh(ScriptedRunner(model.runner, barrier.script))
    async with serving(harness, slow, lease=LONG_LEASE), gateway(harness) as running:
        await running.wait_for_model("echo")
        asking = asyncio.create_task(ask(running, stream=stream))
        await barrier.wait_until_reached()
        job_id = await job_of(running.client)
        began = await disconnect(asking)
        assert await cancelled_at(running.client, job_id) - began < CANCEL_S
        barrier.release()
        await wait_until_queue_is_empty(running.client)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_job_in_decode_is_cancelled_within_100_ms_and_its_stream_ends(harness, stream):
    model = SharedModel.echo()
    slow = model.fresh(ScriptedRunner(model.runner, lambda step: time.sleep(0.01)))
    async with serving(harness, slow, lease=LONG_LEASE), gateway(harness) as running:
        await running.wait_for_model("echo")
        received = asyncio.Event()
        asking = asyncio.create_task(ask(running, stream=stream, received=received))
        await wait_for_jobs(running, 1)
        job_id = await job_of(running.client)
        if stream:
            await asyncio.wait_for(received.wait(), 10)
        else:
            async for item in running.client.events(job_id, idle_s=10):
                if item.kind == "token":
                    break
        began = await disconnect(asking)
        assert await cancelled_at(running.client, job_id) - began < CANCEL_S
        last = [item.event async for item in running.client.events(job_id, idle_s=10)][-1]
        assert last.code == "CANCELLED"


async def test_every_choice_s_job_is_cancelled(harness):
    async with gateway(harness) as running:
        await fake_worker(harness, running)
        asking = asyncio.create_task(running.http().post("/v1/chat/completions", json=BODY | {"n": 3}))
        await wait_for_jobs(running, 3)
        jobs = [entry.job_id for entry in await running.client.queue()]
        await disconnect(asking)
        for job_id in jobs:
            await cancelled_at(running.client, job_id)


async def test_a_job_that_has_ended_is_not_cancelled(gate):
    await gate.http().post("/v1/chat/completions", json=BODY | {"max_tokens": 2})
    async with gate.http().stream("POST", "/v1/chat/completions", json=BODY | {"max_tokens": 2, "stream": True}) as it:
        await it.aread()
    assert gate.metric("gateway_cancelled_total") == 0


async def test_the_job_of_a_request_with_a_key_goes_on(harness):
    async with gateway(harness) as running:
        transport = await fake_worker(harness, running)
        asking = asyncio.create_task(ask(running, {"Idempotency-Key": "k"}, stream=True))
        await wait_for_jobs(running, 1)
        await disconnect(asking)

        async def logged():
            return bool(running.logged("request"))

        await wait_until(logged)
        await take_next(transport)  # fails for a job that was cancelled
        assert running.metric("gateway_cancelled_total") == 0


async def test_a_job_whose_submission_was_under_way_is_cancelled_once_it_is_enqueued(harness):
    held, called = asyncio.Event(), asyncio.Event()

    async def before(name):
        if name == "enqueue":
            called.set()
            await held.wait()

    client = Client(LossyStreams(harness.connect(), lambda name: False, before))
    async with gateway(harness, client=client) as running:
        await fake_worker(harness, running)
        asking = asyncio.create_task(ask(running))
        await asyncio.wait_for(called.wait(), 10)
        await disconnect(asking)
        held.set()
        await wait_for_jobs(running, 1)
        await cancelled_at(running.client, await job_of(running.client))


async def test_a_submission_whose_reply_is_lost_leaves_no_job_that_runs(harness):
    losing = True
    client = Client(LossyStreams(harness.connect(), lambda name: losing and name == "enqueue"))
    async with gateway(harness, client=client) as running:
        await fake_worker(harness, running)
        response = await running.http().post("/v1/chat/completions", json=BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "redis_unreachable")
        losing = False
        job_id = (await running.client.queue())[0].job_id
        await cancelled_at(running.client, job_id)


async def test_a_client_that_times_out_and_retries_leaves_no_job_behind(harness):
    async with gateway(harness) as running:
        await fake_worker(harness, running)
        client = running.openai(timeout=0.4, max_retries=1)
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(model="echo", messages=BODY["messages"])
        jobs = [entry.job_id for entry in await running.client.queue()]
        assert len(jobs) == 2
        for job_id in jobs:
            await cancelled_at(running.client, job_id)
