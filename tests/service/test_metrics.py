"""What a worker's /metrics shows: vLLM's figures, the queues, the model; and what no label ever holds."""

from __future__ import annotations

import time
from typing import get_args

from prometheus_client.parser import text_string_to_metric_families

from tests.jobs.harness import LossyStreams, wait_until
from tests.service.models import ScriptedRunner, SharedModel, StepBarrier
from tests.service.serving import http_get, run_job, serving, wait_until_queue_is_empty
from worker.errors import ServerRefused
from worker.jobs.streams import Disconnected
from worker.sampling import FinishReason
from worker.telemetry import FAULTS

FAST = {"queue_s": 0.05, "vram_s": 0.05}


async def samples_of(worker):
    """Every sample by name and labels, as Prometheus parses the page."""
    _, page = await http_get(worker.service.http_port, "/metrics")
    families = text_string_to_metric_families(page)
    return {(x.name, *sorted(x.labels.items())): x.value for family in families for x in family.samples}


async def until(worker, expected):
    """Wait until the page has these samples, which are written as (name, (label, value) …)."""

    async def shown():
        found = await samples_of(worker)
        return {key: found.get(key) for key in expected} == expected

    await wait_until(shown, 20)


async def test_the_model_device_and_version_are_labels_of_one_metric(fake):
    async with serving(fake, SharedModel.echo().fresh(), **FAST) as worker:
        infos = [key for key in await samples_of(worker) if key[0] == "worker_info"]
    (labels,) = [dict(key[1:]) for key in infos]
    assert (labels["model"], labels["device"]) == ("echo", "none")
    assert labels.keys() == {"model", "device", "version"}


async def test_completed_jobs_are_counted_by_finish_reason_and_timed_from_their_submission(fake):
    client = fake.client()
    await client.submit(job_id="early", prompt="abc", max_tokens=3, ignore_eos=True)
    submitted_s = time.monotonic()
    barrier, model = StepBarrier(at=0), SharedModel.echo()
    async with serving(fake, model.fresh(ScriptedRunner(model.runner, barrier.script)), **FAST) as worker:
        await barrier.wait_until_reached()
        await until(worker, {("worker_queue_jobs", ("queue", "default"), ("state", "running")): 1.0})
        waited_s = time.monotonic() - submitted_s
        barrier.release()
        await client.result("early")
        await run_job(client, prompt="abcdef", max_tokens=50, stop=["d"])
        done = {("worker_request_success_total", ("finish_reason", x)): 1.0 for x in ("length", "stop_sequence")}
        await until(worker, done)
        found = await samples_of(worker)
    reasons = {key[1][1] for key in found if key[0] == "worker_request_success_total"}
    assert reasons == {*_literals(FinishReason)}
    for name in ("worker_request_seconds", "worker_request_first_token_seconds"):
        assert found[f"{name}_count",] == 2
        assert found[f"{name}_sum",] >= waited_s - 0.05, "the wait before the claim counts"


def _literals(kind):
    return [text for each in get_args(kind) for text in (_literals(each) if get_args(each) else [each])]


async def test_kv_use_and_prefix_cache_are_counted_as_in_vllm(fake):
    client, prompt = fake.client(), "a prompt of more than sixteen tokens, which has two full blocks"
    async with serving(fake, SharedModel.echo().fresh(), **FAST) as worker:
        for _ in range(2):
            await run_job(client, prompt=prompt, max_tokens=4, ignore_eos=True)
        started = (await run_job(client, prompt=prompt, max_tokens=4, ignore_eos=True)).of("started")[0]
        assert started.cached_tokens > 0
        await until(worker, {("worker_kv_blocks", ("state", "used")): 0.0, ("worker_kv_cache_usage_ratio",): 0.0})
        found = await samples_of(worker)
    assert found["worker_prefix_cache_query_tokens_total",] == 3 * started.prompt_tokens
    assert found["worker_prefix_cache_hit_tokens_total",] == 2 * started.cached_tokens
    assert found["worker_engine_steps_total",] > 0
    for name in ("worker_preemptions", "worker_draft_tokens", "worker_accepted_draft_tokens"):
        assert found[name,] == found[f"{name}_total",]


async def test_kv_use_is_the_share_of_used_blocks_while_a_job_runs(fake):
    client, model = fake.client(), SharedModel.echo()
    slow = model.fresh(ScriptedRunner(model.runner, lambda step: time.sleep(0.01)))
    async with serving(fake, slow, **FAST) as worker:
        await client.submit(job_id="a", prompt="abc", max_tokens=500, ignore_eos=True)

        async def used():
            found = await samples_of(worker)
            blocks = {dict(key[1:])["state"]: n for key, n in found.items() if key[0] == "worker_kv_blocks"}
            share = blocks.get("used", 0) / max(1, sum(blocks.values()))
            return share > 0 and abs(found["worker_kv_cache_usage_ratio",] - share) < 1e-9

        await wait_until(used, 20)
        await client.cancel("a")
        await wait_until_queue_is_empty(client)


