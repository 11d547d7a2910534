"""What the parsers of an answer have in common: channels, the parser protocol, partial marks.

A parser assigns each piece of an answer's text to a channel and removes the markup. Its output
depends on the joined text only, not on how the text is split into tokens.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol


class Place(NamedTuple):
    """What a piece of text belongs to. A stop string never matches across two `Place` objects."""

    channel: Literal["final", "reasoning", "tool"]
    recipient: str | None = None
    """The called tool, on the channel `tool`."""
    call: int | None = None
    """Index of the tool call in the answer, on the channel `tool`."""


Piece = tuple[Place, str]
"""A piece of text, never empty, and its place."""


class Parser(Protocol):
    """Streaming parser of one answer."""

    place: Place
    """The place of the text that follows, as far as it is known."""
    marks: tuple[str, ...]
    """Markup found as text; a control token with such a name is passed to `push` as its name."""
    boundaries: frozenset[int]
    """Ids of the control tokens that are markup: no code point spans one of them."""

    def push(self, token_id: int, text: str) -> Iterable[Piece]:
        """Add the text of the answer's next token; return the text that can be published."""

    def flush(self) -> Iterable[Piece]:
        """Return the withheld text, at the end of the answer: nothing is lost."""


def partial_mark(text: str, marks: Iterable[str]) -> int:
    """Return the length of the longest suffix of `text` that may become one of the marks."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest
