"""`/v1/batches` with the openai package, over gateways, a worker and a server."""

from __future__ import annotations

import json

import openai
import pytest

from tests.gateway.gateways import fake_worker, gateway
from tests.gateway.stack import last_turn, scripted_worker, stack
from tests.jobs.harness import wait_until
from worker.gateway.keys import ApiKeys, KeyEntry

BREAKS = "a\u2028b\x85c"
"""Line ends for `str.splitlines`, but not in JSON Lines."""
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def script(prompt: str) -> str:
    if "<|im_start|>" not in prompt:
        return f"completed {prompt}"
    text = last_turn(prompt)[1]
    return BREAKS if text == "breaks" else f"you said {text}"


def body_of(endpoint: str, text: str, **fields):
    prompts = {
        CHAT: {"messages": [{"role": "user", "content": text}], "max_tokens": 100},
        COMPLETIONS: {"prompt": text, "max_tokens": 100},
        RESPONSES: {"input": text, "max_output_tokens": 100},
    }
    return {"model": "scripted", **prompts[endpoint], **fields}


def text_of(endpoint: str, body) -> str:
    if endpoint == RESPONSES:
        return body["output"][0]["content"][0]["text"]
    choice = body["choices"][0]
    return choice["text"] if endpoint == COMPLETIONS else choice["message"]["content"]


def line(custom_id: str, endpoint: str, body) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body})


async def submit(client, lines, endpoint=CHAT, **fields):
    file = await client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **fields)


async def ended(client, batch_id, timeout_s=20.0):
    async def is_over() -> bool:
        batch = await client.batches.retrieve(batch_id)
        return batch.status in ("completed", "failed", "expired", "cancelled")

    await wait_until(is_over, timeout_s)
    return await client.batches.retrieve(batch_id)


async def lines_of(client, file_id):
    content = await client.files.content(file_id)
    return [json.loads(each) for each in content.text.splitlines()]


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, RESPONSES])
async def test_a_batch_answers_every_request_of_its_file(harness, endpoint):
    async with stack(harness, script) as (gate, prompts), gate.openai() as client:
        lines = [line(f"c{n}", endpoint, body_of(endpoint, f"word{n}")) for n in range(20)]
        created = await submit(client, lines, endpoint, metadata={"a": "b"})
        batch = await ended(client, created.id)
        output = await lines_of(client, batch.output_file_id)
        assert len(prompts) == 20

    assert created.status == "validating"
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (20, 20, 0)
    assert batch.error_file_id is None
    assert batch.metadata == {"a": "b"}
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert [each["custom_id"] for each in output] == [f"c{n}" for n in range(20)]
    said = "completed" if endpoint == COMPLETIONS else "you said"
    for number, each in enumerate(output):
        assert each["error"] is None
        assert each["response"]["status_code"] == 200
        assert text_of(endpoint, each["response"]["body"]) == f"{said} word{number}"
    assert len({each["id"] for each in output}) == 20


