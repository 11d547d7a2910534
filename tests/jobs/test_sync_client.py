"""SyncClient against a real server."""

from __future__ import annotations

import asyncio
import threading

from tests.jobs.echo import begin, complete, text
from tests.jobs.harness import NO_LEASE, ServerHarness
from tests.jobs.servers import Server
from worker.jobs.client import SyncClient, retry_id
from worker.jobs.transport import Closed


def test_the_sync_client_has_the_same_calls_without_await(server: Server) -> None:
    done = threading.Event()

    async def one_job() -> None:
        harness = ServerHarness(server.url)
        worker = await harness.transport("w1", NO_LEASE)
        while (claim := await worker.claim()) is None:
            pass
        lease = await begin(worker, claim)
        assert not isinstance(lease, Closed)
        await complete(worker, lease, 4)
        done.set()
        await harness.close()

    thread = threading.Thread(target=lambda: asyncio.run(one_job()))
    with SyncClient.from_url(server.url) as client:
        thread.start()
        job_id = client.submit(prompt="hello")
        assert "".join(token.t for token in client.tokens(job_id, idle_s=10)) == text(4)
        thread.join()
        assert next(client.events(job_id)).kind == "started"
        early = client.events(job_id)
        next(early)
        early.close()
        assert client.result(job_id)[1].tokens_out == 4
        assert client.cancel(job_id) == "over"
        assert client.state(job_id)["state"] == "end"
        assert (client.queue(), client.dead_letters(), client.dead_letter("1-0")) == ([], [], None)
        assert client.drop_dead_letter("1-0") is False
        client.drain("no-such-worker")
        assert client.workers() == {}
        left_open = client.events(job_id)
        next(left_open)
    left_open.close()
    assert done.is_set()


def test_a_retried_job_gets_a_numbered_valid_id() -> None:
    assert [retry_id("a"), retry_id("a.r1"), retry_id("a.r9"), retry_id("a.rx")] == ["a.r1", "a.r2", "a.r10", "a.rx.r1"]
    assert len(retry_id("x" * 128)) == 128
