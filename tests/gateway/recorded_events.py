"""Events of a job as a gateway receives them, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from worker.jobs.events import End, Envelope, Event, Started, Token
from worker.jobs.reader import StreamEvent

Item = Token | Event


def started(**fields: Any) -> Started:
    return Started(
        **{"model": "m", "seed": 1, "max_tokens": 99, "prompt_tokens": 5, "cached_tokens": 2, "started_at": 9},
        **{"enqueued_at": 1_700_000_000_123, "prompt_hash": "0" * 64, "fingerprint": "f" * 8, **fields},
    )


def end(tokens: int, reason: Any = "stop", stop: str | None = None) -> End:
    return End(finish_reason=reason, tokens_out=tokens, prompt_tokens=5, ttft_ms=1.0, decode_ms=2.0, stop_sequence=stop)


def texts(*parts: tuple[str, str] | tuple[str, str, int, str]) -> list[Token]:
    """A token for each (channel, text) or (tool, text, call, name)."""
    tokens = []
    for i, (channel, text, *call) in enumerate(parts):
        recipient = f"functions.{call[1]}" if call else None
        tokens.append(Token(i, 100 + i, text, channel=channel, recipient=recipient, call=call[0] if call else None))
    return tokens


def pages(items: Sequence[Item], *, entry: int = 1, page: int = 1) -> list[list[StreamEvent]]:
    """Items as pages: `entry` tokens an entry, `page` entries a page."""
    entries: list[list[StreamEvent]] = []
    for item in items:
        envelope = Envelope("job", 1, 0, "w")
        is_token = isinstance(item, Token)
        full = not entries or not is_token or entries[-1][-1].kind != "token" or len(entries[-1]) >= entry
        if full:
            entries.append([])
        id = f"1-{len(entries)}"
        entries[-1].append(StreamEvent("token" if is_token else item.kind, item, envelope, id, id))
    return [list(chain.from_iterable(entries[at : at + page])) for at in range(0, len(entries), page)]
