"""The view and the command over a real server with echo workers, their deaths and its restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis
from textual.pilot import Pilot

from tests.cli.top.test_app import NARROW, line_with, lines
from tests.jobs.servers import Server, running_server
from tests.service.processes import workers
from worker.cli.top import ServerSource
from worker.cli.top.app import TopApp
from worker.cli.top.table import LiveTable
from worker.errors import ServerRefused
from worker.jobs.client import Client
from worker.jobs.keys import dead_key, queue_key, worker_key
from worker.jobs.payload import pack
from worker.jobs.redis_streams import RedisStreams
from worker.jobs.streams import Contact

JOBS = 1000
SLOW = ("--echo", "--echo-step-ms", 20, "--max-running", 4)
OFTEN = {"WORKER_SERVICE__HEARTBEAT_S": "0.3"}


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as started:
        yield started


@contextlib.asynccontextmanager
async def top(server: Server, size: tuple[int, int] = NARROW) -> AsyncIterator[tuple[Pilot[None], Client]]:
    """The view over the server, refreshed ten times a second, and a client."""
    streams = RedisStreams.from_url(server.url, Contact(lambda _: None, lambda _: None))
    source = ServerSource(streams, server.url, "default", [], 10_000)
    client = Client.from_url(server.url)
    app = TopApp(source, await source.read(), interval_s=0.1)
    try:
        async with app.run_test(size=size, notifications=True) as pilot:
            yield pilot, client
    finally:
        await client.close()
        await streams.close()


async def wait_for(app: TopApp, condition: Callable[[], object], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what}:\n" + "\n".join(lines(app))
        await asyncio.sleep(0.05)


def shows(app: TopApp, *texts: str) -> Callable[[], bool]:
    """Whether one line of the screen has all texts."""
    return lambda: any(all(text in line for text in texts) for line in lines(app))


async def submit_all(client: Client, count: int, **fields: object) -> None:
    await asyncio.gather(*(client.submit(job_id=f"job-{n}", prompt="abcd" * 5, **fields) for n in range(count)))


async def test_keys_cancel_retry_and_drain_with_1000_jobs(server: Server, tmp_path: Path) -> None:
    letter = {"p": pack({"job_id": "bad", "prompt": "x"}), "job_id": "bad", "reason": "DEAD_LETTERED", "attempts": 3}
    with redis.Redis(port=server.port) as raw:
        raw.xadd(dead_key("default"), letter)
    with workers(server.url, tmp_path, (*SLOW, "--name", "gpu-0"), **OFTEN) as (process,):
        async with top(server) as (pilot, client):
            app = pilot.app
            await submit_all(client, JOBS, max_tokens=4000)
            await wait_for(app, shows(app, "gpu-0", "busy", "4/4"), "running jobs")
            await wait_for(app, shows(app, "1 Jobs 1,000 "), "1,000 jobs")
            assert len(app.snapshot.jobs) == JOBS
            await pilot.press("1")
            for key, state, outcome in (("home", "running", "is being cancelled"), ("end", "waiting", "was cancelled")):
                await pilot.press(key, "c")
                job = app.query_one("#jobs", LiveTable).selected
                await wait_for(app, shows(app, f"Cancel the {state} job {job.job_id}?"), "question")
                await pilot.press("y")
                await wait_for(app, shows(app, f"job {job.job_id} {outcome}"), "outcome")
                end = [event async for event in client.events(job.job_id, idle_s=60)][-1].event
                assert end.code == "CANCELLED"
            await pilot.press("2", "r", "y")
            await wait_for(app, lambda: not app.snapshot.letters and app.refreshed, "retry")
            assert await client.is_known("bad.r1")
            await pilot.press("d", "y")
            await wait_for(app, shows(app, "gpu-0", "draining"), "drain")
            with redis.Redis(port=server.port) as raw:
                raw.delete(queue_key("default"))  # the drain does not wait for 4,000 tokens
            assert await asyncio.to_thread(process.wait, 60) == 0
            assert process.logged("worker_draining")[0]["reason"] == "command"
            await wait_for(app, shows(app, "no live workers"), "end of the worker")


async def test_a_reading_takes_the_same_few_commands_for_any_number_of_jobs(server: Server) -> None:
    streams = RedisStreams.from_url(server.url)
    source = ServerSource(streams, server.url, "default", [], 10_000)
    client = Client.from_url(server.url)
    with redis.Redis(port=server.port) as raw:

        async def calls() -> int:
            await source.read()
            raw.config_resetstat()
            await source.read()
            found = raw.info("commandstats")
            assert found["cmdstat_xlen"]["calls"] == 2, "one in the script, one of the dead letters"
            return sum(found[name]["calls"] for name in ("cmdstat_evalsha", "cmdstat_zrange"))

        assert await calls() == 2
        await submit_all(client, JOBS)
        assert await calls() == 2
        assert len((await source.read()).jobs) == JOBS
        sent = raw.info("stats")["total_net_output_bytes"]
        await source.read()
        assert raw.info("stats")["total_net_output_bytes"] - sent < 20_000, "payloads are not sent again"
    await client.close()
    await streams.close()


async def test_a_queue_whose_key_has_another_type_is_an_error_and_hides_no_other_queue(server: Server) -> None:
    streams = RedisStreams.from_url(server.url)
    source = ServerSource(streams, server.url, "default", ["bad", "good"], 10_000)
    client = Client(streams, "good")
    await client.submit(job_id="a", prompt="x")
    with redis.Redis(port=server.port) as raw:
        raw.set(queue_key("bad"), "x")
        for _ in range(2):
            shown = await source.read()
            assert ([queue.name for queue in shown.queues], [job.job_id for job in shown.jobs]) == (["good"], ["a"])
            (error,) = shown.errors
            assert error.code == "REDIS_REFUSED"
            assert "inf:{q:bad}:jobs holds a value of another type" in error.message
        raw.delete(queue_key("bad"))
        assert [queue.name for queue in (await source.read()).queues] == ["bad", "good"]
        raw.set(queue_key("good"), "x")
        raw.set(queue_key("bad"), "x")
        with pytest.raises(ServerRefused, match="another type"):
            await source.read()
    await client.close()


async def test_a_killed_worker_turns_stale_and_disappears_and_its_jobs_are_orphaned(
    server: Server, tmp_path: Path
) -> None:
    each = [(*SLOW, "--name", name) for name in ("gpu-0", "gpu-1")]
    with workers(server.url, tmp_path, *each, **OFTEN, WORKER_LEASE__LEASE_S="60") as (first, _):
        async with top(server) as (pilot, client):
            app = pilot.app
            await submit_all(client, 8, max_tokens=4000)
            await wait_for(app, lambda: sum(row.state == "running" for row in app.snapshot.jobs) == 8, "8 running jobs")
            first.send(signal.SIGKILL)
            await wait_for(app, shows(app, "gpu-0", "stale"), "stale worker")
            assert line_with(app, "gpu-1")
            with redis.Redis(port=server.port) as raw:  # the rest of its 15 s
                raw.pexpire(worker_key(next(row.id for row in app.snapshot.workers if row.stale)), 1)
            await wait_for(app, lambda: [row.id[:5] for row in app.snapshot.workers] == ["gpu-1"], "removal")
            await wait_for(app, shows(app, "orphaned"), "orphaned jobs")
            states = sorted(row.state for row in app.snapshot.jobs)
            assert states == ["orphaned"] * 4 + ["running"] * 4


async def test_a_restart_of_the_server_is_shown_and_survived(server: Server, tmp_path: Path) -> None:
    with workers(server.url, tmp_path, (*SLOW, "--name", "gpu-0"), **OFTEN):
        async with top(server) as (pilot, client):
            app = pilot.app
            await submit_all(client, 20, max_tokens=100)
            await wait_for(app, shows(app, "gpu-0", "busy"), "busy worker")
            server.stop()
            await wait_for(app, shows(app, "server unreachable since"), "banner")
            assert line_with(app, "gpu-0"), "the last state stays"
            await pilot.press("d", "y")
            await wait_for(app, shows(app, "REDIS_UNREACHABLE"), "failed command")
            before = app.refreshed
            server.start()
            await wait_for(app, lambda: app.refreshed > before, "reading")
            await wait_for(app, lambda: not shows(app, "server unreachable")(), "end of the banner")
            await submit_all(client, 3, max_tokens=4000)
            await wait_for(app, shows(app, "gpu-0", "3/4"), "the worker with new jobs")


OPERATOR = "+client|setname +select +ping +time +evalsha +script|load +exists +zrange +hgetall +pttl +xlen +xrange"


async def test_a_right_that_is_taken_away_is_named_until_it_is_back(server: Server) -> None:
    with redis.Redis(port=server.port) as admin:
        rights = f"ACL SETUSER default on nopass resetkeys ~inf:* -@all +acl {OPERATOR}"
        async with top(server, (140, 40)) as (pilot, _):
            app = pilot.app
            admin.execute_command(*f"{rights} +xpending +xinfo|stream -zrange".split())
            await wait_for(app, shows(app, "server refuses since"), "banner")
            assert "zrange" in " ".join(lines(app)[:5])
            admin.execute_command("ACL", "SETUSER", "default", "+@all", "~*")
            await wait_for(app, lambda: not shows(app, "server refuses")(), "end of the banner")


def run(server: Server, *arguments: str, user: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    url = server.url.replace("redis://", f"redis://{user}")
    command = [sys.executable, "-m", "worker", "top", "--redis-url", url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]


def test_once_prints_one_reading_as_json(server: Server) -> None:
    with redis.Redis(port=server.port) as raw:
        raw.xadd(queue_key("a"), {"p": pack({"job_id": "j", "prompt": "x"})})
    ended = run(server, "--once", "--queue", "a", "--queue", "b")
    assert (ended.returncode, ended.stderr) == (0, "")
    printed = json.loads(ended.stdout)
    assert [(row["name"], row["waiting"]) for row in printed["queues"]] == [("a", 1), ("b", 0)]
    assert [(row["job_id"], row["state"]) for row in printed["jobs"]] == [("j", "waiting")]


@contextlib.contextmanager
def viewer(server: Server) -> Iterator[redis.Redis]:
    """An administrator's connection to a server that has the user `viewer`."""
    with redis.Redis(port=server.port) as admin:
        rights = f"ACL SETUSER viewer on >PASSWORD ~inf:* -@all {OPERATOR} +xpending +xinfo|stream"
        admin.execute_command(*rights.split())
        admin.xgroup_create(queue_key("default"), "workers", mkstream=True)
        yield admin


