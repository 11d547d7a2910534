"""The order in which a worker tries its queues."""

from __future__ import annotations

from collections import Counter

import pytest

from worker.config import RedisSection
from worker.queue_order import QueueOrder, parse_queue, queues_of


def claims(order: QueueOrder, number: int, *, entries: set[str]) -> list[str]:
    """The queues of the next claims, while the queues `entries` never run empty."""
    names = []
    for _ in range(number):
        tried = order.next_order()
        first = next(name for name in tried if name in entries)
        order.claimed(first, tried[: tried.index(first)])
        names.append(first)
    return names


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("a", ("a", None)), ("a:3", ("a", 3)), ("a:b", ("a:b", None)), ("a:3:1", ("a:3", 1)), ("a:1000", ("a", 1000))],
)
def test_a_number_after_the_last_colon_is_a_weight(text: str, parsed: tuple[str, int | None]) -> None:
    assert parse_queue(text) == parsed


@pytest.mark.parametrize("text", ["", ":3", "a b", "a:0", "a:1001", "a,b", "a:99999999999999999999", "ü"])
def test_a_malformed_queue_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="must be a queue's name"):
        parse_queue(text)


@pytest.mark.parametrize("queues", [[], ["a", "a"], ["a:1", "a:2"], ["a:1", "b"]])
def test_a_list_without_one_clear_order_is_refused(queues: list[str]) -> None:
    with pytest.raises(ValueError, match="must"):
        QueueOrder(queues)


def test_without_weights_the_first_queue_with_entries_is_tried_first() -> None:
    order = QueueOrder(["urgent", "batch"])
    assert claims(order, 3, entries={"urgent", "batch"}) == ["urgent"] * 3
    assert claims(order, 2, entries={"batch"}) == ["batch"] * 2
    assert order.next_order() == ["urgent", "batch"]


def test_with_weights_each_queue_gets_its_share_in_every_window() -> None:
    names = claims(QueueOrder(["a:3", "b:1", "c:2"]), 600, entries={"a", "b", "c"})
    for start in range(0, 600, 60):
        shares = Counter(names[start : start + 60])
        assert all(abs(shares[name] - share) <= 1 for name, share in {"a": 30, "b": 10, "c": 20}.items())


def test_a_queue_that_was_empty_gets_no_burst_when_it_fills() -> None:
    order = QueueOrder(["a:1", "b:1"])
    claims(order, 100, entries={"b"})
    names = claims(order, 20, entries={"a", "b"})
    assert abs(names.count("a") - 10) <= 1


def test_the_share_of_an_empty_queue_goes_to_the_others() -> None:
    assert Counter(claims(QueueOrder(["a:3", "b:1", "c:1"]), 40, entries={"b", "c"})) == {"b": 20, "c": 20}


def test_the_settings_name_one_queue_or_several() -> None:
    assert QueueOrder(RedisSection().served).names == ("default",)
    assert QueueOrder(RedisSection(queue="a:3").served).names == ("a:3",)
    assert QueueOrder(RedisSection(queues=("a:3", "b:1")).served).names == ("a", "b")
    with pytest.raises(ValueError, match="each queue once"):
        RedisSection(queues=("a", "a"))


def test_a_worker_s_status_lists_its_queues() -> None:
    assert queues_of({"queue": "a,b:c"}) == {"a", "b:c"}
    assert queues_of({}) == frozenset()
