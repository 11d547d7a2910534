"""The parts of an answer: text, reasoning and tool calls, in the order of its tokens.

The Responses and the Messages API both report an answer as a list of such parts. A part is a run of
tokens of one channel, and of one call on the channel `tool`. The division is a function of the
tokens alone, not of the entries in which they were published, so that a stream that is read again
gives the same parts. Read `responses_events.py` and `messages_events.py` next.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from worker.jobs.events import Channel, Token


@dataclass(slots=True)
class AnswerPart:
    """One part of an answer, with what has been received of it."""

    channel: Channel
    index: int
    """Position in the answer, from 0."""
    name: str = ""
    """The called tool, without the prefix `functions.`."""
    call: int | None = None
    """Index of the tool call in the answer."""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its text so far."""
        return "".join(self.pieces)


class Opened(NamedTuple):
    """A part begins."""

    part: AnswerPart


class Delta(NamedTuple):
    """Text is appended to a part, by the tokens that complete it."""

    part: AnswerPart
    text: str
    tokens: tuple[Token, ...]


class Closed(NamedTuple):
    """A part is complete."""

    part: AnswerPart


Change = Opened | Delta | Closed


class AnswerParts:
    """Divides the tokens of one answer into parts.

    Without `parallel_calls` all tool calls but the first are left out.
    """

    def __init__(self, *, parallel_calls: bool = True) -> None:
        self._parallel_calls = parallel_calls
        self.parts: list[AnswerPart] = []
        self.tokens = 0
        self.reasoning_tokens = 0
        self._open: AnswerPart | None = None
        self._pending: list[Token] = []
        """Tokens that have not completed any text yet."""

    @property
    def has_calls(self) -> bool:
        """Whether the answer has a tool call so far."""
        return any(part.channel == "tool" for part in self.parts)

    def add(self, token: Token) -> Iterator[Change]:
        """Yield the changes that a token makes. A token without text opens only a tool call."""
        self.tokens += 1
        self.reasoning_tokens += token.channel == "reasoning"
        if token.call and not self._parallel_calls:
            return
        is_open = self._open is not None and (self._open.channel, self._open.call) == (token.channel, token.call)
        self._pending.append(token)
        if not token.t and (is_open or token.channel != "tool"):
            return
        if not is_open:
            yield from self.close()
            self._open = AnswerPart(token.channel, len(self.parts), _name(token), token.call)
            self.parts.append(self._open)
            yield Opened(self._open)
        if token.t:
            yield self._append(token.t)

    def close(self) -> Iterator[Change]:
        """Yield the changes at the end of the open part. A call without arguments gets `{}`."""
        part, self._open = self._open, None
        if part is None:
            return
        self._pending = [token for token in self._pending if (token.channel, token.call) != (part.channel, part.call)]
        if part.channel == "tool" and not part.pieces:
            part.pieces.append("{}")
            yield Delta(part, "{}", ())
        yield Closed(part)

    def _append(self, text: str) -> Delta:
        part = self._open
        assert part is not None
        part.pieces.append(text)
        tokens, self._pending = tuple(self._pending), []
        return Delta(part, text, tokens)


def _name(token: Token) -> str:
    return (token.recipient or "").removeprefix("functions.") if token.channel == "tool" else ""
