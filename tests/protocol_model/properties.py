"""What must hold in every state of the server, from one state to the next, and when all is quiet.

The same as `tests/chaos/checker.py` requires after a run, and the stream's grammar at every step.
"""

from __future__ import annotations

from functools import cached_property

from tests.jobs.echo import text
from tests.jobs.memory_streams import MemoryStreams, Stream
from tests.jobs.stream_checker import keys_without_ttl, violations
from tests.protocol_model.programs import JOB, QUEUE
from worker.jobs.events import TERMINAL_KINDS
from worker.jobs.keys import dead_key, epoch_of, events_key, queue_key, state_key
from worker.jobs.streams import Record

_NOT_YET = "there is no terminal event"


class Facts:
    """One state of the server, for a job whose answer has `length` tokens."""

    def __init__(self, streams: MemoryStreams, length: int) -> None:
        self._streams = streams
        self._length = length
        queue, dead = (streams._streams.get(key, Stream()) for key in (queue_key(QUEUE), dead_key(QUEUE)))
        events = streams._streams.get(events_key(JOB), Stream())
        self.state = streams._hashes.get(state_key(JOB), {})
        self.records: list[Record] = list(events.entries.items())
        self.epoch = epoch_of(events.last_id)
        self.left = sorted({*queue.entries, *queue.pending})
        """Entries of the queue and of its list of pending entries."""
        self._dead = len(dead.entries)

    @cached_property
    def over(self) -> bool:
        """Whether the job's state says that it has ended."""
        return self.state.get("state") in TERMINAL_KINDS

    @cached_property
    def at_any_time(self) -> list[str]:
        """Violations of what holds in every state."""
        found = [each for each in self._of_stream if _NOT_YET not in each]
        if self.over is any(_NOT_YET in each for each in self._of_stream):
            found.append(f"the state is {self.state.get('state')}, the last event {self.records[-1:]}")
        if self.over is not ("ended_ms" in self.state):
            found.append(f"the state has{'' if self.over else ' an'} ended_ms{' not' if self.over else ''}")
        return found + keys_without_ttl(self._streams.keys())

    @cached_property
    def when_quiet(self) -> list[str]:
        """Violations of what holds when no live worker has anything to do."""
        expected = int(self.state.get("error") == "DEAD_LETTERED")
        found = [] if self._dead == expected else [f"{self._dead} dead letters, expected {expected}"]
        found += [f"the entry {entry_id} is left" for entry_id in self.left]
        return self._of_stream + found

    @cached_property
    def _of_stream(self) -> list[str]:
        return violations(JOB, self.records, text(self._length))

    def is_continued_by(self, later: Facts) -> bool:
        """Whether no published event is changed or gone in the later state."""
        return later.records[: len(self.records)] == self.records
