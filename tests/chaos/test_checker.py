"""The checker finds each kind of violation in an otherwise valid stream."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.chaos.checker import _dead_letters, barren_attempts, check_job
from tests.chaos.run_log import Garbage, Job, ReadPass, RunLog
from tests.chaos.workload import Case
from worker.errors import Cancelled, DeadLettered
from worker.jobs.events import End, Envelope, ErrorEvent, Resumed, Started, Token, Tokens, encode_event
from worker.jobs.reader import decode_entry
from worker.jobs.transport import ENTRY_DELETED

CASE = Case({"prompt": "x"}, (10, 11, 12, 13), ("a", "b", "c", "d"), "length", None)
STARTED = Started(
    model="m",
    seed=1,
    max_tokens=4,
    prompt_tokens=1,
    cached_tokens=0,
    started_at=0,
    enqueued_at=0,
    prompt_hash="",
    fingerprint="",
)
END = End(finish_reason="length", tokens_out=4, prompt_tokens=1, ttft_ms=1.0, decode_ms=1.0)
POISONED = ErrorEvent.of(DeadLettered("given up"))
CANCELLED = ErrorEvent.of(Cancelled("by request"))


def tokens(first, end):
    return Tokens(tokens=tuple(Token(i, CASE.ids[i], CASE.texts[i]) for i in range(first, end)))


def resumed(from_i, reason="crash", exact=True):
    return Resumed(from_i=from_i, reason=reason, exact=exact)


def stream(*epochs):
    """Records of a job whose n-th epoch wrote the n-th list of events."""
    records = []
    for epoch, events in enumerate(epochs, 1):
        for seq, event in enumerate(events):
            kind, packed = encode_event(event, Envelope(job_id="j", epoch=epoch, ts_ms=0, worker_id="w"))
            records.append((f"{epoch}-{seq}", {"type": kind.encode(), "p": packed}))
    return records


def job(kind="plain", **changes):
    return replace(Job("j", "tiny", kind, CASE), **changes)


GOOD = stream([STARTED, tokens(0, 2)], [resumed(2), tokens(2, 4), END])


def test_a_valid_stream_passes():
    assert check_job(job(), GOOD) == []


@pytest.mark.parametrize(
    ("records", "word"),
    [
        (GOOD[:-1], "no terminal event"),
        ([*GOOD, (GOOD[-1][0].replace("3", "4") + "0", GOOD[-1][1])], "follows the terminal event"),
        ([*GOOD[:-2], GOOD[-1]], "counts 4 tokens"),
        (GOOD[::-1], "is not above the id before it"),
        (stream([STARTED, tokens(0, 2), tokens(1, 4), END]), "token indices"),
        (stream([STARTED, tokens(0, 2), tokens(3, 4), END]), "token indices"),
        (stream([STARTED, tokens(0, 4), END, END]), "follows the terminal event"),
        (stream([STARTED, tokens(0, 2)], [resumed(1), tokens(2, 4), END]), "continues at 1"),
        (stream([STARTED, tokens(0, 2)], [resumed(2, exact=False), tokens(2, 4), END]), "exact = false"),
        (stream([STARTED, tokens(0, 2)], [tokens(2, 4), END]), "opens with tokens"),
        (stream([STARTED, tokens(0, 4), replace(END, finish_reason="stop")]), "ended by stop"),
        (stream([STARTED, tokens(0, 4), CANCELLED]), "ended with CANCELLED"),
        (stream([STARTED, tokens(0, 4), POISONED]), "ended with DEAD_LETTERED, after 0 attempts"),
        (stream([STARTED, Tokens(tokens=(Token(0, 99, "a"),)), tokens(1, 4), END]), "token ids"),
        (stream([STARTED, Tokens(tokens=(Token(0, 10, "?"),)), tokens(1, 4), END]), "text"),
        ([], "no terminal event"),
    ],
)
def test_a_violation_is_reported(records, word):
    found = check_job(job(), records)
    assert any(word in problem for problem in found), found


def test_an_early_end_leaves_the_beginning_of_the_reference_answer():
    assert check_job(job("cancelled"), stream([STARTED, tokens(0, 3), CANCELLED])) == []
    wrong = stream([STARTED, Tokens(tokens=(Token(0, 99, "a"),)), CANCELLED])
    assert "token ids" in check_job(job("cancelled"), wrong)[0]


def test_a_dead_letter_is_valid_only_after_three_attempts_without_progress():
    thrice = stream([STARTED], [resumed(0)], [resumed(0)], [POISONED])
    assert check_job(job("poison"), thrice) == []
    assert check_job(job("plain"), thrice) == []
    twice = stream([STARTED], [resumed(0)], [POISONED])
    assert "after 2 attempts without progress" in check_job(job("poison"), twice)[0]
    progress = stream([STARTED, tokens(0, 1)], [resumed(1)], [resumed(1)], [POISONED])
    assert "after 2 attempts without progress" in check_job(job("plain"), progress)[0]
    handed_back = stream([STARTED], [resumed(0, "drain")], [resumed(0)], [POISONED])
    assert "after 2 attempts without progress" in check_job(job("poison"), handed_back)[0]


def test_attempts_without_progress_are_counted_in_a_finished_stream_too():
    assert barren_attempts([STARTED, resumed(0), tokens(0, 4), END]) == 1


def test_a_problem_of_a_reader_is_a_violation():
    assert check_job(job(problems=["a reader received it"]), GOOD) == ["j: a reader received it"]
    assert check_job(job(received={0: 10, 1: 99}), GOOD) == ["j: its reader received {1: 99}"]
    assert check_job(job(received={4: 10}), GOOD) == ["j: its reader received {4: 10}"]


def read(one, run_log, *indices):
    """A reader that has received the tokens of these indices, and the results of `receive`."""
    reading = ReadPass(one, run_log, run_log.losses)
    accepted = [reading.receive(decode_entry(stream([tokens(i, i + 1)])[0], "0-0")[0]) for i in indices]
    return accepted, reading


def test_a_gap_and_a_repeated_token_are_problems():
    for indices in ((0, 1, 3), (0, 1, 1)):
        one = job()
        read(one, RunLog(), *indices)
        assert "is the next" in one.problems[0]


def test_a_reader_may_start_anywhere_and_restart():
    one, run_log = job(), RunLog()
    read(one, run_log, 2, 3)
    read(one, run_log, 0, 1, 2, 3)
    assert one.problems == []
    assert one.received == dict(enumerate(CASE.ids))


def test_a_lost_job_must_have_ended_for_its_reader():
    ended = decode_entry(GOOD[-1], "0-0")[0]
    assert check_job(job(maybe_lost=True, last=ended), []) == []
    assert "no terminal event" in check_job(job(maybe_lost=True), [])[0]
    assert "no terminal event" in check_job(job(last=ended), [])[0]


def test_a_job_whose_entry_may_be_lost_may_end_for_that_reason():
    deleted = stream([STARTED, tokens(0, 2), ErrorEvent.of(Cancelled(ENTRY_DELETED))])
    assert check_job(job(maybe_lost=True), deleted) == []
    assert "ended with CANCELLED" in check_job(job(), deleted)[0]
    assert "ended with CANCELLED" in check_job(job(maybe_lost=True), stream([STARTED, CANCELLED]))[0]


def test_jobs_submitted_since_the_first_lost_write_may_be_lost():
    run_log = RunLog(jobs=[job(), job(sent=940.0), job(sent=1000.0)])
    run_log.lose_writes(since=1000.0)
    assert [each.maybe_lost for each in run_log.jobs] == [True, False, True]  # the first is still being submitted


def test_after_lost_writes_tokens_may_repeat_but_not_differ():
    one, run_log = job(), RunLog()
    _, reading = read(one, run_log, 0, 1)
    run_log.lose_writes(since=0.0)
    assert reading.receive(decode_entry(stream([tokens(1, 2)])[0], "0-0")[0])
    assert not reading.receive(decode_entry(stream([tokens(3, 4)])[0], "0-0")[0])
    assert one.problems == []
    other = Tokens(tokens=(Token(1, 99, "b"),))
    reading.receive(decode_entry(stream([other])[0], "0-0")[0])
    assert "as 11, then 99" in one.problems[0]


def test_a_reader_that_lacks_tokens_at_the_end_restarts_after_lost_writes_and_is_a_problem_otherwise():
    one, run_log, ended = job(), RunLog(), decode_entry(GOOD[-1], "0-0")[0]
    _, reading = read(one, run_log, 0, 1)
    run_log.lose_writes(since=0.0)
    _, resumed_by_id = read(one, run_log, 3)
    assert not reading.end(ended)
    assert (one.last, one.problems) == (None, [])
    assert resumed_by_id.end(ended), "no loss since it began"
    assert one.problems == ["its reader received tokens [0, 1, 3]"]
    read(one, run_log, 2)
    one.problems.clear()
    assert reading.end(ended)
    assert (one.last, one.problems) == (ended, [])


@pytest.mark.parametrize(("letters", "wrong"), [(2, []), (3, ["dead letters of unknown payloads: 1"])])
async def test_unreadable_payloads_that_are_alike_have_a_dead_letter_each(letters, wrong):
    class Letters:
        async def range(self, *_):
            return [("1-0", {"job_id": b"", "p": b"\xc1"})] * letters

    run_log = RunLog(garbage=[Garbage("tiny", b"\xc1", entries=1) for _ in range(2)])
    assert await _dead_letters(Letters(), None, "tiny", run_log) == wrong