async def test_output_lines_are_lines_also_for_clients_that_split_at_other_breaks(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        batch = await ended(client, (await submit(client, [line("c", CHAT, body_of(CHAT, "breaks"))])).id)
        output = await lines_of(client, batch.output_file_id)

    assert text_of(CHAT, output[0]["response"]["body"]) == BREAKS


async def test_requests_that_fail_are_in_the_error_file(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        lines = [
            line("good", CHAT, body_of(CHAT, "x")),
            line("unknown field", CHAT, body_of(CHAT, "x", frob=1)),
            line("refused by the worker", CHAT, body_of(CHAT, "x") | {"max_tokens": 10**6}),
            line("unknown model", CHAT, body_of(CHAT, "x") | {"model": "other"}),
        ]
        batch = await ended(client, (await submit(client, lines)).id)
        output, errors = await lines_of(client, batch.output_file_id), await lines_of(client, batch.error_file_id)

    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 3)
    assert [each["custom_id"] for each in output] == ["good"]
    statuses = {each["custom_id"]: each["response"]["status_code"] for each in errors}
    assert statuses == {"unknown field": 400, "refused by the worker": 400, "unknown model": 404}
    assert "frob" in errors[0]["response"]["body"]["error"]["message"]


async def test_jobs_of_a_batch_are_the_least_urgent_ones_of_its_tenant(harness, monkeypatch):
    submitted = []
    async with stack(harness, script, tenants=("one",)) as (gate, _):
        submit_job = gate.client.submit

        async def spy(**fields):
            submitted.append(fields)
            return await submit_job(**fields)

        monkeypatch.setattr(gate.client, "submit", spy)
        async with gate.openai(api_key="key-of-one") as client:
            lines = [line("c", CHAT, body_of(CHAT, "x", n=2))]
            batch = await ended(client, (await submit(client, lines)).id)
            output = await lines_of(client, batch.output_file_id)

    assert [(fields["priority"], fields["tenant"]) for fields in submitted] == [(9, "one"), (9, "one")]
    assert len(output[0]["response"]["body"]["choices"]) == 2


async def test_a_batch_whose_workers_take_no_jobs_holds_up_no_other(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        stalled = await fake_worker(harness, gate, "stalled", queue="other")
        bodies = [body_of(CHAT, f"x{n}") | {"model": "stalled"} for n in range(3)]
        waiting = await submit(client, [line(f"c{n}", CHAT, body) for n, body in enumerate(bodies)])

        async def queued() -> bool:
            return await harness.client(queue="other").queue_length() == 1

        await wait_until(queued)
        created = await submit(client, [line("c", CHAT, body_of(CHAT, "x"))])
        batch = await ended(client, created.id, timeout_s=8)  # less than the registration of the stalled worker
        waits = await client.batches.retrieve(waiting.id)
        await stalled.close()

    assert batch.request_counts.completed == 1
    assert (waits.status, waits.request_counts.total) == ("in_progress", 3)


async def test_another_request_does_not_wait_behind_a_batch(harness):
    async with stack(harness, script, step_s=0.02, slots=1) as (gate, prompts), gate.openai() as client:
        lines = [line(f"c{n}", CHAT, body_of(CHAT, f"word{n}")) for n in range(12)]
        created = await submit(client, lines)

        async def begun() -> bool:
            return len(prompts) >= 3

        await wait_until(begun)
        await client.chat.completions.create(**body_of(CHAT, "urgent"))
        before = len(prompts)
        batch = await ended(client, created.id)

    assert before <= 7, "one request of the batch ran and one waited"
    assert batch.request_counts.completed == 12


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        (["{"], "invalid_json_line", 1),
        ([""], "empty_file", None),
        ([line("a", CHAT, body_of(CHAT, "x"))] * 2, "duplicate_custom_id", 2),
        ([line("a", COMPLETIONS, body_of(COMPLETIONS, "x"))], "mismatched_endpoint", 1),
        ([line("a", CHAT, body_of(CHAT, "x", stream=True))], "invalid_value", 1),
        ([json.dumps({"custom_id": "a", "method": "POST", "url": CHAT})], "missing_required_parameter", 1),
        ([line("a", CHAT, {}).replace("POST", "GET")], "invalid_method", 1),
        ([line("a", CHAT, {})[:-1] + ', "frob": 1}'], "unknown_parameter", 1),
        ([line("a", CHAT, {})[:-1] + ', "\\ud800": 1}'], "unknown_parameter", 1),
    ],
)
async def test_a_file_with_a_mistake_fails_the_batch_and_runs_nothing(harness, lines, code, number):
    async with stack(harness, script) as (gate, prompts), gate.openai() as client:
        batch = await ended(client, (await submit(client, lines)).id)
        assert prompts == []

    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, number)]
    assert batch.output_file_id is None


async def test_a_batch_goes_on_at_another_gateway_and_runs_each_request_once(harness):
    async with scripted_worker(harness, script, step_s=0.01) as prompts:
        async with gateway(harness, batch_concurrency=4) as gate, gate.openai() as client:
            await gate.wait_for_model("scripted")
            lines = [line(f"c{n}", CHAT, body_of(CHAT, f"word{n}")) for n in range(30)]
            created = await submit(client, lines)

            async def begun() -> bool:
                return (await client.batches.retrieve(created.id)).request_counts.completed >= 5

            await wait_until(begun)
        assert len(prompts) < 30
        async with gateway(harness, batch_concurrency=4) as other, other.openai() as client:
            batch = await ended(client, created.id)
            output = await lines_of(client, batch.output_file_id)
        assert sorted(prompts) == sorted(set(prompts)), "no request ran twice"

    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (30, 0)
    assert [each["custom_id"] for each in output] == [f"c{n}" for n in range(30)]


async def test_two_gateways_run_each_request_once(harness):
    async with scripted_worker(harness, script) as prompts, gateway(harness) as one, gateway(harness) as two:
        await one.wait_for_model("scripted")
        await two.wait_for_model("scripted")
        async with one.openai() as first, two.openai() as second:
            lines = [line(f"c{n}", CHAT, body_of(CHAT, f"word{n}")) for n in range(20)]
            batches = [await submit(each, lines) for each in (first, second, first)]
            over = [await ended(second, batch.id) for batch in batches]
        assert len(prompts) == 60

    assert [batch.request_counts.completed for batch in over] == [20, 20, 20]