async def test_each_missing_right_is_named(server: Server) -> None:
    with viewer(server) as admin:
        streams = RedisStreams.from_url(f"redis://viewer:PASSWORD@127.0.0.1:{server.port}")
        source = ServerSource(streams, server.url, "default", [], 100)
        await source.read()
        for missing in ("zrange", "xinfo|stream", "xpending", "xrange", "xlen", "time", "evalsha"):
            admin.execute_command("ACL", "SETUSER", "viewer", f"-{missing}")
            with pytest.raises(ServerRefused, match=re.escape(missing)):
                await source.read()
            admin.execute_command("ACL", "SETUSER", "viewer", f"+{missing}")
        await streams.close()


def test_a_missing_right_ends_the_command_with_one_sentence(server: Server) -> None:
    with viewer(server) as admin:
        admin.execute_command("ACL", "SETUSER", "viewer", "-xpending")
    ended = run(server, "--once", user="viewer:PASSWORD@")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (5, "", 1)
    assert re.match(r"worker: REDIS_REFUSED: .*xpending", ended.stderr)
    assert "PASSWORD" not in ended.stderr


def test_without_a_terminal_one_sentence_names_the_alternative(server: Server) -> None:
    ended = run(server, stdin=subprocess.DEVNULL)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "worker: NO_TERMINAL: stdin, stdout and stderr must be a terminal; "
        "use `worker top --once` for one reading as JSON\n"
    )


def test_an_unreachable_server_ends_the_command(server: Server) -> None:
    server.stop()
    ended = run(server, "--once")
    assert ended.returncode == 5
    assert ended.stderr.startswith("worker: REDIS_UNREACHABLE: cannot reach redis://127.0.0.1")


def test_a_malformed_queue_is_refused(server: Server) -> None:
    ended = run(server, "--once", "--queue", "a b")
    assert (ended.returncode, ended.stderr[:25]) == (4, "worker: CONFIG_INVALID: -")


def test_without_textual_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from worker import cli
    from worker.cli import top as command

    monkeypatch.setattr(command, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["worker", "top"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 4
    assert "pip install 'worker-orcd[top]'" in capsys.readouterr().err
