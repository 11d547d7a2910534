"""Any payload in the queue gets the right code; no entry is lost and the worker survives."""

from __future__ import annotations

import asyncio
import json

import msgpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.jobs.harness import FakeRedisHarness
from tests.jobs.stream_checker import assert_none, find_violations, keys_without_ttl
from tests.service.models import SharedModel
from tests.service.serving import published_events, run_job, serving, wait_until_queue_is_empty
from worker.errors import InvalidRequest
from worker.jobs.payload import job_id_of
from worker.jobs.protocol import decode_job

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.lists(st.integers(0, 300), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
)
NAMES = st.sampled_from(
    [
        *("prompt", "messages", "prompt_tokens", "max_tokens", "temperature", "top_k", "top_p", "min_p", "stop"),
        *("seed", "logprobs", "logit_bias", "min_tokens", "ignore_eos", "deadline_ms", "model", "v", "special"),
        *("repetition_penalty", "frequency_penalty", "presence_penalty", "correlation_id", "traceparent", "unknown"),
    ]
)
MAPS = st.fixed_dictionaries({}, optional={"prompt": st.text(max_size=30)}).flatmap(
    lambda base: st.dictionaries(NAMES, VALUES, max_size=4).map(lambda more: {"max_tokens": 5, **base, **more})
)


@st.composite
def payloads(draw):
    """Bytes of a queue entry: maps as msgpack or JSON, truncated, changed, or noise."""
    fields = {"job_id": "JOB-ID", **draw(MAPS)}
    packed = msgpack.packb(fields)
    form = draw(st.sampled_from(["msgpack", "json", "cut", "changed", "noise"]))
    if form == "json":
        return json.dumps(fields, default=repr).encode()
    if form == "cut":
        return packed[: draw(st.integers(0, len(packed)))]
    if form == "changed":
        at, byte = draw(st.integers(0, len(packed) - 1)), draw(st.integers(0, 255))
        return packed[:at] + bytes([byte]) + packed[at + 1 :]
    return draw(st.binary(max_size=60)) if form == "noise" else packed


@settings(max_examples=6, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(payloads(), min_size=40, max_size=40))
def test_a_worker_answers_every_payload(batch):
    asyncio.run(_answered([payload.replace(b"JOB-ID", f"J{n:05d}".encode()) for n, payload in enumerate(batch)]))


async def _answered(batch):
    harness = FakeRedisHarness()
    client, streams = harness.client(), harness.connect()
    for payload in batch:
        await streams.enqueue("default", {"p": payload}, 1000)
    async with serving(harness, SharedModel.echo().fresh()) as worker:
        await wait_until_queue_is_empty(client)
        assert (await run_job(client, job_id="last", prompt="abc", max_tokens=3)).text == "abc"
        assert not worker.logged("claim_fault")
        assert not worker.logged("attempt_fault")
        assert not worker.logged("job_fault")
    nameless = sum(job_id_of(payload) is None for payload in batch)
    assert len(await client.dead_letters(1000)) == nameless
    for payload in batch:
        job_id = job_id_of(payload)
        if job_id is not None:
            await _ended_rightly(harness, job_id, payload)
    assert_none(
        await find_violations(streams, "default", {job: None for p in batch if (job := job_id_of(p)) is not None})
    )
    assert_none(keys_without_ttl(await harness.keys()))
    await harness.close()


async def _ended_rightly(harness, job_id, payload):
    last = (await published_events(harness, job_id)).last
    refusal = _refusal(payload)
    if refusal is not None:
        assert last.code == "INVALID_REQUEST"
        assert last.details["errors"] == json.loads(json.dumps(refusal.details["errors"], default=list))
    else:
        assert last.kind == "end" or last.code in ("INVALID_REQUEST", "INFERENCE_TIMEOUT"), last


def _refusal(payload):
    try:
        decode_job(payload)
    except InvalidRequest as error:
        return error
    return None
