"""`submit`, `tail` and `cancel`: every flag reaches the job, and unknown jobs are reported."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import pytest

from tests.cli.conftest import Run, prepare
from tests.jobs.echo import complete, take_next, text
from tests.jobs.harness import ServerHarness
from tests.jobs.servers import Server
from worker import __version__
from worker.cli.generate import generate
from worker.cli.jobs import submit
from worker.jobs.keys import events_key, queue_key
from worker.jobs.protocol import Job


def submitted(server: Server) -> dict[str, object]:
    """The payload of the queue's first entry."""
    payloads = []

    async def read(harness: ServerHarness) -> None:
        ((_, fields),) = await harness.connect().range(queue_key("default"), "-", "+", 1)
        payloads.append(msgpack.unpackb(fields["p"]))

    prepare(server, read)
    return dict(payloads[0])


def test_every_flag_reaches_the_job(server: Server, command: Run, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    (tmp_path / "tools.json").write_text("\ufeff" + json.dumps([tool]))
    flags = {
        "temperature": 0.5, "seed": 3, "top_k": 4, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5,
        "frequency_penalty": 0.5, "presence_penalty": -0.5, "min_tokens": 2, "logprobs": 1, "max_tokens": 9,
        "deadline_ms": 1000, "model": "echo", "priority": 3, "tenant": "t",
    }  # fmt: skip
    options = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
    code, _, err = command(
        *("submit", "hi", "--chat", "--system", "be brief", *options, "--ignore-eos", "--stop", "a", "--stop", "b"),
        *("--stop-token-id", 7, "--tools", tmp_path / "tools.json", "--tool-choice", "add"),
        *("--template-kwargs", '{"enable_thinking": false}', "--job-id", "mine"),
    )
    assert code == 0, err
    job = submitted(server)
    assert Job.parse(job)
    assert job == flags | {
        "job_id": "mine",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "stop": ["a", "b"],
        "stop_token_ids": [7],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "add"}},
        "chat_template_kwargs": {"enable_thinking": False},
        "ignore_eos": True,
    }


def test_token_ids_and_raw_prompts_can_be_submitted(server: Server, command: Run) -> None:
    assert command("submit", "--prompt-tokens", "1,2,3", "--no-special")[0] == 0
    job = submitted(server)
    assert (job["prompt_tokens"], job["special"]) == ([1, 2, 3], False)


def test_a_response_format_is_json_or_a_file(server: Server, command: Run, tmp_path: Path) -> None:
    given = {"type": "regex", "regex": "[0-9]+"}
    (tmp_path / "format.json").write_text(json.dumps(given))
    for value in (json.dumps(given), tmp_path / "format.json"):
        assert command("submit", "x", "--response-format", value)[0] == 0
    job = submitted(server)
    assert (job["response_format"], job["v"]) == (given, 2)


def test_submit_has_every_option_of_a_job_that_generate_has() -> None:
    of_generate = set(inspect.signature(generate).parameters) - {"model", "context", "backend"}
    assert of_generate <= set(inspect.signature(submit).parameters)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("",), 3, "prompt: at least one character"),
        (("", "--chat"), 3, "prompt"),
        ((), 3, "pass a PROMPT"),
        (("--chat",), 3, "pass the user's message"),
        (("x", "--prompt-tokens", "1"), 3, "exactly one of"),
        (("x", "--system", "be brief"), 2, "--system"),
        (("x", "--tools", "missing.json"), 2, "--tools"),
        (("x", "--chat", "--tools", "missing.json"), 2, "missing.json"),
        (("x", "--chat", "--template-kwargs", "[1]"), 2, "JSON object"),
        (("x", "--chat", "--template-kwargs", "{"), 2, "valid JSON"),
        (("x", "--response-format", "missing.json"), 2, "missing.json"),
        (("x", "--response-format", "{"), 2, "valid JSON"),
        (("x", "--response-format", '{"type": "xml"}'), 3, "response_format"),
        (("x", "--temperature", "9"), 3, "temperature"),
        (("x", "--job-id", "no id!"), 3, "job_id"),
    ],
)
def test_what_can_not_run_is_refused_before_it_is_sent(
    server: Server, command: Run, arguments: tuple[str, ...], code: int, named: str
) -> None:
    ended, out, err = command("submit", *arguments)
    assert (ended, out) == (code, "")
    assert named in err
    assert command("jobs")[1] == "the queue is empty\n"


def test_generate_without_a_prompt_names_what_to_pass(command: Run) -> None:
    assert "pass a PROMPT, or --prompt-tokens" in command("generate", "model.gguf")[2]
    assert "pass the user's message" in command("generate", "model.gguf", "--chat")[2]


