"""Models and queues: what the registry has, and requests for what it lacks."""

from __future__ import annotations

import asyncio

from tests.gateway.gateways import fake_worker, gateway, wait_for_jobs
from tests.jobs.harness import ServerHarness, wait_until
from tests.jobs.servers import running_server
from tests.service.models import SharedModel
from tests.service.serving import LONG_LEASE, serving
from worker.gateway.queue_watch import QueueWatch
from worker.jobs.client import Client
from worker.jobs.keys import queue_key, worker_key
from worker.jobs.streams import Disconnected

HELLO = [{"role": "user", "content": "hello"}]


async def test_models_are_those_of_the_living_workers(gate):
    models = [model async for model in gate.openai().models.list()]
    assert [model.id for model in models] == ["echo"]
    assert models[0].object == "model"
    assert models[0].created > 1_600_000_000
    assert (await gate.openai().models.retrieve("echo")).id == "echo"
    assert (await gate.http().get("/v1/models")).json()["data"][0]["max_model_len"] == 4096


async def test_without_any_worker_a_request_has_status_503_and_with_others_404(harness):
    async with gateway(harness) as running:
        http = running.http()
        body = {"model": "echo", "messages": HELLO}
        response = await http.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
        assert int(response.headers["retry-after"]) >= 1
        assert (await http.post("/v1/chat/completions", json={"messages": HELLO})).status_code == 503
        await fake_worker(harness, running, "other")
        response = await http.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_while_a_worker_loads_its_model_an_unknown_one_has_status_503(harness):
    async with gateway(harness) as running:
        await fake_worker(harness, running, "other")
        loading = await harness.transport("loading")
        await loading.registration.heartbeat({"model": "path.gguf", "state": "starting", "queue": "default"})
        await running.context.models.refresh()
        response = await running.http().post("/v1/chat/completions", json={"model": "echo", "messages": HELLO})
        assert response.status_code == 503


async def test_a_worker_whose_status_has_no_numbers_hides_no_model(harness):
    async with gateway(harness) as running:
        await fake_worker(harness, running)
        strange = await harness.transport("strange")
        status = {"model": "strange", "state": "ready", "queue": "default", "started_ms": "soon", "context": "²"}
        await strange.registration.heartbeat(status | {"jobs": "9" * 5000, "vram_used": "-"})
        await running.context.models.refresh()
        names = [model["id"] for model in (await running.http().get("/v1/models")).json()["data"]]
        assert names == ["echo", "strange"]
        assert (await running.http().get("/page/status")).status_code == 200


async def test_a_model_whose_worker_is_gone_takes_requests_for_a_time_and_then_has_status_503(harness):
    async with gateway(harness, no_worker_s=3.0) as running:
        transport = await fake_worker(harness, running)
        body = {"model": "echo", "messages": HELLO}
        await harness.drop(worker_key(transport.worker_id))
        waiting = asyncio.create_task(running.http().post("/v1/chat/completions", json=body))
        await wait_for_jobs(running, 1)

        async def refused():
            return (await running.http().get("/v1/models/echo")).status_code == 503

        await wait_until(refused)
        assert (await running.http().get("/v1/models")).json()["data"] == []
        response = await waiting  # the job that waits is cancelled rather than left behind
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")

        async def cancelled():
            (entry,) = await running.client.queue()
            return (await running.client.state(entry.job_id)).get("error") == "CANCELLED"

        await wait_until(cancelled)
        await fake_worker(harness, running)
        assert (await running.http().get("/v1/models/echo")).status_code == 200


async def test_a_model_of_the_settings_takes_requests_without_a_worker_and_its_jobs_wait(harness):
    async with gateway(harness, no_worker_s=0.2, models=("echo",)) as running:
        assert [model["id"] for model in (await running.http().get("/v1/models")).json()["data"]] == ["echo"]
        unnamed = asyncio.create_task(running.http().post("/v1/completions", json={"prompt": "hello"}))
        await wait_for_jobs(running, 1)
        body = {"model": "other", "messages": HELLO}
        assert (await running.http().post("/v1/chat/completions", json=body)).status_code == 404
        done, _ = await asyncio.wait({unnamed}, timeout=1)
        assert done == set()  # five times no_worker_s: the job still waits
        async with serving(harness, SharedModel.echo().fresh(), lease=LONG_LEASE):
            assert (await unnamed).json()["choices"][0]["text"]


