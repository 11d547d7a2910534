"""`QueueTracker` and the parsing of statuses: listings that follow a queue without reading it again."""

from __future__ import annotations

import json
import math
import re

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.jobs.memory_streams import MemoryStreams
from worker.cli.console import clock
from worker.cli.top import source
from worker.cli.top.format import age, count, latency
from worker.cli.top.snapshot import ErrorRow, WorkerRow
from worker.cli.top.source import QueueTracker, ServerSource
from worker.cli.top.views import details_of, error_columns, worker_columns
from worker.jobs.keys import dead_key, queue_key

LEASE_MS = 60_000


def payload(job_id: object) -> bytes:
    return bytes(msgpack.packb({"job_id": job_id, "prompt": "x"}))


class Queue:
    """A queue in memory and its tracker."""

    def __init__(self) -> None:
        self.streams = MemoryStreams()
        self.tracker = QueueTracker(self.streams, "q", LEASE_MS)
        self.submitted = 0
        self.transferred = 0

    async def submit(self, number: int) -> None:
        await self.streams.open_queue("q")
        for _ in range(number):
            await self.streams.enqueue("q", {"p": payload(f"job-{self.submitted}")}, 10**6)
            self.submitted += 1

    async def take(self, worker: str) -> str:
        return (await self.streams.read_new(["q"], worker, 0))["q"].id

    async def shown(self) -> list[tuple[str | None, str]]:
        found, dead = await self.tracker.read()
        self.transferred += len(found.entries)
        _, jobs, _ = self.tracker.update(found, dead)
        return [(job.job_id, job.state) for job in jobs]


async def test_jobs_run_and_leave_and_each_payload_is_read_once() -> None:
    queue = Queue()
    assert await queue.shown() == []
    await queue.submit(3)
    assert await queue.shown() == [(f"job-{n}", "waiting") for n in range(3)]
    first, second = await queue.take("w1"), await queue.take("dead")
    await queue.streams.give_back("q", "dead", second, LEASE_MS, 1)
    assert await queue.shown() == [("job-0", "running"), ("job-1", "orphaned"), ("job-2", "waiting")]
    await queue.streams.settle("q", first, None)
    await queue.submit(1)
    assert await queue.shown() == [("job-1", "orphaned"), ("job-2", "waiting"), ("job-3", "waiting")]
    await queue.streams.settle("q", second, None)
    await queue.take("w2")
    assert await queue.shown() == [("job-2", "running"), ("job-3", "waiting")]
    assert queue.transferred == 4


async def test_an_orphaned_job_counts_as_waiting_as_in_the_depth() -> None:
    queue = Queue()
    await queue.submit(3)
    await queue.take("w1")
    await queue.streams.give_back("q", "dead", await queue.take("dead"), LEASE_MS + 5000, 1)
    row, jobs, _ = queue.tracker.update(*await queue.tracker.read())
    depth = await queue.streams.depth("q", LEASE_MS)
    assert [job.state for job in jobs] == ["running", "orphaned", "waiting"]
    assert (row.waiting, row.running) == (depth.waiting, depth.running) == (2, 1)
    assert row.oldest_s == jobs[1].age_s


async def test_the_listing_is_bounded_and_moves_on_as_the_queue_is_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "LISTED", 10)
    queue = Queue()
    await queue.submit(25)
    assert [job for job, _ in await queue.shown()] == [f"job-{n}" for n in range(10)]
    for _ in range(8):
        await queue.streams.settle("q", await queue.take("w1"), None)
    await queue.shown()
    shown = [job for job, _ in await queue.shown()]
    assert shown[:2] == ["job-8", "job-9"]
    assert 10 <= len(shown) <= 20
    for _ in range(12):
        await queue.take("w1")
    await queue.shown()
    assert await queue.shown() == [(f"job-{n}", "running") for n in range(8, 18)]


async def test_deleted_entries_and_a_flushed_server_are_noticed() -> None:
    queue = Queue()
    await queue.submit(5)
    await queue.shown()
    entries = await queue.streams.range(queue_key("q"), "-", "+", 10)
    await queue.streams.delete(queue_key("q"), entries[2][0])
    await queue.shown()
    assert [job for job, _ in await queue.shown()] == ["job-0", "job-1", "job-3", "job-4"]
    queue.streams.drop(queue_key("q"))
    await queue.shown()
    assert await queue.shown() == []
    await queue.submit(2)
    assert [job for job, _ in await queue.shown()] == ["job-5", "job-6"]


async def test_unreadable_payloads_have_no_id() -> None:
    queue = Queue()
    await queue.submit(0)
    for each in (b"", b"\xff\xfe", b"{", payload(7), payload("x" * 1000)):
        await queue.streams.enqueue("q", {"p": each}, 100)
    assert [state for _, state in await queue.shown()] == ["waiting"] * 5


async def test_dead_letters_follow_the_stream() -> None:
    streams = MemoryStreams()
    reading = ServerSource(streams, "memory", "q", [], 100)
    await streams.add(dead_key("q"), {"p": payload("a"), "job_id": b"a", "attempts": b"3"}, 100, None)
    assert [(row.job_id, row.attempts) for row in (await reading.read()).letters] == [("a", 3)]
    assert [row.job_id for row in (await reading.read()).letters] == ["a"], "unchanged, so not sent again"
    assert await reading.retry("q", (await reading.read()).letters[0].entry_id) == "a.r1"
    after = await reading.read()
    assert (after.letters, after.letters_total, [job.job_id for job in after.jobs]) == ([], 0, ["a.r1"])
    with pytest.raises(source.Gone, match="no dead letter"):
        await reading.retry("q", "1-1")


