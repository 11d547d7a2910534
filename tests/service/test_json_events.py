"""A job with `"encoding": "json"` has events that a person can read with redis-cli."""

from __future__ import annotations

import json
import time

from tests.service.jobs import SAMPLED_JOB, handed_back_attempt, reference_tokens
from tests.service.models import ScriptedRunner, SharedModel
from tests.service.serving import published_events, read_job, run_job, serving
from worker.jobs.keys import events_key


async def payloads(harness, job_id):
    """Each event's payload, parsed as strict JSON."""
    records = await harness.connect().range(events_key(job_id), "-", "+", 10_000)
    return [json.loads(fields["p"].decode("utf-8", "strict")) for _, fields in records]


async def test_all_events_of_the_job_are_json_and_readers_notice_no_difference(harness):
    client = harness.client()
    async with serving(harness, SharedModel.echo().fresh()):
        both = [await run_job(client, job_id=name, prompt="é🙂 x", encoding=name) for name in ("json", "msgpack")]
    assert both[0].text == both[1].text
    assert both[0].tokens == both[1].tokens
    found = await payloads(harness, "json")
    assert found[0]["model"] == "echo"
    assert {each["job_id"] for each in found} == {"json"}
    assert "".join(token["t"] for each in found for token in each.get("tokens", ())) == both[0].text


async def test_a_later_attempt_keeps_the_encoding_and_reads_the_history(fake, model):
    client, job = fake.client(), SAMPLED_JOB | {"encoding": "json"}
    whole = reference_tokens(model(), **job)
    await client.submit(job_id="a", **job)
    await handed_back_attempt(fake, model().fresh(), whole[:5])
    async with serving(fake, model().fresh()):
        result = await read_job(client, "a")
    assert result.tokens == whole
    assert [event.from_i for event in result.of("resumed")] == [5]
    assert len(await payloads(fake, "a")) >= 4


async def test_errors_are_json_where_the_payload_requests_it(fake):
    client, streams = fake.client(), fake.connect()
    echo = SharedModel.echo()
    async with serving(fake, echo.fresh(ScriptedRunner(echo.runner, lambda step: time.sleep(0.01)))):
        for job_id, rest in {"b": b'"tempo": 1}', "c": b'"prompt": "x"', "d": b'"prompt": "x", "v": 9}'}.items():
            payload = b'\xef\xbb\xbf {"job_id": "%s", "encoding": "json", %s' % (job_id.encode(), rest)
            await streams.enqueue("default", {"p": payload}, 100)
            assert (await read_job(client, job_id)).kinds == ["error"]
            assert (await payloads(fake, job_id))[0]["code"] == "INVALID_REQUEST"
        await client.submit(job_id="e", prompt="abc", max_tokens=2000, encoding="json")
        async for _ in client.tokens("e"):
            assert await client.cancel("e") == "requested"
            break
        result = await read_job(client, "e")
    assert result.last.code == "CANCELLED"
    assert (await payloads(fake, "e"))[-1]["code"] == "CANCELLED"
    assert (await published_events(fake, "e")).kinds == ["started", "token", "error"]
