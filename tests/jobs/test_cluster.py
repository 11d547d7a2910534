"""Jobs on a cluster: failover in the middle of an answer, slots that move, keys of many slots."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from redis.crc import key_slot
from redis.exceptions import ConnectionError as ConnectionLost

from tests.jobs.cluster import ClusterServer, running_cluster, wait_for
from tests.jobs.echo import begin, claim_next, complete, take_next, text, tokens
from tests.jobs.harness import ClusterHarness, assert_consistent, wait_until
from tests.jobs.servers import Server, free_port
from worker.errors import ServerRefused
from worker.jobs import redis_streams
from worker.jobs.client import Client, SyncClient
from worker.jobs.keys import CONTROL, events_key, queue_key
from worker.jobs.redis_cluster import Cluster
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Contact, Disconnected, retry_until_connected

LIMIT_S = 60


@pytest_asyncio.fixture
async def harness(cluster: ClusterServer) -> AsyncIterator[ClusterHarness]:
    created = ClusterHarness(cluster)
    yield created
    await created.close()


def job_on(node: Server, cluster: ClusterServer) -> str:
    """An id whose keys a node has."""
    return next(name for n in range(1000) if cluster.master_of(events_key(name := f"j{n}")) is node)


class Move:
    """The move of a key's slot to another master, in the steps of `redis-cli --cluster reshard`."""

    def __init__(self, cluster: ClusterServer, key: str) -> None:
        self._cluster, self._slot = cluster, key_slot(key.encode())
        self._source = cluster.master_of(key)
        self._target = next(node for node in cluster.masters() if node is not self._source)

    def begin(self) -> None:
        source, target = self._cluster.id_of(self._source), self._cluster.id_of(self._target)
        self._cluster.run(self._target, "CLUSTER", "SETSLOT", self._slot, "IMPORTING", source)
        self._cluster.run(self._source, "CLUSTER", "SETSLOT", self._slot, "MIGRATING", target)

    def move_keys(self, *only: str) -> None:
        keys = only or self._cluster.run(self._source, "CLUSTER", "GETKEYSINSLOT", self._slot, 1000)
        if keys:
            self._cluster.run(self._source, "MIGRATE", "127.0.0.1", self._target.port, "", 0, 5000, "KEYS", *keys)

    def finish(self) -> None:
        target = self._cluster.id_of(self._target)
        for node in (self._target, self._source, *self._cluster.masters()):
            self._cluster.run(node, "CLUSTER", "SETSLOT", self._slot, "NODE", target)


async def test_workers_of_several_queues_and_jobs_on_every_node(harness: ClusterHarness) -> None:
    client = harness.client()
    worker = await harness.transport("w1")
    job_ids = [await client.submit(prompt="hello") for _ in range(20)]
    reading = [asyncio.create_task(client.result(job_id)) for job_id in job_ids]
    for _ in job_ids:
        await complete(worker, await take_next(worker), 3)
    assert [(await each)[0] for each in reading] == [text(3)] * 20
    await assert_consistent(harness, **dict.fromkeys(job_ids, text(3)))


def test_the_sync_client_uses_a_cluster(cluster: ClusterServer) -> None:
    with SyncClient.from_url(cluster.url) as client:
        job_ids = {client.submit(prompt="hello") for _ in range(10)}
        assert {entry.job_id for entry in client.queue()} == job_ids
        assert {client.cancel(job_id) for job_id in job_ids} == {"cancelled"}


