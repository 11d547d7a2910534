"""The gateway's metrics of queues and workers: what they show, and what no label ever holds."""

from __future__ import annotations

from tests.gateway.gateways import fake_worker, gateway
from tests.gateway.stack import stack
from tests.jobs.echo import claim_next
from tests.jobs.harness import LossyStreams, wait_until
from worker.errors import ServerRefused
from worker.gateway.queue_watch import MAX_LABELS, QueueWatch
from worker.jobs.client import Client
from worker.jobs.keys import queue_key
from worker.jobs.streams import Disconnected

SLOW = {"registry_s": 60.0}
"""The gateway's own loop reads once, at the start."""


def samples(running, prefix):
    lines = running.context.metrics.exposition().decode().splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines) if name.startswith(prefix)}


async def test_queues_and_workers_are_shown_with_their_names(harness):
    async with gateway(harness, **SLOW) as running:
        watch = QueueWatch(running.context)
        await watch.refresh()
        assert samples(running, "gateway_queue_workers") == {'gateway_queue_workers{queue="default"}': 0.0}
        transport = await fake_worker(running=running, harness=harness, model="m", queue="default,other")
        fields = {"model": "m", "state": "busy", "queue": "default", "kv_blocks": "30", "kv_blocks_used": "10"}
        await (await harness.transport("w2")).registration.heartbeat(fields)
        for n in range(3):
            await running.client.submit(job_id=f"j{n}", prompt="x")
        await claim_next(transport)
        await watch.refresh()
        assert samples(running, "gateway_queue_jobs") == {
            'gateway_queue_jobs{queue="default",state="waiting"}': 2.0,
            'gateway_queue_jobs{queue="default",state="running"}': 1.0,
            'gateway_queue_jobs{queue="other",state="waiting"}': 0.0,
            'gateway_queue_jobs{queue="other",state="running"}': 0.0,
        }
        assert (
            samples(running, "gateway_queue_oldest_wait_seconds")['gateway_queue_oldest_wait_seconds{queue="default"}']
            < 60
        )
        assert running.metric('gateway_queue_workers{queue="default"}') == 2
        assert running.metric('gateway_queue_workers{queue="other"}') == 1
        assert running.metric('gateway_model_workers{model="m"}') == 2
        assert abs(running.metric('gateway_kv_cache_usage_ratio{model="m"}') - 1 / 3) < 1e-9
        await transport.registration.close()
        await watch.refresh()
        assert running.metric('gateway_model_workers{model="m"}') == 1


async def test_a_queue_and_a_model_that_lost_their_last_worker_are_shown_with_none(harness):
    async with gateway(harness, **SLOW) as running:
        watch = QueueWatch(running.context)
        transport = await fake_worker(harness, running, "m", "other")
        await watch.refresh()
        await transport.registration.close()
        await harness.client(queue="other").submit(job_id="a", prompt="x")
        await watch.refresh()
        assert running.metric('gateway_queue_jobs{queue="other",state="waiting"}') == 1
        shown = samples(running, "gateway_queue_workers") | samples(running, "gateway_model_workers")
        assert shown['gateway_queue_workers{queue="other"}'] == shown['gateway_model_workers{model="m"}'] == 0


async def test_a_scrape_reads_no_queue(harness):
    calls = []
    streams = LossyStreams(harness.connect(), calls.append)
    async with gateway(harness, client=Client(streams), **SLOW) as running:

        async def read():
            return "depth" in calls

        await wait_until(read)
        calls.clear()
        http = running.http()
        for _ in range(20):
            assert "gateway_queue_jobs" in (await http.get("/metrics")).text
        assert {"depth", "length", "pending"}.isdisjoint(calls)


async def test_figures_of_an_unreachable_server_disappear_and_come_back(harness):
    down = False

    async def before(name):
        if down:
            raise Disconnected("the server is down")

    streams = LossyStreams(harness.connect(), lambda name: False, before)
    async with gateway(harness, client=Client(streams), **SLOW) as running:
        watch = QueueWatch(running.context)
        await watch.refresh()
        assert (running.metric("gateway_server_reached"), len(samples(running, "gateway_queue_jobs"))) == (1, 2)
        down = True
        await watch.refresh()
        assert (running.metric("gateway_server_reached"), samples(running, "gateway_queue_jobs")) == (0, {})
        down = False
        await watch.refresh()
        assert (running.metric("gateway_server_reached"), len(samples(running, "gateway_queue_jobs"))) == (1, 2)


