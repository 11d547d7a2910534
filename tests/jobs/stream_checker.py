"""Replays the event streams on a server and lists every violation of the protocol.

A valid stream has increasing ids, the grammar `[started (tokens | metrics | resumed)*] (end |
error)`, one terminal event as its last, token indices 0…n without gap or duplicate, and opens each
later epoch with `resumed` at the next index.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

from worker.jobs.events import End, Resumed, Started, Tokens, decode_event
from worker.jobs.keys import epoch_of, events_key, split_id
from worker.jobs.streams import PendingEntry, Record, Streams


def violations(job_id: str, records: Sequence[Record], text: str | None = None) -> list[str]:
    """Violations in one job's whole event stream; `text` is the answer without faults."""
    found: list[str] = []
    indices: list[int] = []
    released: list[str] = []
    previous, epoch, started, ended = (0, -1), 0, False, False
    for entry_id, fields in records:
        decoded = decode_event(fields["type"].decode(), fields["p"])
        if decoded is None:
            continue
        event, envelope = decoded
        if split_id(entry_id) <= previous:
            found.append(f"{entry_id} is not above the id before it")
        previous = split_id(entry_id)
        if ended:
            found.append(f"{event.kind} at {entry_id} follows the terminal event")
        if envelope.epoch != epoch_of(entry_id) or envelope.job_id != job_id:
            found.append(f"{entry_id} has epoch {envelope.epoch} and job {envelope.job_id}")
        if isinstance(event, Started):
            found += [f"a second started at {entry_id}"] if started else []
            started = True
        elif not started and not event.terminal:
            found.append(f"{event.kind} at {entry_id} precedes started")
        if isinstance(event, Resumed) and event.from_i != len(indices):
            found.append(f"resumed at {entry_id} continues at {event.from_i}, not {len(indices)}")
        if epoch_of(entry_id) != epoch:
            opens = isinstance(event, Started if not epoch else Resumed) or event.terminal
            found += [] if opens and previous[1] == 0 else [f"epoch {epoch_of(entry_id)} opens with {event.kind}"]
            epoch = epoch_of(entry_id)
        if isinstance(event, Tokens):
            indices += [token.i for token in event.tokens]
            released += [token.t for token in event.tokens]
        ended = ended or event.terminal
        if isinstance(event, End):
            found += _ending(event, indices, "".join(released), text)
    if indices != list(range(len(indices))):
        found.append(f"token indices are {indices}")
    found += [] if ended else ["there is no terminal event"]
    return [f"{job_id}: {violation}" for violation in found]


def _ending(event: End, indices: Sequence[int], released: str, text: str | None) -> list[str]:
    found: list[str] = []
    if event.tokens_out != len(indices):
        found.append(f"end counts {event.tokens_out} tokens, the stream {len(indices)}")
    if text is not None and released != text:
        found.append(f"the text is {released!r}, expected {text!r}")
    return found


async def find_violations(streams: Streams, queue: str, texts: Mapping[str, str | None]) -> list[str]:
    """Violations of the jobs in `texts` (id to text), and entries that are still pending."""
    found: list[str] = []
    for job_id, text in texts.items():
        found += violations(job_id, await streams.range(events_key(job_id), "-", "+", 1_000_000), text)
    found += [f"{row.entry_id} is still pending for {row.consumer}" for row in await _pending(streams, queue)]
    return found


async def _pending(streams: Streams, queue: str) -> list[PendingEntry]:
    """Pending entries; waits for those that are being settled, which follows the terminal event."""
    rows = await streams.pending(queue, 100)
    for _ in range(100):
        if not rows:
            break
        await asyncio.sleep(0.01)
        rows = await streams.pending(queue, 100)
    return rows


def keys_without_ttl(keys: Mapping[str, int | None]) -> list[str]:
    """Job keys that do not expire; `keys` maps each key to its time to live in ms."""
    return [key for key, ttl in keys.items() if key.startswith("inf:{job:") and ttl is None]


def assert_none(found: Iterable[str]) -> None:
    """Fail with all violations."""
    listed = list(found)
    assert not listed, "\n".join(listed)