async def test_many_readers_poll_together(harness: ClusterHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than have a connection of their own: streams of all slots, in one call a node."""
    monkeypatch.setattr(redis_streams, "CLUSTER_READERS", 3)
    client, worker = harness.client(), await harness.transport("w1")
    job_ids = [await client.submit(prompt="hello") for _ in range(30)]
    reading = [asyncio.create_task(client.result(job_id)) for job_id in job_ids]
    await asyncio.sleep(0)
    for _ in job_ids:
        await complete(worker, await take_next(worker), 2)
    assert [(await each)[0] for each in reading] == [text(2)] * 30


async def move_during(cluster: ClusterServer, key: str, use: Callable[[], object]) -> list[object]:
    """Results of `use` before, in and after each step of a move of the key's slot."""
    move = Move(cluster, key)
    results = [await use()]  # type: ignore[misc]
    for step in (move.begin, move.move_keys, move.finish):
        step()
        results.append(await use())  # type: ignore[misc]
    return results


async def test_a_queue_whose_slot_moves_is_served_meanwhile(harness: ClusterHarness, cluster: ClusterServer) -> None:
    """Its scripts have one key: those with a key that does not exist would have to wait."""
    client, worker = harness.client(), await harness.transport("w1")
    for _ in range(8):
        await client.submit(prompt="hello")

    async def use() -> str:
        claim = await claim_next(worker)
        assert (await worker.renew(claim)).value == "held"
        assert len(await client.queue()) > 0
        await client.submit(prompt="hello")
        await complete(worker, await begin(worker, claim), 1)
        return "served"

    assert await asyncio.wait_for(move_during(cluster, queue_key("default"), use), LIMIT_S) == ["served"] * 4
    assert len(await client.queue()) == 8


async def test_a_running_job_whose_slot_moves_loses_no_token(harness: ClusterHarness, cluster: ClusterServer) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    reading = asyncio.create_task(client.result("a"))
    lease = await take_next(worker)
    published = 0

    async def use() -> None:
        nonlocal published
        await worker.append(lease, tokens(published, published + 2))
        published += 2
        assert (await worker.renew(lease)).value == "held"

    await asyncio.wait_for(move_during(cluster, events_key("a"), use), LIMIT_S)
    await complete(worker, lease, published + 1)
    assert (await asyncio.wait_for(reading, LIMIT_S))[0] == text(published + 1)
    await assert_consistent(harness, a=text(published + 1))


async def test_a_job_waits_while_one_of_its_keys_has_moved(harness: ClusterHarness, cluster: ClusterServer) -> None:
    client, worker = harness.client(), await harness.transport("w1")
    await client.submit(job_id="a", prompt="hello")
    lease = await take_next(worker)
    move = Move(cluster, events_key("a"))
    move.begin()
    move.move_keys(events_key("a"))
    appending = asyncio.create_task(worker.append(lease, tokens(0, 2)))
    with pytest.raises(Disconnected, match="its cluster is moving keys"):
        await worker._streams.job_state("a")
    assert not appending.done()
    move.move_keys()
    await asyncio.wait_for(appending, LIMIT_S)
    move.finish()
    await complete(worker, lease, 3)
    await assert_consistent(harness, a=text(3))


async def test_a_document_whose_slot_moves_is_found(harness: ClusterHarness, cluster: ClusterServer) -> None:
    documents = harness.connect().documents

    async def use() -> object:
        await documents.put("inf:{file:x}:meta", {"a": "1"}, 60_000)
        return await documents.get("inf:{file:x}:meta")

    assert await move_during(cluster, "inf:{file:x}:meta", use) == [{"a": b"1"}] * 4


async def test_an_answer_continues_after_the_masters_of_job_and_queue_fail() -> None:
    """Every token once: what a replica lacked is appended again from the worker's memory."""
    with running_cluster(replicas=True) as cluster:
        harness = ClusterHarness(cluster)
        client, worker = harness.client(), await harness.transport("w1")
        queue_node = cluster.master_of(queue_key("default"))
        job_node = next(node for node in cluster.masters() if node is not queue_node)
        job_id = job_on(job_node, cluster)
        await client.submit(job_id=job_id, prompt="hello")
        reading = asyncio.create_task(client.result(job_id))
        lease = await take_next(worker)
        await worker.append(lease, tokens(0, 2))
        job_node.stop()
        await asyncio.wait_for(worker.append(lease, tokens(2, 4)), LIMIT_S)
        replaced = cluster.master_of(events_key(job_id))
        assert replaced is not job_node
        job_node.start()
        await asyncio.to_thread(wait_for, lambda: cluster.run(job_node, "ROLE")[0] == "slave")
        queue_node.stop()
        assert (await asyncio.wait_for(worker.renew(lease), LIMIT_S)).value == "held"
        await complete(worker, lease, 6)
        assert (await asyncio.wait_for(reading, LIMIT_S))[0] == text(6)
        await client.submit(job_id="next", prompt="hello")
        replicated = next(node for node in cluster.masters() if cluster.run(node, "ROLE")[2])
        job_id = job_on(replicated, cluster)
        await client.submit(job_id=job_id, prompt="hello")
        for length in (1, 2):
            await complete(worker, await take_next(worker), length)
        assert (await asyncio.wait_for(client.result("next"), LIMIT_S))[0] == text(1)
        assert cluster.run(replicated, "INFO", "commandstats")["cmdstat_wait"]["calls"] > 0, "the end is on a replica"
        assert harness._opened[1].reconnects > 0
        await harness.close()


async def test_another_node_of_the_url_is_used_if_the_first_is_down(cluster: ClusterServer) -> None:
    client = Client.from_url(f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.nodes[1].port}")
    assert await client.submit(job_id="a", prompt="hello") == "a"
    await client.close()


async def test_a_cluster_that_is_down_is_named_with_the_reason() -> None:
    url = f"redis+cluster://127.0.0.1:{free_port()}"
    streams = RedisStreams.from_url(url)
    with pytest.raises(Disconnected) as caught:
        await streams.time_ms()
    assert str(caught.value) == f"cannot reach {url} (connection refused)"
    await streams.close()


@pytest.mark.parametrize("kind", ["cluster", "server"])
async def test_a_url_of_the_wrong_kind_names_the_right_one(kind: str, cluster: ClusterServer, server: Server) -> None:
    if kind == "cluster":
        url, words = f"redis://127.0.0.1:{cluster.nodes[0].port}", "use a URL that begins with redis+cluster://"
    else:
        url, words = server.url.replace("redis://", "redis+cluster://"), "use a URL that begins with redis://"
    streams = RedisStreams.from_url(url)
    with pytest.raises(ServerRefused, match=re.escape(words)):
        await asyncio.gather(*(streams.job_state(f"j{n}") for n in range(20)))  # on several nodes
    await streams.close()


async def test_a_lost_node_affects_its_own_jobs_only(harness: ClusterHarness, cluster: ClusterServer) -> None:
    """Of the calls that one round trip makes, those to other nodes have their results."""
    client, worker = harness.client(), await harness.transport("w1")
    streams = worker._streams
    assert isinstance(streams, RedisStreams)
    assert isinstance(streams._server, Cluster)
    lost, other = (node for node in cluster.masters() if node is not cluster.master_of(queue_key("default")))
    leases = []
    for node in (lost, other):
        await client.submit(job_id=job_on(node, cluster), prompt="hello")
        leases.append(await take_next(worker))

    async def without_reply(*_: object, **__: object) -> list[object]:
        raise ConnectionLost("cut")

    (node,) = (node for address, node in streams._server._nodes.items() if address.port == lost.port)
    node.exchange = without_reply  # type: ignore[method-assign]
    renewals = await streams.renew_many("w1", [("default", each.claim.entry_id, each.job_id) for each in leases])
    assert renewals == [None, ("held", False)]
    lines: list[str] = []
    streams.contact = Contact(lines.append, lambda _: lines.append("back"))
    with pytest.raises(Disconnected, match=rf"\(node 127\.0\.0\.1:{lost.port}: cut\)"):
        await streams.job_state(leases[0].job_id)
    await streams.job_state(leases[1].job_id)
    assert len(lines) == 1, "not back while a node is lost"


async def test_all_clients_read_the_clock_of_one_node(harness: ClusterHarness, cluster: ClusterServer) -> None:
    for node in cluster.masters():
        cluster.run(node, "CONFIG", "RESETSTAT")
    for _ in range(3):
        await harness.connect().time_ms()
    calls = [node for node in cluster.masters() if "cmdstat_time" in cluster.run(node, "INFO", "commandstats")]
    assert calls == [cluster.master_of(CONTROL)]


async def test_calls_wait_while_a_slot_has_no_node(harness: ClusterHarness, cluster: ClusterServer) -> None:
    streams = harness.connect()
    slot = key_slot(CONTROL.encode())
    node = cluster.master_of(CONTROL)
    cluster.run(node, "CLUSTER", "DELSLOTS", slot)
    try:
        with pytest.raises(Disconnected) as caught:
            await streams.length(CONTROL)
        assert caught.value.reply == "CLUSTERDOWN"
        waiting = asyncio.create_task(retry_until_connected(streams.length, CONTROL))
        await asyncio.sleep(0)
        assert not waiting.done()
    finally:
        cluster.run(node, "CLUSTER", "ADDSLOTS", slot)

    async def replied() -> bool:
        return waiting.done()

    await wait_until(replied, LIMIT_S)
    assert await waiting == 0