async def test_the_queue_is_shown(fake):
    client, barrier, model = fake.client(), StepBarrier(at=0), SharedModel.echo()
    async with serving(fake, model.fresh(ScriptedRunner(model.runner, barrier.script)), **FAST) as worker:
        for n in range(4):
            await client.submit(job_id=f"j{n}", prompt="abc", max_tokens=2)
        await barrier.wait_until_reached()
        running, waiting = (("worker_queue_jobs", ("queue", "default"), ("state", x)) for x in ("running", "waiting"))
        oldest, dead = ((f"worker_queue_{x}", ("queue", "default")) for x in ("oldest_wait_seconds", "dead_letters"))
        await until(worker, {running: 1.0, waiting: 3.0, dead: 0.0})
        assert (await samples_of(worker))[oldest] > 0
        barrier.release()
        await until(worker, {running: 0.0, waiting: 0.0, oldest: 0.0})


async def test_a_payload_without_a_job_id_is_no_fault_of_the_worker(fake):
    async with serving(fake, SharedModel.echo().fresh(), **FAST) as worker:
        await fake.connect().enqueue("default", {"p": b"garbage"}, 100)
        await until(worker, {("worker_requests_total", ("outcome", "unreadable")): 1.0})
        found = await samples_of(worker)
        assert [found["worker_requests_total", ("outcome", fault)] for fault in FAULTS] == [0.0] * len(FAULTS)
        assert await fake.client().dead_letter_count() == 1


async def test_a_refused_reading_of_the_queue_is_logged_once(fake):
    calls = []

    async def before(name):
        if name == "depth":
            calls.append(name)
            raise ServerRefused("no +xinfo", {"reply": "NOPERM"})

    streams = LossyStreams(fake.connect(), lambda name: False, before)
    async with serving(fake, SharedModel.echo().fresh(), streams=streams, queue_s=0.02) as worker:

        async def read_often():
            return len(calls) > 3

        await wait_until(read_often)
        assert [line["reason"] for line in worker.logged("redis_refused")] == ["no +xinfo"]


async def test_a_scrape_reads_no_queue(fake):
    calls = []
    streams = LossyStreams(fake.connect(), calls.append)
    async with serving(fake, SharedModel.echo().fresh(), streams=streams, queue_s=600) as worker:

        async def read():
            return "depth" in calls

        await wait_until(read)
        for _ in range(20):
            await samples_of(worker)
        assert calls.count("depth") == 1


async def test_an_unreachable_server_is_shown_and_its_queues_are_not(fake):
    down = False

    async def before(name):
        if down:
            raise Disconnected("the server is down")

    streams = LossyStreams(fake.connect(), lambda name: False, before)
    async with serving(fake, SharedModel.echo().fresh(), streams=streams, **FAST) as worker:
        waiting = ("worker_queue_jobs", ("queue", "default"), ("state", "waiting"))
        await until(worker, {("worker_server_reached",): 1.0, waiting: 0.0})
        down = True
        await until(worker, {("worker_server_reached",): 0.0, waiting: None})
        down = False
        await until(worker, {("worker_server_reached",): 1.0, waiting: 0.0})


async def test_a_worker_is_degraded_from_a_failed_allocation_to_the_next_completed_job(fake):
    client, model = fake.client(), SharedModel.echo()

    def fail(step):
        if step == 0:
            raise MemoryError

    async with serving(fake, model.fresh(ScriptedRunner(model.runner, fail)), **FAST) as worker:
        assert (await samples_of(worker))["worker_degraded",] == 0
        assert (await run_job(client, prompt="abc", max_tokens=2)).last.code == "VRAM_OOM"
        await until(worker, {("worker_degraded",): 1.0, ("worker_requests_total", ("outcome", "vram_oom")): 1.0})
        await run_job(client, prompt="abc", max_tokens=2)
        await until(worker, {("worker_degraded",): 0.0})


MARK = "zebra"
"""In everything that a job's sender chooses."""


async def test_no_label_holds_what_a_job_says(fake):
    client, model = fake.client(), SharedModel.echo()
    hostile = [
        {"job_id": f"{MARK}-1", "prompt": MARK, "tenant": f'{MARK}"}}\n{MARK}', "correlation_id": f"{MARK}-c"},
        {"job_id": f"{MARK}-2", "prompt": MARK, "model": f"../../{MARK}/model"},
        {"job_id": f"{MARK}-3", "prompt": MARK, "max_tokens": 100_000, "tenant": f"sk-{MARK}"},
        {"job_id": f"{MARK}-4", "prompt": MARK, "stop": [MARK[:2]], "traceparent": f"00-{MARK}"},
        {"job_id": f"{MARK}-5", "messages": [{"role": "user", "content": MARK}]},
        {"job_id": f"{MARK}-6", "prompt": MARK, "response_format": {"type": "regex", "regex": f"({MARK}"}},
    ]
    async with serving(fake, model.fresh(), **FAST) as worker:
        for fields in hostile:
            await run_job(client, **({"max_tokens": 20} | fields))
        unreadable = [
            b'{"job_id": "%s-7", "prompt": 1}',
            b'{"job_id": "\\n%s\\"}", "prompt": "x"}',
            b"%s",
            b'{"%s": 2}',
        ]
        for payload in unreadable:
            await fake.connect().enqueue("default", {"p": payload % MARK.encode()}, 100)
        await wait_until_queue_is_empty(client)
        waiting = "worker_queue_jobs", ("queue", "default"), ("state", "waiting")
        await until(worker, {waiting: 0.0, ("worker_queue_dead_letters", ("queue", "default")): 3.0})
        _, page = await http_get(worker.service.http_port, "/metrics")
        found = await samples_of(worker)
    assert MARK not in page
    assert sum(n for key, n in found.items() if key[0] == "worker_requests_total") >= len(hostile)