async def test_a_cancelled_batch_cancels_its_jobs_and_keeps_what_is_done(harness):
    async with stack(harness, script, step_s=0.02, batch_concurrency=2) as (gate, prompts), gate.openai() as client:
        texts = ["x", *("y" * 90 for _ in range(20))]
        lines = [line(f"c{n}", CHAT, body_of(CHAT, text)) for n, text in enumerate(texts)]
        created = await submit(client, lines)

        async def begun() -> bool:
            return (await client.batches.retrieve(created.id)).request_counts.completed >= 1

        await wait_until(begun)
        cancelling = await client.batches.cancel(created.id)
        batch = await ended(client, created.id)
        output = await lines_of(client, batch.output_file_id)

        async def idle() -> bool:
            return not await gate.client.queue()

        await wait_until(idle)
        assert len(prompts) < 10
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(created.id)

    assert cancelling.status == "cancelling"
    assert batch.status == "cancelled"
    assert batch.cancelled_at
    assert len(output) == batch.request_counts.completed < 21
    assert batch.request_counts.failed == 0


async def test_a_cancelled_batch_cancels_the_jobs_of_every_prompt_and_choice(harness, monkeypatch):
    submitted = []
    async with stack(harness, script, step_s=0.05, slots=2) as (gate, prompts), gate.openai() as client:
        submit_job = gate.client.submit

        async def spy(**fields):
            submitted.append(fields["job_id"])
            return await submit_job(**fields)

        monkeypatch.setattr(gate.client, "submit", spy)
        body = body_of(COMPLETIONS, "", prompt=["y" * 90, "z" * 90], n=2)
        created = await submit(client, [line("c", COMPLETIONS, body)], COMPLETIONS)

        async def begun() -> bool:
            return len(prompts) == 2

        await wait_until(begun)
        await client.batches.cancel(created.id)
        await ended(client, created.id)

        async def cancelled() -> bool:
            states = [await gate.client.state(job_id) for job_id in submitted]
            return [state.get("error") for state in states] == ["CANCELLED"] * 4

        await wait_until(cancelled, 10)


async def test_the_models_of_the_key_that_created_a_batch_apply_to_its_lines(harness):
    allowed, refused = KeyEntry(key="key-allowed", tenant="t"), KeyEntry(key="key-refused", tenant="t", models=("x",))
    async with (
        scripted_worker(harness, script) as prompts,
        gateway(harness, keys=ApiKeys([allowed, refused])) as gate,
        gate.openai(api_key=allowed.key) as one,
        gate.openai(api_key=refused.key) as two,
    ):
        await gate.wait_for_model("scripted")
        lines = [line("c", CHAT, body_of(CHAT, "x"))]
        batch = await ended(two, (await submit(two, lines)).id)
        (error,) = await lines_of(two, batch.error_file_id)
        assert prompts == []
        completed = await ended(one, (await submit(one, lines)).id)
        assert "key_digest" not in batch.to_dict()

    assert error["response"]["status_code"] == 403
    assert error["response"]["body"]["error"]["code"] == "model_not_allowed"
    assert completed.request_counts.completed == 1


async def test_batches_are_listed_in_pages_the_newest_first(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        created = [(await submit(client, [line("c", CHAT, body_of(CHAT, "x"))])).id for _ in range(3)]
        listed = [batch.id async for batch in client.batches.list(limit=2)]

    assert listed == created[::-1]


async def test_batches_of_other_tenants_are_not_found(harness):
    async with stack(harness, script, tenants=("one", "two")) as (gate, _):
        one, two = gate.openai(api_key="key-of-one"), gate.openai(api_key="key-of-two")
        async with one, two:
            batch = await submit(one, [line("c", CHAT, body_of(CHAT, "x"))])
            with pytest.raises(openai.NotFoundError):
                await two.batches.retrieve(batch.id)
            with pytest.raises(openai.BadRequestError) as raised:
                await two.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
            assert raised.value.param == "input_file_id"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"extra_body": {"frob": 1}}, "frob"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(harness, fields, param):
    async with gateway(harness) as gate, gate.openai() as client:
        request = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"}
        with pytest.raises(openai.BadRequestError) as raised:
            await client.batches.create(**request | fields)

    assert raised.value.param == param


async def test_every_key_of_an_ended_batch_expires(harness):
    async with stack(harness, script) as (gate, _), gate.openai() as client:
        await ended(client, (await submit(client, [line("c", CHAT, body_of(CHAT, "x"))])).id)
    keys = {key: ttl for key, ttl in (await harness.keys()).items() if "batch" in key or "file" in key}

    assert len(keys) >= 7
    assert None not in keys.values()
