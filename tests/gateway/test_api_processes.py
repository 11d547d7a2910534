"""Gateways and workers as processes: kills in the middle of a background response and of a batch."""

from __future__ import annotations

import json
import signal

from tests.gateway.gateways import GatewayProcess, openai_client
from tests.gateway.test_processes import echo_worker, holder_of, processes, until_served
from tests.jobs.harness import ServerHarness, wait_until
from worker.jobs.client import Client

CHAT = "/v1/chat/completions"


async def test_a_background_response_survives_kills_of_its_worker_and_its_gateway(server, tmp_path):
    gates = [GatewayProcess(server.url, tmp_path / f"gate-{n}") for n in range(2)]
    workers = [echo_worker(server.url, tmp_path, name) for name in ("one", "two")]
    request = {"model": "echo", "input": "tell me", "max_output_tokens": 120, "extra_body": {"ignore_eos": True}}
    with processes(*gates, *workers):
        for gate in gates:
            await until_served(gate.url)
        async with openai_client(gates[0].url) as client, Client.from_url(server.url) as jobs:
            stream = await client.responses.create(**request, background=True, stream=True)
            events = [await anext(stream) for _ in range(12)]
            killed = await holder_of(jobs, events[0].response.id)
            next(each for each, name in zip(workers, ("one", "two"), strict=True) if killed.startswith(name)).send(
                signal.SIGKILL
            )
            gates[0].send(signal.SIGKILL)
            async with openai_client(gates[1].url) as other:
                response_id, last = events[0].response.id, events[-1].sequence_number
                rest = await other.responses.retrieve(response_id, stream=True, starting_after=last)
                events += [event async for event in rest]
                whole = await other.responses.create(**request)
            kinds = [item.kind async for item in jobs.events(response_id, idle_s=5)]

    assert "resumed" in kinds
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 120


async def test_a_batch_survives_a_kill_of_its_gateway_and_runs_each_request_once(server, tmp_path):
    fast = {"WORKER_GATEWAY__BATCH_LEASE_S": "1"}
    gates = [GatewayProcess(server.url, tmp_path / f"gate-{n}", **fast) for n in range(2)]
    lines = [
        {
            "custom_id": f"c{n}",
            "method": "POST",
            "url": CHAT,
            "body": {"model": "echo", "messages": [{"role": "user", "content": f"word {n}"}]},
        }
        for n in range(20)
    ]
    with processes(*gates, echo_worker(server.url, tmp_path, "one")):
        for gate in gates:
            await until_served(gate.url)
        async with openai_client(gates[0].url) as client:
            content = "\n".join(map(json.dumps, lines)).encode()
            file = await client.files.create(file=("in.jsonl", content), purpose="batch")
            created = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")

            async def begun() -> bool:
                return (await client.batches.retrieve(created.id)).request_counts.completed >= 3

            await wait_until(begun, 20)
            gates[0].send(signal.SIGKILL)
        async with openai_client(gates[1].url) as client:
            before = await client.batches.retrieve(created.id)

            async def completed() -> bool:
                return (await client.batches.retrieve(created.id)).status == "completed"

            await wait_until(completed, 30)
            batch = await client.batches.retrieve(created.id)
            output = [json.loads(line) for line in (await client.files.content(batch.output_file_id)).text.splitlines()]
        jobs = await job_keys(server.url)

    assert before.request_counts.completed < 20, "the gateway was killed in the middle"
    assert [each["custom_id"] for each in output] == [f"c{n}" for n in range(20)]
    answers = [each["response"]["body"]["choices"][0]["message"]["content"] for each in output]
    assert answers == [f"user\nword {n}" for n in range(20)]
    assert len(jobs) == 20


async def job_keys(url: str) -> list[str]:
    """The event streams of all jobs."""
    harness = ServerHarness(url)
    try:
        return [key for key in await harness.keys() if key.endswith(":events") and "{job:" in key]
    finally:
        await harness.close()