def test_the_version_is_printed(command: Run) -> None:
    assert command("--version")[:2] == (0, f"worker {__version__}\n")


def test_a_full_queue_is_exit_code_3_with_the_time_to_retry_after(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_REDIS__QUEUE_BOUND", "1")
    assert command("submit", "x")[0] == 0
    code, out, err = command("submit", "x")
    assert (code, out, err) == (
        3,
        "",
        "worker: QUEUE_FULL: the queue default holds 1 jobs; retry after 1 s\n",
    )


def test_submit_wait_says_when_no_worker_lives(server: Server) -> None:
    async def beat(harness: ServerHarness) -> None:
        transport = await harness.transport("w1")
        await transport.registration.heartbeat({"state": "ready", "model": "llama", "queue": "other"})

    err = _first_line_of_waiting(server, "--queue", "mine")
    assert "no live worker serves the queue mine (live: none)" in err
    prepare(server, beat)
    err = _first_line_of_waiting(server, "--queue", "mine")
    assert "no live worker serves the queue mine (live: llama on the queue other)" in err
    assert "no live worker serves the model qwen" in _first_line_of_waiting(server, "--model", "qwen")
    assert "still running" in _first_line_of_waiting(server, "--model", "llama", after_s=2)


def _first_line_of_waiting(server: Server, *options: str, after_s: float = 0) -> str:
    """Wait for a job, interrupted after a time if given; return the first line of stderr."""
    command = [sys.executable, "-m", "worker", "submit", "x", "--wait", "--redis-url", server.url, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        if after_s:
            time.sleep(after_s)
            process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        line = next((line for line in process.stderr if line.strip()), "")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
    return line


def test_unknown_jobs_are_reported_by_cancel_and_tail(command: Run) -> None:
    for name in ("cancel", "tail"):
        code, out, err = command(name, "TYPO")
        assert (code, out) == (1, "")
        assert err.startswith("worker: NOT_FOUND: no job TYPO is known")
        assert command(name, "no id!")[0] == 3
    command("submit", "x", "--job-id", "a")
    assert command("cancel", "a")[:2] == (0, "cancelled\n")
    assert command("cancel", "a")[:2] == (0, "cancelled\n")


def test_an_expired_job_is_reported_by_tail(server: Server, command: Run) -> None:
    async def finish(harness: ServerHarness) -> None:
        worker = await harness.transport("w1")
        await harness.client().submit(job_id="a", prompt="hello")
        await complete(worker, await take_next(worker), 2)

    prepare(server, finish)
    assert command("tail", "a")[0] == 0

    async def lose(harness: ServerHarness) -> None:
        await harness.drop(events_key("a"))

    prepare(server, lose)
    code, _, err = command("tail", "a")
    assert (code, err.startswith("worker: EVENTS_LOST: ")) == (1, True)


def test_tail_all_follows_ten_thousand_jobs(server: Server, tmp_path: Path) -> None:
    async def fill(harness: ServerHarness) -> None:
        async with harness.raw.pipeline(transaction=False) as pipe:
            for number in range(10_000):
                pipe.xadd(queue_key("default"), {"p": msgpack.packb({"job_id": f"j{number}", "prompt": "x"})})
            await pipe.execute()

    async def answer(harness: ServerHarness) -> None:
        worker = await harness.transport("w1")
        await complete(worker, await take_next(worker), 3)

    def shown() -> list[dict[str, object]]:
        return [json.loads(line) for line in (tmp_path / "out").read_text().splitlines() if line.endswith("}")]

    prepare(server, fill)
    command = [sys.executable, "-m", "worker", "tail", "--all", "--json", "--redis-url", server.url]
    with (
        (tmp_path / "out").open("w") as output,
        (tmp_path / "err").open("w") as errors,
        subprocess.Popen(command, stdout=output, stderr=errors) as tail,
    ):
        try:
            deadline = time.monotonic() + 60
            while not [line for line in shown() if line["event"] == "end"] and time.monotonic() < deadline:
                prepare(server, answer)  # the process does not report that it is listening
                time.sleep(0.5)
            assert (tail.poll(), (tmp_path / "err").read_text()) == (None, "")
            tail.send_signal(signal.SIGINT)
            assert tail.wait(20) == 130
        finally:
            tail.kill()
    ended = next(line["job_id"] for line in shown() if line["event"] == "end")
    assert "".join(str(line.get("t", "")) for line in shown() if line["job_id"] == ended) == text(3)
