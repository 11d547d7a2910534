"""Lanes: several jobs in one worker, each with its own lease, cancellation, deadline and release."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tests.jobs.harness import Harness, wait_until
from tests.service.serving import LONG_LEASE, Worker, http_get, published_events, read_job, serving, worker_events
from worker.echo import load_echo
from worker.engine import Engine
from worker.engine.kv_blocks import KvBlocks
from worker.jobs.client import Client
from worker.runtime import LoadedModel

TOKENS = 60


def lanes(count: int, step_s: float = 0.02) -> LoadedModel:
    return load_echo(512, 512, step_s, lambda done, total: None, max_running=count)


async def submit_all(client: Client, *job_ids: str, **fields: object) -> None:
    for job_id in job_ids:
        await client.submit(job_id=job_id, prompt=f"{job_id:4}", max_tokens=TOKENS, **fields)


def answer(job_id: str) -> str:
    return f"{job_id:4}" * (TOKENS // 4)


async def has_begun(harness: Harness, job_id: str) -> bool:
    return bool((await published_events(harness, job_id)).tokens)


async def all_run(harness: Harness, *job_ids: str) -> None:
    async def begun() -> bool:
        return all([await has_begun(harness, job_id) for job_id in job_ids])

    await wait_until(begun)


async def shown(client: Client, worker: Worker, field: str) -> str:
    return (await client.workers())[worker.name].get(field, "")


async def test_no_more_jobs_are_claimed_than_there_are_lanes(fake: Harness) -> None:
    client = fake.client()
    await submit_all(client, "a", "b", "c")
    async with serving(fake, lanes(2), lease=LONG_LEASE):
        await all_run(fake, "a", "b")
        assert (await published_events(fake, "c")).items == []
        assert [bool(entry.worker) for entry in await client.queue()] == [True, True, False]
        results = [await read_job(client, job_id) for job_id in ("a", "b", "c")]
    assert [result.text for result in results] == [answer("a"), answer("b"), answer("c")]


async def test_a_cancelled_job_leaves_the_others_as_they_are(fake: Harness) -> None:
    client = fake.client()
    await submit_all(client, "a", "b", "c")
    async with serving(fake, lanes(3), lease=LONG_LEASE):
        await all_run(fake, "a", "b", "c")
        await client.cancel("b")
        results = [await read_job(client, job_id) for job_id in ("a", "b", "c")]
    assert [results[0].text, results[2].text] == [answer("a"), answer("c")]
    assert results[1].last.code == "CANCELLED"


async def test_a_drain_completes_all_running_jobs(fake: Harness) -> None:
    client = fake.client()
    await submit_all(client, "a", "b", "c")
    async with serving(fake, lanes(3), lease=LONG_LEASE) as worker:
        await all_run(fake, "a", "b", "c")
        assert await worker.stop() == 0
        results = [await read_job(client, job_id) for job_id in ("a", "b", "c")]
    assert [result.text for result in results] == [answer("a"), answer("b"), answer("c")]
    assert worker.logged("worker_draining")[0]["reason"] == "test"


async def test_jobs_that_outlast_the_grace_period_continue_on_another_worker(fake: Harness) -> None:
    client = fake.client()
    await submit_all(client, "a", "b", "c")
    async with serving(fake, lanes(3, 0.05), lease=LONG_LEASE, grace_s=0.2, name="w1") as worker:
        await all_run(fake, "a", "b", "c")
        assert await worker.stop() == 0
    async with serving(fake, lanes(3, 0.0), lease=LONG_LEASE, name="w2"):
        results = [await read_job(client, job_id) for job_id in ("a", "b", "c")]
    assert [result.text for result in results] == [answer("a"), answer("b"), answer("c")]
    assert [result.of("resumed")[0].reason for result in results] == ["drain"] * 3


async def test_the_status_and_the_metrics_show_how_many_jobs_run(fake: Harness) -> None:
    client = fake.client()
    async with serving(fake, lanes(2), lease=LONG_LEASE, vram_s=0.05) as worker:
        await submit_all(client, "a", "b")
        await all_run(fake, "a", "b")

        async def two() -> bool:
            return await shown(client, worker, "running") == "2"

        await wait_until(two)
        _, page = await http_get(worker.service.http_port, "/metrics")
        assert "worker_jobs_running 2.0" in page
        for job_id in ("a", "b"):
            await read_job(client, job_id)

        async def none() -> bool:
            return await shown(client, worker, "running") == "0"

        await wait_until(none)
        assert await shown(client, worker, "state") == "ready"


async def test_waiting_and_preempted_sequences_and_kv_use_are_shown(fake: Harness) -> None:
    """Three answers need twelve KV blocks and there are eight: the engine preempts the youngest."""
    client, blocks = fake.client(), 8
    model = lanes(3, 0.03)
    engine = Engine(model.engine._runner, model.engine.settings, KvBlocks(blocks))
    async with serving(fake, replace(model, engine=engine), lease=LONG_LEASE, vram_s=0.02) as worker:
        await submit_all(client, "a", "b", "c")

        async def one_waits() -> bool:
            return (await shown(client, worker, "waiting"), await shown(client, worker, "preempted")) == ("1", "1")

        await wait_until(one_waits)
        assert await shown(client, worker, "running") == "3"
        assert 0 < int(await shown(client, worker, "kv_blocks_used")) <= blocks
        assert await shown(client, worker, "kv_blocks") == str(blocks)
        _, page = await http_get(worker.service.http_port, "/metrics")
        for line in (
            'worker_sequences{state="running"} 2.0',
            'worker_sequences{state="waiting"} 1.0',
            "worker_preemptions 1.0",
        ):
            assert line in page, line
        used = next(line for line in page.splitlines() if line.startswith('worker_kv_blocks{state="used"}'))
        assert 0 < float(used.split()[1]) <= blocks
        results = [await read_job(client, job_id) for job_id in ("a", "b", "c")]

        async def idle() -> bool:
            shows = [await shown(client, worker, field) for field in ("running", "waiting", "kv_blocks_used")]
            return shows == ["0", "0", "0"] and int(await shown(client, worker, "preempted")) >= 1

        await wait_until(idle)
        assert await worker.stop() == 0
    assert [result.text for result in results] == [answer("a"), answer("b"), answer("c")]
    loads = [event for event in await worker_events(fake, worker.name) if event.kind == "vram"]
    assert (loads[0].running, loads[0].waiting, loads[0].preempted) == (0, 0, 0)
    assert (loads[-1].running, loads[-1].waiting, loads[-1].kv_blocks_used) == (0, 0, 0)
    assert loads[-1].preempted >= 1
    assert {load.kv_blocks for load in loads} == {blocks}
    assert max(load.running for load in loads) >= 2


@pytest.mark.parametrize("count", [2, 8])
async def test_deadlines_end_only_their_own_jobs(fake: Harness, count: int) -> None:
    client = fake.client()
    others = [f"j{n}" for n in range(count - 1)]
    await submit_all(client, *others)
    await client.submit(job_id="late", prompt="x", max_tokens=400, deadline_ms=400)
    async with serving(fake, lanes(count), lease=LONG_LEASE):
        results = await asyncio.gather(*(read_job(client, job_id) for job_id in (*others, "late")))
    assert [result.text for result in results[:-1]] == [answer(job_id) for job_id in others]
    assert results[-1].last.code == "INFERENCE_TIMEOUT"


async def test_a_second_entry_of_a_running_job_does_not_stop_it(harness: Harness) -> None:
    """Both entries are attempts of one worker, and the second one ends as a duplicate."""
    client = harness.client()
    async with serving(harness, lanes(2), lease=LONG_LEASE) as worker:
        await submit_all(client, "a")
        await all_run(harness, "a")
        await submit_all(client, "a")
        result = await asyncio.wait_for(read_job(client, "a"), 10)
        assert (result.last.kind, result.text) == ("end", answer("a"))
        await worker.wait_until_logged("job_released")
        assert [line["outcome"] for line in worker.logged("job_released")] == ["duplicate"]
