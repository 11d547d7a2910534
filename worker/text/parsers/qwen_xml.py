"""`<function=F><parameter=P>VALUE</parameter></function>` in `<tool_call>`: calls of Qwen3-Coder.

The arguments are published as a JSON object that the parser builds: a string as it comes, a value
of another type (by the job's tools) when it is complete. One newline at each end of a value and
newlines next to the marks are markup.

| odd | published |
| --- | --- |
| `<tool_call>` or its end is missing, several functions in one | the calls |
| `</parameter>` or `</function>` is missing | the next parameter, function or end closes it |
| white space inside tags, no `>` after a name | as without the oddity |
| a value with the end tags inside | the tags are text, unless further tags or the end follow |
| `<tool_call>` without a function | the text from it on, as final |
| text between the parameters | as final |
| a JSON object in place of the parameters | as the arguments |
| the answer ends in a value or a tag | the object without an end |
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from worker.text.parsers.interface import Piece, Place, TextParser
from worker.text.parsers.json_value import JsonValue
from worker.text.parsers.tool_schema import STRING, json_string, json_value, parameter_types

_MAX_NAME = 256
_MAX_TAG = 40

# White space in tags is bounded, so that less than a tag is never longer than _MAX_TAG.
_OPEN_CALL = re.compile(r"<\s{0,3}tool_call\s{0,3}>")
_OPEN = re.compile(rf"{_OPEN_CALL.pattern}|<\s{{0,3}}function\s{{0,3}}=")
_CLOSE_CALL = re.compile(r"<\s{0,3}/\s{0,3}tool_call\s{0,3}>")
_CLOSE_FUNCTION = re.compile(r"<\s{0,3}/\s{0,3}function\s{0,3}(?:>|(?=<))")
_NAME_END = r"[ \t]{0,3}(?:>|(?=[\n<]))"
_FUNCTION = re.compile(rf"<\s{{0,3}}function\s{{0,3}}=[ \t]{{0,3}}([^\s<>]{{1,{_MAX_NAME}}}){_NAME_END}")
_PARAMETER = re.compile(
    rf"<\s{{0,3}}parameter\s{{0,3}}=[ \t]{{0,3}}([^\s<>](?:[^\n<>]{{0,{_MAX_NAME}}}[^\s<>])?){_NAME_END}"
)
_NAME_SO_FAR = re.compile(rf"<\s{{0,3}}(?:function|parameter)\s{{0,3}}=[^\n<>]{{0,{_MAX_NAME + 20}}}")
_IN_VALUE = re.compile(r"<\s{0,3}(?:/\s{0,3}(parameter|function|tool_call)\s{0,3}>|parameter\s{0,3}=)")
_AFTER_FUNCTION = re.compile(rf"{_OPEN.pattern}|{_CLOSE_CALL.pattern}")
_AFTER_VALUE = re.compile(rf"{_AFTER_FUNCTION.pattern}|{_CLOSE_FUNCTION.pattern}|<\s{{0,3}}parameter\s{{0,3}}=")
_TAGS = ("<tool_call>", "<function=", "</tool_call>", "</function>", "<parameter=", "</parameter>")
_OPENING = _TAGS[:2]


class QwenXmlParser(TextParser):
    """Parser of text with calls of the job's `tools`."""

    marks: tuple[str, ...] = ("<tool_call>", "</tool_call>")

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(self._text)
        self._tools = tools
        self._calls = 0
        self._types: Mapping[str, frozenset[str]] = {}
        self._type = STRING
        self._is_new = self._has_parameters = False
        self._json: JsonValue | None = None
        self._scanned = 0

    def flush(self) -> list[Piece]:
        """Return the withheld text, at the end of the answer."""
        pieces = super().flush()
        if self._state == self._in_function:
            self._end_function()
        return pieces + self._advance(last=True)

    def _text(self, last: bool) -> bool:
        if start := _OPEN.search(self._held):
            self._publish_before(start.start())
            self._state = self._call
            return True
        withheld = _partial_tag(self._held, _OPENING)
        self._publish_all_but(withheld, last)
        return False

    def _call(self, last: bool) -> bool:
        """At `<tool_call>` or `<function=`."""
        call = _OPEN_CALL.match(self._held)
        at = call.end() if call else 0
        rest = self._held[at:].lstrip()
        if function := _FUNCTION.match(rest):
            self._held = rest[function.end() :]
            self._begin_function(function[1])
            return True
        is_open = not rest or _partial_tag(rest, _OPENING[1:]) == len(rest) or _NAME_SO_FAR.fullmatch(rest)
        if is_open and not last:
            return False
        self._publish(self._take(at or 1))
        self._state = self._text
        return True

    def _begin_function(self, name: str) -> None:
        self.place = Place("tool", f"functions.{name}", self._calls)
        self._calls += 1
        self._types = parameter_types(self._tools, name)
        self._has_parameters, self._json, self._is_new = False, None, True
        self._state = self._in_function

    def _end_function(self) -> None:
        if self._json is None:
            self._publish("}" if self._has_parameters else "{}")
        self.place = Place("final")
        self._state = self._after_function

    def _in_function(self, last: bool) -> bool:
        """Before a parameter or the function's end."""
        rest = self._held.lstrip()
        if not rest:
            return False
        if parameter := _PARAMETER.match(rest):
            self._held = rest[parameter.end() :]
            self._begin_value(parameter[1])
        elif end := _CLOSE_FUNCTION.match(rest):
            self._held = rest[end.end() :]
            self._end_function()
        elif _AFTER_FUNCTION.match(rest):
            self._end_function()
        elif rest.startswith("{") and self._is_new:
            self._held, self._json, self._is_new = rest, JsonValue("</function>"), False
            self._state = self._in_json
        elif _partial_tag(rest, _TAGS) == len(rest) or _NAME_SO_FAR.fullmatch(rest):
            return last and self._cut_off(rest)
        else:
            self._publish_between(len(self._held) - len(rest))
        return True

    def _in_json(self, last: bool) -> bool:
        """In arguments that are a JSON object."""
        assert self._json is not None
        end = self._json.scan(self._held, 0, last)
        self._publish(self._take(len(self._held) if last and not self._json.is_complete else end))
        self._state = self._in_function if self._json.is_complete else self._in_json
        return self._json.is_complete

    def _cut_off(self, rest: str) -> bool:
        """At the end of the answer: a closing tag closes, another one leaves the object open."""
        self._held = ""
        if rest.startswith("</"):
            self._end_function()
        else:
            self._publish("" if self._has_parameters or self._json else "{")
            self.place = Place("final")
            self._publish(rest)
            self._state = self._text
        return False

    def _publish_between(self, at: int) -> None:
        """Publish text that is no tag, from `at` to the next tag, as final."""
        self._is_new = False
        next_tag = self._held.find("<", at + 1)
        text = (self._held if next_tag < 0 else self._held[:next_tag]).rstrip()
        self._pieces.append((Place("final"), self._take(len(text))))

    def _begin_value(self, name: str) -> None:
        self._type, self._scanned = self._types.get(name, STRING), 0
        quote = '"' if self._type == STRING else ""
        self._publish(f"{', ' if self._has_parameters else '{'}{json_string(name)}: {quote}")
        self._has_parameters, self._is_new = True, False
        self._state = self._before_value

    def _before_value(self, last: bool) -> bool:
        self._held = self._held.removeprefix("\n")
        self._state = self._in_value
        return True

    def _in_value(self, last: bool) -> bool:
        while tag := _IN_VALUE.search(self._held, self._scanned):
            ends = self._ends_value(tag, last)
            if ends:
                self._end_value(tag.start(), tag.end() if tag[1] == "parameter" else tag.start())
                return True
            if ends is None:
                self._stream_value(tag.start())
                return False
            self._scanned = tag.end()
        if last:
            value = self._take(len(self._held))
            self._publish(json_string(value)[1:-1] if self._type == STRING else json_value(value, self._type))
        else:
            self._stream_value(len(self._held) - _partial_tag(self._held, _TAGS))
        return False

    def _ends_value(self, tag: re.Match[str], last: bool) -> bool | None:
        """Whether a tag in a value ends it; None if that depends on the text that follows."""
        if tag[1] is None:
            following, expected = self._held[tag.start() :], _PARAMETER
            is_open = _NAME_SO_FAR.fullmatch(following) is not None
        else:
            following = self._held[tag.end() :].lstrip()
            expected = _AFTER_VALUE if tag[1] == "parameter" else _AFTER_FUNCTION
            is_open = not following or _partial_tag(following, _TAGS) == len(following)
        if expected.match(following):
            return True
        return (last or None) if is_open else False

    def _stream_value(self, end: int) -> None:
        """Publish a string up to `end`, without a newline there; values of other types wait."""
        self._scanned = end
        if self._type == STRING:
            text = self._take(end - self._held[:end].endswith("\n"))
            self._publish(json_string(text)[1:-1])
            self._scanned -= len(text)

    def _end_value(self, end: int, next_at: int) -> None:
        value = self._take(next_at)[:end].removesuffix("\n")
        self._publish(json_string(value)[1:] if self._type == STRING else json_value(value, self._type))
        self._state = self._in_function

    def _after_function(self, last: bool) -> bool:
        rest = self._held.lstrip()
        if close := _CLOSE_CALL.match(rest):
            self._held = rest[close.end() :]
            self._state = self._after_markup
        elif not rest or _partial_tag(rest, ("</tool_call>", *_OPENING)) == len(rest):
            self._held = "" if last else self._held
            return False
        elif _OPEN.match(rest):
            self._held = rest
            self._state = self._call
        else:
            self._state = self._after_markup
        return True


def _partial_tag(text: str, tags: Sequence[str]) -> int:
    """Return the length of the end of `text` that may become one of the tags, with white space."""
    at = text.rfind("<", max(0, len(text) - _MAX_TAG))
    if at < 0:
        return 0
    tail = "".join(text[at:].split())
    return len(text) - at if any(tag.startswith(tail) and tag != tail for tag in tags) else 0
