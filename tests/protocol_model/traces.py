"""Calls and replies of the protocol as short text, for counterexamples."""

from __future__ import annotations

from typing import Any

from tests.protocol_model.automaton import Call, Lost
from worker.jobs.events import EncodedEvent
from worker.jobs.streams import AppendCall, CancelCall, Entry, JobState, PendingEntry, TakeCall, TakeReply


def describe(value: Any) -> str:
    """A call or a reply in one line."""
    match value:
        case Call(name, args):
            return f"{name}({', '.join(map(describe, args))})"
        case Lost():
            return "executed, reply lost"
        case TakeCall():
            attempt = f"{value.worker} entry {value.entry_id} after {value.expected} epoch {value.epoch}"
            return f"{attempt}: {value.opening.kind}"
        case AppendCall():
            events = " ".join(f"{entry_id}={event.kind}" for entry_id, event in value.events)
            return f"{value.worker} after {value.expected} state {value.state}: {events or 'no event'}"
        case CancelCall():
            return f"after {value.expected} epoch {value.epoch}"
        case TakeReply():
            return " ".join(filter(None, (value.outcome, value.code)))
        case JobState():
            return f"last {value.last_id} {dict(value.fields)}"
        case Entry():
            return f"entry {value.id}, delivery {value.deliveries}"
        case PendingEntry():
            return f"{value.entry_id} of {value.consumer}, delivery {value.deliveries}, idle {value.idle_ms}"
        case EncodedEvent():
            return value.kind
        case bytes():
            return f"{len(value)} bytes"
        case dict():
            return "{" + ", ".join(f"{key}: {describe(each)}" for key, each in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(describe, value)) + "]"
        case _:
            return str(value)
