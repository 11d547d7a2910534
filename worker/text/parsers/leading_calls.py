"""Content that follows a grammar, or tool calls: a call can only be at the beginning.

JSON in the content may contain the marks of a call in its strings.
"""

from worker.text.parsers.interface import Parser, Piece, Place

_OPENING = "<tool_call>"


class LeadingCallsParser:
    """Passes text to the parser of calls if it begins with a call; else it is final."""

    def __init__(self, calls: Parser) -> None:
        self.place = Place("final")
        self.marks = calls.marks
        self.boundaries = calls.boundaries
        self._calls = calls
        self._start = ""
        self._is_call: bool | None = None
        """None until enough text has arrived to decide."""

    def push(self, token_id: int, text: str) -> list[Piece]:
        """Add the text of the answer's next token; return the text that can be published."""
        if self._is_call is None:
            self._start += text
            begins = self._start.lstrip()
            if not begins or (_OPENING.startswith(begins) and begins != _OPENING):
                return []
            self._is_call = begins.startswith(_OPENING)
            text, self._start = self._start, ""
        if not self._is_call:
            return [(self.place, text)] if text else []
        pieces = list(self._calls.push(token_id, text))
        self.place = self._calls.place
        return pieces

    def flush(self) -> list[Piece]:
        """Return the withheld text, at the end of the answer."""
        if not self._is_call:
            text, self._start = self._start, ""
            return [(self.place, text)] if text else []
        pieces = list(self._calls.flush())
        self.place = self._calls.place
        return pieces
