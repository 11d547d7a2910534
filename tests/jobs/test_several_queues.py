"""A worker of several queues, over each implementation of `Streams`."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.jobs.echo import claim_next, complete, take_next
from tests.jobs.harness import LONG_LEASE, Harness
from worker.errors import ServerRefused
from worker.jobs.client import Client
from worker.jobs.lease import Claim, Lease
from worker.jobs.transport import Transport


async def serving(harness: Harness, *queues: str, name: str = "w1") -> Transport:
    transport = Transport(harness.connect(), name, queues, LONG_LEASE)
    await transport.open()
    return transport


def client(harness: Harness, queue: str) -> Client:
    return Client(harness.connect(), queue)


async def next_claim(worker: Transport) -> Claim:
    """The next entry, once there is one."""
    while (claim := await worker.claim()) is None:
        pass
    return claim


async def claimed_queues(worker: Transport, number: int) -> list[str]:
    claims: list[Claim] = [await claim_next(worker) for _ in range(number)]
    return [claim.queue for claim in claims]


async def test_the_first_queue_is_emptied_before_the_second(harness: Harness) -> None:
    worker = await serving(harness, "urgent", "batch")
    for queue in ("batch", "urgent", "batch", "urgent"):
        await client(harness, queue).submit(prompt="x")
    assert await claimed_queues(worker, 4) == ["urgent", "urgent", "batch", "batch"]


async def test_weights_share_the_claims(harness: Harness) -> None:
    worker = await serving(harness, "a:3", "b:1")
    for queue in ("a", "b"):
        for _ in range(8):
            await client(harness, queue).submit(prompt="x")
    names = await claimed_queues(worker, 8)
    assert names.count("a") == 6


@pytest.mark.parametrize("queue", ["a", "b"])
async def test_a_waiting_worker_receives_a_job_of_any_queue_at_once(harness: Harness, queue: str) -> None:
    worker = await serving(harness, "a", "b")
    waiting = asyncio.create_task(next_claim(worker))
    await asyncio.sleep(0.05)
    began_s = time.monotonic()
    await client(harness, queue).submit(job_id="j", prompt="x")
    assert (await waiting).queue == queue
    assert time.monotonic() - began_s < 0.3


async def test_a_job_of_each_queue_is_finished_and_settled_in_its_own(harness: Harness) -> None:
    worker = await serving(harness, "a", "b")
    for queue in ("a", "b"):
        await client(harness, queue).submit(job_id=queue, prompt="x")
    for _ in range(2):
        lease: Lease = await take_next(worker)
        await complete(worker, lease, 2)
    for queue in ("a", "b"):
        assert await client(harness, queue).queue() == []
        assert (await client(harness, queue).result(queue))[1].tokens_out == 2


async def test_a_job_given_back_is_claimed_from_its_own_queue_again(harness: Harness) -> None:
    worker, other = await serving(harness, "a", "b"), await serving(harness, "b", name="w2")
    await client(harness, "b").submit(job_id="j", prompt="x")
    await worker.release(await take_next(worker), avoid_s=60)
    assert (await next_claim(other)).queue == "b"


async def test_entries_of_two_queues_that_arrive_together_are_claimed_one_at_a_time(harness: Harness) -> None:
    """One blocking read may return an entry of each queue: the second is given back, uncounted."""
    worker, other = await serving(harness, "a", "b"), await serving(harness, "a", "b", name="w2")
    for n in range(20):
        waiting = asyncio.create_task(next_claim(worker))
        await asyncio.sleep(0.01)
        await asyncio.gather(*(client(harness, queue).submit(job_id=f"{queue}{n}", prompt="x") for queue in "ab"))
        claims = [await waiting, await next_claim(other)]
        assert sorted(claim.queue for claim in claims) == ["a", "b"]
        assert [claim.deliveries for claim in claims] == [1, 1]


async def test_a_client_finds_a_job_in_any_queue_of_a_worker(harness: Harness) -> None:
    worker = await serving(harness, "a", "b")
    await worker.registration.heartbeat({"queue": "a,b", "model": "m", "state": "ready"})
    assert await client(harness, "other").submit(job_id="j", prompt="x", model="m") == "j"
    assert await client(harness, "third").is_known("j")
    assert (await claim_next(worker)).queue == "a"


async def test_a_client_reports_the_place_of_a_waiting_job(harness: Harness) -> None:
    submitter = client(harness, "a")
    for n in range(4):
        await submitter.submit(job_id=f"j{n}", prompt="x", correlation_id=f"request-{n}")
    assert await submitter.position("request-2") == (3, 4)
    worker = await serving(harness, "a")
    await claim_next(worker)
    assert await submitter.position("request-0") is None
    assert await submitter.position("request-2") == (2, 3)
    assert await submitter.position("request-9") is None
    assert await client(harness, "empty").position("request-0") is None


async def test_a_refused_queue_holds_up_no_other_queue(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await serving(harness, "broken", "whole")

    async def refused(_: int) -> None:
        raise ServerRefused("broken has another type")

    with monkeypatch.context() as broken:
        broken.setattr(worker._consumers["broken"], "next", refused)
        for _ in range(2):
            await client(harness, "whole").submit(prompt="x")
        assert await claimed_queues(worker, 2) == ["whole", "whole"]
        assert "another type" in str(worker.queue_refusal)
        with pytest.raises(ServerRefused, match="another type"):
            await worker.claim()
    await client(harness, "broken").submit(prompt="x")
    assert await claimed_queues(worker, 1) == ["broken"]
    assert worker.queue_refusal is None
