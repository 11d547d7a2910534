"""API keys: tenants, models, rates."""

from __future__ import annotations

import asyncio
import hashlib

import openai
import pytest

from tests.gateway.gateways import events_of, fake_worker, gateway, wait_for_jobs
from tests.jobs.harness import wait_until
from tests.service.models import SharedModel
from tests.service.serving import LONG_LEASE, serving
from worker.errors import ConfigInvalid
from worker.gateway.errors import ApiError
from worker.gateway.keys import ApiKeys, Caller, KeyEntry
from worker.jobs.keys import queue_key
from worker.jobs.protocol import decode_job

HELLO = [{"role": "user", "content": "hello"}]
BODY = {"model": "echo", "messages": HELLO, "max_tokens": 5}


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def entry(**fields):
    return KeyEntry(**{"key": "sk-secret-1", "tenant": "team", **fields})


def test_requests_above_the_rate_are_refused_until_the_bucket_has_refilled():
    clock = Clock()
    caller = Caller(entry(requests_per_minute=2), clock)
    caller.admit()
    caller.admit()
    with pytest.raises(ApiError) as refused:
        caller.admit()
    assert (refused.value.status, refused.value.code) == (429, "requests_per_minute")
    assert refused.value.headers["retry-after"] == "30"
    clock.now += 29.9
    with pytest.raises(ApiError):
        caller.admit()
    clock.now += 0.2
    caller.admit()


def test_tokens_are_charged_when_a_job_ends_and_refuse_later_requests():
    clock = Clock()
    caller = Caller(entry(tokens_per_minute=60), clock)
    caller.admit()
    caller.charge(90)
    with pytest.raises(ApiError) as refused:
        caller.admit()
    assert refused.value.code == "tokens_per_minute"
    assert refused.value.headers["retry-after"] == "31"
    clock.now += 31.1
    caller.admit()


def test_the_file_has_keys_or_their_digests(tmp_path):
    digest = hashlib.sha256(b"sk-hidden-2").hexdigest()
    file = tmp_path / "keys.toml"
    file.write_text(f'[[keys]]\nkey = "sk-secret-1"\ntenant = "a"\n[[keys]]\nkey_sha256 = "{digest}"\ntenant = "b"\n')
    keys = ApiKeys.load(str(file))
    assert keys.caller({"authorization": "Bearer sk-secret-1"}).tenant == "a"
    assert keys.caller({"x-api-key": "sk-hidden-2"}).tenant == "b"
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sk-secret-1"}):
        with pytest.raises(ApiError) as refused:
            keys.caller(headers)
        assert refused.value.status == 401


@pytest.mark.parametrize(
    "text",
    [
        "",
        "keys = []",
        "keys = 5",
        "[[keys]",
        '[[keys]]\nkey = "sk-secret-1"',
        '[[keys]]\ntenant = "a"',
        '[[keys]]\nkey = "short"\ntenant = "a"',
        '[[keys]]\nkey = "sk-secret-1"\ntenant = "a"\nrate = 5',
        '[[keys]]\nkey = "sk-secret-1"\ntenant = "a"\n[[keys]]\nkey = "sk-secret-1"\ntenant = "b"',
    ],
)
def test_a_wrong_file_is_refused_without_a_key_in_the_message(tmp_path, text):
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ConfigInvalid) as refused:
        ApiKeys.load(str(file))
    assert "sk-secret-1" not in refused.value.message
    with pytest.raises(ConfigInvalid, match="cannot be read"):
        ApiKeys.load(str(tmp_path / "absent.toml"))


@pytest.fixture
async def guarded(harness):
    """A gateway with keys: `all` may use every model, `none` none that is served, `slow` asks twice a minute."""
    entries = [
        entry(key="sk-secret-all", tenant="all"),
        entry(key="sk-secret-none", tenant="none", models=("other",)),
        entry(key="sk-secret-slow", tenant="slow", requests_per_minute=2),
        entry(key="sk-secret-few", tenant="few", tokens_per_minute=3),
        entry(key="sk-secret-fifty", tenant="fifty", tokens_per_minute=35),
    ]
    async with (
        serving(harness, SharedModel.echo().fresh(), lease=LONG_LEASE),
        gateway(harness, keys=ApiKeys(entries)) as running,
    ):
        await running.wait_for_model("echo")
        yield running


def bearer(name):
    return {"Authorization": f"Bearer sk-secret-{name}"}


