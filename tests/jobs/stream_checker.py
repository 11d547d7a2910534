"""Replays what a run left on the server and lists every breach of the protocol. For any tests, chaos too.

A job's stream: ids rising, `[started (tokens | metrics | resumed)*] (end | error)`, one terminal event and nothing
after it, token indices 0…n with no gap or duplicate, each later epoch opened by `resumed` at the next index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from worker.jobs.events import End, Resumed, Started, Tokens, decode_event
from worker.jobs.keys import epoch_of, events_key, split_id
from worker.jobs.streams import Record, Streams


def violations(job_id: str, records: Sequence[Record], text: str | None = None) -> list[str]:
    """What is wrong with one job's whole event stream; `text` is the answer of an undisturbed run."""
    found: list[str] = []
    indices: list[int] = []
    released: list[str] = []
    previous, epoch, started, over = (0, -1), 0, False, False
    for entry_id, fields in records:
        decoded = decode_event(fields["type"].decode(), fields["p"])
        if decoded is None:
            continue
        event, envelope = decoded
        if split_id(entry_id) <= previous:
            found.append(f"{entry_id} does not rise")
        previous = split_id(entry_id)
        if over:
            found.append(f"{event.kind} at {entry_id} comes after the end")
        if envelope.epoch != epoch_of(entry_id) or envelope.job_id != job_id:
            found.append(f"{entry_id} carries epoch {envelope.epoch} and job {envelope.job_id}")
        if isinstance(event, Started):
            found += [f"a second started at {entry_id}"] if started else []
            started = True
        elif not started and not event.terminal:
            found.append(f"{event.kind} at {entry_id} comes before started")
        if isinstance(event, Resumed) and event.from_i != len(indices):
            found.append(f"resumed at {entry_id} goes on at {event.from_i}, not {len(indices)}")
        if epoch_of(entry_id) != epoch:
            opens = isinstance(event, Started if not epoch else Resumed) or event.terminal
            found += [] if opens and previous[1] == 0 else [f"epoch {epoch_of(entry_id)} opens with {event.kind}"]
            epoch = epoch_of(entry_id)
        if isinstance(event, Tokens):
            indices += [token.i for token in event.tokens]
            released += [token.t for token in event.tokens]
        over = over or event.terminal
        if isinstance(event, End):
            found += _ending(event, indices, "".join(released), text)
    if indices != list(range(len(indices))):
        found.append(f"token indices are {indices}")
    found += [] if over else ["there is no terminal event"]
    return [f"{job_id}: {breach}" for breach in found]


def _ending(event: End, indices: Sequence[int], released: str, text: str | None) -> list[str]:
    found: list[str] = []
    if event.tokens_out != len(indices):
        found.append(f"end counts {event.tokens_out} tokens, the stream {len(indices)}")
    if text is not None and released != text:
        found.append(f"the text is {released!r}, undisturbed {text!r}")
    return found


async def find_violations(streams: Streams, queue: str, texts: Mapping[str, str | None]) -> list[str]:
    """What is wrong with the jobs of these ids, and with the queue, which should be empty by now."""
    found: list[str] = []
    for job_id, text in texts.items():
        found += violations(job_id, await streams.range(events_key(job_id), "-", "+", 1_000_000), text)
    found += [f"{row.entry_id} is still pending for {row.consumer}" for row in await streams.pending(queue, 100)]
    return found


def keys_without_ttl(keys: Mapping[str, int | None]) -> list[str]:
    """Job keys that would stay for ever; `keys` gives milliseconds to live."""
    return [key for key, ttl in keys.items() if key.startswith("inf:{job:") and ttl is None]


def assert_none(found: Iterable[str]) -> None:
    """Fail with every breach."""
    listed = list(found)
    assert not listed, "\n".join(listed)
