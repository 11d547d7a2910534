"""A server that refuses for seconds: attempts pause, no delivery is counted, every answer is whole."""

from __future__ import annotations

import asyncio
import contextlib
import shutil

import pytest
from redis import exceptions
from redis.asyncio import Redis

from tests.jobs.harness import ServerHarness, wait_until
from tests.jobs.servers import free_port, running_server
from tests.jobs.stream_checker import assert_none, find_violations
from tests.service.models import SharedModel, slow_model
from tests.service.serving import http_get, read_job, serving, wait_until_queue_is_empty
from worker.config import LeaseSection

LEASE = LeaseSection(lease_s=0.6, renew_s=0.15, scan_s=0.1)
PAUSE_S = 0.9
"""Longer than the lease."""


@pytest.fixture
async def real():
    """A server of its own, which a test may leave in any state."""
    with running_server() as server:
        harness = ServerHarness(server.url)
        yield harness
        await harness.close()


@contextlib.asynccontextmanager
async def too_few_replicas(harness):
    await harness.raw.config_set("min-replicas-to-write", 1)
    yield
    await harness.raw.config_set("min-replicas-to-write", 0)


@contextlib.asynccontextmanager
async def out_of_memory(harness):
    await harness.raw.config_set("maxmemory", 1)
    yield
    await harness.raw.config_set("maxmemory", 0)


@contextlib.asynccontextmanager
async def read_only(harness):
    await harness.raw.execute_command("REPLICAOF", "127.0.0.1", free_port())
    yield
    await harness.raw.execute_command("REPLICAOF", "NO", "ONE")


@contextlib.asynccontextmanager
async def without_rights(harness, commands=("xadd", "xreadgroup", "evalsha")):
    await harness.raw.execute_command("ACL", "SETUSER", "default", *(f"-{name}" for name in commands))
    yield
    await harness.raw.execute_command("ACL", "SETUSER", "default", "+@all")


@contextlib.asynccontextmanager
async def without_scripts(harness):
    """XREADGROUP still delivers entries, which no script can take."""
    async with without_rights(harness, ["evalsha", "eval"]):
        yield


@contextlib.asynccontextmanager
async def without_writes(harness):
    """A script is begun, and refused in its middle."""
    async with without_rights(harness, ["hset", "xack"]):
        yield


@contextlib.asynccontextmanager
async def without_registry(harness):
    async with without_rights(harness, ["zadd"]):
        yield


@contextlib.asynccontextmanager
async def changed_password(harness):
    """Every connection is closed; new ones are refused, in other words for a call with many arguments."""
    await harness.raw.config_set("requirepass", "s3cret")
    await harness.raw.client_kill_filter(_type="normal", skipme=True)
    yield
    async with Redis.from_url(harness.url, password="s3cret") as admin:
        await admin.config_set("requirepass", "")


@contextlib.asynccontextmanager
async def running_script(harness):
    await harness.raw.config_set("busy-reply-threshold", 50)
    async with Redis.from_url(harness.url) as other:
        script = asyncio.create_task(other.eval("while true do end", 0))
        yield
        await harness.raw.script_kill()
        with pytest.raises(exceptions.ResponseError):
            await script


@contextlib.asynccontextmanager
async def unable_to_save(harness):
    shutil.rmtree((await harness.raw.config_get("dir"))["dir"], ignore_errors=True)
    await harness.raw.config_set("save", "3600 1")
    await harness.raw.bgsave()

    async def failed():
        return (await harness.raw.info("persistence"))["rdb_last_bgsave_status"] == "err"

    await wait_until(failed)
    yield
    await harness.raw.config_set("stop-writes-on-bgsave-error", "no")


REFUSALS = [
    too_few_replicas,
    out_of_memory,
    read_only,
    without_rights,
    without_scripts,
    without_writes,
    changed_password,
    running_script,
    unable_to_save,
]


async def has_tokens(harness, job_id, count=5):
    return await harness.raw.xlen(f"inf:{{job:{job_id}}}:events") > count


async def assert_healthy(harness, *workers, texts):
    """Every job is complete, was delivered once, and no attempt failed."""
    await wait_until_queue_is_empty(harness.client())
    assert_none(await find_violations(harness.connect(), "default", texts))
    for worker in workers:
        for event in ("attempt_fault", "renewal_fault", "claim_fault", "background_fault", "job_failed"):
            assert worker.logged(event) == []
    assert await harness.client().dead_letters() == []


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_running_job_goes_on_when_the_server_accepts_writes_again(real, refusal):
    client = real.client()
    async with serving(real, slow_model(0.04), lease=LEASE) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=30)
        await wait_until(lambda: has_tokens(real, "a"))
        async with refusal(real):
            await asyncio.sleep(PAUSE_S)
        result = await read_job(client, "a")
        assert result.text == "abc" * 10
        assert "resumed" not in result.kinds
        await assert_healthy(real, worker, texts={"a": "abc" * 10})
    assert await real.client().queue() == []


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_with_two_workers_a_waiting_and_a_running_job_end_well(real, refusal):
    client = real.client()
    async with (
        serving(real, slow_model(0.04), name="w1", lease=LEASE) as one,
        serving(real, SharedModel.echo().fresh(), name="w2", lease=LEASE) as two,
    ):
        await client.submit(job_id="a", prompt="abc", max_tokens=30)
        await wait_until(lambda: has_tokens(real, "a"))
        async with refusal(real):
            await asyncio.sleep(PAUSE_S)
        await client.submit(job_id="b", prompt="abc", max_tokens=15)
        results = await asyncio.gather(read_job(client, "a"), read_job(client, "b"))
        assert [result.text for result in results] == ["abc" * 10, "abc" * 5]
        await assert_healthy(real, one, two, texts={"a": "abc" * 10, "b": "abc" * 5})


@pytest.mark.parametrize("refusal", [too_few_replicas, out_of_memory, without_scripts])
async def test_deliveries_and_attempts_are_not_counted_while_the_server_refuses(real, refusal):
    """Without rights to scripts, XREADGROUP still delivers; the entry is taken when it can be."""
    client = real.client()
    lease = LeaseSection(lease_s=0.6, renew_s=0.15, scan_s=0.1, max_deliveries=2, max_attempts=1)
    async with serving(real, slow_model(0.04), lease=lease) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=50)
        for seen in (0, 2, 5):
            await wait_until(lambda count=seen: has_tokens(real, "a", count))
            async with refusal(real):
                await asyncio.sleep(PAUSE_S)
        assert (await read_job(client, "a")).text == "abc" * 16 + "ab"
        await assert_healthy(real, worker, texts={"a": "abc" * 16 + "ab"})


@pytest.mark.parametrize("refusal", [out_of_memory, unable_to_save, without_registry])
async def test_a_worker_whose_writes_are_refused_for_longer_than_a_lease_is_not_ready(real, refusal):
    """Its polls succeed: without a heartbeat it is no longer registered, and it can take no job."""
    async with serving(real, SharedModel.echo().fresh(), lease=LEASE) as worker:

        async def shows(status, reached):
            ready, _ = await http_get(worker.service.http_port, "/readyz")
            _, page = await http_get(worker.service.http_port, "/metrics")
            return ready == status and f"worker_server_reached {reached}" in page

        await wait_until(lambda: shows(200, "1.0"))
        async with refusal(real):
            await wait_until(lambda: shows(503, "0.0"), 10)
            assert (await http_get(worker.service.http_port, "/livez"))[0] == 200
        await wait_until(lambda: shows(200, "1.0"), 10)
