"""`Idempotency-Key`: a repeated request attaches to the job of the first one."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.gateways import chunks_of, fake_worker, gateway, wait_for_jobs
from tests.jobs.echo import complete, take_next, text
from tests.jobs.harness import wait_until
from tests.service.models import SharedModel
from tests.service.serving import LONG_LEASE, serving, wait_until_queue_is_empty
from worker.gateway.keys import ApiKeys, KeyEntry

HELLO = [{"role": "user", "content": "hello"}]
BODY = {"model": "echo", "messages": HELLO}
KEY = {"Idempotency-Key": "order-7"}


async def post(running, body=BODY, headers=KEY):
    response = await running.http().post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


async def test_a_repeated_request_gets_the_same_answer_without_another_job(gate):
    first, second = (await post(gate)).json(), (await post(gate)).json()
    assert first == second
    assert gate.metric("gateway_jobs_total") == 1
    assert gate.metric("gateway_attached_total") == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_concurrent_requests_at_two_gateways_are_one_job_for_each_choice(harness, n):
    async with gateway(harness) as one, gateway(harness) as other:
        await fake_worker(harness, one)
        await other.wait_for_model("echo")
        asking = [asyncio.create_task(post(each, BODY | {"n": n})) for each in (one, other, one, other)]

        async def all_read():
            return one.client._reader._reads.readers == other.client._reader._reads.readers == 2 * n

        await wait_until(all_read)
        async with serving(harness, SharedModel.echo().fresh(), lease=LONG_LEASE) as worker:
            answers = [(await each).json() for each in asking]
            assert all(answer == answers[0] for answer in answers)
            assert len(answers[0]["choices"]) == n
            await wait_until_queue_is_empty(one.client)
            assert len(worker.logged("job_completed")) == n


async def test_a_request_after_a_restart_of_the_gateway_attaches(harness):
    async with gateway(harness) as first:
        transport = await fake_worker(harness, first)
        asking = asyncio.create_task(post(first))
        await wait_for_jobs(first, 1)
        asking.cancel()
    async with gateway(harness) as second:
        await second.wait_for_model("echo")
        streaming = asyncio.create_task(post(second, BODY | {"stream": True}))
        await complete(transport, await take_next(transport), 3)
        chunks = chunks_of((await streaming).text)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text(3)
        assert second.metric("gateway_jobs_total") == 0


async def test_another_body_or_tenant_under_the_same_key_is_another_request(harness):
    entries = [KeyEntry(key=f"secret-{name}", tenant=name) for name in ("a", "b")]
    async with gateway(harness, keys=ApiKeys(entries)) as running:
        transport = await fake_worker(harness, running)

        async def ask(tenant, body=BODY):
            asking = asyncio.create_task(post(running, body, KEY | {"Authorization": f"Bearer secret-{tenant}"}))
            await wait_for_jobs(running, 1)
            await complete(transport, await take_next(transport), 1)
            return (await asking).json()["id"]

        ids = {await ask("a"), await ask("b"), await ask("a", BODY | {"seed": 5})}
        assert len(ids) == 3


async def test_a_malformed_key_is_refused(gate):
    response = await gate.http().post("/v1/chat/completions", json=BODY, headers={"Idempotency-Key": "x" * 300})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "idempotency-key")