async def test_a_hostile_registry_neither_ends_the_loop_nor_floods_the_metrics(harness):
    async with gateway(harness, **SLOW) as running:
        streams = harness.connect()
        queues = ",".join(f"q{n}" for n in range(3 * MAX_LABELS))
        odd = {"state": "ready", "kv_blocks": "1e999", "kv_blocks_used": "-5", "started_ms": "0"}
        await streams.put_status("w", odd | {"queue": queues, "model": 'a"}\n# TYPE b'}, 15_000)
        await streams.put_status("v", odd | {"queue": '"}\n,../../etc/passwd', "model": "x" * 100_000}, 15_000)
        for n in range(2 * MAX_LABELS):
            await streams.put_status(f"w{n}", odd | {"queue": "default", "model": f"m{n:03}"}, 15_000)
        await QueueWatch(running.context).refresh()
        assert len(samples(running, "gateway_queue_dead_letters")) == MAX_LABELS
        assert len(samples(running, "gateway_model_workers")) == MAX_LABELS
        text = running.context.metrics.exposition().decode()
        assert "passwd" not in text
        assert "\n# TYPE b" not in text


async def test_a_queue_whose_key_is_no_stream_hides_no_other_queue(harness):
    async with gateway(harness, **SLOW) as running:
        await running.client.documents.put(queue_key("odd"), {"a": "hash"}, 60_000)
        await fake_worker(harness, running, "m", "default,odd")
        await QueueWatch(running.context).refresh()
        assert list(samples(running, "gateway_queue_dead_letters")) == ['gateway_queue_dead_letters{queue="default"}']
        assert running.metric("gateway_server_reached") == 1


async def test_a_refusal_is_logged_once_for_each_change_of_its_reason(harness):
    refused: dict[str, str] = {}

    async def before(name):
        if name in refused:
            raise ServerRefused(refused[name], {"reply": "NOPERM"})

    streams = LossyStreams(harness.connect(), lambda name: False, before)
    async with gateway(harness, client=Client(streams), **SLOW) as running:
        await fake_worker(harness, running, "m", "default")
        await running.wait_for_model("m")
        watch = QueueWatch(running.context)

        async def reasons_after(**changed):
            refused.clear()
            refused.update(changed)
            for _ in range(2):
                await watch.refresh()
            return [line["reason"] for line in running.logged("redis_refused")]

        assert await reasons_after(depth="no +xinfo") == ["no +xinfo"]
        assert await reasons_after() == ["no +xinfo"]
        assert await reasons_after(depth="no +xinfo") == ["no +xinfo"] * 2
        assert await reasons_after(workers="no +zrange") == ["no +xinfo"] * 2 + ["no +zrange"]
        assert await reasons_after() == ["no +xinfo"] * 2 + ["no +zrange"]
        refused["enqueue"] = "no +xadd"
        for _ in range(2):
            body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
            response = await running.http().post("/v1/chat/completions", json=body)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "redis_refused")
        assert [line["reason"] for line in running.logged("redis_refused")][3:] == ["no +xadd"]


async def test_a_refused_reading_of_the_registry_is_logged_once_by_both_loops(harness):
    refused = []

    async def before(name):
        if name == "workers" and refused:
            refused.append(name)
            raise ServerRefused("no +zrange", {"reply": "NOPERM"})

    streams = LossyStreams(harness.connect(), lambda name: False, before)
    async with gateway(harness, client=Client(streams), registry_s=0.02) as running:
        refused.append("from now on")

        async def read_often():
            return len(refused) > 8

        await wait_until(read_often)
        assert [line["reason"] for line in running.logged("redis_refused")] == ["no +zrange"]


MARK = "zebra"
"""In everything that a client chooses."""


async def test_no_label_holds_what_a_request_says(harness):
    body = {"model": "scripted", "messages": [{"role": "user", "content": MARK}], "user": MARK, "max_tokens": 5}
    async with stack(harness, lambda prompt: "fine", tenants=(MARK,), registry_s=0.05) as (running, _):
        http = running.http(headers={"Authorization": f"Bearer key-of-{MARK}", "X-Request-Id": MARK})
        chat = "/v1/chat/completions"
        statuses = [
            (await http.post(chat, json=body)).status_code,
            (await http.post(chat, json=body | {"model": MARK})).status_code,
            (await http.post(chat, json=body | {MARK: MARK})).status_code,
            (await http.post(chat, json=body, headers={"Authorization": f"Bearer sk-{MARK}"})).status_code,
            (await http.post(chat, content=b'{"' + MARK.encode())).status_code,
            (await http.get(f"/v1/models/{MARK}/../..%2f{MARK}?{MARK}={MARK}")).status_code,
            (await http.get(f"/{MARK}%0a%22%7d")).status_code,
            (await http.get(f"/static/{MARK}")).status_code,
            (await http.request(MARK.upper(), chat)).status_code,
            (await http.get(f"/v1/responses/{MARK}")).status_code,
            (await http.get(f"/v1/files/{MARK}/content")).status_code,
        ]
        assert statuses == [200, 404, 400, 401, 400, 404, 404, 404, 400, 404, 404]
        text = (await http.get("/metrics")).text
    assert MARK not in text.lower()
    assert 'gateway_requests_total{route="/v1/chat/completions",status="200"} 1.0' in text
