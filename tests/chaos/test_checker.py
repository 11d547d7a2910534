"""The checker finds what it is there to find: each breach, put into a good stream by hand."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from tests.chaos.checker import barren_attempts, judged
from tests.chaos.ledger import Job, Ledger, Pass
from tests.chaos.questions import Asked
from worker.errors import Cancelled, DeadLettered
from worker.jobs.events import End, Envelope, ErrorEvent, Resumed, Started, Token, Tokens, encode_event
from worker.jobs.reader import decode_entry

ASKED = Asked({"prompt": "x"}, (10, 11, 12, 13), ("a", "b", "c", "d"), "length", None)
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
WORN_OUT = ErrorEvent.of(DeadLettered("given up"))
CANCELLED = ErrorEvent.of(Cancelled("by request"))


def tokens(first, end):
    return Tokens(tokens=tuple(Token(i, ASKED.ids[i], ASKED.texts[i]) for i in range(first, end)))


def resumed(from_i, reason="crash", exact=True):
    return Resumed(from_i=from_i, reason=reason, exact=exact)


def stream(*epochs):
    """The records of a job whose n-th epoch wrote the n-th list of events."""
    records = []
    for epoch, events in enumerate(epochs, 1):
        for seq, event in enumerate(events):
            kind, packed = encode_event(event, Envelope(job_id="j", epoch=epoch, ts_ms=0, worker_id="w"))
            records.append((f"{epoch}-{seq}", {"type": kind.encode(), "p": packed}))
    return records


def job(kind="plain", **changes):
    return replace(Job("j", "tiny", kind, ASKED), **changes)


GOOD = stream([STARTED, tokens(0, 2)], [resumed(2), tokens(2, 4), END])


def test_a_good_stream_passes():
    assert judged(job(), GOOD) == []


@pytest.mark.parametrize(
    ("records", "word"),
    [
        (GOOD[:-1], "no terminal event"),
        ([*GOOD, (GOOD[-1][0].replace("3", "4") + "0", GOOD[-1][1])], "after the end"),
        ([*GOOD[:-2], GOOD[-1]], "counts 4 tokens"),
        (GOOD[::-1], "does not rise"),
        (stream([STARTED, tokens(0, 2), tokens(1, 4), END]), "token indices"),
        (stream([STARTED, tokens(0, 2), tokens(3, 4), END]), "token indices"),
        (stream([STARTED, tokens(0, 4), END, END]), "after the end"),
        (stream([STARTED, tokens(0, 2)], [resumed(1), tokens(2, 4), END]), "goes on at 1"),
        (stream([STARTED, tokens(0, 2)], [resumed(2, exact=False), tokens(2, 4), END]), "another model"),
        (stream([STARTED, tokens(0, 2)], [tokens(2, 4), END]), "opens with tokens"),
        (stream([STARTED, tokens(0, 4), replace(END, finish_reason="stop")]), "ended by stop"),
        (stream([STARTED, tokens(0, 4), CANCELLED]), "ended with CANCELLED"),
        (stream([STARTED, tokens(0, 4), WORN_OUT]), "ended with DEAD_LETTERED, after 0 attempts"),
        (stream([STARTED, Tokens(tokens=(Token(0, 99, "a"),)), tokens(1, 4), END]), "token ids"),
        (stream([STARTED, Tokens(tokens=(Token(0, 10, "?"),)), tokens(1, 4), END]), "text"),
        ([], "no terminal event"),
    ],
)
def test_a_breach_is_named(records, word):
    found = judged(job(), records)
    assert any(word in wrong for wrong in found), found


def test_an_early_end_leaves_the_beginning_of_the_undisturbed_answer():
    assert judged(job("cancelled"), stream([STARTED, tokens(0, 3), CANCELLED])) == []
    wrong = stream([STARTED, Tokens(tokens=(Token(0, 99, "a"),)), CANCELLED])
    assert "token ids" in judged(job("cancelled"), wrong)[0]


def test_a_dead_letter_is_right_after_three_attempts_in_vain_and_only_then():
    thrice = stream([STARTED], [resumed(0)], [resumed(0)], [WORN_OUT])
    assert judged(job("poison"), thrice) == []
    assert judged(job("plain"), thrice) == []
    twice = stream([STARTED], [resumed(0)], [WORN_OUT])
    assert "after 2 attempts in vain" in judged(job("poison"), twice)[0]
    progress = stream([STARTED, tokens(0, 1)], [resumed(1)], [resumed(1)], [WORN_OUT])
    assert "after 2 attempts in vain" in judged(job("plain"), progress)[0]
    handed_back = stream([STARTED], [resumed(0, "drain")], [resumed(0)], [WORN_OUT])
    assert "after 2 attempts in vain" in judged(job("poison"), handed_back)[0]


def test_attempts_in_vain_are_counted_to_the_end_of_a_stream_that_goes_well():
    assert barren_attempts([STARTED, resumed(0), tokens(0, 4), END]) == 1


def test_what_a_reader_found_wrong_is_a_breach():
    assert judged(job(wrong=["a reader heard it"]), GOOD) == ["j: a reader heard it"]
    assert judged(job(heard={0: 10, 1: 99}), GOOD) == ["j: its reader heard {1: 99}"]
    assert judged(job(heard={4: 10}), GOOD) == ["j: its reader heard {4: 10}"]


def heard(one, ledger, *ids):
    """A reader that hears the tokens of these indices; what it was told in the end."""
    reading = Pass(one, ledger, ledger.losses)
    told = [reading.hear(decode_entry(stream([tokens(i, i + 1)])[0], "0-0")[0]) for i in ids]
    return told, reading


def test_a_reader_notices_a_gap_and_a_token_heard_twice():
    for indices in ((0, 1, 3), (0, 1, 1)):
        one = job()
        heard(one, Ledger(), *indices)
        assert "is the next" in one.wrong[0]


def test_a_reader_may_begin_anywhere_and_again():
    one, ledger = job(), Ledger()
    heard(one, ledger, 2, 3)
    heard(one, ledger, 0, 1, 2, 3)
    assert one.wrong == []
    assert one.heard == dict(enumerate(ASKED.ids))


def test_a_job_that_the_server_forgot_with_its_last_second_must_have_been_answered():
    ended = decode_entry(GOOD[-1], "0-0")[0]
    assert judged(job(perhaps_lost=True, last=ended), []) == []
    assert "no terminal event" in judged(job(perhaps_lost=True), [])[0]
    assert "no terminal event" in judged(job(last=ended), [])[0]


def test_only_what_was_sent_in_the_last_seconds_may_be_lost():
    ledger = Ledger(jobs=[job(), job(sent=time.monotonic() - 60), job(sent=time.monotonic())])
    ledger.lose_last_second()
    assert [each.perhaps_lost for each in ledger.jobs] == [True, False, True]  # the first is being sent


def test_after_lost_writes_a_reader_may_hear_tokens_again_but_no_others():
    one, ledger = job(), Ledger()
    _, reading = heard(one, ledger, 0, 1)
    ledger.lose_last_second()
    assert reading.hear(decode_entry(stream([tokens(1, 2)])[0], "0-0")[0])
    assert not reading.hear(decode_entry(stream([tokens(3, 4)])[0], "0-0")[0])
    assert one.wrong == []
    other = Tokens(tokens=(Token(1, 99, "b"),))
    reading.hear(decode_entry(stream([other])[0], "0-0")[0])
    assert "as 11, then 99" in one.wrong[0]
