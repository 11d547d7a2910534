"""The end of a JSON value in text that comes in parts."""

import re

_STRING = re.compile(r'(?:[^"\\]|\\.)*', re.DOTALL)
_STRUCTURE = re.compile(r'["{}\[\]<]')
_AFTER_SCALAR = re.compile(r"[,}\]\s<]")


class JsonValue:
    """Find the end of a JSON value in text that comes in parts. It may have other errors."""

    def __init__(self, end_tag: str) -> None:
        self._end_tag = end_tag
        self.is_complete = False
        self._depth = 0
        self._in_string = False
        self._is_scalar: bool | None = None

    def scan(self, text: str, at: int, last: bool) -> int:
        """Return the index up to which `text[at:]`, the next part, belongs to the value.

        The end tag outside of strings ends a value; less than a tag or an escape waits.
        """
        if self._is_scalar is None:
            self._is_scalar = text[at] not in '"{['
        if self._is_scalar:
            found = _AFTER_SCALAR.search(text, at)
            self.is_complete = found is not None
            return found.start() if found else len(text)
        while at < len(text) and not self.is_complete:
            if self._in_string:
                at = _STRING.match(text, at).end()  # type: ignore[union-attr]  # matches always
                if text[at : at + 1] != '"':
                    return at
                self._in_string = False
            else:
                found = _STRUCTURE.search(text, at)
                if found is None:
                    return len(text)
                at = found.start()
                if found[0] == "<":
                    self.is_complete = text.startswith(self._end_tag, at)
                    if self.is_complete or (self._end_tag.startswith(text[at:]) and not last):
                        return at
                self._in_string = found[0] == '"'
                self._depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found[0], 0)
            at += 1
            self.is_complete = self._depth <= 0 and not self._in_string
        return at
