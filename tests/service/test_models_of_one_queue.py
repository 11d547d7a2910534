"""Workers of different models on one queue: a job that names a model is run by a worker of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time

import pytest
import redis

from tests.jobs.harness import wait_until
from tests.service.models import ScriptedRunner, SharedModel, StepBarrier
from tests.service.processes import workers
from tests.service.serving import (
    LONG_LEASE,
    read_job,
    run_job,
    serving,
    wait_until_queue_is_empty,
)
from worker.config import LeaseSection
from worker.jobs.client import SyncClient
from worker.jobs.keys import WORKERS, queue_key

LEASE = LeaseSection(lease_s=60, renew_s=0.1, scan_s=0.05)


def model(name, script=lambda step: None):
    echo = SharedModel.echo()
    loaded = echo.fresh(ScriptedRunner(echo.runner, script))
    return dataclasses.replace(loaded, name=name)


@contextlib.asynccontextmanager
async def two_workers(harness, **section):
    async with (
        serving(harness, model("one"), name="w1", lease=LEASE, **section) as one,
        serving(harness, model("two"), name="w2", lease=LEASE, **section) as two,
    ):
        await listed(harness, {"one", "two"})
        yield one, two


async def listed(harness, models):
    async def all_are():
        return models <= {status["model"] for status in (await harness.client().workers()).values()}

    await wait_until(all_are)


async def test_no_job_is_refused_because_the_wrong_worker_took_it(harness):
    client = harness.client()
    async with two_workers(harness) as (one, two):
        names = ["one"] * 20 + ["two"] * 20 + [None] * 5
        jobs = [(name, await client.submit(prompt="abc", max_tokens=3, model=name)) for name in names]
        for name, job in jobs:
            result = await read_job(client, job)
            assert result.kinds == ["started", "token", "end"]
            assert name in (None, result.of("started")[0].model)
        await wait_until_queue_is_empty(client)
        for worker, name in ((one, "one"), (two, "two")):
            started = [
                (await read_job(client, line["job_id"])).of("started")[0] for line in worker.logged("job_started")
            ]
            assert {each.model for each in started} == {name}
        ended = sum([int((await client.workers())[worker.name]["jobs"]) for worker in (one, two)])
        assert ended <= 45, "an attempt was counted for an entry that was given back"


async def test_giving_back_counts_as_no_delivery_and_is_not_repeated(fake):
    client = fake.client()
    async with serving(fake, model("one"), name="w1", lease=LEASE) as one:
        await client_of(fake, "w2", "two")
        jobs = [await client.submit(prompt="abc", max_tokens=3, model="two") for _ in range(5)]
        own = await client.submit(prompt="abc", max_tokens=3)
        assert (await read_job(client, own)).kinds[-1] == "end", "it waited behind the other model's jobs"
        await asyncio.sleep(10 * LEASE.scan_s)
        assert len(one.logged("job_released")) == 5
        assert {entry.deliveries for entry in await client.queue()} == {0}
        async with serving(fake, model("two"), name="w2", lease=LEASE):
            for job in jobs:
                assert (await read_job(client, job)).kinds == ["started", "token", "end"]


async def client_of(harness, worker, name, queue="default", state="ready"):
    """List a worker in the registry that takes no jobs."""
    await harness.connect().put_status(worker, {"model": name, "queue": queue, "state": state}, 15_000)


@pytest.mark.parametrize(("queue", "state"), [("default", "failed"), ("another", "ready")])
async def test_a_model_that_no_living_worker_of_the_queue_serves_is_refused(fake, queue, state):
    client = fake.client()
    async with serving(fake, model("one"), name="w1", lease=LEASE):
        await client_of(fake, "w2", "two", queue, state)
        payload = b'{"job_id": "a", "prompt": "abc", "model": "two"}'
        await fake.connect().enqueue("default", {"p": payload}, 10)  # `submit` would choose the other queue
        result = await read_job(client, "a")
        assert (result.kinds, result.last.code) == (["error"], "INVALID_REQUEST")
        assert "this worker serves one" in result.last.message


async def test_a_job_is_refused_once_the_last_worker_of_its_model_is_gone(fake):
    client = fake.client()
    async with serving(fake, model("one"), name="w1", lease=LEASE) as one:
        await client_of(fake, "w2", "two")
        job = await client.submit(prompt="abc", model="two")
        await one.wait_until_logged("job_released")
        assert await client.state(job) == {}
        await fake.connect().drop_status("w2")
        assert (await read_job(client, job)).last.code == "INVALID_REQUEST"


async def test_a_job_waits_for_a_worker_that_still_loads_its_model(fake):
    client, barrier = fake.client(), StepBarrier(at=0)

    def load(progress):
        barrier.script(0)
        return model("two")

    async with (
        serving(fake, model("one"), name="w1", lease=LEASE) as one,
        serving(fake, load, name="w2", lease=LEASE, ready=False),
    ):
        await listed(fake, {"one", "test"})
        job = await client.submit(prompt="abc", model="two", max_tokens=3)
        await one.wait_until_logged("job_released")
        barrier.release()
        assert (await read_job(client, job)).kinds == ["started", "token", "end"]


async def test_a_registry_without_this_worker_is_incomplete(fake):
    """After the loss of the server's data each worker is listed again at its next heartbeat."""
    client = fake.client()
    async with serving(fake, model("one"), name="w1", lease=LEASE) as one:
        await fake.connect().drop_status("w1")
        job = await client.submit(prompt="abc", model="two", max_tokens=3)
        await one.wait_until_logged("job_released")
        async with serving(fake, model("two"), name="w2", lease=LEASE):
            assert (await read_job(client, job)).kinds == ["started", "token", "end"]


