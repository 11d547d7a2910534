"""Tokens on their way from the engine to the job's stream: the first at once, the others a few at a time.

It holds what is drawn and not yet published, says when something is due, and keeps the figures of one attempt. Times
are of `time.monotonic`, given by the caller. Knows neither server nor engine; `attempt.py` empties it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

from worker.config import ServiceSection
from worker.jobs.events import Event, Token, Tokens


class Outbox:
    """One attempt's unpublished tokens. Entries hold at most `flush_tokens` of them."""

    def __init__(self, section: ServiceSection) -> None:
        self._size = section.flush_tokens
        self._pause_s = section.flush_ms / 1000
        self._held: list[Token] = []
        self._due = math.inf
        self._first = True

    @property
    def due(self) -> float:
        """When `take` is to be called next; infinite while nothing is held."""
        return self._due

    def add(self, token: Token, now: float) -> None:
        """Hold a token that came at `now`."""
        self._held.append(token)
        if self._first or len(self._held) >= self._size:
            self._due = now
        elif len(self._held) == 1:
            self._due = now + self._pause_s
        self._first = False

    def take(self) -> list[Event]:
        """Everything held, as events."""
        events = list(self._cut())
        self._held, self._due = [], math.inf
        return events

    def _cut(self) -> Iterator[Event]:
        for at in range(0, len(self._held), self._size):
            yield Tokens(tokens=tuple(self._held[at : at + self._size]))


class Figures:
    """How an attempt goes: when its tokens came and how many, and a digest of its text in place of the text."""

    def __init__(self, claimed: float) -> None:
        self.claimed = claimed
        self.tokens = 0
        """Drawn by this attempt, without those that an earlier one had published."""
        self.chars = 0
        self._first = self._newest = claimed
        self._digest = hashlib.sha256()

    @property
    def ttft_s(self) -> float:
        """Seconds from the claim to the first token that this attempt drew."""
        return self._first - self.claimed

    @property
    def decode_s(self) -> float:
        """Seconds from that token to the newest."""
        return self._newest - self._first

    @property
    def total_s(self) -> float:
        """Seconds from the claim to the newest token."""
        return self._newest - self.claimed

    @property
    def rate(self) -> float:
        """Tokens a second since the first."""
        return (self.tokens - 1) / self.decode_s if self.tokens > 1 and self.decode_s > 0 else 0.0

    @property
    def text_sha256(self) -> str:
        """Of the text that this attempt released."""
        return self._digest.hexdigest()

    def count(self, text: str, at: float) -> float | None:
        """Note a token that was drawn at `at`; seconds since the one before, if there was one."""
        since = at - self._newest if self.tokens else None
        if not self.tokens:
            self._first = at
        self._newest = at
        self.tokens += 1
        self.chars += len(text)
        self._digest.update(text.encode())
        return since