async def test_a_request_without_a_model_must_name_one_of_several(harness):
    async with gateway(harness) as running:
        for name in ("one", "two"):
            await fake_worker(harness, running, name)
        response = await running.http().post("/v1/chat/completions", json={"messages": HELLO})
        assert response.status_code == 400
        assert "one, two" in response.json()["error"]["message"]


async def test_a_job_goes_to_the_queue_whose_workers_serve_its_model(harness):
    async with gateway(harness) as running:
        for name in ("one", "two"):
            await fake_worker(harness, running, name, queue=f"queue-{name}")
        body = {"model": "two", "messages": HELLO, "priority": 3}
        asking = asyncio.create_task(running.http().post("/v1/chat/completions", json=body))
        of_two = Client(harness.connect(), "queue-two")

        async def queued():
            return await of_two.queue_length() == 1

        await wait_until(queued)
        assert await running.client.queue_length() == 0
        assert await harness.connect().length(queue_key("queue-one")) == 0
        asking.cancel()


async def test_health_reports_the_workers_and_a_lost_server():
    with running_server() as server:
        harness = ServerHarness(server.url)
        async with gateway(harness, client=Client(harness.connect(), reconnect_timeout_s=0.5)) as running:
            await fake_worker(harness, running)
            response = await running.http().get("/health")
            assert (response.status_code, response.json()["status"], response.json()["workers"]) == (200, "ok", 1)
            server.stop()
            response = await running.http().get("/health")
            assert (response.status_code, response.json()["status"]) == (503, "redis_unreachable")
            body = {"model": "echo", "messages": HELLO}
            response = await running.http().post("/v1/chat/completions", json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "redis_unreachable")
            server.start()
        await harness.close()


async def test_a_full_server_is_not_taken_for_one_without_workers():
    """The workers' statuses expire there, since no heartbeat can be written."""
    with running_server() as server:
        harness = ServerHarness(server.url)
        async with gateway(harness, no_worker_s=0.2) as running:
            worker = await fake_worker(harness, running)

            async def shows(reached):
                await QueueWatch(running.context).refresh()
                return running.metric("gateway_server_reached") == reached

            async def code_of(body):
                response = await running.http().post("/v1/chat/completions", json={"messages": HELLO, **body})
                return response.status_code, response.json()["error"]["code"]

            assert await shows(1)
            await harness.raw.config_set("maxmemory", 1)
            await wait_until(lambda: shows(0))
            await harness.drop(worker_key(worker.worker_id))
            health = await running.http().get("/health")
            assert (health.status_code, health.json()["status"], health.json()["workers"]) == (200, "redis_busy", 0)
            page = (await running.http().get("/metrics")).text
            assert 'gateway_queue_jobs{queue="default",state="waiting"} 0.0' in page
            assert "gateway_queue_workers{" not in page
            await asyncio.sleep(0.4)  # twice no_worker_s
            assert await code_of({"model": "other"}) == (404, "model_not_found")
            assert await code_of({"model": "echo"}) == (503, "redis_busy")
            async with gateway(harness) as late:
                response = await late.http().post("/v1/chat/completions", json={"messages": HELLO})
                assert (response.status_code, response.json()["error"]["code"]) == (503, "redis_busy")
                assert "(OOM)" in response.json()["error"]["message"]
            await harness.raw.config_set("maxmemory", 0)
            await wait_until(lambda: shows(1))
            await asyncio.sleep(0.4)
            assert await code_of({"model": "echo"}) == (503, "no_worker")
            assert (await running.http().get("/health")).status_code == 200
            assert await harness.raw.exists("inf:{job:}:events") == 0
        await harness.close()


async def test_a_node_that_is_away_hides_no_worker(gate, monkeypatch):
    """On a cluster, writes are checked at another node than that of the registry."""

    async def away():
        raise Disconnected("cannot reach the node")

    monkeypatch.setattr(gate.context.models._client, "write_refusal", away)
    await gate.context.models.refresh()
    assert gate.context.models.workers
    assert (await gate.http().get("/health")).status_code == 200


async def test_metrics_count_requests_jobs_and_tokens(gate):
    await gate.openai().chat.completions.create(model="echo", messages=HELLO, max_tokens=5)
    text = (await gate.http().get("/metrics")).text
    assert 'gateway_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
    assert gate.metric("gateway_tokens_total") == 5
    assert gate.metric("gateway_first_token_seconds_count") == 1
    assert gate.metric("gateway_open_requests") == 0