async def test_a_job_of_another_model_waits_while_the_registry_has_another_type(fake):
    client = fake.client()
    async with serving(fake, model("one"), name="w1", lease=LEASE, heartbeat_s=0.3) as one:
        await fake.raw.delete(WORKERS)
        await fake.raw.set(WORKERS, "x")
        payload = b'{"job_id": "a", "prompt": "abc", "model": "two", "max_tokens": 3}'
        await fake.connect().enqueue("default", {"p": payload}, 10)  # `submit` would read the registry
        await one.wait_until_logged("job_released")
        await asyncio.sleep(10 * LEASE.scan_s)
        assert (await client.state("a"), await client.queue_length()) == ({}, 1)
        await fake.raw.delete(WORKERS)
        async with serving(fake, model("two"), name="w2", lease=LEASE):
            assert (await read_job(client, "a")).kinds == ["started", "token", "end"]
        assert [line["reason"].count(WORKERS) for line in one.logged("redis_refused")] == [1]


async def test_a_busy_worker_receives_its_jobs_afterwards_and_the_other_is_not_held_up(fake):
    client, slow = fake.client(), lambda step: time.sleep(0.01)
    async with (
        serving(fake, model("one"), name="w1", lease=LONG_LEASE),
        serving(fake, model("two", slow), name="w2", lease=LONG_LEASE),
    ):
        await listed(fake, {"one", "two"})
        first = await client.submit(prompt="abc", max_tokens=100, model="two")
        waiting = [await client.submit(prompt="abc", max_tokens=3, model="two") for _ in range(30)]
        began = time.monotonic()
        assert (await run_job(client, prompt="abc", max_tokens=3, model="one")).text == "abc"
        assert time.monotonic() - began < 1
        for job in (first, *waiting):
            assert (await read_job(client, job)).kinds[-1] == "end"


def test_processes_with_two_models_on_a_real_server_refuse_no_job(server, tiny, tmp_path):
    arguments = [("--model", tiny(name), "--backend", "cpu") for name in ("qwen2", "llama")]
    raw = redis.Redis.from_url(server.url)
    with workers(server.url, tmp_path, *arguments) as both, SyncClient.from_url(server.url) as client:
        named = {f"{n}-{name}": f"tiny {name}" for n in range(10) for name in ("qwen2", "llama")}
        for job_id, name in named.items():  # not by `submit`, which may choose a queue
            job = {"job_id": job_id, "prompt": "hello", "max_tokens": 3, "model": name}
            raw.xadd(queue_key("default"), {"p": json.dumps(job)})
        for job_id, name in named.items():
            events = list(client.events(job_id, idle_s=20))
            assert (events[0].event.model, events[-1].kind) == (name, "end")
        outcomes = {line["outcome"] for process in both for line in process.logged("job_released")}
        assert outcomes <= {"other_model"}
    raw.close()
