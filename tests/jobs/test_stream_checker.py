"""The checker finds each kind of violation."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.jobs.echo import end, text, tokens
from tests.jobs.stream_checker import assert_none, keys_without_ttl, violations
from worker.jobs.events import Envelope, ErrorEvent, Event, Resumed, Started, encode_event
from worker.jobs.streams import Record

STARTED = Started(
    **{"model": "m", "seed": 1, "max_tokens": 9, "prompt_tokens": 3, "cached_tokens": 0},
    **{"started_at": 0, "enqueued_at": 0, "prompt_hash": "", "fingerprint": ""},
)


def resumed(from_i: int) -> Resumed:
    return Resumed(from_i=from_i, reason="crash", exact=True)


def entry(entry_id: str, event: Event, *, epoch: int | None = None, job_id: str = "a") -> Record:
    of_id = int(entry_id.partition("-")[0])
    envelope = Envelope(job_id=job_id, epoch=of_id if epoch is None else epoch, ts_ms=0, worker_id="w")
    kind, packed = encode_event(event, envelope)
    return entry_id, {"type": kind.encode(), "p": packed}


def valid_stream() -> list[Record]:
    events = [("1-0", STARTED), ("1-1", tokens(0, 2)), ("2-0", resumed(2)), ("2-1", tokens(2, 3)), ("2-2", end(3))]
    return [entry(entry_id, event) for entry_id, event in events]


def test_a_valid_stream_has_no_violation() -> None:
    assert violations("a", valid_stream(), text(3)) == []
    assert violations("a", [entry("1-0", ErrorEvent(code="CANCELLED", message=""))]) == []
    assert_none([])


@pytest.mark.parametrize(
    ("corrupt", "found"),
    [
        (lambda records: records[:-1], "no terminal event"),
        (lambda records: [*records, entry("2-3", tokens(3, 4))], "follows the terminal event"),
        (lambda records: records[1:], "precedes started"),
        (lambda records: [*records[:3], *records[4:]], "end counts 3 tokens, the stream 2"),
        (lambda records: [records[0], records[2], *records[1:2], *records[3:]], "is not above the id before it"),
        (lambda records: [*records[:2], entry("1-2", tokens(1, 2)), *records[2:]], "token indices are [0, 1, 1, 2]"),
        (lambda records: [*records[:2], entry("2-0", resumed(1)), *records[3:]], "continues at 1, not 2"),
        (lambda records: [*records[:2], *records[3:]], "epoch 2 opens with tokens"),
        (lambda records: [*records[:3], entry("2-1", tokens(2, 3), epoch=1), records[4]], "has epoch 1"),
        (lambda records: [*records[:3], entry("2-1", tokens(2, 3), job_id="b"), records[4]], "and job b"),
        (lambda records: [*records[:4], entry("2-2", STARTED), entry("2-3", end(3))], "a second started"),
    ],
)
def test_each_violation_is_found(corrupt: Callable[[list[Record]], list[Record]], found: str) -> None:
    assert found in "\n".join(violations("a", corrupt(valid_stream())))


def test_a_different_text_is_found() -> None:
    assert "the text is" in violations("a", valid_stream(), "something else")[0]


def test_a_job_key_without_expiry_is_found() -> None:
    assert keys_without_ttl({"inf:{job:a}:state": None, "inf:{job:b}:state": 5, "inf:workers": None}) == [
        "inf:{job:a}:state"
    ]
    with pytest.raises(AssertionError, match="one\ntwo"):
        assert_none(["one", "two"])
