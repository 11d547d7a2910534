"""SyncClient against a real server."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.jobs.echo import begin, complete, text
from tests.jobs.harness import LONG_LEASE, NO_LEASE, ServerHarness
from tests.jobs.servers import Server
from worker.jobs.client import SyncClient
from worker.jobs.lease import Closed
from worker.jobs.protocol import decode_job
from worker.jobs.queue_entries import retry_id


def test_the_sync_client_has_the_same_calls_without_await(server: Server) -> None:
    done = threading.Event()

    async def one_job() -> None:
        harness = ServerHarness(server.url)
        worker = await harness.transport("w1", NO_LEASE)
        while (claim := await worker.claim()) is None:
            pass
        lease = await begin(worker, claim)
        assert not isinstance(lease, Closed)
        await complete(worker, lease, 4)
        done.set()
        await harness.close()

    thread = threading.Thread(target=lambda: asyncio.run(one_job()))
    with SyncClient.from_url(server.url) as client:
        thread.start()
        job_id = client.submit(prompt="hello")
        assert "".join(token.t for token in client.tokens(job_id, idle_s=10)) == text(4)
        thread.join()
        assert next(client.events(job_id)).kind == "started"
        early = client.events(job_id)
        next(early)
        early.close()
        assert client.result(job_id)[1].tokens_out == 4
        assert client.cancel(job_id) == "over"
        assert client.state(job_id)["state"] == "end"
        assert (client.queue(), client.dead_letters(), client.dead_letter("1-0")) == ([], [], None)
        assert client.drop_dead_letter("1-0") is False
        client.drain("no-such-worker")
        assert client.workers() == {}
        left_open = client.events(job_id)
        next(left_open)
    left_open.close()
    assert done.is_set()


def run_echo(url: str, jobs: int, stop: threading.Event) -> None:
    """Answer this many jobs with their number of tokens, then wait."""

    async def serve() -> None:
        harness = ServerHarness(url)
        worker = await harness.transport("w1", LONG_LEASE)
        for _ in range(jobs):
            while (claim := await worker.claim()) is None:
                if stop.is_set():
                    return await harness.close()
            lease = await begin(worker, claim)
            assert not isinstance(lease, Closed)
            await complete(worker, lease, decode_job(claim.payload).max_tokens or 0)
        return await harness.close()

    asyncio.run(serve())


def test_threads_share_a_client(server: Server) -> None:
    stop = threading.Event()
    worker = threading.Thread(target=run_echo, args=(server.url, 24, stop))
    worker.start()

    def ask(number: int) -> bool:
        job_id = client.submit(prompt="hello", max_tokens=number + 1)
        assert "".join(token.t for token in client.tokens(job_id, idle_s=20)) == text(number + 1)
        return client.result(job_id, idle_s=20)[1].tokens_out == number + 1

    with SyncClient.from_url(server.url) as client, ThreadPoolExecutor(8) as threads:
        waiting = threads.submit(lambda: next(client.events("not-submitted", idle_s=60), None))
        assert list(threads.map(ask, range(24))) == [True] * 24
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result(5)
    stop.set()
    worker.join()
    assert "worker-client" not in [thread.name for thread in threading.enumerate()]
    for call in (lambda: client.submit(prompt="x"), lambda: next(client.tokens("a"))):
        with pytest.raises(RuntimeError, match="the client is closed"):
            call()
    client.close()


SCRIPT = """
import os, signal, sys, threading, time
from worker import SyncClient
from worker.errors import EventsLost

client = SyncClient.from_url(sys.argv[1])
"""


def run_script(server: Server, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", SCRIPT + code, server.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


INTERRUPT = """
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
reading = client.tokens("waits")
try:
    next(reading)
except KeyboardInterrupt:
    print("interrupted")
print(next(reading, "over"), client.submit(job_id="later", prompt="x"))
"""
FORK = """
client.submit(job_id="first", prompt="x")
if (child := os.fork()) == 0:
    try:
        client.submit(prompt="x")
    except RuntimeError as error:
        print(error)
    client.close()
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), client.submit(job_id="second", prompt="x"))
"""
UNUSED = """
if (child := os.fork()) == 0:
    print(client.submit(job_id="in-child", prompt="x"))
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), client.submit(job_id="in-parent", prompt="x"))
"""


def test_an_interrupt_ends_the_call_and_not_the_client(server: Server) -> None:
    done = run_script(server, INTERRUPT, "-X", "dev")
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\nover later\n", "")


def test_a_forked_process_is_refused_and_ends_cleanly(server: Server) -> None:
    done = run_script(server, FORK)
    assert (done.returncode, done.stderr) == (0, "")
    refusal, after = done.stdout.splitlines()
    assert "forked" in refusal
    assert after == "3 second"


def test_a_client_that_was_not_used_may_be_used_after_a_fork(server: Server) -> None:
    done = run_script(server, UNUSED)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "in-child\n3 in-parent\n")


def test_a_process_ends_though_the_client_is_open_and_a_thread_reads(server: Server) -> None:
    # A traceback of a daemon thread on stderr at the interpreter's end can abort the process (CPython).
    code = "def read():\n    with contextlib.suppress(RuntimeError):\n        next(client.tokens('waits'), None)\n"
    code += "import contextlib\nthreading.Thread(target=read, daemon=True).start()\n"
    began = time.monotonic()
    done = run_script(server, code + "time.sleep(0.5)\nclient.submit(prompt='x')\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 10


def test_a_client_that_is_dropped_leaves_no_thread(server: Server) -> None:
    client = SyncClient.from_url(server.url)
    client.submit(prompt="hello")
    del client
    gc.collect()
    assert "worker-client" not in [thread.name for thread in threading.enumerate()]


def test_a_retried_job_gets_a_numbered_valid_id() -> None:
    assert [retry_id("a"), retry_id("a.r1"), retry_id("a.r9"), retry_id("a.rx")] == ["a.r1", "a.r2", "a.r10", "a.rx.r1"]
    assert len(retry_id("x" * 128)) == 128
