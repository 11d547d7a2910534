"""`<tool_call>{"name": …, "arguments": {…}}</tool_call>`: calls of Hermes, Qwen2.5 and Qwen3.

The text of `arguments` (or `parameters`) is published as the model wrote it, as soon as the name is
known: a call whose name comes last is withheld until then. Other keys of the object and newlines
next to the marks are markup.

| odd | published |
| --- | --- |
| no JSON object with a name, or other keys in place of `arguments` | the text, as final |
| no `arguments` and no other keys | a call with `{}` |
| a closing brace or `</tool_call>` is missing, one brace too many | the call; later text is final |
| the arguments end in the middle | the call with what there is |
| several objects in one `<tool_call>` | several calls |
"""

import json
import re

from worker.text.parsers.interface import Place, TextParser, partial_mark
from worker.text.parsers.json_value import JsonValue

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_START = re.compile(r"(?:<tool_call>)?\s*\{")
_END = re.compile(r"\s*\}")
_KEY = re.compile(r'\s*(?:,\s*)?"((?:[^"\\]|\\.)*)"\s*:\s*(?=[^\s,:}\]<])')
_KEY_SO_FAR = re.compile(r'\s*(?:,\s*)?(?:"(?:[^"\\]|\\.)*(?:\\|"\s*:?\s*)?)?')
_ARGUMENTS = ("arguments", "parameters")
_ABOUT = ("name", "id", "type")


class HermesParser(TextParser):
    """Parser of text with calls. `_at` is the index in `_held` of what is not parsed yet."""

    marks: tuple[str, ...] = (_OPEN, _CLOSE)

    def __init__(self) -> None:
        super().__init__(self._text)
        self._calls = 0
        self._begin_object(0)

    def _begin_object(self, at: int) -> None:
        self._at = self._key_at = at
        self._key = ""
        self._value = JsonValue(_CLOSE)
        self._value_at = 0
        self._name: str | None = None
        self._early_arguments: str | None = None
        self._is_published = self._has_other_keys = False

    def _text(self, last: bool) -> bool:
        start = self._held.find(_OPEN)
        if start >= 0:
            self._publish_before(start)
            self._state = self._object
            return True
        withheld = partial_mark(self._held, (_OPEN,))
        self._publish_all_but(withheld, last)
        return False

    def _object(self, last: bool) -> bool:
        """At `<tool_call>`, or at the brace of a further object."""
        start = _START.match(self._held)
        self._begin_object(start.end() if start else 0)
        if start:
            self._state = self._in_object
            return True
        if self._held.removeprefix(_OPEN).strip() or last:
            return self._reject()
        return False

    def _in_object(self, last: bool) -> bool:
        """Before a key or the closing brace."""
        self._key_at = self._at
        if key := _KEY.match(self._held, self._at):
            self._key, self._value, self._at = key[1], JsonValue(_CLOSE), key.end()
            self._value_at = self._at
            self._state = self._in_value
            if self._key in _ARGUMENTS and self._is_published:
                return self._reject()
            if self._key in _ARGUMENTS and self._name is not None:
                self._publish_call("")
                self._state = self._arguments
            return True
        if end := _END.match(self._held, self._at):
            self._at = end.end()
            return self._end_object()
        rest = self._held[self._at :].lstrip()
        if self._is_published and rest.startswith((_OPEN, _CLOSE)):  # the brace is missing
            return self._end_object()
        is_open = _KEY_SO_FAR.fullmatch(self._held, self._at) or (self._is_published and _CLOSE.startswith(rest))
        return False if is_open and not last else self._reject()

    def _in_value(self, last: bool) -> bool:
        """In a value that is not published as it comes."""
        self._at = self._value.scan(self._held, self._at, last)
        if not self._value.is_complete:
            return self._reject() if last else False
        value = self._held[self._value_at : self._at]
        self._state = self._in_object
        if self._key == "name" and self._name is None:
            self._name = _string(value)
            if self._name is None:
                return self._reject()
            if self._early_arguments is not None:
                self._publish_call(self._early_arguments)
                self.place = Place("final")
        elif self._key in _ARGUMENTS:
            self._early_arguments = value
        elif self._key not in _ABOUT:
            self._has_other_keys = True
        return True

    def _arguments(self, last: bool) -> bool:
        end = self._value.scan(self._held, 0, last)
        self._publish(self._take(len(self._held) if last and not self._value.is_complete else end))
        if self._value.is_complete:
            self.place, self._state = Place("final"), self._in_object
        return self._value.is_complete

    def _end_object(self) -> bool:
        if not self._is_published:
            if self._name is None or self._has_other_keys:
                return self._reject()
            self._publish_call("{}")
            self.place = Place("final")
        self._take(self._at)
        self._state = self._after_object
        return True

    def _after_object(self, last: bool) -> bool:
        rest = self._held.lstrip()
        if rest.startswith(_CLOSE):
            self._held = rest.removeprefix(_CLOSE)
            self._state = self._after_markup
        elif rest.startswith("}"):
            self._held = rest[1:]
        elif rest.startswith("{"):
            self._held = rest
            self._state = self._object
        elif _CLOSE.startswith(rest):  # at the end of the answer, markup that is cut off
            return False
        else:
            self._state = self._after_markup
        return True

    def _publish_call(self, arguments: str) -> None:
        """Open the call's place, publish the first part of the arguments, drop the parsed text."""
        self.place = Place("tool", f"functions.{self._name}", self._calls)
        self._calls += 1
        self._publish(arguments)
        self._take(self._at)
        self._at, self._is_published = 0, True

    def _reject(self) -> bool:
        """Continue as text: what is no call, or what follows the arguments and is no key."""
        if self._is_published:
            self._take(self._key_at)
        else:
            self._publish(self._take(len(_OPEN) if self._held.startswith(_OPEN) else 1))
        self._state = self._text
        return True


def _string(value: str) -> str | None:
    """Return the value of a JSON string that is not empty and is Unicode."""
    try:
        text = json.loads(value, strict=False)
        return text if isinstance(text, str) and text.encode() else None
    except (ValueError, RecursionError):  # a lone surrogate is a ValueError
        return None
