"""`worker gateway` as a process: drain, kills of a worker and of a gateway in mid-stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys

import httpx
import pytest

from tests.cli.conftest import command  # noqa: F401  # a fixture
from tests.gateway.gateways import GatewayProcess, events_of, openai_client
from tests.jobs.harness import wait_until
from tests.service.processes import Process
from worker.jobs.client import Client

QUESTION = [{"role": "user", "content": "tell me"}]
BODY = {"model": "echo", "messages": QUESTION, "max_tokens": 120, "ignore_eos": True}
STEP_MS = 15


@contextlib.contextmanager
def processes(*started):
    """Kill them at the end."""
    try:
        yield started
    finally:
        for process in started:
            process.popen.kill()
            process.wait()


def echo_worker(url, folder, name):
    worker = Process(url, folder / name, "--echo", "--echo-step-ms", STEP_MS, "--name", name)
    worker.await_log("worker_ready")
    return worker


async def until_served(url):
    async def served():
        async with httpx.AsyncClient() as http:
            models = (await http.get(f"{url}/v1/models")).json()
            return bool(models["data"])

    await wait_until(served, 10)


async def text_of(stream):
    parts, ends = [], []
    async for chunk in stream:
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            ends += [choice.finish_reason] if choice.finish_reason else []
    return "".join(parts), ends


async def holder_of(client, job_id):
    """The worker that runs the job, once it has published a tenth of the answer."""

    async def begun():
        return int((await client.state(job_id)).get("tokens") or 0) >= BODY["max_tokens"] // 10

    await wait_until(begun, 20)
    return (await client.state(job_id))["worker"]


async def test_a_stream_is_unbroken_when_its_worker_is_killed(server, tmp_path):
    gate = GatewayProcess(server.url, tmp_path / "gate")
    workers = [echo_worker(server.url, tmp_path, name) for name in ("one", "two")]
    with processes(gate, *workers):
        await until_served(gate.url)
        async with openai_client(gate.url) as client, Client.from_url(server.url) as jobs:
            expected, _ = await text_of(await client.chat.completions.create(**BODY_KWARGS, stream=True))
            stream = await client.chat.completions.create(**BODY_KWARGS, stream=True)
            first = await anext(stream)
            killed = await holder_of(jobs, first.id)
            next(each for each, name in zip(workers, ("one", "two"), strict=True) if killed.startswith(name)).send(
                signal.SIGKILL
            )
            text, ends = await text_of(stream)
            assert (text, ends) == (expected, ["length"])
            kinds = [item.kind async for item in jobs.events(first.id, idle_s=5)]
            assert "resumed" in kinds


async def test_a_client_that_reconnects_to_another_gateway_gets_every_token_once(server, tmp_path):
    gates = [GatewayProcess(server.url, tmp_path / name) for name in ("gate-1", "gate-2")]
    with processes(*gates, echo_worker(server.url, tmp_path, "one")):
        for gate in gates:
            await until_served(gate.url)
        body = BODY | {"stream": True, "stream_options": {"include_usage": True}}
        received, last_id = [], None
        async with httpx.AsyncClient(timeout=30) as http:
            with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
                async with http.stream("POST", f"{gates[0].url}/v1/chat/completions", json=body) as response:
                    async for block in blocks(response):
                        (event,) = events_of(block)
                        received.append(json.loads(event["data"]))
                        last_id = event["id"]
                        if len(received) == 20:
                            gates[0].send(signal.SIGKILL)
            assert 20 <= len(received) < BODY["max_tokens"]
            headers = {"Last-Event-ID": last_id}
            rest = await http.post(f"{gates[1].url}/v1/chat/completions", json=body, headers=headers)
            events = events_of(rest.text)
            assert events[-1] == {"data": "[DONE]"}
            received += [json.loads(event["data"]) for event in events[:-1]]
            whole = (await http.post(f"{gates[1].url}/v1/chat/completions", json=BODY)).json()
        deltas = [choice["delta"] for chunk in received for choice in chunk["choices"]]
        assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
        assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
        assert received[-1]["usage"]["completion_tokens"] == BODY["max_tokens"]
        assert len({chunk["id"] for chunk in received}) == 1


async def blocks(response):
    """The text of each server-sent event, as it arrives."""
    buffered = ""
    async for text in response.aiter_text():
        buffered += text
        while "\n\n" in buffered:
            block, _, buffered = buffered.partition("\n\n")
            yield block


async def test_after_sigterm_open_streams_finish_and_new_requests_have_status_503(server, tmp_path):
    gate = GatewayProcess(server.url, tmp_path / "gate")
    with processes(gate, echo_worker(server.url, tmp_path, "one")):
        await until_served(gate.url)
        async with openai_client(gate.url) as client, httpx.AsyncClient() as http:
            stream = await client.chat.completions.create(**BODY_KWARGS, stream=True)
            await anext(stream)
            gate.send(signal.SIGTERM)
            gate.await_log("draining")
            refused = await http.post(f"{gate.url}/v1/chat/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await http.get(f"{gate.url}/health")).status_code == 503
            text, ends = await text_of(stream)
            assert ends == ["length"]
            assert len(text) > BODY["max_tokens"] // 2
        assert await asyncio.to_thread(gate.wait) == 0


async def test_at_the_end_of_the_grace_period_streams_end_with_an_error_and_their_jobs_go_on(server, tmp_path):
    gate = GatewayProcess(server.url, tmp_path / "gate", "--grace", 0.2)
    body = BODY | {"max_tokens": 200}
    with processes(gate, echo_worker(server.url, tmp_path, "one")):
        await until_served(gate.url)
        async with httpx.AsyncClient(timeout=30) as http, Client.from_url(server.url) as jobs:
            url = f"{gate.url}/v1/chat/completions"
            whole = asyncio.create_task(http.post(url, json=body))
            async with http.stream("POST", url, json=body | {"stream": True}) as response:
                received = blocks(response)
                (first,) = events_of(await anext(received))
                gate.send(signal.SIGTERM)
                *_, last = [event async for block in received for event in events_of(block)]
            assert json.loads(last["data"])["error"]["code"] == "draining"
            refused = await whole
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert await asyncio.to_thread(gate.wait) == 0
            job_id = json.loads(first["data"])["id"]
            kinds = [item.kind async for item in jobs.events(job_id, idle_s=10)]
            assert kinds[-1] == "end"
    assert "Traceback" not in gate.log.read_text()


async def test_every_line_of_the_log_is_json_also_after_requests_that_cannot_be_parsed(server, tmp_path):
    gate = GatewayProcess(server.url, tmp_path / "gate")
    with processes(gate):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(gate.url.rpartition(":")[2]))
        writer.write(b"not HTTP\r\n\r\n")
        assert b"400" in await reader.read()
        writer.close()
        async with httpx.AsyncClient() as http:
            broken = {"content": b"--x\r\nbroken", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
            assert (await http.post(f"{gate.url}/v1/files", **broken)).status_code == 400
        gate.send(signal.SIGTERM)
        await asyncio.to_thread(gate.wait)
    assert [json.loads(line)["event"] for line in gate.log.read_text().splitlines()][-1] == "draining"


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
async def test_an_idle_gateway_ends_at_once_and_a_busy_one_at_the_second_signal(server, tmp_path, signals):
    gate = GatewayProcess(server.url, tmp_path / "gate")
    with processes(gate, echo_worker(server.url, tmp_path, "one")):
        await until_served(gate.url)
        async with openai_client(gate.url) as client:
            if len(signals) > 1:
                stream = await client.chat.completions.create(**BODY_KWARGS | {"max_tokens": 4000}, stream=True)
                await anext(stream)
            for number in signals:
                gate.send(number)
                gate.await_log("draining")
            assert await asyncio.to_thread(gate.wait, 10) == 0


def test_the_command_ends_with_5_without_a_server_and_with_4_for_wrong_settings(command, tmp_path, server):  # noqa: F811
    code, _, err = command("gateway", "--redis-url", "redis://127.0.0.1:1", "--port", 0)
    assert (code, "REDIS_UNREACHABLE" in err) == (5, True)
    code, _, err = command("gateway", "--api-keys", tmp_path / "absent.toml", "--port", 0)
    assert (code, "gateway.api_keys" in err) == (4, True)
    code, _, err = command("gateway", "--port", server.port)
    assert (code, f"cannot listen on 127.0.0.1:{server.port}" in err) == (4, True)


def test_without_the_extra_the_command_names_it(command, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.delitem(sys.modules, "worker.cli.gateway", raising=False)
    code, _, err = command("gateway", "--port", 0)
    assert (code, "pip install 'worker-orcd[gateway]'" in err) == (4, True)


BODY_KWARGS = {"model": "echo", "messages": QUESTION, "max_tokens": 120, "extra_body": {"ignore_eos": True}}
