"""`<|channel>thought…<channel|>` and `<|tool_call>call:F{…}<tool_call|>`: Gemma 4's answers.

Source: "Gemma 4 Prompt Formatting" (ai.google.dev) and the chat template of google/gemma-4-31B-it.
Text in a channel is reasoning, without the channel's name; the template removes both marks of a
channel from earlier turns wherever they are, and so does the parser from text. Arguments are
published as JSON that the parser builds, strings as they come:

    {key:<|"|>text<|"|>,n:5,list:[true,{k:null}]}    →    {"key": "text", "n": 5, "list": […]}

| odd | published |
| --- | --- |
| `<channel|>` is missing | all as reasoning, up to a call |
| `<|tool_call>` without `call:`, a name and a brace | the text from it on, as final |
| keys in `<|"|>`, strings in `"`, values None and True | as without the oddity |
| a value of another form, without quotes | a string |
| no value after a key | null |
| no `<|"|>` after a text | the rest of the answer as part of it |
| text without a key, a closing bracket too many | as final |
| closing brackets are missing before `<tool_call|>` | the object with them |
| the answer ends in the arguments | the object without an end |
"""

import re
from collections.abc import Sequence

from worker.text.parsers.interface import Place, TextParser, partial_mark
from worker.text.parsers.json_value import JsonValue
from worker.text.parsers.think import opens_reasoning
from worker.text.parsers.tool_schema import json_string, json_value
from worker.text.tokenizer import Tokenizer

OPEN, CLOSE = "<|channel>", "<channel|>"
CALL, CALL_END = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'

# White space is bounded, so that less than a name is never longer than the patterns `_SO_FAR`.
_NAME = re.compile(r"thought(?:\n|(?=<channel\|>)|\Z)")
_CALL = re.compile(r"<\|tool_call>\s{0,8}call:\s{0,8}([^\s{}<>]{1,256})\s{0,8}\{")
_CALL_SO_FAR = re.compile(r"<\|tool_call>\s{0,8}(?:c|ca|cal|call|call:\s{0,8}[^\s{}<>]{0,256}\s{0,8})?")
_IN_KEY = r"[^:,{}\[\]\n]"
_KEYS = (
    rf'<\|"\|>({_IN_KEY}{{0,256}}?)<\|"\|>',
    r'"([^"\\]{0,256})"',
    r'([^\s:,{}\[\]<"][^:,{}\[\]<"\n]{0,255})',
)
_KEY = re.compile(rf"(?:{'|'.join(_KEYS)})[ \t]{{0,8}}:")
_KEY_SO_FAR = re.compile(
    rf"""<\|"\|>{_IN_KEY}{{0,269}}|"[^"\\]{{0,256}}(?:"[ \t]{{0,8}})?|[^:,{{}}\[\]<"\n]{{0,264}}"""
)
_BARE_END = re.compile(r'[,}\]]|<tool_call\|>|<\|"\|>')
_SCALARS = frozenset(("null", "boolean", "number", "integer"))


