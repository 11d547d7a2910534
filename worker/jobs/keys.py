"""Redis key names, and the arithmetic of stream entry ids.

Braces are cluster hash tags: the two keys of a job share a slot, and so do the two keys of a queue.
"""

import re

GROUP = "workers"
"""The consumer group of every queue."""
WORKERS = "inf:workers"
"""Sorted set: the registry of workers, by the time of their last heartbeat."""
CONTROL = "inf:control"
"""Stream: commands to workers."""
START = "0-0"
"""The id below that of every entry; the last id of a stream that does not exist."""


def queue_key(queue: str) -> str:
    """Stream of waiting and running jobs."""
    return f"inf:{{q:{queue}}}:jobs"


def dead_key(queue: str) -> str:
    """Dead-letter stream of a queue."""
    return f"inf:{{q:{queue}}}:dead"


def events_key(job_id: str) -> str:
    """Stream of a job's events."""
    return f"inf:{{job:{job_id}}}:events"


def state_key(job_id: str) -> str:
    """Hash of a job's state."""
    return f"inf:{{job:{job_id}}}:state"


def worker_key(name: str) -> str:
    """Status hash of a worker."""
    return f"inf:worker:{name}"


def worker_events_key(name: str) -> str:
    """Stream of a worker's own events."""
    return f"inf:worker:{name}:events"


def is_entry_id(text: str) -> bool:
    """Whether the text is an entry id: `5-0`, or `5` for short."""
    match = re.fullmatch(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", text)
    return match is not None and all(int(part or 0) < 2**64 for part in match.groups())


def split_id(entry_id: str) -> tuple[int, int]:
    """The two numbers of an entry id, which compare as Redis compares ids; `5` is 5-0."""
    major, _, minor = entry_id.partition("-")
    return int(major), int(minor or 0)


def epoch_of(event_id: str) -> int:
    """The epoch in an event's id, `<epoch>-<seq>`."""
    return split_id(event_id)[0]


def next_id(entry_id: str) -> str:
    """The smallest id above `entry_id`."""
    major, minor = split_id(entry_id)
    return f"{major}-{minor + 1}"
