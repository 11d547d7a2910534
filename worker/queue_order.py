"""The order in which a worker tries its queues: as listed, or in proportion to weights."""

import re
from collections.abc import Mapping, Sequence

QUEUE_NAME = r"[A-Za-z0-9\-_.:]{1,128}"
MAX_WEIGHT = 1000
_FORM = "must be a queue's name, or its name and a weight of 1 to 1000 such as interactive:3"


def parse_queue(text: str) -> tuple[str, int | None]:
    """The name and weight of `name` or `name:weight`. Raises ValueError.

    A number after the last colon is a weight: the queue `a:3` is written `a:3:1`.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]+", weight):
        name, weight = text, ""
    if not re.fullmatch(QUEUE_NAME, name) or (weight and not 1 <= int(weight[:9]) <= MAX_WEIGHT):
        raise ValueError(f"{text!r} {_FORM}")
    return name, int(weight) if weight else None


class QueueOrder:
    """The queues of a worker, written as for `parse_queue`.

    Without weights the order is strict: a queue is tried first while it has entries. With weights
    every queue gets its share of the claims among those that have entries (start-time fair
    queueing, Goyal et al. 1997).

    Raises ValueError: no queue, a queue listed twice, or weights for some queues only.
    """

    def __init__(self, queues: Sequence[str]) -> None:
        parsed = [parse_queue(each) for each in queues]
        self.names = tuple(name for name, _ in parsed)
        weights = [weight for _, weight in parsed if weight is not None]
        if not parsed:
            raise ValueError("must name at least one queue")
        if len(set(self.names)) < len(self.names):
            raise ValueError("must name each queue once")
        if len(weights) not in (0, len(parsed)):
            raise ValueError("must have a weight for every queue or for none")
        self._cost = {name: 1 / weight for name, weight in zip(self.names, weights, strict=False)}
        self._start = dict.fromkeys(self.names, 0.0)
        """With weights, the sum of a queue's costs so far; the smallest is tried first."""

    def next_order(self) -> list[str]:
        """The names in the order to try; among equals as listed."""
        return sorted(self.names, key=lambda name: self._start[name]) if self._cost else list(self.names)

    def claimed(self, name: str, empty: Sequence[str]) -> None:
        """Count a claim from a queue; `empty` had no entries and save up no claims."""
        if self._cost:
            for each in empty:
                self._start[each] = max(self._start[each], self._start[name])
            self._start[name] += self._cost[name]


def queues_of(status: Mapping[str, str]) -> frozenset[str]:
    """The queues that a worker serves, by its status hash: names separated by commas."""
    return frozenset(filter(None, status.get("queue", "").split(",")))