class Gemma4Parser(TextParser):
    """Parser of channels and, with `calls`, of tool calls.

    `opened`: the prompt ends in a channel. `structured`: the content follows a grammar; channels
    and calls are only before it.
    """

    def __init__(self, *, opened: bool, calls: bool, structured: bool = False) -> None:
        super().__init__(self._start if structured else self._text)
        self.marks = (OPEN, CLOSE, *((CALL, CALL_END, QUOTE) if calls else ()))
        self._opening = (OPEN, CALL) if calls else (OPEN,)
        self._calls = 0
        self._open: list[str] = []
        """The closing brackets of the arguments' objects and lists that are open."""
        self._follows_item = False
        self._json = JsonValue(CALL_END)
        self._scanned = 0
        if opened:
            self.place, self._state = Place("reasoning"), self._channel

    def _start(self, last: bool) -> bool:
        """Before structured content: white space, then a mark or the content."""
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._held = text
            return self._begin_channel()
        if CALL in self._opening and text.startswith(CALL):
            self._held, self._state, self._first_state = text, self._call, self._text
            return True
        if not last and any(mark.startswith(text) for mark in self._opening):
            return False
        self._state = self._content
        return True

    def _content(self, last: bool) -> bool:
        self._publish(self._take(len(self._held)))
        return False

    def _text(self, last: bool) -> bool:
        mark = self._publish_to_mark((*self._opening, CLOSE), last)
        if mark == OPEN:
            return self._begin_channel()
        if mark == CLOSE:
            self._take(len(CLOSE))
            self._state = self._after_markup
        elif mark == CALL:
            self._state = self._call
        return mark is not None

    def _publish_to_mark(self, marks: Sequence[str], last: bool) -> str | None:
        """Publish the text before the first mark and return the mark, which is not removed.

        Without one, publish what can't become a mark, and return None.
        """
        found = [(at, mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if not found:
            self._publish_all_but(partial_mark(self._held, marks), last)
            return None
        at, mark = min(found)
        self._publish_before(at)
        return mark

    def _begin_channel(self) -> bool:
        self._take(len(OPEN))
        self.place, self._state = Place("reasoning"), self._channel
        return True

    def _channel(self, last: bool) -> bool:
        """After `<|channel>`: the channel's name and newlines; a model may repeat the mark."""
        if self._held.startswith(OPEN):
            return self._begin_channel()
        if not last and any(mark.startswith(self._held) for mark in (OPEN, "thought\n", f"thought{CLOSE}")):
            return False
        name = _NAME.match(self._held)
        self._take(name.end() if name else 0)
        self._state = self._before_reasoning
        return True

    def _before_reasoning(self, last: bool) -> bool:
        self._held = self._held.lstrip("\n")
        self._state = self._reasoning if self._held else self._before_reasoning
        return bool(self._held)

    def _reasoning(self, last: bool) -> bool:
        mark = self._publish_to_mark((CLOSE, f"{CALL}call:") if CALL in self._opening else (CLOSE,), last)
        if mark is None:
            return False
        self.place = Place("final")
        if mark == CLOSE:
            self._take(len(CLOSE))
            self._state = self._after_markup
        else:
            self._state, self._first_state = self._call, self._text
        return True

    def _call(self, last: bool) -> bool:
        """At `<|tool_call>`."""
        if call := _CALL.match(self._held):
            self._take(call.end())
            self.place = Place("tool", f"functions.{call[1]}", self._calls)
            self._calls += 1
            self._begin("{")
            return True
        if _CALL_SO_FAR.fullmatch(self._held) and not last:
            return False
        self._publish(self._take(len(CALL)))
        self._state = self._text
        return True

    def _begin(self, bracket: str) -> None:
        """Publish the bracket of an object or a list."""
        self._publish(bracket)
        self._open.append("}" if bracket == "{" else "]")
        self._follows_item, self._state = False, self._arguments

    def _separator(self) -> str:
        separator, self._follows_item = ", " if self._follows_item else "", True
        return separator

    def _arguments(self, last: bool) -> bool:
        """Before an item of the innermost object or list, or its end."""
        self._held = self._held.lstrip()
        if not self._held:
            return False
        first = self._held[0]
        if self._held.startswith(CALL_END):
            self._close(self._open[0], missing=True)
        elif not last and any(mark.startswith(self._held) for mark in (CALL_END, QUOTE)):
            return False
        elif first in self._open:
            self._take(1)
            self._close(first)
        elif first == ",":
            self._take(1)
        elif self._open[-1] == "}":
            return self._key(last)
        else:
            self._publish(self._separator())
            self._state = self._value
        return True

    def _key(self, last: bool) -> bool:
        if key := _KEY.match(self._held):
            self._take(key.end())
            name = next(name for name in key.groups() if name is not None)
            self._publish(f"{self._separator()}{json_string(name.strip())}: ")
            self._state = self._value
            return True
        if _KEY_SO_FAR.fullmatch(self._held) and not last:
            return False
        so_far = _KEY_SO_FAR.match(self._held)
        self._pieces.append((Place("final"), self._take(so_far.end() if so_far and so_far[0] else 1)))
        return True

    def _value(self, last: bool) -> bool:
        self._held = self._held.lstrip()
        if not self._held:
            return False
        self._scanned = 0
        if self._held.startswith(QUOTE):
            self._take(len(QUOTE))
            self._publish('"')
            self._state = self._string
        elif not last and QUOTE.startswith(self._held):
            return False
        elif self._held[0] in "{[":
            self._begin(self._take(1))
        elif self._held[0] == '"':
            self._json, self._state = JsonValue(CALL_END), self._json_string
        else:
            self._state = self._bare
        return True

    def _string(self, last: bool) -> bool:
        end = self._held.find(QUOTE)
        withheld = 0 if last else partial_mark(self._held, (QUOTE,))
        self._publish(json_string(self._take(end if end >= 0 else len(self._held) - withheld))[1:-1])
        if end >= 0:
            self._take(len(QUOTE))
            self._publish('"')
            self._state = self._arguments
        return end >= 0

    def _json_string(self, last: bool) -> bool:
        self._publish(self._take(self._json.scan(self._held, 0, last)))
        self._state = self._arguments if self._json.is_complete else self._json_string
        return self._json.is_complete

    def _bare(self, last: bool) -> bool:
        """In a value without quotes: a number, a word, or a string whose quotes are missing."""
        end = _BARE_END.search(self._held, self._scanned)
        if end is None and not last:
            self._scanned = max(0, len(self._held) - len(CALL_END))
            return False
        text = self._take(end.start() if end else len(self._held)).rstrip()
        self._publish(json_value(text, _SCALARS) if text else "null")
        self._state = self._arguments
        return True

    def _close(self, bracket: str, *, missing: bool = False) -> None:
        """Close the objects and lists up to the one with this closing bracket; `missing`: all."""
        while self._open:
            closed = self._open.pop()
            self._publish(closed)
            if closed == bracket and not missing:
                break
        self._follows_item = True
        if not self._open:
            self.place, self._state = Place("final"), self._after_arguments

    def _after_arguments(self, last: bool) -> bool:
        rest = self._held.lstrip()
        if rest.startswith(CALL_END):
            self._held = rest.removeprefix(CALL_END)
            self._state = self._after_markup
        elif rest.startswith(("}", "]")):
            self._held = rest[1:]
        elif CALL_END.startswith(rest):  # at the end of the answer, markup that is cut off
            return False
        else:
            self._state = self._after_markup
        return True


def opens_channel(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether the prompt's last turn has an open `<|channel>`; results of tools may name it."""
    return opens_reasoning(tokenizer, prompt_ids, OPEN, (CLOSE, "<tool_response|>"))
