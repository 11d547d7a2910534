"""The runner of batches: leases, retries, faults, expiry; requests are answered by the test."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from dataclasses import replace

import pytest

from tests.jobs.harness import FakeRedisHarness, wait_until
from worker.config import LogSection
from worker.errors import ServerRefused
from worker.gateway.batch_lines import Outcome
from worker.gateway.batch_runner import BatchRunner, RunnerSettings
from worker.gateway.batch_store import Batch, BatchStore
from worker.gateway.file_store import FileStore
from worker.jobs.documents import batch_key, batch_lease_key
from worker.jobs.streams import Disconnected
from worker.telemetry import open_log

CHAT = "/v1/chat/completions"
WEEK_S = 7 * 24 * 3600
FAST = RunnerSettings(concurrency=4, scan_s=0.02, lease_s=0.3, renew_s=0.05, cancel_poll_s=0.02)


class Stores:
    def __init__(self, harness):
        self.documents = harness.connect().documents
        self.batches, self.files = BatchStore(self.documents, WEEK_S), FileStore(self.documents, WEEK_S)

    async def create(self, count: int, window_s: int = 3600) -> Batch:
        lines = [
            json.dumps({"custom_id": f"c{n}", "method": "POST", "url": CHAT, "body": {"n": n}}).encode()
            for n in range(count)
        ]

        async def content():
            yield b"\n".join(lines)

        file = await self.files.write(content(), tenant="", filename="f", purpose="batch")
        return await self.batches.create(Batch("", "", CHAT, file.id, "24h"), window_s)

    async def ended(self, batch: Batch) -> Batch:
        async def is_over() -> bool:
            return (await self.batches.read(batch.id)).is_over

        await wait_until(is_over)
        return await self.batches.read(batch.id)

    async def lines(self, file_id: str):
        file = await self.files.find(file_id, "")
        return [json.loads(each) async for each in self.files.lines(file)]


@pytest.fixture
async def stores():
    harness = FakeRedisHarness()
    yield Stores(harness)
    await harness.close()


@contextlib.asynccontextmanager
async def running(stores, execute, *, cancel=None, settings=FAST):
    """A runner, and its log; it is stopped at the end."""

    async def nothing(batch, line):
        pass

    log = io.StringIO()
    opened = open_log(LogSection(format="json"), "gateway", log)
    runner = BatchRunner(stores.batches, stores.files, execute, cancel or nothing, opened, settings)
    task = asyncio.create_task(runner.run())
    try:
        yield log
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def answer(line):
    return Outcome(200, {"line": line.line})


async def test_at_most_the_set_number_of_requests_is_answered_at_a_time(stores):
    now, most = 0, 0

    async def execute(batch, line):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.005)
        now -= 1
        return answer(line)

    async with running(stores, execute):
        batch = await stores.ended(await stores.create(30))

    assert most == FAST.concurrency
    assert batch.completed == batch.total == 30


async def test_a_request_that_is_not_accepted_is_repeated_when_the_server_says(stores):
    attempts = {}

    async def execute(batch, line):
        attempts[line.line] = attempts.get(line.line, 0) + 1
        if attempts[line.line] < 3:
            return Outcome(429 if line.line % 2 else 503, {"error": {}}, 0.01)
        return answer(line)

    async with running(stores, execute):
        batch = await stores.ended(await stores.create(4))

    assert attempts == {1: 3, 2: 3, 3: 3, 4: 3}
    assert (batch.completed, batch.failed) == (4, 0)


async def test_a_request_is_repeated_after_the_server_was_away(stores, monkeypatch):
    monkeypatch.setattr("worker.gateway.batch_runner._RETRY_S", 0.01)
    attempts = []

    async def execute(batch, line):
        attempts.append(line.line)
        if len(attempts) < 3:
            raise Disconnected("away")
        return answer(line)

    async with running(stores, execute):
        batch = await stores.ended(await stores.create(1))

    assert attempts == [1, 1, 1]
    assert batch.completed == 1


async def test_another_runner_takes_the_batch_of_one_that_stalls(stores):
    stalled = asyncio.Event()

    async def stall(batch, line):
        stalled.set()
        await asyncio.Event().wait()

    async def execute(batch, line):
        return answer(line)

    created = await stores.create(10)
    async with running(stores, stall, settings=RunnerSettings(4, 0.02, 0.1, 3600)):
        await stalled.wait()
        async with running(stores, execute):
            batch = await stores.ended(created)

    assert batch.status == "completed"
    assert batch.completed == 10


async def test_a_runner_that_lost_its_lease_stops(stores):
    begun, stopped = asyncio.Event(), asyncio.Event()

    async def execute(batch, line):
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    created = await stores.create(1)
    async with running(stores, execute) as log:
        await begun.wait()
        await stores.documents.delete(batch_lease_key(created.id))
        await stores.documents.hold(batch_lease_key(created.id), "another", 60_000)
        await asyncio.wait_for(stopped.wait(), 5)

        async def logged() -> bool:
            return "batch_lease_lost" in log.getvalue()

        await wait_until(logged)

    assert not await stores.documents.hold(batch_lease_key(created.id), "third", 1), "the lease is the other's"


async def test_a_stopped_runner_releases_its_leases_at_once(stores):
    begun = asyncio.Event()

    async def execute(batch, line):
        begun.set()
        await asyncio.Event().wait()

    created = await stores.create(1)
    async with running(stores, execute, settings=RunnerSettings(lease_s=3600)):
        await begun.wait()

    assert await stores.documents.hold(batch_lease_key(created.id), "other", 1)


async def test_two_answers_to_one_request_count_once(stores):
    batch = await stores.create(1)

    await stores.batches.put_result(batch.id, 1, b"first", succeeded=True)
    await stores.batches.put_result(batch.id, 1, b"second", succeeded=False)

    read = await stores.batches.read(batch.id)
    assert (read.completed, read.failed) == (1, 0)
    assert await stores.batches.results(batch, range(1, 2)) == [(b"first", True)]


async def test_counts_are_corrected_after_a_runner_stopped_between_result_and_count(stores):
    async def execute(batch, line):
        return answer(line)

    batch = await stores.create(3)
    await stores.documents.put_once(f"inf:{{batch:{batch.id}}}:results", "2", b'+{"custom_id":"c1"}')
    async with running(stores, execute):
        over = await stores.ended(batch)

    assert (over.total, over.completed, over.failed) == (3, 3, 0)
    assert [each["custom_id"] for each in await stores.lines(over.output_file_id)] == ["c0", "c1", "c2"]


async def test_requests_that_were_not_run_in_time_expire(stores, monkeypatch):
    async def execute(batch, line):
        if line.line == 1:
            monkeypatch.setattr(Batch, "is_late", property(lambda batch: True))
            batch.times["expires_at"] = int(time.time())
            return answer(line)
        raise AssertionError("a late request was run")

    batch = await stores.create(3)
    async with running(stores, execute, settings=RunnerSettings(1, 0.02)):
        over = await stores.ended(batch)

    assert over.status == "expired"
    assert (over.completed, over.failed) == (1, 2)
    errors = await stores.lines(over.error_file_id)
    assert [(each["custom_id"], each["error"]["code"]) for each in errors] == [
        ("c1", "batch_expired"),
        ("c2", "batch_expired"),
    ]


async def test_a_fault_of_the_store_interrupts_a_batch_which_is_then_run_again(stores, monkeypatch):
    put, calls = stores.batches.put_result, 0

    async def refuse_once(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ServerRefused("no rights", {"reply": "NOPERM"})
        await put(*args, **kwargs)

    async def execute(batch, line):
        return answer(line)

    monkeypatch.setattr(stores.batches, "put_result", refuse_once)
    created = await stores.create(3)
    async with running(stores, execute) as log:
        batch = await stores.ended(created)

    assert "batch_interrupted" in log.getvalue()
    assert batch.completed == 3


async def test_an_unexpected_exception_fails_the_batch_and_is_logged_once_with_frames(stores):
    attempts = []

    async def execute(batch, line):
        attempts.append(line.line)
        raise ValueError("secret prompt")

    created = await stores.create(1)
    async with running(stores, execute) as log:
        batch = await stores.ended(created)
        assert await stores.batches.active() == []

    assert batch.status == "failed"
    assert batch.errors[0]["code"] == "internal_error"
    assert attempts == [1]
    (logged,) = [each for each in map(json.loads, log.getvalue().splitlines()) if each["event"] == "batch_failed"]
    assert logged["frames"][-1] == "ValueError"
    assert any(frame.endswith("in execute") for frame in logged["frames"])
    assert "secret prompt" not in log.getvalue()


async def test_a_batch_that_fails_in_the_middle_has_the_results_so_far(stores):
    async def execute(batch, line):
        if line.line == 3:
            raise ValueError("a defect")
        return answer(line)

    created = await stores.create(3)
    async with running(stores, execute, settings=replace(FAST, concurrency=1)):
        batch = await stores.ended(created)

    assert (batch.status, batch.completed) == ("failed", 2)
    assert [each["custom_id"] for each in await stores.lines(batch.output_file_id)] == ["c0", "c1"]
    assert batch.error_file_id is None


async def test_a_batch_fails_also_if_its_results_cannot_be_written(stores, monkeypatch):
    async def execute(batch, line):
        raise ValueError("a defect")

    async def broken(*args, **kwargs):
        raise TypeError("another defect")

    created = await stores.create(1)
    monkeypatch.setattr(stores.files, "write", broken)
    async with running(stores, execute) as log:
        batch = await stores.ended(created)

    assert (batch.status, batch.output_file_id) == ("failed", None)
    assert log.getvalue().count("batch_failed") == 2


async def test_a_description_that_cannot_be_read_is_logged_with_frames(stores):
    created = await stores.create(1)
    await stores.documents.put(batch_key(created.id), {"batch": "secret"}, 60_000)

    async with running(stores, None) as log:

        async def logged() -> bool:
            return "batch_failed" in log.getvalue()

        await wait_until(logged)

    line = json.loads(log.getvalue().splitlines()[0])
    assert line["frames"][-1] == "JSONDecodeError"
    assert "exc_info" not in line


async def test_a_description_with_a_lone_surrogate_is_stored(stores):
    batch = await stores.create(1)
    batch.errors = [{"param": "\ud800"}]
    await stores.batches.save(batch)

    assert (await stores.batches.read(batch.id)).errors == [{"param": "\ud800"}]


async def test_a_batch_whose_input_file_is_gone_fails(stores):
    async def execute(batch, line):
        return answer(line)

    created = await stores.create(1)
    await stores.files.delete(await stores.files.find(created.input_file_id, ""))
    async with running(stores, execute):
        batch = await stores.ended(created)

    assert batch.status == "failed"
    assert batch.errors[0]["code"] == "input_file_lost"


async def test_requests_that_are_answered_while_a_batch_is_cancelled_have_no_result(stores):
    begun, cancelled = asyncio.Event(), []

    async def execute(batch, line):
        begun.set()
        while not cancelled:
            await asyncio.sleep(0.01)
        return Outcome(409, {"error": {"code": "cancelled"}})

    async def cancel(batch, line):
        cancelled.append(line.line)
        await asyncio.sleep(0.05)

    created = await stores.create(10)
    async with running(stores, execute, cancel=cancel):
        await begun.wait()
        await stores.batches.request_cancel(created)
        batch = await stores.ended(created)

    assert batch.status == "cancelled"
    assert sorted(cancelled) == [1, 2, 3, 4]
    assert (batch.completed, batch.failed) == (0, 0)
    assert batch.to_api()["error_file_id"] is None


async def test_an_interrupted_upload_is_no_file(stores):
    async def content():
        yield b"x" * 600_000
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await stores.files.write(content(), tenant="", filename="f", purpose="batch", file_id="file-1")

    assert await stores.files.ids("") == []
    with pytest.raises(Exception, match="no file has the id"):
        await stores.files.find("file-1", "")