async def test_requests_need_a_key_but_health_and_metrics_do_not(guarded):
    http = guarded.http()
    assert (await http.get("/v1/models")).status_code == 401
    refused = await http.post("/v1/chat/completions", json=BODY, headers=bearer("wrong"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await http.get("/health")).status_code == 200
    assert (await http.get("/metrics")).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        await guarded.openai(api_key="sk-secret-wrong").models.list()


@pytest.mark.parametrize("keys", [None, ApiKeys([entry(key="sk-secret-all", tenant="team")])])
async def test_a_key_s_tenant_is_the_job_s_and_without_keys_the_user_is(harness, keys):
    async with gateway(harness, keys=keys) as running:
        await fake_worker(harness, running)
        body = BODY | {"user": "ada"}
        asking = asyncio.create_task(running.http().post("/v1/chat/completions", json=body, headers=bearer("all")))
        await wait_for_jobs(running, 1)
        ((_, fields),) = await harness.connect().range(queue_key("default"), "-", "+", 1)
        assert decode_job(fields["p"]).tenant == ("team" if keys else "ada")
        assert "sk-secret" not in running.output.getvalue()
        asking.cancel()


async def test_a_key_may_use_its_models_only(guarded):
    http = guarded.http()
    refused = await http.post("/v1/chat/completions", json=BODY, headers=bearer("none"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    assert (await http.get("/v1/models", headers=bearer("none"))).json()["data"] == []
    assert [each["id"] for each in (await http.get("/v1/models", headers=bearer("all"))).json()["data"]] == ["echo"]


async def test_the_status_shows_a_key_the_workers_and_queues_of_its_models_only(guarded, harness):
    await fake_worker(harness, guarded, "other", "other-queue")
    await guarded.context.models.refresh()

    async def shown(name):
        status = (await guarded.http().get("/page/status", headers=bearer(name))).json()
        return [each["model"] for each in status["workers"]], [each["queue"] for each in status["queues"]]

    models, queues = await shown("all")
    assert (sorted(models), queues) == (["echo", "other"], ["default", "other-queue"])
    assert await shown("none") == (["other"], ["other-queue"])


async def test_another_tenant_s_stream_cannot_be_resumed(guarded):
    body = BODY | {"stream": True}
    whole = events_of((await guarded.http().post("/v1/chat/completions", json=body, headers=bearer("all"))).text)
    for name, status in (("slow", 400), ("all", 200)):
        headers = bearer(name) | {"Last-Event-ID": whole[0]["id"]}
        response = await guarded.http().post("/v1/chat/completions", json=body, headers=headers)
        assert response.status_code == status


async def test_another_tenant_cannot_take_a_response(guarded):
    body = {"model": "echo", "input": "hello"}
    created = (await guarded.http().post("/v1/responses", json=body, headers=bearer("all"))).json()
    for given in (body, body | {"input": "x"}):
        headers = bearer("slow") | {"Last-Event-ID": f"{created['id']}:0-1:0"}
        taken = await guarded.http().post("/v1/responses", json=given, headers=headers)
        assert taken.status_code == 400
    path = f"/v1/responses/{created['id']}"
    assert (await guarded.http().get(path, headers=bearer("slow"))).status_code == 404
    assert (await guarded.http().get(path, headers=bearer("all"))).json()["output"] == created["output"]


async def test_tokens_of_broken_streams_and_of_background_responses_count(guarded):
    body = BODY | {"stream": True, "ignore_eos": True, "max_tokens": 3000}
    async with guarded.http().stream("POST", "/v1/chat/completions", json=body, headers=bearer("few")) as response:
        async for line in response.aiter_lines():
            if '"finish_reason":null' in line and '"content":"' in line:
                break

    async def noticed() -> bool:
        return guarded.context.open_requests == 0

    await wait_until(noticed)
    refused = await guarded.http().post("/v1/chat/completions", json=BODY, headers=bearer("few"))
    assert refused.json()["error"]["code"] == "tokens_per_minute"
    background = {"model": "echo", "input": "hello", "background": True, "max_output_tokens": 40}
    for status in (200, 429):
        response = await guarded.http().post("/v1/responses", json=background, headers=bearer("fifty"))
        assert response.status_code == status


async def test_the_rates_of_a_key_answer_429_with_the_time_to_wait(guarded):
    http = guarded.http()
    statuses = [(await http.post("/v1/chat/completions", json=BODY, headers=bearer("slow"))) for _ in range(3)]
    assert [each.status_code for each in statuses] == [200, 200, 429]
    assert 1 <= int(statuses[2].headers["retry-after"]) <= 30
    first = await http.post("/v1/chat/completions", json=BODY, headers=bearer("few"))
    second = await http.post("/v1/chat/completions", json=BODY, headers=bearer("few"))
    assert (first.status_code, second.status_code) == (200, 429)
    assert second.json()["error"]["code"] == "tokens_per_minute"
    assert guarded.metric("gateway_jobs_total") == 3
