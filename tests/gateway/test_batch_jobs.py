"""Answers to requests of batches, by endpoints that the test writes."""

from __future__ import annotations

import asyncio
import io
import time
from functools import partial
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.jobs.harness import wait_until
from worker.config import LogSection
from worker.gateway.batch_jobs import LineJobs
from worker.gateway.batch_lines import LineRequest
from worker.gateway.batch_store import Batch
from worker.gateway.context import GatewayContext, call_of
from worker.gateway.errors import too_many
from worker.gateway.keys import ApiKeys, KeyEntry
from worker.jobs.streams import Disconnected
from worker.telemetry import open_log

CHAT = "/v1/chat/completions"


def jobs_of(endpoint, *, keys=None):
    """The jobs of a process with that endpoint, whose queue is empty, and its log."""

    async def nothing(*_):
        return 0

    log = io.StringIO()
    client = SimpleNamespace(unclaimed=nothing, is_known=nothing)
    context = SimpleNamespace(
        keys=keys or ApiKeys(),
        client=client,
        models=SimpleNamespace(workers={}),
        log=open_log(LogSection(format="json"), "gateway", log),
    )
    context.log_failure = partial(GatewayContext.log_failure, context)
    return LineJobs(Starlette(routes=[Route(CHAT, endpoint, methods=["POST"])]), context), log


async def execute(jobs, **batch):
    later = int(time.time()) + 60
    created = Batch("batch_1", "one", CHAT, "file-1", "24h", times={"expires_at": later}, **batch)
    return await jobs.execute(created, LineRequest(3, "c", {"model": "m"}))


async def test_a_request_has_a_key_of_batch_and_line_and_the_lowest_priority():
    seen = []

    async def endpoint(request):
        seen.append((call_of(request).idempotency_key, await request.json()))
        return JSONResponse({"ok": True})

    jobs, _ = jobs_of(endpoint)
    outcome = await execute(jobs)

    assert (outcome.status, outcome.body) == (200, {"ok": True})
    ((key, body),) = seen
    assert key == "batch_1:3"
    assert (body["model"], body["priority"]) == ("m", 9)


async def test_a_fault_of_an_endpoint_is_logged_and_an_error_of_the_request():
    async def endpoint(request):
        raise RuntimeError("a bug")

    jobs, log = jobs_of(endpoint)
    outcome = await execute(jobs)

    assert (outcome.status, outcome.body["error"]["code"]) == (500, "internal_error")
    assert "batch_request_failed" in log.getvalue()
    assert "a bug" not in log.getvalue()


async def test_a_refusal_for_now_says_when_to_try_again():
    async def endpoint(request):
        raise too_many("full", 0.25, "queue_full")

    jobs, _ = jobs_of(endpoint)

    assert (await execute(jobs)).retry_after_s == 0.25


async def test_a_server_that_is_away_is_no_outcome():
    async def endpoint(request):
        raise Disconnected("away")

    jobs, _ = jobs_of(endpoint)
    with pytest.raises(Disconnected):
        await execute(jobs)


@pytest.mark.parametrize("digest", [None, KeyEntry(key="key-that-left", tenant="one").digest])
async def test_a_batch_whose_key_has_left_the_key_file_gets_no_answer(digest):
    async def endpoint(request):
        raise AssertionError("it was run")

    jobs, _ = jobs_of(endpoint, keys=ApiKeys([KeyEntry(key="key-of-one", tenant="one")]))

    assert (await execute(jobs, key_digest=digest)).status == 403


async def test_a_request_is_made_by_the_key_that_created_the_batch():
    callers = []

    async def endpoint(request):
        callers.append(call_of(request).caller)
        return JSONResponse({})

    entries = [KeyEntry(key=f"key-number-{n}", tenant="one") for n in range(3)]
    keys = ApiKeys(entries)
    jobs, _ = jobs_of(endpoint, keys=keys)
    await execute(jobs, key_digest=entries[1].digest)

    assert callers == [keys.caller({"x-api-key": "key-number-1"})]


async def test_a_job_is_cancelled_that_reaches_the_server_after_the_cancellation():
    async def endpoint(request):
        call_of(request).job_ids = ["job", "job-1"]
        await asyncio.Event().wait()

    jobs, _ = jobs_of(endpoint)
    outcomes = {"job": ["cancelled"], "job-1": ["unknown", "unknown", "requested"]}

    async def cancel(job_id):
        return outcomes[job_id].pop(0)

    jobs._context.client.cancel = cancel
    batch = Batch("batch_1", "", CHAT, "file-1", "24h", times={"expires_at": int(time.time()) + 60})
    line = LineRequest(1, "c", {"model": "m"})
    task = asyncio.create_task(jobs.execute(batch, line))

    async def begun():
        return any(call.job_ids for call in jobs._calls.values())

    await wait_until(begun)
    await jobs.cancel(batch, line)
    task.cancel()

    assert outcomes == {"job": [], "job-1": []}


async def test_a_request_that_waits_for_room_is_not_run_once_its_batch_is_cancelled():
    async def endpoint(request):
        raise AssertionError("it was run")

    jobs, _ = jobs_of(endpoint)
    batch = Batch("batch_1", "", CHAT, "file-1", "24h", times={"expires_at": int(time.time()) + 60})
    lengths = [1, 1]

    async def unclaimed(*_):
        if not lengths:
            batch.times["cancelling_at"] = int(time.time())
            return 1
        return lengths.pop()

    jobs._context.client.unclaimed = unclaimed
    outcome = await asyncio.wait_for(jobs.execute(batch, LineRequest(1, "c", {"model": "m"})), 5)

    assert outcome.status == 503


async def test_a_request_that_is_late_while_it_waits_for_room_is_not_run():
    async def endpoint(request):
        raise AssertionError("it was run")

    jobs, _ = jobs_of(endpoint)

    async def always_one(*_):
        return 1

    jobs._context.client.unclaimed = always_one
    batch = Batch("batch_1", "", CHAT, "file-1", "24h", times={"expires_at": int(time.time()) + 1})
    outcome = await jobs.execute(batch, LineRequest(1, "c", {"model": "m"}))

    assert outcome.retry_after_s == 0.0
    assert batch.is_late