async def test_dead_letters_are_bounded_by_number_and_by_bytes_and_read_again_at_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = MemoryStreams()
    reading = ServerSource(streams, "memory", "q", [], 100)
    for number in range(250):
        await streams.add(dead_key("q"), {"p": b"x" * 1000, "job_id": b"%d" % number}, 1000, None)
    shown = await reading.read()
    assert ([row.job_id for row in shown.letters], shown.letters_total) == ([str(n) for n in range(100)], 250)
    await streams.delete(dead_key("q"), shown.letters[0].entry_id)
    await streams.add(dead_key("q"), {"job_id": b"new"}, 1000, None)
    for _ in range(source.LETTER_READINGS):
        shown = await reading.read()
    assert shown.letters[0].job_id == "1", "the number is the same"
    monkeypatch.setattr(source, "LETTER_BYTES", 25_000)
    assert len((await ServerSource(streams, "memory", "q", [], 100).read()).letters) == 30


async def test_all_queues_of_live_workers_are_read_or_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = MemoryStreams()
    await streams.put_status("w1", {"queue": "a,b"}, 15_000)
    await streams.put_status("w2", {"queue": "c"}, 15_000)
    shown = await ServerSource(streams, "", "own", [], 100).read()
    assert [queue.name for queue in shown.queues] == ["a", "b", "c", "own"]
    named = await ServerSource(streams, "", "own", ["b", "z"], 100).read()
    assert ([queue.name for queue in named.queues], [row.id for row in named.workers]) == (["b", "z"], ["w1"])
    monkeypatch.setattr(source, "MAX_QUEUES", 3)
    some = await ServerSource(streams, "", "own", [], 100).read()
    assert (len(some.queues), some.hidden_queues) == (3, 1)


async def test_errors_of_workers_that_have_left_are_kept() -> None:
    streams = MemoryStreams()
    errors = [{"ts_ms": 10**12 + n, "job_id": f"j{n}", "code": "INTERNAL", "message": "m"} for n in range(3)]
    await streams.put_status("w1", {"last_errors": json.dumps(errors)}, 15_000)
    reading = ServerSource(streams, "", "q", [], 100)
    await reading.read()
    await streams.drop_status("w1")
    assert [error.job_id for error in (await reading.read()).errors] == ["j2", "j1", "j0"]


VALUES = st.text() | st.sampled_from(["nan", "inf", "-1", "1e400", "1e30", "٣", "[]", "[{}]", "null", "[" * 10_000])


FIELDS = [*WorkerRow.__dataclass_fields__, "last_errors", "started_ms", "heartbeat_s", "vram_kv"]


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES))
@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50)
def test_any_status_is_read_and_shown(status: dict[str, str]) -> None:
    row = WorkerRow.of("w", status, 10**12, 0.0)
    assert row.running >= 0
    for column in worker_columns(color=True):
        assert str(column.text(row, column.width)).isprintable()
    details_of(row, 70, color=False)
    assert isinstance(ErrorRow.all_of("w", status), list)


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=50)
@given(
    st.recursive(
        st.none() | st.integers() | st.integers(0, 2**53) | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
def test_any_list_of_errors_is_read(value: object) -> None:
    listed = [{"ts_ms": value, "message": value}, value, {"ts_ms": 5, "code": value}]
    found = ErrorRow.all_of("w", {"last_errors": json.dumps(listed)})
    assert found[-1].ts_ms == 5
    for row in found:
        assert all(str(column.text(row, 20)).isprintable() for column in error_columns())
        assert details_of(row, 70, color=False)


YEAR_10000_MS = 253_402_300_800_000


def test_a_time_that_is_none_is_a_question_mark() -> None:
    listed = [{"ts_ms": ts_ms} for ts_ms in (0, YEAR_10000_MS, 2**53 - 1)]
    rows = ErrorRow.all_of("w", {"last_errors": json.dumps(listed)})
    times = [str(error_columns()[0].text(row, 8)) for row in rows]
    assert times == [times[0], "?", "?"]
    assert re.fullmatch(r"\d\d:\d\d:\d\d", times[0])
    for value in (math.nan, math.inf, -1e300, 10**400, "5", None, b""):
        assert clock(value) == "?"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0.44, "0.4s"),
        (59.9, "59s"),
        (65, "1m05s"),
        (3600, "1h00m"),
        (90_061, "1d01h"),
        (8.64e6, "100d00h"),
    ],
)
def test_ages(seconds: float | None, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(None, "-"), (0, "0"), (3.46, "3.5"), (99_999, "99,999"), (123_456, "0.1M"), (2e9, "2.0G")]
)
def test_counts(number: float | None, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.0081, "8.1ms"), (0.24, "240ms"), (1.23, "1.2s"), (4000, "1h06m")]
)
def test_latencies(seconds: float | None, text: str) -> None:
    assert latency(seconds) == text
