"""What the parsers of an answer have in common: channels, the protocol, markup found as text.

A parser assigns each piece of an answer's text to a channel and removes the markup. Its output
depends on the joined text only, not on how the text is split into tokens.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Protocol

_MAX_MARK = 20
_MAX_NEWLINES = 16  # removed before a mark; a model that repeats newlines must not be withheld for ever


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
    """Ids of the tokens that are markup and have no text: no code point spans one of them."""

    def push(self, token_id: int, text: str) -> Iterable[Piece]:
        """Add the text of the answer's next token; return the text that can be published."""

    def flush(self) -> Iterable[Piece]:
        """Return the withheld text, at the end of the answer: nothing is lost."""


class TextParser:
    """Base of parsers that find markup in the text: a state machine over withheld text.

    A state is a method that consumes text from `_held`. It returns whether the next state goes on;
    if not, it needs more text. With `last` there is none, and a state must not wait.
    """

    marks: tuple[str, ...] = ()
    boundaries: frozenset[int] = frozenset()

    def __init__(self, state: Callable[[bool], bool]) -> None:
        self.place = Place("final")
        self._first_state = self._state = state
        self._held = ""
        self._pieces: list[Piece] = []

    def push(self, token_id: int, text: str) -> list[Piece]:
        """Add the text of the answer's next token; return the text that can be published."""
        self._held += text
        return self._advance(last=False)

    def flush(self) -> list[Piece]:
        """Return the withheld text, at the end of the answer."""
        return self._advance(last=True)

    def _advance(self, *, last: bool) -> list[Piece]:
        while self._held and self._state(last):
            pass
        pieces, self._pieces = self._pieces, []
        return pieces

    def _publish(self, text: str) -> None:
        if text:
            self._pieces.append((self.place, text))

    def _publish_before(self, mark: int) -> None:
        """Publish the text before the mark at this index of `_held`, without its last newlines."""
        end = self._without_newlines(mark)
        self._publish(self._take(mark)[:end])

    def _publish_all_but(self, withheld: int, last: bool) -> None:
        """Publish the text without its last `withheld` characters and newlines before these.

        `last` publishes all.
        """
        end = len(self._held) if last else self._without_newlines(len(self._held) - withheld)
        self._publish(self._take(end))

    def _without_newlines(self, end: int) -> int:
        newlines = self._held[max(0, end - _MAX_NEWLINES) : end]
        return end - len(newlines) + len(newlines.rstrip("\n"))

    def _after_markup(self, last: bool) -> bool:
        """Remove newlines after a mark, then return to the first state."""
        self._held = self._held.lstrip("\n")
        self._state = self._first_state if self._held else self._after_markup
        return bool(self._held)

    def _take(self, length: int) -> str:
        """Remove and return the first characters of the withheld text."""
        text, self._held = self._held[:length], self._held[length:]
        return text


def partial_mark(text: str, marks: Iterable[str]) -> int:
    """Return the length of the longest suffix of `text` that may become one of the marks."""
    at = text.rfind("<", max(0, len(text) - _MAX_MARK))
    return len(text) - at if at >= 0 and any(mark.startswith(text[at:]) for mark in marks) else 0
