"""Worker, gateway and commands as processes over a cluster with users, and over Sentinel.

A master is killed in the middle of an answer: every token arrives once, and no secret is shown.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.gateway.gateways import GatewayProcess, openai_client
from tests.gateway.test_processes import BODY, holder_of, processes, until_served
from tests.jobs.acl import ROLES, acl_file, password_of
from tests.jobs.cluster import running_cluster
from tests.jobs.harness import wait_until
from tests.jobs.sentinels import monitored_servers
from tests.service.processes import Process
from worker.jobs.client import Client
from worker.jobs.keys import events_key

FIELDS = {name: value for name, value in BODY.items() if name != "ignore_eos"} | {"extra_body": {"ignore_eos": True}}
STEP_MS = 30
LIMIT_S = 90
EXPECTED = 120


def login(role: str, folder: Path) -> dict[str, str]:
    """The environment of a role's process: its password is in a file."""
    path = folder / f"{role}-password"
    path.write_text(password_of(role) + "\n")
    return {"WORKER_REDIS__USERNAME": role, "WORKER_REDIS__PASSWORD_FILE": str(path)}


def echo_worker(url: str, log: Path, **environment: str) -> Process:
    return Process(url, log, "--echo", "--echo-step-ms", STEP_MS, **environment)


async def run_command(url: str, environment: dict[str, str], *arguments: str) -> str:
    """The output of a command; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "worker", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "WORKER_REDIS__URL": url, **environment},
    )
    out, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
    assert process.returncode == 0, err.decode()
    return out.decode() + err.decode()


async def collected(stream):
    """The text of the rest of a stream, and how it ended."""
    parts, ends = [], []
    async for chunk in stream:
        for choice in chunk.choices:
            parts.append(choice.delta.content or "")
            ends += [choice.finish_reason] if choice.finish_reason else []
    return "".join(parts), ends


async def assert_every_token_once(jobs: Client, job_id: str) -> None:
    numbers = [token.i async for token in jobs.tokens(job_id, idle_s=LIMIT_S)]
    assert numbers == list(range(EXPECTED))


async def run_a_batch(client) -> None:
    """A file, and a batch of two requests, as OpenAI's client sends them."""
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": {**BODY, "max_tokens": 3}}
        for n in range(2)
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    file = await client.files.create(file=("lines.jsonl", content), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

    async def completed() -> bool:
        return (await client.batches.retrieve(batch.id)).status == "completed"

    await wait_until(completed, LIMIT_S)
    output = await client.files.content((await client.batches.retrieve(batch.id)).output_file_id)
    assert {json.loads(line)["custom_id"] for line in output.text.splitlines()} == {"0", "1"}
    await client.files.delete(file.id)
    kept = await client.responses.create(model="echo", input="hello", max_output_tokens=16)
    await client.responses.delete(kept.id)


async def test_roles_on_a_cluster_whose_master_is_killed_in_mid_answer(tmp_path):
    acl = acl_file(tmp_path)
    acl.write_text(acl.read_text().replace("user default off", "user default on nopass allkeys +@all"))
    with running_cluster("--aclfile", str(acl), replicas=True) as cluster:
        environments = {role: login(role, tmp_path) for role in ROLES}
        gate = GatewayProcess(cluster.url, tmp_path / "gate", **environments["gateway"])
        worker = echo_worker(cluster.url, tmp_path / "worker", **environments["worker"])
        with processes(gate, worker):
            worker.await_log("worker_ready")
            await until_served(gate.url)
            async with openai_client(gate.url) as client, Client.from_url(cluster.url) as jobs:
                stream = await client.chat.completions.create(**FIELDS, stream=True)
                first = await anext(stream)
                await holder_of(jobs, first.id)
                cluster.master_of(events_key(first.id)).stop()
                text, ends = await asyncio.wait_for(collected(stream), LIMIT_S)
                assert ends == ["length"]
                await assert_every_token_once(jobs, first.id)
                again = await client.chat.completions.create(**FIELDS)
                assert again.choices[0].message.content == text
                await asyncio.wait_for(run_a_batch(client), LIMIT_S)
            shown = [await run_command(cluster.url, environments["operator"], *command) for command in OPERATOR]
            shown += [await run_command(cluster.url, environments["orchestrator"], *command) for command in PROGRAM]
            assert "echo" in shown[0]
            shown += [await run_command(cluster.url, environments["operator"], "drain", worker_name(shown[0]))]
            assert worker.wait(LIMIT_S) == 0
            command_line = Path(f"/proc/{gate.popen.pid}/cmdline").read_text()
        for text in (*shown, command_line, gate.log.read_text(), worker.log.read_text()):
            assert "s3cret" not in text


OPERATOR = [("workers", "--json"), ("jobs",), ("dead", "ls")]
PROGRAM = [("submit", "hello", "--job-id", "one", "--max-tokens", "4", "--wait"), ("tail", "one"), ("cancel", "one")]


def worker_name(listed: str) -> str:
    return str(json.loads(listed.splitlines()[0])["worker"])


async def test_the_master_behind_sentinels_is_killed_in_mid_answer(tmp_path):
    with monitored_servers() as monitored:
        gate = GatewayProcess(monitored.url, tmp_path / "gate")
        worker = echo_worker(monitored.url, tmp_path / "worker")
        with processes(gate, worker):
            worker.await_log("worker_ready")
            await until_served(gate.url)
            async with openai_client(gate.url) as client, Client.from_url(monitored.url) as jobs:
                stream = await client.chat.completions.create(**FIELDS, stream=True)
                first = await anext(stream)
                await holder_of(jobs, first.id)
                monitored.servers[0].stop()
                text, ends = await asyncio.wait_for(collected(stream), LIMIT_S)
                assert ends == ["length"]
                await assert_every_token_once(jobs, first.id)
                again = await client.chat.completions.create(**FIELDS)
                assert again.choices[0].message.content == text
