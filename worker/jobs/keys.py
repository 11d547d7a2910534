"""The names of keys and the order of ids, as DESIGN's table draws them.

Braces are cluster hash tags: a job's two keys share a slot, a queue's two share another.
"""

from __future__ import annotations

GROUP = "workers"
WORKERS = "inf:workers"
CONTROL = "inf:control"
START = "0-0"
"""The id before every entry's, and the top of a stream that does not exist."""


def queue_key(queue: str) -> str:
    """The stream of jobs."""
    return f"inf:{{q:{queue}}}:jobs"


def dead_key(queue: str) -> str:
    """The dead-letter stream, in the queue's slot."""
    return f"inf:{{q:{queue}}}:dead"


def events_key(job_id: str) -> str:
    """The stream of a job's events."""
    return f"inf:{{job:{job_id}}}:events"


def state_key(job_id: str) -> str:
    """The hash of a job's state, in the slot of its events."""
    return f"inf:{{job:{job_id}}}:state"


def worker_key(name: str) -> str:
    """The status hash of a worker."""
    return f"inf:worker:{name}"


def worker_events_key(name: str) -> str:
    """The stream of a worker's own events."""
    return f"inf:worker:{name}:events"


def epoch_of(entry_id: str) -> int:
    """The epoch in an event's id, `<epoch>-<seq>`."""
    return int(entry_id.partition("-")[0])


def order_of(entry_id: str) -> tuple[int, int]:
    """An id as Redis orders it; `5` is 5-0."""
    major, _, minor = entry_id.partition("-")
    return int(major), int(minor or 0)


def after(entry_id: str) -> str:
    """The least id above this one."""
    major, minor = order_of(entry_id)
    return f"{major}-{minor + 1}"
